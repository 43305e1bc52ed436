"""The configuration's schema: every group's keys, their types, defaults and the line `--help` shows.

These dataclasses are what Hydra composes into, so they are neither frozen nor used at run time
(`settings.py` is). `MISSING` marks a required key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.plan import ATTENTION, KV_DTYPES
from pipeline.quant.spec import KERNELS

RETRIES = (None, "failed")
COMPRESSIONS = ("zstd", "snappy", "gzip", "lz4", "none")
MISSING: Any = "???"

# Of keys that several launchers have.
PROCESSES = "that share the work; if null one (local), or one for each GPU of the cluster, else one (ray)"
CPUS = "cores of a task (slurm) or process (ray; an even share if null)"
SHARED = "the compute nodes see the same files, although they look like this machine's own"
MARGIN = "seconds before the end of its Slurm job at which a process stops and saves"


def doc(default: Any, text: str) -> Any:
    """A schema field: its default and the line that `--help` shows."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


@dataclass
class ModelSchema:
    path: str = doc(MISSING, "hub id or folder in the Hugging Face layout, weights in safetensors")
    revision: str | None = doc(None, "branch, tag or commit of the hub repository")
    dtype: str = doc("auto", "auto (the checkpoint's), bfloat16, float16 or float32")
    tokenizer: str | None = doc(None, "another folder or hub id to take the tokenizer from")
    hash_weights: bool = doc(False, "tell other weights by all of their bytes, not by samples of them")
    trust_remote_code: bool = doc(False, "run Python code that comes with the checkpoint")
    max_len: int | None = doc(None, "longest row in tokens, answer included; the model's own limit if null")
    device: str = doc("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N")
    adapter: str | None = doc(None, "PEFT LoRA adapter on top of the model: folder or hub id")
    adapter_revision: str | None = doc(None, "branch, tag or commit of the adapter's hub repository")
    memory: Any = doc("auto", "GiB of the device (of main memory on cpu) for weights and key/value cache, or auto")


@dataclass
class QuantSchema:
    method: str = MISSING


@dataclass
class QuantKernelSchema(QuantSchema):
    kernel: str = doc("auto", f"what runs the quantized weights: {', '.join(KERNELS)}")
    dequant_cache: Any = doc("auto", "GiB for weights kept dequantized (faster, same bits), off, or auto: what is left")


@dataclass
class QuantOperatorsSchema(QuantKernelSchema):
    tuning_cache: str | None = doc(None, "folder that kernel bitblas keeps compiled operators in; the user's if null")


@dataclass
class QuantBnbSchema(QuantKernelSchema):
    method: str = "bnb"
    double_quant: bool = doc(True, "quantize the block maxima as well (0.4 bits a weight less)")
    skip_modules: list[str] = doc([], "module names or paths that stay unquantized (the output head always does)")


@dataclass
class QuantInt8Schema(QuantKernelSchema):
    method: str = "bnb-int8"
    int8_threshold: float = doc(6.0, "activations this large are not quantized; 0: all are, and rows are independent")
    skip_modules: list[str] = doc([], "module names or paths that stay unquantized (the output head always does)")


@dataclass
class QuantGptqSchema(QuantKernelSchema):
    method: str = "gptq"
    bits: int | None = doc(None, "2, 3, 4 or 8: what the checkpoint has to have; what pipeline.quantize makes (4)")
    group_size: int | None = doc(None, "inputs that share a scale, -1 for all; as bits (128)")
    symmetric: bool | None = doc(None, "no zero points; as bits (true)")
    act_order: bool | None = doc(None, "inputs quantized in the order of their activations; as bits (false)")


@dataclass
class DataSchema:
    kind: str = MISSING
    path: Any = doc(MISSING, "file, folder, glob, fsspec URL, or list of these; data=hub: saved dataset or hub id")
    columns: list[str] | None = doc(None, "input columns to read; all if null")
    limit: int | None = doc(None, "only the first rows of the dataset")
    chunk_rows: int = doc(4096, "rows in a chunk, the unit of commit; fixed at the first run")
    storage_options: Any = doc({}, "what fsspec needs for URLs: endpoint, credentials, ...")


@dataclass
class DataParquetSchema(DataSchema):
    kind: str = "parquet"


@dataclass
class DataJsonlSchema(DataSchema):
    kind: str = "jsonl"


@dataclass
class DataHubSchema(DataSchema):
    kind: str = "hub"
    name: str | None = doc(None, "configuration of a hub dataset; its default one if null")
    split: str | None = doc(None, "split to read; needed where there are several")
    revision: str | None = doc(None, "branch, tag or commit of a hub dataset")


@dataclass
class TaskSchema:
    kind: str = MISSING
    prompt: str | None = doc(
        None, "Jinja template over the row's columns (sandboxed; \\n is a new line); {{ prompt }} if null"
    )
    prompt_file: str | None = doc(None, "file that holds the template, in place of task.prompt")
    messages: str | None = doc(None, "column with conversations (lists of role and content), in place of task.prompt")
    system: str | None = doc(None, "system message (chat models)")
    chat: Any = doc("auto", "use the tokenizer's chat template: auto (if it has one), true, false")
    chat_args: Any = doc({}, "map of further variables of the chat template")
    too_long: str = doc("error", "a prompt without room: error, truncate_left, truncate_right (of the row's own text)")


@dataclass
class TaskGenerateSchema(TaskSchema):
    kind: str = "generate"


@dataclass
class TaskLabelSchema(TaskSchema):
    kind: str = "label"
    labels: Any = doc(MISSING, "list of labels, map of label to the text that stands for it, or a column of lists")
    label_separator: str | None = doc(None, "text between prompt and label; nothing in a chat, else one space, if null")
    label_eos: Any = doc("auto", "score the end of the answer too: auto (if one label begins another), true, false")
    abstain_below: float = doc(0.0, "no label where the best probability is lower")
    truth: str | None = doc(None, "column with the true label, for the accuracy")


@dataclass
class TaskScoreSchema(TaskSchema):
    kind: str = "score"
    target: str | None = doc(None, "column with the text to score behind the prompt; the prompt itself if null")
    prompt_logprob: bool = doc(False, "also a column prompt_logprob: of the prompt's tokens from the second one on")


@dataclass
class SamplingSchema:
    max_new_tokens: int = doc(128, "longest answer in tokens")
    temperature: float | None = doc(0.0, "0 is greedy; null is what the checkpoint says")
    top_k: int | None = doc(0, "draw among the k likeliest; 0 is off, null is what the checkpoint says")
    top_p: float | None = doc(1.0, "draw among the likeliest that reach this probability; 1 is off, null as above")
    min_p: float | None = doc(0.0, "drop tokens less likely than this share of the likeliest; 0 is off, null as above")
    repetition_penalty: float | None = doc(1.0, "divide the logits of seen tokens by this; 1 is off, null as above")
    stop: list[str] = doc([], "texts that end an answer and are not part of it")
    stop_token_ids: list[int] = doc([], "tokens that end an answer, besides the checkpoint's own")
    seed: int = doc(0, "seed of the draws")
    n: int = doc(1, "answers for each row; more than one give a column choices")
    logprobs: Any = doc(False, "columns token_ids and logprobs: false, true, or how many alternatives at every step")
    columns: Any = doc({}, "map of parameter to the column that holds it for each row")


@dataclass
class EngineSchema:
    slots: Any = doc("auto", "rows decoded together in the shortest length class, or auto")
    max_len: int | None = doc(None, "longest row in tokens the engine has room for; model.max_len if null")
    prefill_tokens: Any = doc("auto", "prompt tokens in one pass, or auto")
    share_prefix: Any = doc(
        True, "run what prompts begin with once: the template's own beginning; a number: also every so many tokens"
    )
    dedup: bool = doc(True, "run equal requests once")
    compile: Any = doc("auto", "decode steps as CUDA graphs: graphs, off, or auto: on CUDA, where they can be captured")
    kv_dtype: str = doc("auto", f"of cached keys and values: {', '.join(KV_DTYPES)}; auto is the model's dtype")
    attention: str = doc(
        "auto", f"kernel that reads the cache: {', '.join(ATTENTION)}; auto: triton on CUDA, numba on a CPU"
    )


@dataclass
class OutputSchema:
    dir: str = doc(MISSING, "folder or fsspec URL of results, stats and run.json; the same one again resumes")
    columns: list[str] | None = doc(None, "input columns to keep in the results; all if null")
    on_change: str = doc(
        "refuse",
        "settings or input that changed: refuse, or new (a version beside the old one: v0002/, v0003/, ...)",
    )
    compression: str = doc("zstd", f"of the results' Parquet: {', '.join(COMPRESSIONS)}")
    row_group_rows: int | None = doc(None, "rows in a row group of the results; a whole chunk if null")
    journal_s: float = doc(10.0, "a kill costs at most so many seconds of answers, besides the rows in flight")
    storage_options: Any = doc({}, "what fsspec needs for output.dir as a URL: endpoint, credentials, ...")


@dataclass
class ShardSchema:
    index: int | None = doc(None, "where this process starts, from 0; if null what Slurm says, else 0")
    count: int | None = doc(None, "processes that share the output; if null what Slurm says, else 1")
    wait_s: float = doc(
        0.0, "with nothing left to take, seconds to wait for chunks of others; those of the dead are taken"
    )


@dataclass
class LauncherSchema:
    kind: str = MISSING
    gpus: Any = doc(None, "local: a number or all, one process for each; slurm, ray: number for each task or process")
    lock: bool = doc(False, "end with 75 while another run with launcher.lock works on the output (for schedules)")


@dataclass
class LauncherLocalSchema(LauncherSchema):
    kind: str = "local"
    processes: int | None = doc(None, PROCESSES)
    margin_s: float = doc(60.0, MARGIN)


@dataclass
class LauncherSlurmSchema(LauncherSchema):
    kind: str = "slurm"
    tasks: int = doc(1, "tasks of the array")
    at_once: int | None = doc(None, "tasks that may run at the same time")
    time: str | None = doc(None, "time limit of a task, as sbatch --time takes it; the partition's if null")
    partition: str | None = doc(None, "partition of the tasks")
    account: str | None = doc(None, "account that pays")
    qos: str | None = doc(None, "quality of service")
    cpus: int | None = doc(None, CPUS)
    mem: str | None = doc(None, "memory of a task, as sbatch --mem takes it")
    requeues: int = doc(20, "how often a task may be put back in the queue")
    name: str = doc("pipeline", "name of the jobs")
    logs: str | None = doc(None, "folder of the jobs' logs; slurm/ in the output folder if null")
    options: list[str] = doc([], "further options of sbatch")
    shared: bool = doc(False, SHARED)
    network: bool = doc(False, "the compute nodes can fetch the model themselves")


@dataclass
class LauncherRaySchema(LauncherSchema):
    kind: str = "ray"
    processes: int | None = doc(None, PROCESSES)
    cpus: int | None = doc(None, CPUS)
    address: str | None = doc(
        None, "host:port of the cluster; if null RAY_ADDRESS, else the one on this machine, else a new one"
    )
    env: list[str] = doc([], "names of variables that the processes get from this environment")
    shared: bool = doc(False, SHARED)
    margin_s: float = doc(60.0, MARGIN)


@dataclass
class RootSchema:
    model: ModelSchema = MISSING
    quant: QuantSchema = MISSING
    data: DataSchema = MISSING
    task: TaskSchema = MISSING
    sampling: SamplingSchema = MISSING
    engine: EngineSchema = MISSING
    output: OutputSchema = MISSING
    launcher: LauncherSchema = MISSING
    shard: ShardSchema = field(default_factory=ShardSchema)
    retry: str | None = doc(None, "failed: answer the error rows of a run again; all other rows stay as they are")
    dry_run: bool = doc(False, "show the plan (files, rows, shapes, memory) without loading weights")
    max_error_rate: float = doc(1.0, "exit code 3 when a larger share of the rows are errors")


GROUP_SCHEMAS: Mapping[str, Mapping[str, type]] = {
    "model": {"base": ModelSchema},
    "quant": {
        "base": QuantSchema,
        "auto": QuantOperatorsSchema,
        "gptq": QuantGptqSchema,
        "bnb": QuantBnbSchema,
        "bnb-int8": QuantInt8Schema,
    },
    "data": {"parquet": DataParquetSchema, "jsonl": DataJsonlSchema, "hub": DataHubSchema},
    "task": {"generate": TaskGenerateSchema, "label": TaskLabelSchema, "score": TaskScoreSchema},
    "sampling": {"base": SamplingSchema},
    "engine": {"base": EngineSchema},
    "output": {"base": OutputSchema},
    "launcher": {"local": LauncherLocalSchema, "ray": LauncherRaySchema, "slurm": LauncherSlurmSchema},
}
