"""The group `task`: template, conversation and labels, as frozen settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config_checks import auto_bool, between, map_of, one_of
from pipeline.errors import ConfigError
from pipeline.settings import TaskSettings

DEFAULT_PROMPT = "{{ prompt }}"
TOO_LONG = ("error", "truncate_left", "truncate_right")


def task_from(values: Mapping[str, Any]) -> TaskSettings:
    """The `task` group, with the text of its template; keys of other kinds of task keep their defaults."""
    label, score = (values["kind"] == kind for kind in ("label", "score"))
    return TaskSettings(
        kind=values["kind"],
        prompt=_template(values),
        messages=_messages(values),
        too_long=one_of("task.too_long", values["too_long"], TOO_LONG),
        system=values["system"],
        chat=auto_bool("task.chat", values["chat"]),
        chat_args=map_of("task.chat_args", values["chat_args"]),
        labels=_labels(values["labels"]) if label else None,
        label_separator=values["label_separator"] if label else None,
        label_eos=auto_bool("task.label_eos", values["label_eos"]) if label else None,
        abstain_below=between("task.abstain_below", values["abstain_below"], 0, 1) if label else 0.0,
        truth=values["truth"] if label else None,
        target=values["target"] if score else None,
        prompt_logprob=values["prompt_logprob"] if score else False,
    )


def _template(values: Mapping[str, Any]) -> str:
    """The template's text; a command line has no other way to write a new line than \\n."""
    prompt = values["prompt"]
    if values["prompt_file"] is None:
        if prompt is not None and not prompt.strip():
            raise ConfigError("task.prompt is empty; give a template, or a file that holds it as task.prompt_file")
        return DEFAULT_PROMPT if prompt is None else str(prompt).replace("\\n", "\n")
    if prompt is not None:
        raise ConfigError(
            f"task.prompt and task.prompt_file={values['prompt_file']} are both set; set one of them to null"
        )
    try:
        return Path(values["prompt_file"]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task.prompt_file={values['prompt_file']} cannot be read as UTF-8 text ({error})") from error


def _messages(values: Mapping[str, Any]) -> str | None:
    if values["messages"] is None:
        return None
    for key in ("prompt", "prompt_file"):
        if values[key] is not None:
            raise ConfigError(f"task.messages and task.{key} are both set; set one of them to null")
    if values["too_long"] != "error":
        raise ConfigError(
            f"task.too_long={values['too_long']} cuts the text of task.prompt; with task.messages it must be error"
        )
    return str(values["messages"])


def _labels(labels: Any) -> Mapping[str, str] | str:
    if isinstance(labels, str):
        return labels
    if not isinstance(labels, (list, dict)):
        raise ConfigError(f"task.labels must be a list of labels, a map of label to text, or a column, got {labels}")
    pairs = list(labels.items()) if isinstance(labels, dict) else [(label, label) for label in labels]
    for value in (part for pair in pairs for part in pair):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ConfigError(
                f"task.labels must hold texts, got {value}; quote words such as true, null and (in YAML) yes and no"
            )
    named = {str(name): str(text) for name, text in pairs}
    given = len(labels)
    if len(named) < 2 or len(named) != given or len(set(named.values())) != given or not all(named.values()):
        raise ConfigError(f"task.labels must be at least two different, non-empty labels, got {labels}")
    alike = sorted(name for name in named if sum(other.casefold() == name.casefold() for other in named) > 1)
    if alike:  # they become fields of a struct, and label_probs['no'] gives DuckDB the first of No and no
        raise ConfigError(
            f"task.labels has {', '.join(alike)}, which differ by case alone, so that DuckDB takes one for the other "
            "in label_probs; give them other names: {no: 'no', upper_no: 'No'}"
        )
    return named
