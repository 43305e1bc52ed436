"""`python -m pipeline.quantize`: what it writes against transformers' own, and against quantizing in flight."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TICKETS, TINY, Ended, call, environment, label_args, prompt, results, run_here, wait_for
from oracle import QUANTS, oracle_logits, pass_logits, random_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.kernels.bnb import bitsandbytes
from pipeline.models.checkpoint import open_checkpoint
from pipeline.models.shards import ShardWriter, entry_bytes
from pipeline.quantize import main

CHOICES = {
    "nf4": ["quant=bnb"],
    "nf4-single": ["quant=bnb", "quant.double_quant=false"],
    "fp4": ["quant=bnb-fp4"],
    "int8": ["quant=bnb-int8"],
    "int8-plain": ["quant=bnb-int8", "quant.int8_threshold=0"],
}
MODELS = ("llama", "llama-tied", "llama-biases", "qwen2", "phi3")
each_quant = pytest.mark.parametrize("quant", CHOICES)
Written = Callable[..., Path]


def quantize(*arguments: str) -> Ended:
    return call(main, *arguments)


@pytest.fixture(scope="module")
def written(checkpoint_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Name, quantization and dtype to the folder that the command has written."""

    @cache
    def write(name: str, quant: str, dtype: str = "bfloat16", *more: str) -> Path:
        folder = tmp_path_factory.mktemp("written") / f"{name}-{quant}"
        source = ["model=path", f"model.path={checkpoint_folder(name)}", f"model.dtype={dtype}"]
        quantize(*source, *CHOICES[quant], f"output.dir={folder}", *more).done()
        return folder

    return write


@pytest.fixture(scope="module")
def by_transformers(checkpoint_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """The same checkpoint as transformers quantizes it with bitsandbytes."""
    bitsandbytes()

    @cache
    def load(name: str, quant: str, dtype: torch.dtype = torch.bfloat16, skip: tuple[str, ...] = ()) -> Any:
        asked = QUANTS[quant]
        if "int8" in quant:
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=asked["int8_threshold"])
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant[:3],
                bnb_4bit_use_double_quant=asked["double_quant"],
                bnb_4bit_compute_dtype=dtype,
            )
        folder = checkpoint_folder(name)
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config, device_map="cpu", attn_implementation="eager"
        ).eval()

    return load


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- the same as others' and as in flight -----------------------------------------------------------------------


@each_quant
@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_configuration_are_those_that_transformers_saves(
    name: str, quant: str, written: Written, by_transformers: Callable[..., Any], tmp_path: Path
) -> None:
    by_transformers(name, quant).save_pretrained(tmp_path)
    ours, theirs = all_tensors(written(name, quant)), all_tensors(tmp_path)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist())), key
        else:
            assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    our_config, their_config = (json.loads((f / "config.json").read_text()) for f in (written(name, quant), tmp_path))
    told, expected = our_config["quantization_config"], their_config["quantization_config"]
    assert set(told) == set(expected)
    assert told["llm_int8_skip_modules"] == ["lm_head"]  # what transformers' null means
    unread = ("llm_int8_skip_modules", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type")
    assert {k: v for k, v in told.items() if k not in unread} == {k: v for k, v in expected.items() if k not in unread}
    assert our_config["dtype"] == their_config["dtype"] == "bfloat16"


@each_quant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loaded_it_is_what_quantizing_in_flight_makes(
    dtype: str, quant: str, written: Written, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    stored = load_decoder(written("qwen2", quant, dtype), getattr(torch, dtype), "auto")
    in_flight = load_decoder(checkpoint_folder("qwen2"), getattr(torch, dtype), quant)
    ours, expected = dict(stored.quant_linears()), dict(in_flight.quant_linears())
    assert set(ours) == set(expected) and len(ours) == 7 * 3
    for path, linear in ours.items():
        assert torch.equal(linear.dequantize(), expected[path].dequantize()), path
    rows = random_prompt(random.Random(0), 70)
    assert torch.equal(pass_logits(stored, rows), pass_logits(in_flight, rows))
    assert stored.weight_bytes() == in_flight.weight_bytes()
    assert stored.unused_tensors == ()


@each_quant
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "phi3"])
def test_transformers_loads_it_as_it_would_quantize(
    name: str, quant: str, written: Written, by_transformers: Callable[..., Any]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(written(name, quant), attn_implementation="eager").eval()
    assert loaded.dtype == torch.bfloat16
    tokens = random_prompt(random.Random(1), 50)
    assert torch.equal(oracle_logits(loaded, tokens), oracle_logits(by_transformers(name, quant), tokens))


@pytest.mark.parametrize("quant", ["nf4", "int8-plain"])
def test_a_run_gives_the_same_rows(quant: str, tmp_path: Path) -> None:
    quantize(*CHOICES[quant], f"output.dir={tmp_path / 'written'}").done()
    rows = [f"data.path={TICKETS}", "data.limit=12", prompt("Topic?\n\n{{ ticket }}")]
    for task in (label_args(), ["sampling.max_new_tokens=12", "sampling.logprobs=2"]):
        stored = ["model=path", f"model.path={tmp_path / 'written'}"]
        run_here(*rows, *task, *stored, f"output.dir={tmp_path / 'stored'}").done()
        run_here(*rows, *task, *CHOICES[quant], f"output.dir={tmp_path / 'flight'}").done()
        assert results(tmp_path / "stored").equals(results(tmp_path / "flight"))
        shutil.rmtree(tmp_path / "stored"), shutil.rmtree(tmp_path / "flight")


@pytest.mark.parametrize("quant", ["nf4", "int8-plain"])
def test_modules_to_skip_are_the_same_to_every_reader(
    quant: str, written: Written, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    """A layer's path and a projection's name: vLLM's rule and transformers' patterns read short names differently."""
    folder = written("qwen2", quant, "float32", "quant.skip_modules=[model.layers.1,up_proj]")
    ours = {path for path, _ in load_decoder(folder, torch.float32, "auto").quant_linears()}
    assert len(ours) == 2 * 6 and not any("layers.1." in path or "up_proj" in path for path in ours)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    kinds = (bitsandbytes().nn.Linear4bit, bitsandbytes().nn.Linear8bitLt)
    assert {path for path, module in loaded.named_modules() if isinstance(module, kinds)} == ours
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in listed and "model.layers.1.mlp.down_proj" in listed and len(listed) == 1 + 7 + 2
    in_flight = load_decoder(
        checkpoint_folder("qwen2"), torch.float32, quant, skip_modules=("model.layers.1", "up_proj")
    )
    rows = random_prompt(random.Random(2), 20)
    assert torch.equal(pass_logits(load_decoder(folder, torch.float32, "auto"), rows), pass_logits(in_flight, rows))


# --- files --------------------------------------------------------------------------------------------------------


def offsets(file: Path) -> dict[str, tuple[str, int]]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {n: (v["dtype"], 8 + length + v["data_offsets"][0]) for n, v in header.items() if n != "__metadata__"}


def test_files_of_any_tensors_are_read_by_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.float16, torch.int32)
    tensors = {f"{n}.weight": (torch.randn(n % 7 + 1, n % 5) * 9).to(kinds[n % 6]) for n in range(60)}
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 4), torch.tensor(3, dtype=torch.uint8)
    tensors["turned"] = torch.randn(4, 6).T
    for limit in (1 << 30, 200):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with ShardWriter(folder, sum(map(entry_bytes, tensors)), limit) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        found = all_tensors(folder)
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        sizes = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}
        for file in folder.glob("*.safetensors"):
            assert all(first % sizes[dtype] == 0 for dtype, first in offsets(file).values())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_several_files_are_loaded_by_both(
    quant: str, written: Written, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.quantize.SHARD_BYTES", 40_000)
    source = ["model=path", f"model.path={checkpoint_folder('qwen2')}", "model.dtype=bfloat16"]
    quantize(*source, *CHOICES[quant], f"output.dir={tmp_path / 'shards'}").done()
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 150_000 for file in files)
    whole = load_decoder(written("qwen2", quant), torch.bfloat16, "auto")
    sharded = load_decoder(tmp_path / "shards", torch.bfloat16, "auto")
    rows = random_prompt(random.Random(3), 30)
    assert torch.equal(pass_logits(sharded, rows), pass_logits(whole, rows))
    loaded = [AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "shards", written("qwen2", quant))]
    assert torch.equal(*(oracle_logits(model, rows) for model in loaded))


def test_what_else_belongs_to_a_checkpoint_is_copied(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    (source / "modeling_own.py").write_text("# code")
    quantize("model=path", f"model.path={source}", "quant=bnb", f"output.dir={tmp_path / 'out'}").done()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {file.name for file in source.iterdir()} - {"pytorch_model.bin", "model.safetensors.index.json"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_another_tokenizer_goes_along(tmp_path: Path, checkpoint_folder: Callable[[str], Path]) -> None:
    more = ["model=path", f"model.path={checkpoint_folder('llama')}", f"model.tokenizer={TINY}", "quant=bnb"]
    quantize(*more, f"output.dir={tmp_path / 'out'}").done()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 509, "the model's own"
    generation = (checkpoint_folder("llama") / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == generation


# --- all or nothing -----------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    message = quantize("quant=bnb", f"output.dir={tmp_path / 'out'}").refusal()
    assert f"output.dir={tmp_path / 'out'} is there already and not empty" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "file").write_text("")
    assert "is there already" in quantize("quant=bnb", f"output.dir={tmp_path / 'file'}").refusal()


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for folder in ("out", "some/where/else"):
        ended = quantize("quant=bnb", f"output.dir={tmp_path / folder}").done()
        assert (tmp_path / folder / "model.safetensors").is_file()
        assert f"model.path={tmp_path / folder}" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "some"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quant=bnb"], "output.dir is required"),
        (["output.dir=out"], "quant=auto is no format that pipeline.quantize writes"),
        (["quant=none", "output.dir=out"], "quant=none is no format"),
        (["model=path", "quant=bnb", "output.dir=out"], "model.path is required"),
        (["model=path", "model.path=/no/such", "quant=bnb", "output.dir=out"], "/no/such does not exist"),
        (["quant=bnb", "output.dir=out", "quant.nosuch=1"], "quant.nosuch is no key"),
        (["quant=bnb", "output.dir=out", "model.device=cuda:7"], "model.device=cuda:7"),
    ],
)
def test_bad_configuration_is_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in quantize(*arguments).refusal()
    assert not list(tmp_path.iterdir())


def test_what_is_quantized_is_not_quantized_again(written: Written, tmp_path: Path) -> None:
    more = ["model=path", f"model.path={written('llama', 'nf4')}", f"output.dir={tmp_path / 'out'}"]
    assert "is bitsandbytes NF4 double-quantized, from the checkpoint already" in quantize(*more, "quant=bnb").refusal()
    assert "contradicts the checkpoint" in quantize(*more, "quant=bnb-int8").refusal()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "shape", "truncated"])
def test_a_bad_checkpoint_leaves_nothing(damage: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    if damage == "truncated":
        content = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(content[:-1000])
    message = quantize("model=path", f"model.path={source}", "quant=bnb", f"output.dir={tmp_path / 'out'}").refusal()
    assert ("model.safetensors" if damage == "truncated" else name) in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- GPTQ, before the library is started (the rest is in tests/quant/test_gptq_calibrated.py) ------------------------


GPTQ = ["quant=gptq", "output.dir=out"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "quant=gptq is calibrated on rows, and data.path is not set; add data.path="),
        ([f"data.path={TICKETS}", "task=label"], "task.labels is not set"),
        ([f"data.path={TICKETS}", "quant.bits=5"], "quant.bits must be one of 2, 3, 4, 8, got 5"),
        ([f"data.path={TICKETS}", "quant.group_size=0"], "quant.group_size must be at least 1, got 0"),
        ([f"data.path={TICKETS}", "model.dtype=float32"], "set model.dtype=bfloat16 or float16"),
        (["data.path=/no/such.parquet"], "/no/such.parquet"),
        ([f"data.path={TICKETS}", "task.prompt='{{ nosuch }}'"], "nosuch"),
        ([f"data.path={TICKETS}", "task.prompt='{{ topic.x.y }}'"], "has no row to calibrate on"),
        ([f"data.path={TICKETS}", "task.prompt=short", "task.chat=false"], "name rows with longer prompts"),
    ],
)
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed (make setup)")
def test_gptq_that_cannot_be_made_is_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = quantize(*GPTQ, *arguments)
    assert ended.code == 2
    assert words in ended.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_the_library_gptq_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    message = quantize(*GPTQ, f"data.path={TICKETS}").refusal()
    assert "needs the gptqmodel library" in message and "[gptq]" in message and "quant=bnb" in message
    assert not list(tmp_path.iterdir())


PROGRAM = [sys.executable, "-m", "pipeline.quantize"]


def big_model(folder: Path) -> Path:
    """One whose quantization takes a while."""
    from transformers import LlamaConfig

    shapes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=2000, tie_word_embeddings=True, dtype=torch.bfloat16, **shapes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_it_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    source = big_model(tmp_path / "source")
    more = ["model=path", f"model.path={source}", "quant=bnb", f"output.dir={tmp_path / 'out'}"]
    process = subprocess.Popen([*PROGRAM, *more], stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: list(tmp_path.glob(".out.*/*.partial")), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped while quantizing; nothing was left in output.dir; run the same command again" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_a_failure_that_leaves_nothing(tmp_path: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731  # stands for it
    more = ["quant=bnb", f"output.dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [*PROGRAM, *more], capture_output=True, text=True, env=environment(), preexec_fn=limit, check=False
    )
    assert done.returncode == 1, done.stderr
    assert f"{tmp_path / 'out'} could not be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_is_recognised(written: Written) -> None:
    checkpoint = open_checkpoint(str(written("llama", "nf4")))
    assert checkpoint.quantization["quant_method"] == "bitsandbytes"
    assert "python -m pipeline.quantize" in quantize("--help").done().out
