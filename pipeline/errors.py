"""Errors that end a run with a known exit code instead of a traceback."""


class ConfigError(ValueError):
    """Bad configuration, checkpoint or input location (exit code 2).

    The message is one sentence that names the key, its value and the remedy.
    """


class RunFailed(RuntimeError):
    """The run cannot go on (exit code 1): a write failed, the disk is full, the device broke."""


class Interrupted(Exception):
    """A signal asked the run to stop; what is committed stays committed (exit code 75)."""
