"""Errors that end a run with a known exit code instead of a traceback."""


class ConfigError(ValueError):
    """Bad configuration, checkpoint or input (exit code 2).

    The message is one sentence that names the key, its value and the remedy.
    """


class OutputDiffers(ConfigError):
    """What is asked for, or its input, is not what `output.dir` holds; `what` differs, in a few words."""

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what or message


class Overtaken(Exception):
    """Another process has begun the same run from other input; this one looks at everything again."""


class SchemaDiffers(ConfigError):
    """A file has other columns than those before it."""


class RunFailed(RuntimeError):
    """The run cannot go on (exit code 1): a write failed, the disk is full, the device broke."""


class Interrupted(Exception):
    """A signal asked the run to stop; what is committed stays committed (exit code 75)."""
