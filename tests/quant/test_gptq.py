"""GPTQ checkpoints packed by GPTQModel: weights bit for bit, logits and answers as transformers computes them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Case as AdapterCase
from adapters import Made as Adapted
from adapters import furthest, lora, make_adapters, some_prompts
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
from pipeline.quant.detect import resolve_spec
from pipeline.quant.gptq_spec import GptqSpec
from pipeline.quant.spec import QuantSettings

pytestmark = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed (make setup)")

SHAPE = {"vocab_size": 512, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint to make: see make_gptq.py."""

    base: str = "llama"
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    format: str = "gptq"
    lm_head: bool = False
    dynamic: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: str = "float16"
    dtype: str = "float16"
    told_in: str = "config.json"
    file: str = "model.safetensors"


JOBS = {
    "4-32": Job(),
    "4-asym-act": Job(sym=False, desc_act=True, group_size=64),
    "4-v2-asym": Job(sym=False, format="gptq_v2", group_size=128),
    "4-one-group": Job(sym=False, group_size=-1),
    "2-asym": Job(bits=2, sym=False),
    "2-v2-act": Job(bits=2, format="gptq_v2", desc_act=True),
    "3-asym": Job(bits=3, sym=False),
    "3-act-one-group": Job(bits=3, group_size=-1, desc_act=True),
    "3-v2-asym": Job(bits=3, sym=False, format="gptq_v2", desc_act=True),
    "8-asym": Job(bits=8, sym=False, group_size=128),
    "8-v2": Job(bits=8, format="gptq_v2", group_size=-1),
    "8-asym-act": Job(bits=8, sym=False, desc_act=True),
    "head": Job(lm_head=True, sym=False),
    "dynamic": Job(
        lm_head=True,
        dynamic={r"-:model\.layers\.0\.self_attn\..*": {}, r"+:.*\.down_proj$": {"bits": 8}, "lm_head": {"bits": 8}},
    ),
    "old-tool": Job(told_in="quantize_config.json", file="gptq_model-4bit-32g.safetensors", sym=False, desc_act=True),
    "float32-scales": Job(scales="float32", sym=False),
    "bfloat16": Job(dtype="bfloat16", sym=False),
    "biases": Job(base="qwen2", sym=False),
    "fused": Job(base="phi3", sym=False, desc_act=True),
    "tied": Job(base="llama-tied"),
}
CASES = pytest.mark.parametrize("case", JOBS)


@dataclass(frozen=True)
class Made:
    """The GPTQ checkpoint, and the unquantized one of what GPTQModel dequantizes it to."""

    folder: Path
    dense: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every checkpoint of JOBS, written by one process that has GPTQModel imported."""
    root = tmp_path_factory.mktemp("gptq")
    for base in {job.base for job in JOBS.values()}:
        save_checkpoint(base, root / base, **SHAPE)
    found = {name: Made(root / name / "gptq", root / name / "dense") for name in JOBS}
    orders = [
        asdict(job) | {"source": str(root / job.base), "target": str(found[n].folder), "dense": str(found[n].dense)}
        for n, job in JOBS.items()
    ]
    program = [sys.executable, str(Path(__file__).with_name("make_gptq.py"))]
    done = subprocess.run(program, input=json.dumps(orders), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def dense() -> Callable[[Path], Any]:
    """An unquantized folder as transformers runs it in float32."""
    return cache(load_reference)


@CASES
def test_recognised_from_its_config(case: str, made: dict[str, Made]) -> None:
    job = JOBS[case]
    checkpoint = open_checkpoint(str(made[case].folder))
    spec = resolve_spec(QuantSettings(), checkpoint.quantization, "there")
    assert isinstance(spec, GptqSpec)
    assert (spec.bits, spec.group_size, spec.symmetric, spec.act_order) == (
        job.bits, job.group_size, job.sym, job.desc_act,
    )  # fmt: skip
    assert resolve_spec(QuantSettings(method="gptq"), checkpoint.quantization, "there") == spec


@CASES
def test_weights_are_those_of_gptqmodel_bit_for_bit(
    case: str, made: dict[str, Made], load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder(made[case].folder, torch.float32, "auto")
    expected = load_file(made[case].dense / "model.safetensors")
    linears = dict(decoder.quant_linears())
    assert len(linears) == sum(name.endswith("qweight") for name in open_checkpoint(str(made[case].folder)).tensors)
    for path, linear in linears.items():
        name = path.removesuffix(".linear") + ".weight"
        assert torch.equal(linear.dequantize(), expected[name]), path


@CASES
def test_logits_are_those_of_the_dequantized_model(
    case: str, made: dict[str, Made], load_decoder: Callable[..., Any], dense: Callable[[Path], Any]
) -> None:
    decoder = load_decoder(made[case].folder, torch.float32, "auto")
    rng = random.Random(case)
    for length in (1, 17, 130):
        prompt = random_prompt(rng, length)
        expected = oracle_logits(dense(made[case].dense), prompt)
        assert float((pass_logits(decoder, prompt).double() - expected).abs().max()) < 2e-4 * float(
            expected.abs().max()
        )


@pytest.mark.parametrize("case", ["4-asym-act", "3-asym", "dynamic", "fused", "biases"])
def test_greedy_answers_are_those_of_the_dequantized_model(
    case: str, made: dict[str, Made], build_engine: Callable[..., Any], dense: Callable[[Path], Any]
) -> None:
    rng = random.Random(7)
    requests = [greedy(n, random_prompt(rng, rng.choice([3, 21, 40, 64])), 64) for n in range(20)]
    answers = build_engine(made[case].folder, torch.float32, "auto", slots=16).answer(requests)
    expected = oracle_generate_all(dense(made[case].dense), requests)
    for request in requests:
        assert answers[request.id].token_ids == expected[request.id].token_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_once(dtype: torch.dtype, made: dict[str, Made], load_decoder: Callable[..., Any]) -> None:
    decoder = load_decoder(made["4-asym-act"].folder, dtype, "auto")
    expected = load_file(made["4-asym-act"].dense / "model.safetensors")
    for path, linear in decoder.quant_linears():
        assert torch.equal(linear.dequantize(), expected[f"{path}.weight"].to(dtype))


def test_zeros_of_nought_are_there(made: dict[str, Made], load_decoder: Callable[..., Any]) -> None:
    """They borrow from their neighbours in format v1; without any the tests above would prove less."""
    for case in ("2-asym", "3-asym", "4-asym-act", "8-asym"):
        linear = dict(load_decoder(made[case].folder, torch.float32, "auto").quant_linears())
        zeros = linear["model.layers.0.mlp.up_proj"].weight.zeros_GN
        assert int((zeros == 0).sum()) > 20


# --- contradictions and what is not supported ------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["none", "bnb", "bnb-fp4", "bnb-int8"])
def test_what_contradicts_the_checkpoint_is_refused(asked: str, made: dict[str, Made]) -> None:
    stored = open_checkpoint(str(made["4-32"].folder)).quantization
    with pytest.raises(ConfigError, match=f"quant={asked} contradicts the checkpoint: model.path=there is .* GPTQ"):
        resolve_spec(QuantSettings(method=asked), stored, "there")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"bits": 8}, "quant.bits=8 contradicts the checkpoint: model.path=there has 4; leave quant.bits out"),
        ({"group_size": -1}, "quant.group_size=-1 contradicts the checkpoint: model.path=there has 32"),
        ({"symmetric": False}, "quant.symmetric=false contradicts the checkpoint: model.path=there has true"),
        ({"act_order": True}, "quant.act_order=true contradicts the checkpoint: model.path=there has false"),
    ],
)
def test_values_that_contradict_the_checkpoint_are_refused(asked: dict[str, Any], found: str) -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    with pytest.raises(ConfigError) as caught:
        resolve_spec(QuantSettings(method="gptq", **asked), stored, "there")
    assert found in str(caught.value)
    agreed = QuantSettings(method="gptq", bits=4, group_size=32, symmetric=True, act_order=False)
    assert resolve_spec(agreed, stored, "there") == resolve_spec(QuantSettings(), stored, "there")


@pytest.mark.parametrize("asked", ["gptq", "bitblas"])
def test_unquantized_weights_are_not_gptq(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"quant={asked} needs a checkpoint quantized with GPTQ.*quant=bnb"):
        resolve_spec(QuantSettings(method=asked), {}, "there")


@pytest.mark.parametrize(
    "told",
    [{"bits": 5}, {"bits": None}, {"group_size": 0}, {"checkpoint_format": "gptq_p"}, {"checkpoint_format": "marlin"},
     {"pack_dtype": "int64"}, {"group_size": "x"}],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_what_is(told: dict[str, Any]) -> None:
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128} | told
    with pytest.raises(ConfigError, match=r"supported are bits 2, 3, 4 and 8"):
        resolve_spec(QuantSettings(), stored, "there")


@pytest.mark.parametrize(("case", "bits"), [("4-32", 8), ("8-asym", 4), ("3-asym", 4), ("2-asym", 3)])
def test_bits_that_the_tensors_do_not_have_are_refused(case: str, bits: int, made: dict[str, Made]) -> None:
    checkpoint = open_checkpoint(str(made[case].folder))
    spec = resolve_spec(QuantSettings(), checkpoint.quantization | {"bits": bits}, "there")
    with pytest.raises(ConfigError, match=rf"model\.safetensors: model\.layers.* but for {bits} bits"):
        spec.stored_modules(checkpoint.tensors)


# --- damage ---------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


def _without(leaf: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{UP}.{leaf}")


def _cut(leaf: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{UP}.{leaf}": tensors[f"{UP}.{leaf}"][:-1].clone()})


def _group(value: int) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.g_idx"][5] = value

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (_without("scales"), "scales is missing"),
    "no zeros": (_without("qzeros"), "qzeros is missing"),
    "no codes": (_without("qweight"), "lacks tensor model.layers.1.mlp.up_proj.weight"),
    "short codes": (_cut("qweight"), "qweight has shape"),
    "short scales": (_cut("scales"), "has shape"),
    "short zeros": (_cut("qzeros"), "qzeros has shape"),
    "group too high": (_group(4), "g_idx names group 4, but the groups are 0 to 3"),
    "group below 0": (_group(-1), "g_idx names group -1"),
    "float codes": (
        lambda tensors: tensors.update({f"{UP}.qweight": tensors[f"{UP}.qweight"].float()}),
        "qweight is F32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    damage: str, made: dict[str, Made], tmp_path: Path, load_decoder: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(made["4-32"].folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    change, message = DAMAGES[damage]
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="up_proj") as caught:
        load_decoder(folder, torch.float32, "auto")
    assert message in str(caught.value)


def test_shards_are_read_through_their_index(
    made: dict[str, Made], tmp_path: Path, load_decoder: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(made["4-asym-act"].folder, tmp_path / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{n + 1:05d}-of-00003.safetensors": names[n::3] for n in range(3)}  # a module's tensors apart
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    prompt = random_prompt(random.Random(3), 40)
    whole = load_decoder(made["4-asym-act"].folder, torch.float32, "auto")
    assert torch.equal(pass_logits(load_decoder(folder, torch.float32, "auto"), prompt), pass_logits(whole, prompt))


# --- adapters ------------------------------------------------------------------------------------------------

ADAPTED = {
    "4-asym-act": lora("all-linear", 20),
    "head": lora(["q_proj", "lm_head"], use_dora=True),
    "tied": lora(["down_proj"], modules_to_save=["lm_head", "v_proj"]),
    "fused": lora(["qkv_proj", "down_proj"]),
}
"""What is trained on which of JOBS; modules that are saved whole take the place of quantized ones."""


@pytest.fixture(scope="module")
def adapted(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    cases = {
        case: AdapterCase(base=made[case].dense, settings=settings, prompts=some_prompts())
        for case, settings in ADAPTED.items()
    }
    return make_adapters(cases, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(("case", "method"), [*((case, "gptq") for case in ADAPTED), ("4-asym-act", "bitblas")])
def test_under_an_adapter_logits_are_those_of_peft_on_the_dequantized_model(
    case: str, method: str, adapted: dict[str, Adapted], made: dict[str, Made], load_decoder: Callable[..., Any]
) -> None:
    decoder = load_decoder(made[case].folder, torch.float32, "auto", adapter=adapted[case].folder, method=method)
    assert len(list(decoder.quant_linears())) >= 8
    for n, prompt in enumerate(adapted[case].case.prompts):
        assert furthest(pass_logits(decoder, prompt), adapted[case].logits(n)) < 2e-4
