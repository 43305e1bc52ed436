"""BitBLAS checkpoints packed by the bitblas package, of weights that GPTQModel made and dequantizes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    greedy,
    load_reference,
    oracle_generate_all,
    oracle_logits,
    pass_logits,
    random_prompt,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quant.bitblas_spec import BitblasSpec
from pipeline.quant.detect import resolve_spec
from pipeline.quant.spec import QuantSettings, QuantSpec

pytestmark = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed (make setup)")

SHAPE = {"vocab_size": 512, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Source:
    """A GPTQ checkpoint to make: see make_gptq.py."""

    base: str = "llama"
    bits: int = 4
    group_size: int = 32
    sym: bool = False
    desc_act: bool = False
    format: str = "gptq_v2"
    lm_head: bool = False
    scales: str = "float16"
    dtype: str = "float16"
    told_in: str = "config.json"
    file: str = "model.safetensors"


SOURCES = {
    "4": Source(),
    "4-sym": Source(sym=True, group_size=128),
    "4-one-group": Source(group_size=-1),
    "4-head": Source(lm_head=True, group_size=64),
    "4-biases": Source(base="qwen2"),
    "2": Source(bits=2, group_size=64),
    "2-sym": Source(bits=2, sym=True),
    "8": Source(bits=8),
    "8-sym": Source(bits=8, sym=True, group_size=-1),
    # what only repacking at load meets
    "4-v1-act": Source(desc_act=True, format="gptq"),
    "4-v1": Source(format="gptq", group_size=64),
    "2-v1-act": Source(bits=2, desc_act=True, format="gptq"),
    "8-v1-act": Source(bits=8, desc_act=True, format="gptq", group_size=64),
    "4-one-group-act": Source(desc_act=True, group_size=-1),
    "4-float32-scales": Source(scales="float32"),
    "4-bfloat16": Source(dtype="bfloat16", desc_act=True),
    "4-fused": Source(base="phi3", desc_act=True),
    "3": Source(bits=3),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A BitBLAS checkpoint to make of a GPTQ one: see make_bitblas.py; `says` is added to its configuration."""

    source: str = "4"
    zeros: str = "quantized"
    leaf: str = "qzeros"
    code_dtype: str = ""
    ladder: bool = False
    says: tuple[tuple[str, Any], ...] = (("quant_method", "bitblas"),)
    told_in: str = "config.json"


GPTQ_MARK = (("quant_method", "gptq"), ("checkpoint_format", "bitblas"))
OLD_MARK = (("quant_method", "gptq"), ("is_bitblas_format", True))
RESCALED = (("quant_method", "bitblas"), ("zeros_mode", "rescale"))
SIGNED = (("quant_method", "bitblas"), ("W_dtype", "int8"))
UNSIGNED = (("quant_method", "bitblas"), ("W_dtype", "uint8"))
JOBS = {
    "4-quantized": Job(says=GPTQ_MARK),
    "4-original": Job(zeros="original", leaf="zeros", says=OLD_MARK, told_in="quantize_config.json"),
    "4-rescale": Job(zeros="rescale", leaf="zeros", says=RESCALED),
    "4-one-group": Job(source="4-one-group", says=GPTQ_MARK, told_in="quantize_config.json"),
    "4-head": Job(source="4-head"),
    "4-biases": Job(source="4-biases", says=OLD_MARK),
    "4-sym": Job(source="4-sym", zeros="none"),
    "4-sym-empty": Job(source="4-sym", zeros="empty"),
    "4-sym-zeros": Job(source="4-sym", zeros="quantized"),
    "4-called-sym": Job(says=(*GPTQ_MARK, ("sym", True))),  # zeros that are not the middle are honoured
    "2-quantized": Job(source="2", leaf="zeros"),
    "2-original": Job(source="2", zeros="original"),
    "2-sym": Job(source="2-sym", zeros="none"),
    "8-signed": Job(source="8", code_dtype="int8", says=SIGNED),
    "8-signed-original": Job(source="8", zeros="original", code_dtype="int8", says=SIGNED),
    "8-signed-sym": Job(source="8-sym", zeros="none", code_dtype="int8", says=SIGNED),
    "8-unsigned": Job(source="8", code_dtype="uint8", says=UNSIGNED),
    "8-unsigned-original": Job(source="8", zeros="original", code_dtype="uint8", says=UNSIGNED),
    "8-unsigned-sym": Job(source="8-sym", zeros="none", code_dtype="uint8", says=UNSIGNED),
    "4-ladder": Job(ladder=True),
    "2-ladder": Job(source="2", ladder=True),
    "8-ladder": Job(source="8", ladder=True, code_dtype="int8", says=SIGNED),
}
CASES = pytest.mark.parametrize("case", JOBS)
REPACKED = [name for name, source in SOURCES.items() if source.bits != 3]
UP = "model.layers.1.mlp.up_proj"

Folders = dict[str, Path]


def run(program: str, jobs: list[dict[str, Any]], environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, str(HERE / program)]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, check=False, env=environment,
        cwd=Path(jobs[0]["target"]).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every checkpoint of SOURCES; beside each, in "dense", what GPTQModel dequantizes it to."""
    root = tmp_path_factory.mktemp("gptq")
    for base in {source.base for source in SOURCES.values()}:
        save_checkpoint(base, root / base, **SHAPE)
    folders = {name: root / name / "gptq" for name in SOURCES}
    places = {
        name: {"source": str(root / s.base), "target": str(folders[name]), "dense": str(dense_of(folders[name]))}
        for name, s in SOURCES.items()
    }
    run("make_gptq.py", [asdict(s) | {"dynamic": {}} | places[name] for name, s in SOURCES.items()])
    return folders


def dense_of(folder: Path) -> Path:
    return folder.with_name("dense")


@pytest.fixture(scope="module")
def made(gptq: Folders, tmp_path_factory: pytest.TempPathFactory, bitblas_environment: dict[str, str]) -> Folders:
    """Every checkpoint of JOBS, written by one process that has the package imported."""
    root = tmp_path_factory.mktemp("bitblas")
    orders = []
    for name, job in JOBS.items():
        source = SOURCES[job.source]
        told = {"bits": source.bits, "group_size": source.group_size, "sym": source.sym, "desc_act": False}
        order = asdict(job) | {"bits": source.bits, "told": told | {"lm_head": source.lm_head} | dict(job.says)}
        orders.append(order | {"source": str(gptq[job.source]), "target": str(root / name)})
    run("make_bitblas.py", orders, bitblas_environment)
    return {name: root / name for name in JOBS}


@pytest.fixture(scope="module")
def dense() -> Callable[[Path], Any]:
    """An unquantized folder as transformers runs it in float32."""
    return cache(load_reference)


def spec_of(folder: Path, method: str = "auto", **told: Any) -> QuantSpec:
    stored = open_checkpoint(str(folder)).quantization | told
    return resolve_spec(QuantSettings(method=method), stored, "there")


# --- checkpoints in BitBLAS' format ------------------------------------------------------------------------------


@CASES
def test_recognised_from_its_config(case: str, made: Folders) -> None:
    source = SOURCES[JOBS[case].source]
    spec = spec_of(made[case])
    assert isinstance(spec, BitblasSpec)
    assert (spec.bits, spec.group_size) == (source.bits, source.group_size)
    assert spec_of(made[case], "bitblas") == spec


@CASES
def test_weights_are_those_of_gptqmodel_bit_for_bit(
    case: str, made: Folders, gptq: Folders, load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder(made[case], torch.float32, "auto")
    expected = load_file(dense_of(gptq[JOBS[case].source]) / "model.safetensors")
    linears = dict(decoder.quant_linears())
    assert len(linears) == sum(name.endswith("qweight") for name in open_checkpoint(str(made[case])).tensors)
    for path, linear in linears.items():
        weight_NK, expected_NK = linear.dequantize(), expected[path.removesuffix(".linear") + ".weight"]
        if JOBS[case].zeros == "rescale":  # the product of zero point and scale was rounded to float16
            assert float((weight_NK - expected_NK).abs().max()) <= 2**-11 * float(expected_NK.abs().max())
        else:
            assert torch.equal(weight_NK, expected_NK), path


@pytest.mark.parametrize("case", [name for name in JOBS if JOBS[name].zeros != "rescale"])
def test_logits_are_those_of_the_dequantized_model(
    case: str, made: Folders, gptq: Folders, load_decoder: Callable[..., Any], dense: Callable[[Path], Any]
) -> None:
    decoder = load_decoder(made[case], torch.float32, "auto")
    rng = random.Random(case)
    for length in (1, 17, 130):
        prompt = random_prompt(rng, length)
        expected = oracle_logits(dense(dense_of(gptq[JOBS[case].source])), prompt)
        error = float((pass_logits(decoder, prompt).double() - expected).abs().max())
        assert error < 2e-4 * float(expected.abs().max())


@pytest.mark.parametrize("case", ["4-quantized", "4-biases", "2-original", "8-unsigned", "4-sym", "4-ladder"])
def test_greedy_answers_are_those_of_the_dequantized_model(
    case: str, made: Folders, gptq: Folders, build_engine: Callable[..., Any], dense: Callable[[Path], Any]
) -> None:
    rng = random.Random(7)
    requests = [greedy(n, random_prompt(rng, rng.choice([3, 21, 40, 64])), 64) for n in range(20)]
    answers = build_engine(made[case], torch.float32, "auto", slots=16).answer(requests)
    expected = oracle_generate_all(dense(dense_of(gptq[JOBS[case].source])), requests)
    for request in requests:
        assert answers[request.id].token_ids == expected[request.id].token_ids


@pytest.mark.parametrize("case", ["4-quantized", "2-original", "8-signed", "8-unsigned", "4-ladder"])
def test_memory_is_planned_for_what_is_loaded(case: str, made: Folders, load_decoder: Callable[..., Any]) -> None:
    modules = spec_of(made[case]).stored_modules(open_checkpoint(str(made[case])).tensors)
    linears = dict(load_decoder(made[case], torch.float32, "auto").quant_linears())
    assert {module.path: module.num_bytes for module in modules} == {
        path: linear.stored_bytes for path, linear in linears.items()
    }


# --- GPTQ repacked at load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in JOBS if not JOBS[name].ladder and JOBS[name].zeros != "rescale"])
def test_repacked_bytes_are_those_of_the_package(
    case: str, made: Folders, gptq: Folders, load_decoder: Callable[..., Any]
) -> None:
    """A GPTQ checkpoint repacked at load against what the package's own packing made of the same one."""
    ours = dict(load_decoder(gptq[JOBS[case].source], torch.float32, "bitblas").quant_linears())
    stored = load_file(made[case] / "model.safetensors")
    for path, linear in ours.items():
        path = path.removesuffix(".linear")
        codes_NB = stored[f"{path}.qweight"]
        if JOBS[case].code_dtype == "uint8":
            codes_NB = (codes_NB.to(torch.int16) - 128).to(torch.int8)
        assert torch.equal(linear.weight.codes_NB, codes_NB)
        assert torch.equal(linear.weight.scales_NG, stored[f"{path}.scales"])
        if JOBS[case].zeros == "original" and JOBS[case].code_dtype != "uint8":
            assert torch.equal(linear.weight.zeros_NG, stored[f"{path}.{JOBS[case].leaf}"])


@pytest.mark.parametrize("case", REPACKED)
def test_repacked_weights_are_those_of_gptqmodel_bit_for_bit(
    case: str, gptq: Folders, load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder(gptq[case], torch.float32, "bitblas")
    expected = load_file(dense_of(gptq[case]) / "model.safetensors")
    orders = []
    for path, linear in decoder.quant_linears():
        assert torch.equal(linear.dequantize(), expected[path.removesuffix(".linear") + ".weight"]), path
        orders.append(linear.weight.order_K)
    assert spec_of(gptq[case], "bitblas").describe().endswith("repacked for BitBLAS")
    reordered = SOURCES[case].desc_act and SOURCES[case].group_size != -1
    assert all((order is not None) == reordered for order in orders)


@pytest.mark.parametrize("case", ["4-v1-act", "8-v1-act", "4-fused"])
def test_repacked_greedy_answers_are_those_of_the_dequantized_model(
    case: str, gptq: Folders, build_engine: Callable[..., Any], dense: Callable[[Path], Any]
) -> None:
    rng = random.Random(8)
    requests = [greedy(n, random_prompt(rng, rng.choice([3, 21, 40, 64])), 64) for n in range(20)]
    answers = build_engine(gptq[case], torch.float32, "bitblas", slots=16).answer(requests)
    expected = oracle_generate_all(dense(dense_of(gptq[case])), requests)
    for request in requests:
        assert answers[request.id].token_ids == expected[request.id].token_ids


@pytest.mark.parametrize("case", ["4", "4-v1-act", "8", "4-float32-scales"])
def test_memory_is_planned_for_what_is_repacked(case: str, gptq: Folders, load_decoder: Callable[..., Any]) -> None:
    modules = spec_of(gptq[case], "bitblas").stored_modules(open_checkpoint(str(gptq[case])).tensors)
    linears = dict(load_decoder(gptq[case], torch.float32, "bitblas").quant_linears())
    assert {module.path: module.num_bytes for module in modules} == {
        path: linear.stored_bytes for path, linear in linears.items()
    }


def test_three_bits_cannot_be_repacked(gptq: Folders) -> None:
    spec = spec_of(gptq["3"], "bitblas")
    with pytest.raises(ConfigError, match=r"model\.safetensors: model\.layers.* has 3 bits, .* use quant=gptq"):
        spec.stored_modules(open_checkpoint(str(gptq["3"])).tensors)


def test_groups_of_unequal_size_cannot_be_repacked(
    gptq: Folders, tmp_path: Path, load_decoder: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(gptq["4-v1-act"], tmp_path / "unequal"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.g_idx"] = torch.zeros_like(tensors[f"{UP}.g_idx"])
    tensors[f"{UP}.g_idx"][-1] = 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"up_proj: its g_idx gives group 0 127 inputs, .* use quant=gptq") as caught:
        load_decoder(folder, torch.float32, "bitblas")
    assert "fetch" not in str(caught.value)
    load_decoder(folder, torch.float32, "gptq")  # the remedy works


# --- contradictions and what is not supported --------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["none", "gptq", "bnb", "bnb-fp4", "bnb-int8"])
def test_what_contradicts_the_checkpoint_is_refused(asked: str) -> None:
    stored = {"quant_method": "gptq", "checkpoint_format": "bitblas", "bits": 4, "group_size": 128}
    with pytest.raises(
        ConfigError, match=rf"quant={asked} contradicts .*model\.path=there is .*BitBLAS.* quant=bitblas"
    ):
        resolve_spec(QuantSettings(method=asked), stored, "there")


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"bits": 3}, "bits 3, .*supported are bits 2, 4 and 8"),
        ({"bits": 1}, "supported are"),
        ({"bits": None}, "supported are"),
        ({"group_size": 0}, "supported are"),
        ({"group_size": "128"}, "supported are"),
        ({"zeros_mode": "other"}, "zeros_mode other; supported are"),
        ({"desc_act": True}, "desc_act true, .*GPTQ checkpoint"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_with_what_is(told: dict[str, Any], sentence: str) -> None:
    stored = {"quant_method": "bitblas", "bits": 4, "group_size": 128} | told
    with pytest.raises(ConfigError, match=sentence):
        resolve_spec(QuantSettings(), stored, "there")


@pytest.mark.parametrize("told", [{"desc_act": True, "group_size": -1}, {"desc_act": True, "static_groups": True}])
def test_an_order_that_is_none_is_no_obstacle(told: dict[str, Any]) -> None:
    stored = {"quant_method": "bitblas", "bits": 4, "group_size": 128} | told
    assert isinstance(resolve_spec(QuantSettings(), stored, "there"), BitblasSpec)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "8 bits of either kind": ("8-signed", {"W_dtype": None}, 'whether they are signed; add "W_dtype"'),
    "rescaled unsigned": ("8-unsigned-original", {"zeros_mode": "rescale"}, "unsigned codes and rescaled zeros"),
    "other bits": ("4-quantized", {"bits": 2}, "with 2 bits"),
    "more bits": ("4-quantized", {"bits": 8, "W_dtype": "int8"}, "with 8 bits"),
    "other groups": ("4-quantized", {"group_size": 64}, "scales is F16"),
    "groups that do not fit": ("4-quantized", {"group_size": 96}, "no multiple of the group size 96"),
    "zeros of another mode": ("4-quantized", {"zeros_mode": "original"}, "qzeros is I8"),
    "zeros of a third mode": ("4-original", {"zeros_mode": "quantized"}, "zeros is F16"),
    "ladder of other bits": ("4-ladder", {"bits": 2}, "the wrong format or bits"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(wrong: str, made: Folders) -> None:
    case, told, sentence = WRONG[wrong]
    with pytest.raises(ConfigError, match=rf"model\.safetensors: model\.layers\.\d.*{sentence}"):
        spec_of(made[case], **told).stored_modules(open_checkpoint(str(made[case])).tensors)


def test_gptq_tensors_under_another_name_are_refused(gptq: Folders) -> None:
    with pytest.raises(ConfigError, match=r"qweight is I32 .*the wrong format or bits"):
        spec_of(gptq["4"], checkpoint_format="bitblas").stored_modules(open_checkpoint(str(gptq["4"])).tensors)


def test_modules_with_bits_of_their_own(made: Folders, gptq: Folders, tmp_path: Path, load_decoder: Any) -> None:
    """As GPTQModel writes `dynamic`: down_proj from a checkpoint of 2 bits in one of 4."""
    folder = Path(shutil.copytree(made["4-original"], tmp_path / "mixed"))
    mixed = {k: v for k, v in load_file(made["4-original"] / "model.safetensors").items() if "down_proj" not in k}
    mixed |= {k: v for k, v in load_file(made["2-original"] / "model.safetensors").items() if "down_proj" in k}
    save_file(mixed, folder / "model.safetensors")
    told = json.loads((folder / "quantize_config.json").read_text())
    told["dynamic"] = {r"-:.*embed.*": {}, r"+:.*\.down_proj$": {"bits": 2, "group_size": 64}}
    (folder / "quantize_config.json").write_text(json.dumps(told))
    expected = {n: load_file(dense_of(gptq[n]) / "model.safetensors") for n in ("4", "2")}
    for path, linear in load_decoder(folder, torch.float32, "auto").quant_linears():
        weights = expected["2" if "down_proj" in path else "4"]
        assert torch.equal(linear.dequantize(), weights[f"{path}.weight"])


# --- damage ------------------------------------------------------------------------------------------------------


def _without(leaf: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{UP}.{leaf}")


def _cut(leaf: str, dim: int = 0) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[f"{UP}.{leaf}"]
        tensors[f"{UP}.{leaf}"] = tensor.narrow(dim, 0, tensor.shape[dim] - 1).clone()

    return change


def _as(leaf: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{UP}.{leaf}": tensors[f"{UP}.{leaf}"].to(dtype)})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (_without("scales"), "scales is missing"),
    "no codes": (_without("qweight"), "lacks tensor model.layers.1.mlp.up_proj.weight"),
    "fewer outputs": (_cut("qweight"), "is 255 x 128"),
    "fewer inputs": (_cut("qweight", 1), "is 256 x 126"),
    "short scales": (_cut("scales"), "scales is F16 [255, 4]"),
    "short zeros": (_cut("qzeros"), "qzeros is I8 [3, 128]"),
    "float codes": (_as("qweight", torch.float16), "qweight is F16"),
    "float32 scales": (_as("scales", torch.float32), "scales is F32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, made: Folders, tmp_path: Path, load_decoder: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(made["4-quantized"], tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    change, message = DAMAGES[damage]
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="up_proj") as caught:
        load_decoder(folder, torch.float32, "auto")
    assert message in str(caught.value)
