"""The configuration composed: with `__main__` the only Hydra and OmegaConf code.

Every group's keys are declared here, so that a key that does not exist is refused; the YAML files
under conf/ choose values. `load_config` turns command-line overrides into a frozen RunConfig.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config_schema import GROUP_SCHEMAS, RootSchema, ShardSchema
from pipeline.config_values import model_config_from, settings_from
from pipeline.errors import ConfigError
from pipeline.launch.place import ALONE, Place
from pipeline.redaction import BLANK, redacted, redacted_url
from pipeline.settings import ModelConfig, RunConfig

FIXED_BY_CHOICE = ("quant.method", "data.kind", "task.kind", "launcher.kind")
MAPS = ("task.labels", "task.chat_args", "sampling.columns", "data.storage_options", "output.storage_options")
"""Keys that can hold a map, which takes the place of the one before; Hydra by itself refuses or mixes them."""
OPEN_MAPS = ("task.chat_args.", "data.storage_options.", "sampling.columns.", "output.storage_options.")
"""Keys below which any name is taken."""
PACKAGE = Path(__file__).parent


def config_folder() -> Path:
    """conf/ inside an installed package, else beside it in a checkout."""
    return next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())


def register_schemas() -> None:
    """Store the schemas where conf/ finds them, and the resolver of files that the package ships."""
    store = ConfigStore.instance()
    store.store(name="root_schema", node=RootSchema)
    for group, schemas in GROUP_SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"{group}/schema", name=name, node=schema)
    OmegaConf.register_new_resolver("asset", lambda name: str(PACKAGE / "assets" / name), replace=True)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/ with overrides. Raises ConfigError."""
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        lines = [line for override in parsed for line in _hydra_lines(override)]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose("config", overrides=lines)
        OmegaConf.resolve(config)
        _refuse_added_keys(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, overrides)) from error
    return config


def _hydra_lines(override: Override) -> list[str]:
    """What Hydra is given for an override, after refusing what it would ignore or stumble over."""
    key, line = override.key_or_group, str(override.input_line)
    shown = _shown(line)
    group = re.split(r"[./]", key)[0]
    if not key:
        raise ConfigError(f"{shown} names no key; a setting is written key=value")
    if key in FIXED_BY_CHOICE:
        raise ConfigError(f"{key} is set by the choice of its group; use {group}=... instead")
    if group == "hydra":
        raise ConfigError(_unknown_key(key))
    if override.is_delete():
        raise ConfigError(f"{shown} would delete a key, which is not possible; set {key} to a value or to null")
    if override.is_sweep_override():
        raise ConfigError(
            f"{shown} has several values for {key}; a list is written {key}=[a,b], and a text with commas is quoted "
            f"twice, as in '{key}=\"a,b\"'"
        )
    if key in group_names() and not isinstance(override.value(), str):
        raise ConfigError(
            f"{shown} names no choice; {key} can be {', '.join(choices(key))}, and its keys are set one by one"
        )
    if key in MAPS and isinstance(override.value(), dict):
        return [f"{key}=null", line]
    return [f"++{line.lstrip('+')}"] if key.startswith(OPEN_MAPS) else [line]


def _refuse_added_keys(config: DictConfig) -> None:
    """A key added with + passes Hydra even where the schema lacks it."""
    added = [str(key) for key in config if key != "experiment" and key not in {f.name for f in fields(RootSchema)}]
    for group, schemas in GROUP_SCHEMAS.items():
        schema = next((s for s in schemas.values() if OmegaConf.get_type(config[group]) is s), None)
        if schema is not None:
            added += [f"{group}.{key}" for key in config[group] if key not in {f.name for f in fields(schema)}]
    if added:
        raise ConfigError(_unknown_key(added[0]))


def load_config(overrides: Sequence[str], place: Place = ALONE) -> RunConfig:
    """From command-line overrides to a validated RunConfig; an empty command line is the demo.

    Raises ConfigError with one sentence.
    """
    config = compose_config(overrides or ["experiment=demo"])
    _require(config, [str(group) for group in config])
    return settings_from(_values(config), place)


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides alone say, as maps in maps; raises ConfigError."""
    said: dict[str, Any] = {}
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            said = _merged(said, _nested(override.key_or_group, override.value()))
        values = OmegaConf.to_container(OmegaConf.create(said), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, overrides)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def stored_config(
    stored: Mapping[str, Any], fingerprint: Mapping[str, Any], output_dir: str, overrides: Sequence[str]
) -> RunConfig:
    """The configuration in a run.json, as changed by overrides; raises ConfigError.

    Credentials, which are blanked there, are left out, the prompt is that of the fingerprint, whatever has become of
    its file, and keys that are newer than the run have their defaults.
    """
    values = {**_with_defaults(_without_blanks(stored)), "dry_run": False, "max_error_rate": 1.0}
    values["task"] = {**values["task"], "prompt": None, "prompt_file": None}
    values["output"] = {**values["output"], "dir": output_dir, "on_change": "refuse"}
    values["shard"] = {"index": 0, "count": 1, "wait_s": 0.0}
    run = settings_from(_merged(values, override_values(overrides)), ALONE)
    return replace(run, task=replace(run.task, prompt=fingerprint["task.prompt"]))


def _without_blanks(values: Mapping[str, Any]) -> dict[str, Any]:
    """Maps without the entries that were blanked as credentials."""
    return {
        key: _without_blanks(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != BLANK
    }


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Groups with the keys that their schema has and they lack."""
    complete = dict(values)
    for group, schemas in GROUP_SCHEMAS.items():
        own = complete[group]
        schema = schemas.get(own.get("kind", own.get("method", "base")), schemas.get("base"))
        known = {} if schema is None else OmegaConf.to_container(OmegaConf.structured(schema))
        assert isinstance(known, dict)
        complete[group] = {**known, **own}
    return complete


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Maps in maps, with the changes put into them."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return merged


def load_model_config(overrides: Sequence[str], required: Sequence[str]) -> ModelConfig:
    """The same for a command beside the run, which needs the groups `required` to be complete."""
    config = compose_config(overrides)
    _require(config, required)
    incomplete = {str(key).split(".")[0] for key in OmegaConf.missing_keys(config)}
    return model_config_from({key: value for key, value in _values(config).items() if key not in incomplete})


def _require(config: DictConfig, groups: Sequence[str]) -> None:
    missing = sorted(key for key in map(str, OmegaConf.missing_keys(config)) if key.split(".")[0] in groups)
    if missing:
        raise ConfigError(f"{missing[0]} is required and not set; add {missing[0]}=... to the command line")


def _values(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    values.pop("experiment", None)
    return {str(key): value for key, value in values.items()}


def credentials_in(overrides: Sequence[str]) -> list[str]:
    """The keys of overrides that hold a credential themselves, not a reference to where it is kept (`${...}`)."""
    parsed = OverridesParser.create().parse_overrides([o for o in overrides if "${" not in o])
    return [
        override.key_or_group
        for override in parsed
        if (values := _nested(override.key_or_group, override.value())) != redacted(values)
    ]


def refuse_credentials(overrides: Sequence[str], where: str) -> None:
    """Raise ConfigError for the first override that would show a credential in a place that others see."""
    for key in credentials_in(overrides):
        raise ConfigError(f"{key} would be seen in {where}; leave it to the environment, as in {key}=${{oc.env:NAME}}")


def _nested(key: str, value: Any) -> Any:
    """A dotted key as maps in maps, texts without the parser's quotes."""
    plain = OmegaConf.to_container(
        OmegaConf.create({"value": str(value) if isinstance(value, QuotedString) else value})
    )
    assert isinstance(plain, dict)
    inner = plain["value"]
    for name in reversed(key.split(".")):
        inner = {name: inner}
    return inner


def choices(group: str) -> list[str]:
    """The choices of a group: the YAML files under conf/."""
    return sorted(p.stem for p in (config_folder() / group).glob("*.yaml"))


def group_names() -> list[str]:
    """All groups: the folders under conf/."""
    return sorted(p.name for p in config_folder().iterdir() if p.is_dir())


def schema_keys() -> dict[str, str]:
    """Every key with the line that documents it."""
    keys: dict[str, str] = {}
    for group, schemas in GROUP_SCHEMAS.items():
        for schema in schemas.values():
            keys |= _keys_of(group, schema)
    keys |= _keys_of("shard", ShardSchema)
    return keys | {f.name: f.metadata["doc"] for f in fields(RootSchema) if "doc" in f.metadata}


def _keys_of(group: str, schema: type) -> dict[str, str]:
    return {f"{group}.{f.name}": f.metadata["doc"] for f in fields(schema) if "doc" in f.metadata}


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's and OmegaConf's messages as one sentence with key, value and remedy."""
    text, cause = str(error), str(error.__cause__ or "")
    if "nterpolation" in text:
        named = next((_shown(override) for override in overrides if "${" in override), "the configuration")
        return f"{named} refers to what is not there ({_first_line(text)}); write \\${{ for the characters themselves"
    if isinstance(error, OverrideParseException):
        shown = _shown(str(error.override))
        why = f" ({_first_line(cause or text)})" if BLANK not in shown else ""
        return (
            f"{shown} cannot be parsed{why}; quote a value with braces, commas or "
            "spaces twice, as in 'task.prompt=\"Label {{ text }}\"', or use task.prompt_file"
        )
    match = re.search(r"Could not find '([^'/]+)/([^']+)'", text)
    if match:
        return f"{match[1]}={match[2]} is no choice; {match[1]} can be {', '.join(choices(match[1]))}"
    match = re.search(r"An item is already at '([^']+)'", text)
    if match:
        return f"{match[1]} is a key already; write {match[1]}=... without the +"
    match = re.search(r"full_key: (\S+)", f"{text}\n{cause}")
    unknown = re.search(r"Key '[^']*' (?:is )?not in ", text + cause)
    if match and not unknown:
        return f"{match[1]}: {_first_line(cause or text)}"
    match = re.search(r"Could not override '?([\w.@/-]+)'?", text)
    return _unknown_key(match[1]) if match else _first_line(text)


def _shown(override: str) -> str:
    """An override without credentials: any value of storage options may be one."""
    key, equals, _ = override.partition("=")
    return f"{key}{equals}{BLANK}" if "storage_options" in key else redacted_url(override)


def _unknown_key(key: str) -> str:
    """The sentence for a key that the chosen configuration does not have."""
    group = key.split(".")[0]
    owners = [n for n, schema in GROUP_SCHEMAS.get(group, {}).items() if key in _keys_of(group, schema)]
    if owners:
        return f"{key} is no key of the chosen {group}; it belongs to {' and '.join(f'{group}={n}' for n in owners)}"
    return f"{key} is no key of the configuration{_suggestion(key)}"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "the configuration cannot be composed"


def _suggestion(key: str) -> str:
    known = list(schema_keys()) if "." in key else [*group_names(), *(k for k in schema_keys() if "." not in k)]
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    group = key.split(".")[0]
    inside = [k.split(".", 1)[1] for k in schema_keys() if k.startswith(f"{group}.")]
    return f"; {group} has {', '.join(inside)}" if inside else "; python -m pipeline --help lists the keys"
