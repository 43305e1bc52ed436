"""The resolved configuration as frozen values: what `config.py` makes and every room reads.

Rooms that only need a part get that part: `quant.spec.QuantSettings` and `engine.plan.EngineSettings`
live with the code they steer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.plan import EngineSettings
from pipeline.launch.place import ALONE, Place
from pipeline.quant.spec import QuantSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The `model` group; `memory_gib` None is auto."""

    path: str
    revision: str | None = None
    dtype: str = "auto"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    hash_weights: bool = False
    max_len: int | None = None
    device: str = "auto"
    adapter: str | None = None
    adapter_revision: str | None = None
    memory_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The `data` group; `kind` is the choice (parquet, jsonl, hub). `name`, `split`, `revision` are hub's."""

    kind: str
    path: tuple[str, ...]
    columns: tuple[str, ...] | None = None
    limit: int | None = None
    chunk_rows: int = 4096
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """The `task` group; `kind` is the choice (generate, label, score).

    `prompt` is the template's text; it is not used with `messages`, a column of conversations. `labels`
    maps each label's name to its verbalizer (the text that stands for it), or is the name of a column
    that holds each row's list of labels. `label_eos` None is auto. `target` None scores the prompt itself.
    """

    kind: str
    prompt: str
    system: str | None = None
    messages: str | None = None
    chat: bool | None = None
    chat_args: Mapping[str, Any] = field(default_factory=dict)
    too_long: str = "error"
    labels: Mapping[str, str] | str | None = None
    label_separator: str | None = None
    label_eos: bool | None = None
    abstain_below: float = 0.0
    truth: str | None = None
    target: str | None = None
    prompt_logprob: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """The `sampling` group; None is what the checkpoint's generation_config.json says.

    `columns` maps a parameter to the column that holds it for each row. `logprobs` None is off here too.
    """

    max_new_tokens: int = 128
    temperature: float | None = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def token_columns(self) -> tuple[str, ...]:
        """The output columns of single tokens, if these settings ask for them."""
        return ("token_ids", "logprobs") if self.logprobs is not None or "logprobs" in self.columns else ()

    @property
    def choice_columns(self) -> tuple[str, ...]:
        """The output column of several answers, if these settings ask for them."""
        return ("choices",) if self.n > 1 or "n" in self.columns else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSettings:
    """The `output` group; `row_group_rows` None is one row group a Part.

    Answers are on the disk `journal_s` seconds after they are made.
    """

    dir: str
    on_change: str = "refuse"
    columns: tuple[str, ...] | None = None
    compression: str = "zstd"
    row_group_rows: int | None = None
    journal_s: float = 10.0
    storage_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """Where this process starts among `count`; it claims other shards' chunks only when its own are done.

    `wait_s` is how long it then waits for chunks that others hold, to take over those of the dead.
    """

    index: int = 0
    count: int = 1
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSettings:
    """`launcher=local`: one process, or several of this machine; `gpus` is a number or all, one process for each.

    `margin_s` is how long before the end of a Slurm job it stops, and `lock` keeps out other runs with `lock`.
    """

    processes: int | None = None
    gpus: int | str | None = None
    margin_s: float = 60.0
    lock: bool = False

    @property
    def alone(self) -> bool:
        """Whether this process does the work itself."""
        return self.gpus is None and (self.processes or 1) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSettings:
    """`launcher=slurm`: an array of tasks and a job that looks at what they did; None leaves a choice to Slurm.

    `gpus` None is one, or none with `model.device=cpu`. `options` are further options of sbatch. `shared` and
    `network` are what a user knows of the compute nodes and this machine cannot see.
    """

    tasks: int = 1
    at_once: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    mem: str | None = None
    requeues: int = 20
    name: str = "pipeline"
    logs: str | None = None
    lock: bool = False
    options: tuple[str, ...] = ()
    shared: bool = False
    network: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """`launcher=ray`: actors of a Ray cluster, each with a process; None is by what the cluster has.

    `address` None is Ray's own choice. `cpus` and `gpus` are what a process reserves, `env` the names of variables that
    it gets from here. `shared` is what a user knows of the nodes; `margin_s` and `lock` are as for `launcher=local`.
    """

    processes: int | None = None
    gpus: int | None = None
    cpus: int | None = None
    address: str | None = None
    env: tuple[str, ...] = ()
    shared: bool = False
    margin_s: float = 60.0
    lock: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run, resolved; `resolved` is the same as plain JSON values, for run.json and the stats.

    `retry` is "failed" where error rows are to be answered again.
    """

    model: ModelSettings
    quant: QuantSettings
    data: DataSettings
    task: TaskSettings
    sampling: SamplingSettings
    engine: EngineSettings
    output: OutputSettings
    shard: ShardSettings
    dry_run: bool
    max_error_rate: float
    resolved: Mapping[str, Any]
    launcher: LocalSettings | SlurmSettings | RaySettings = LocalSettings()
    place: Place = ALONE
    retry: str | None = None

    @property
    def on_request(self) -> tuple[str, ...]:
        """The output columns that are there only because they are asked for."""
        if self.task.kind == "generate":
            return (*self.sampling.token_columns, *self.sampling.choice_columns)
        if self.task.kind == "score":
            return (*self.sampling.token_columns, *(("prompt_logprob",) if self.task.prompt_logprob else ()))
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the commands beside the run read of the same keys; None is a group without its required keys."""

    model: ModelSettings
    quant: QuantSettings
    output: OutputSettings | None
    data: DataSettings | None
    task: TaskSettings | None
