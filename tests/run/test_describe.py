"""`python -m pipeline.describe`: what it says against the files, the loaded model and a run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import TICKETS, TINY, Ended, call, environment, run_here

from pipeline.describe import main
from pipeline.quantize import main as quantize

METHODS = {"none": "none", "nf4": "bnb", "fp4": "bnb-fp4", "int8": "bnb-int8"}


def describe(*arguments: str) -> Ended:
    return call(main, *arguments)


def facts(*arguments: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(describe("--json", *arguments).done().out)
    return values


def path(folder: Path) -> list[str]:
    return ["model=path", f"model.path={folder}"]


def write_headers(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A checkpoint whose weights are a hole in the file: it has its size, and nothing in it to read."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return folder


LLAMA_13B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
GPTQ_4BIT = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def gptq_13b() -> dict[str, tuple[str, list[int], int]]:
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = ("F16", [32000, 5120], 32000 * 5120 * 2)
    for layer in range(40):
        prefix = f"model.layers.{layer}"
        shapes = {f"self_attn.{x}_proj": (5120, 5120) for x in "qkvo"}
        shapes |= {"mlp.up_proj": (13824, 5120), "mlp.gate_proj": (13824, 5120), "mlp.down_proj": (5120, 13824)}
        for path, (outputs, inputs) in shapes.items():
            groups = inputs // 128
            leaves = {
                "qweight": ("I32", [inputs // 8, outputs], inputs * outputs // 2),
                "qzeros": ("I32", [groups, outputs // 8], groups * outputs // 2),
                "scales": ("F16", [groups, outputs], groups * outputs * 2),
                "g_idx": ("I32", [inputs], inputs * 4),
            }
            tensors |= {f"{prefix}.{path}.{leaf}": header for leaf, header in leaves.items()}
        tensors |= {f"{prefix}.{n}_layernorm.weight": ("F16", [5120], 10240) for n in ("input", "post_attention")}
    return tensors | {"model.norm.weight": ("F16", [5120], 10240)}


# --- what it says ---------------------------------------------------------------------------------------------


def test_the_shipped_model(reference: Callable[..., Any]) -> None:
    said = facts()
    assert (said["format"], said["runs_as"], said["problem"]) == ("unquantized", "unquantized", None)
    assert said["parameters"] == sum(p.numel() for p in reference(TINY).parameters())
    assert said["context_length"] == 1024
    assert (said["tokenizer"], said["chat_template"]) == ("tokenizer.json", True)
    assert said["weight_files"] == 1
    assert said["disk_bytes"] == pytest.approx((TINY / "model.safetensors").stat().st_size, rel=0.01)
    assert said["place"]["kernel"] == said["place"]["auto_kernel"] == "torch"
    assert said["place"]["kernels"] == []


def test_no_weight_is_read(tmp_path: Path) -> None:
    """13 billion parameters in four bits, as if: 7 GB of a hole."""
    folder = write_headers(tmp_path / "13b", LLAMA_13B | {"quantization_config": GPTQ_4BIT}, gptq_13b())
    ended = describe(*path(folder)).done()
    assert ended.seconds < 60
    said = facts(*path(folder))
    assert said["format"] == "GPTQ 4 bits in groups of 128 (symmetric), from the checkpoint"
    assert said["parameters"] == 13_015_864_320
    up = next(kind for kind in said["modules"] if kind["name"] == "model.layers.*.mlp.up_proj")
    assert (up["count"], up["shape"], up["format"]) == (40, [13824, 5120], "GPTQ 4 bits, groups of 128")
    assert up["disk_bytes"] == 40 * (35_389_440 + 276_480 + 1_105_920 + 20_480)
    assert said["disk_bytes"] == sum(size for _, _, size in gptq_13b().values())
    place = said["place"]
    assert place["dequantized_bytes"] == 2 * said["parameters"]
    assert place["kv_bytes_per_token"] == 2 * 40 * 5120 * 2
    assert said["disk_bytes"] < place["resident_bytes"] < 1.2 * said["disk_bytes"]
    assert "model.layers.*.mlp.up_proj" in ended.out and "x 40" in ended.out and "13824 x 5120" in ended.out


def test_layers_that_differ_are_told_apart(tmp_path: Path) -> None:
    tensors = gptq_13b()
    for layer in (0, 1, 2, 7):
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"model.layers.{layer}.mlp.up_proj.{leaf}"]
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = ("F16", [13824, 5120], 13824 * 5120 * 2)
    folder = write_headers(tmp_path / "mixed", LLAMA_13B | {"quantization_config": GPTQ_4BIT}, tensors)
    kinds = {kind["name"]: kind for kind in facts(*path(folder))["modules"]}
    assert kinds["model.layers.*.mlp.up_proj.weight"]["count"] == 4
    assert kinds["model.layers.*.mlp.up_proj"]["count"] == 36
    dynamic = GPTQ_4BIT | {"dynamic": {r".*\.[01]\.mlp\.down_proj": {"bits": 8}}}
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.down_proj.qweight"] = ("I32", [3456, 5120], 3456 * 5120 * 4)
        tensors[f"model.layers.{layer}.mlp.down_proj.qzeros"] = ("I32", [108, 1280], 108 * 1280 * 4)
    folder = write_headers(tmp_path / "dynamic", LLAMA_13B | {"quantization_config": dynamic}, tensors)
    formats = {kind["name"]: kind["format"] for kind in facts(*path(folder))["modules"]}
    assert formats["model.layers.[0-1].mlp.down_proj"] == "GPTQ 8 bits, groups of 128"
    assert formats["model.layers.[2-39].mlp.down_proj"] == "GPTQ 4 bits, groups of 128"


@pytest.mark.parametrize("quant", METHODS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_the_memory_is_that_of_the_loaded_model(
    name: str, quant: str, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    import torch

    folder = checkpoint_folder(name)
    said = facts(*path(folder), f"quant={METHODS[quant]}", "model.dtype=float32")
    decoder = load_decoder(folder, torch.float32, quant)
    computed = sum(buffer.nbytes for n, buffer in decoder.model.named_buffers() if "inv_freq" in n)
    assert said["place"]["resident_bytes"] == decoder.weight_bytes() - computed
    quantized = [kind for kind in said["modules"] if "in flight" in kind["format"]]
    assert sum(kind["resident_bytes"] for kind in quantized) == sum(
        linear.stored_bytes for _, linear in decoder.quant_linears()
    )


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
def test_a_stored_checkpoint_takes_what_was_said_of_it_in_flight(
    quant: str, tmp_path: Path, load_decoder: Callable[..., Any]
) -> None:
    import torch

    call(quantize, f"quant={METHODS[quant]}", f"output.dir={tmp_path / 'stored'}").done()
    stored, in_flight = facts(*path(tmp_path / "stored")), facts(f"quant={METHODS[quant]}")
    assert stored["runs_as"].replace("from the checkpoint", "in flight") == in_flight["runs_as"]
    for key in ("parameters", "context_length", "chat_template", "batch_invariant"):
        assert stored[key] == in_flight[key]
    assert stored["place"] == in_flight["place"]
    assert stored["disk_bytes"] < in_flight["disk_bytes"]
    formats = [{kind["name"]: kind["format"] for kind in said["modules"]} for said in (stored, in_flight)]
    assert formats[0] == {name: text.removesuffix(", in flight") for name, text in formats[1].items()}
    decoder = load_decoder(tmp_path / "stored", torch.bfloat16, "auto")
    computed = sum(buffer.nbytes for n, buffer in decoder.model.named_buffers() if "inv_freq" in n)
    assert stored["place"]["resident_bytes"] == decoder.weight_bytes() - computed


@pytest.mark.parametrize(
    ("overrides", "invariant"), [(["quant=bnb-int8"], False), (["quant=bnb-int8", "quant.int8_threshold=0"], True)]
)
def test_whether_rows_are_independent(overrides: list[str], invariant: bool) -> None:
    assert facts(*overrides)["batch_invariant"] is invariant
    assert ("do not depend on each other" in describe(*overrides).out) is invariant


# --- kernels --------------------------------------------------------------------------------------------------


def test_every_kernel_answers_and_auto_is_what_a_run_takes(tmp_path: Path) -> None:
    said = facts("quant=bnb")["place"]
    assert [answer["name"] for answer in said["kernels"]] == [
        "reference",
        "bitsandbytes",
        "bitblas",
        "triton",
        "triton-fused",
    ]
    assert [answer["can_run"] for answer in said["kernels"]] == [True, True, False, False, False]
    assert all(bool(answer["reason"]) is not answer["can_run"] for answer in said["kernels"])
    run = ["quant=bnb", f"data.path={TICKETS}", f"output.dir={tmp_path}", "task.prompt='{{ ticket }}'", "dry_run=true"]
    assert json.loads(run_here(*run).done().out)["runs"]["resolved.kernel"] == said["auto_kernel"] == said["kernel"]
    assert facts("quant=bnb", "quant.kernel=reference")["place"]["kernel"] == "reference"


def test_kernels_of_gptq_and_of_gptq_repacked(tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "13b", LLAMA_13B | {"quantization_config": GPTQ_4BIT}, gptq_13b())
    plain, repacked = (facts(*path(folder), "model.device=cpu", *more)["place"] for more in ((), ("quant=bitblas",)))
    for place in (plain, repacked):
        assert place["auto_kernel"] == "reference"
        reasons = {answer["name"]: answer["reason"] for answer in place["kernels"]}
        assert reasons["reference"] == ""
        assert reasons["bitsandbytes"] == "does not run this format"
        assert "not on cpu" in reasons["triton"]
    found = [next(a["reason"] for a in place["kernels"] if a["name"] == "bitblas") for place in (plain, repacked)]
    assert "to which quant=bitblas repacks" in found[0]
    assert "not on cpu" in found[1]


def test_a_kernel_that_cannot_run_is_refused_after_the_description() -> None:
    ended = describe("quant=bnb", "quant.kernel=bitblas")
    assert ended.code == 2
    assert ended.err.startswith("error: quant.kernel=bitblas cannot run") and ended.err.count("\n") == 1
    assert "auto takes it" in ended.out


# --- what a run would refuse ------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "sentence", "shown"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantized with awq, which is not", "awq"),
        ({"quantization_config": GPTQ_4BIT | {"bits": 5}}, "is GPTQ with bits 5", "gptq"),
        ({"model_type": "gpt2"}, "is a gpt2 model, which is not supported", "unquantized"),
        ({"dtype": "float8_e4m3fn"}, "the checkpoint says float8_e4m3fn", "unquantized"),
    ],
    ids=["awq", "5 bits", "gpt2", "float8"],
)
def test_what_is_not_supported_is_described_and_refused(
    changes: dict[str, Any], sentence: str, shown: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    change_config(folder, **changes)
    ended = describe(*path(folder))
    assert ended.code == 2
    assert ended.err.startswith("error: ") and sentence in ended.err and ended.err.count("\n") == 1
    lines = dict(line.split(None, 1) for line in ended.out.splitlines() if line[:1].isalpha())
    assert shown in lines["format"]
    assert "tokenizer.json" in lines["tokenizer"]
    said = json.loads(describe("--json", *path(folder)).out)
    assert f"error: {said['problem']}\n" == ended.err
    assert said["place"] is None
    assert {kind["name"] for kind in said["modules"]} >= {"model.layers.*.mlp.up_proj.weight"}


def test_what_contradicts_the_checkpoint_is_described_as_it_is(tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "13b", LLAMA_13B | {"quantization_config": GPTQ_4BIT}, gptq_13b())
    ended = describe(*path(folder), "quant=bnb")
    assert ended.code == 2
    assert "quant=bnb contradicts the checkpoint" in ended.err
    assert "GPTQ 4 bits in groups of 128" in ended.out


def test_a_broken_module_is_named(tmp_path: Path) -> None:
    tensors = gptq_13b()
    del tensors["model.layers.3.mlp.up_proj.scales"]
    folder = write_headers(tmp_path / "13b", LLAMA_13B | {"quantization_config": GPTQ_4BIT}, tensors)
    ended = describe(*path(folder))
    assert ended.code == 2
    assert "model.layers.3.mlp.up_proj.scales is missing" in ended.err
    assert "model.layers.*.mlp.up_proj.qweight" in ended.out, "the bare tensors"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=path"], "model.path is required"),
        (["model=path", "model.path=/no/such/folder"], "/no/such/folder"),
        (["model=nosuch"], "model=nosuch is no choice"),
        (["quant.nosuch=1"], "quant.nosuch is no key"),
        (["--jsn"], "jsn"),
        (["model.tokenizer=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_configuration_is_refused_as_by_a_run(arguments: list[str], words: str) -> None:
    ended = describe(*arguments)
    assert ended.code == 2
    assert words in ended.err and ended.err.count("\n") == 1


def test_the_command_of_a_run_is_taken_as_it_is(tmp_path: Path) -> None:
    more = [f"data.path={TICKETS}", f"output.dir={tmp_path / 'out'}", "task=label", "task.labels=[a,b]"]
    assert facts("quant=bnb", *more) == facts("quant=bnb")
    assert not (tmp_path / "out").exists()


def test_in_a_process_of_its_own() -> None:
    program = [sys.executable, "-m", "pipeline.describe", "quant=bnb"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment(), check=True)
    assert "bitsandbytes NF4 double-quantized, in flight" in done.stdout
    assert done.stderr == ""
    help_text = describe("--help").done().out
    assert "python -m pipeline.describe" in help_text and "--json" in help_text
