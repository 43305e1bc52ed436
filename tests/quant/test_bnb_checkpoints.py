"""Checkpoints that transformers and bitsandbytes have saved: NF4, FP4 and INT8, recognised and run as they run them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import QUANTS, VOCAB, oracle_logits, pass_logits, random_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.core import Request, SamplingParams
from pipeline.errors import ConfigError
from pipeline.kernels.bnb import bitsandbytes
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quant.bnb_spec import BnbSpec
from pipeline.quant.detect import resolve_spec
from pipeline.quant.spec import QuantSettings

WEIGHTS = "model.safetensors"
FOUR_BIT = ("nf4", "nf4-single", "fp4", "fp4-single")
EIGHT_BIT = ("int8", "int8-plain")
STORAGES = ("uint8", "bfloat16", "float32")
SAVED = [
    *(pytest.param(quant, storage, id=f"{quant}-{storage}") for quant in FOUR_BIT for storage in STORAGES),
    *(pytest.param("nf4", storage, id=f"nf4-{storage}") for storage in ("int8", "float16", "float64")),
    *(pytest.param(quant, "uint8", id=quant) for quant in EIGHT_BIT),
]
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16)]
BASE = "qwen2"
UP = "model.layers.1.mlp.up_proj"

Save = Callable[..., Path]


def bnb_config(quant: str, storage: str, dtype: torch.dtype, **more: Any) -> BitsAndBytesConfig:
    """What a user of transformers would ask for."""
    asked = QUANTS[quant]
    if quant in EIGHT_BIT:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=asked["int8_threshold"], **more)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.split("-")[0],
        bnb_4bit_use_double_quant=asked["double_quant"],
        bnb_4bit_quant_storage=getattr(torch, storage),
        bnb_4bit_compute_dtype=dtype,
        **more,
    )


@pytest.fixture(scope="module")
def saved(checkpoint_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Quantization, storage and dtype to the folder that save_pretrained has written."""
    bitsandbytes()

    @cache
    def save(
        quant: str,
        storage: str = "uint8",
        dtype: torch.dtype = torch.bfloat16,
        skip: str | None = None,
        shard: str = "1GB",
    ) -> Path:
        more = {} if skip is None else {"llm_int8_skip_modules": skip.split()}
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint_folder(BASE),
            dtype=dtype,
            quantization_config=bnb_config(quant, storage, dtype, **more),
            device_map="cpu",
        )
        folder = tmp_path_factory.mktemp("saved") / f"{quant}-{storage}"
        model.save_pretrained(folder, max_shard_size=shard)
        return folder

    return save


@pytest.fixture
def copy_of(saved: Save, tmp_path: Path) -> Callable[[str], Path]:
    """A saved checkpoint's folder that a test may break."""
    return lambda quant: Path(shutil.copytree(saved(quant), tmp_path / quant))


def quantized_by_transformers(model: nn.Module) -> dict[str, Any]:
    kinds = (bitsandbytes().nn.Linear4bit, bitsandbytes().nn.Linear8bitLt)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def dense_by_transformers(linear: Any) -> Tensor:
    """bitsandbytes' own dequantization of its own module."""
    if isinstance(linear, bitsandbytes().nn.Linear8bitLt):
        statistics = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.data.float() * statistics[:, None] / 127  # type: ignore[no-any-return]
    weight: Tensor = bitsandbytes().functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return weight


def make_dense(model: nn.Module) -> nn.Module:
    """Put ordinary Linears with the dequantized weights in place of bitsandbytes' own."""
    for path, linear in quantized_by_transformers(model).items():
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
        dense.weight, dense.bias = nn.Parameter(dense_by_transformers(linear), requires_grad=False), linear.bias
        model.set_submodule(path, dense)
    return model


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


# --- recognised and run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "storage"), SAVED)
def test_recognised_from_its_config(quant: str, storage: str, saved: Save) -> None:
    folder = saved(quant, storage)
    stored = open_checkpoint(str(folder)).quantization
    spec = resolve_spec(QuantSettings(), stored, str(folder))
    if quant in EIGHT_BIT:
        threshold = QUANTS[quant]["int8_threshold"]
        assert spec == BnbSpec(bits=8, int8_threshold=threshold, stored=True, skip_modules=spec.skip_modules)
        assert spec.batch_invariant is (threshold == 0)
    else:
        double, kind = QUANTS[quant]["double_quant"], quant.split("-")[0]
        assert (spec.bits, spec.quant_type, spec.blocksize, spec.double_quant) == (4, kind, 64, double)
        assert spec.batch_invariant
    assert spec.stored
    assert resolve_spec(QuantSettings(**QUANTS[quant]), stored, str(folder)) == spec, "asked for by its name"


@pytest.mark.parametrize(("quant", "storage"), SAVED)
def test_runs_as_if_quantized_in_flight(
    quant: str, storage: str, saved: Save, checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    """The same logits bit for bit, and the same weights in the same places."""
    decoder = load_decoder(saved(quant, storage), torch.bfloat16, "auto")
    in_flight = load_decoder(checkpoint_folder(BASE), torch.bfloat16, quant)
    assert decoder.unused_tensors == ()
    ours, expected = dict(decoder.quant_linears()), dict(in_flight.quant_linears())
    assert set(ours) == set(expected)
    assert len(ours) == 7 * 3
    for path, linear in ours.items():
        assert torch.equal(linear.dequantize(), expected[path].dequantize()), path
        assert linear.stored_bytes == expected[path].stored_bytes
    prompt = random_prompt(random.Random(0), 70)
    assert torch.equal(pass_logits(decoder, prompt), pass_logits(in_flight, prompt))
    assert decoder.weight_bytes() == in_flight.weight_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", [*FOUR_BIT, *EIGHT_BIT])
def test_weights_are_those_that_transformers_loads(
    quant: str, dtype: torch.dtype, saved: Save, load_decoder: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    folder = saved(quant, "uint8", dtype)
    theirs = quantized_by_transformers(reference(folder, dtype))
    ours = dict(load_decoder(folder, dtype, "auto").quant_linears())
    assert set(ours) == set(theirs)
    for path, linear in ours.items():
        assert torch.equal(linear.dequantize(), dense_by_transformers(theirs[path]).to(dtype)), path
        assert (linear.bias is None) == (theirs[path].bias is None)
        if linear.bias is not None:
            assert torch.equal(linear.bias, theirs[path].bias.to(dtype))


@pytest.mark.parametrize("quant", FOUR_BIT)
def test_four_bit_logits_equal_those_of_the_dequantized_model(
    quant: str, saved: Save, load_decoder: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """In float32, where transformers' products of 4-bit weights on CPU would round to bfloat16."""
    folder = saved(quant, "uint8", torch.float32)
    model = make_dense(reference.__wrapped__(folder, torch.float32))  # type: ignore[attr-defined]  # one of its own
    decoder = load_decoder(folder, torch.float32, "auto")
    for length in (1, 17, 200):
        prompt = random_prompt(random.Random(length), length)
        assert float((pass_logits(decoder, prompt).double() - oracle_logits(model, prompt)).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", EIGHT_BIT)
def test_eight_bit_products_are_those_of_bitsandbytes(
    quant: str, dtype: torch.dtype, saved: Save, load_decoder: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """Every Linear on the same inputs, some of which reach the threshold, against transformers' own module."""
    folder = saved(quant, "uint8", dtype)
    theirs = quantized_by_transformers(reference(folder, dtype))
    torch.manual_seed(0)
    for path, linear in load_decoder(folder, dtype, "auto").quant_linears():
        x = (torch.randn(1, 32, linear.in_features) * 2).to(dtype)
        assert bool((x.abs() >= 6).any())
        with torch.no_grad():
            ours, expected = linear(x), theirs[path](x)
        step = torch.finfo(dtype).eps * expected.abs().double() + 1e-6
        assert bool(((ours - expected).abs() <= step).all()), path


@pytest.mark.parametrize("quant", EIGHT_BIT)
def test_eight_bit_logits_err_no_more_than_transformers_own(
    quant: str, saved: Save, load_decoder: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """Against the dequantized weights in float64: a last bit that differs may move an activation to the next code,
    so that two forwards differ as much as each differs from the exact one."""
    folder = saved(quant)
    decoder, model = load_decoder(folder, torch.bfloat16, "auto"), reference(folder, torch.bfloat16)
    exact = reference.__wrapped__(folder, torch.bfloat16)  # type: ignore[attr-defined]  # one of its own
    exact = make_dense(exact).double()
    ours, theirs, size = [], [], []
    for length in (5, 64, 150):
        prompt = random_prompt(random.Random(length), length)
        expected = oracle_logits(exact, prompt)
        ours.append(pass_logits(decoder, prompt).double() - expected)
        theirs.append(oracle_logits(model, prompt) - expected)
        size.append(expected)
    our_error, their_error, whole = (float(torch.cat(e).square().mean().sqrt()) for e in (ours, theirs, size))
    assert our_error < 1.2 * their_error
    assert our_error < 0.1 * whole


@pytest.mark.parametrize("quant", [*FOUR_BIT, *EIGHT_BIT])
def test_both_kernels_give_the_same_logits(quant: str, saved: Save, load_decoder: Callable[..., Any]) -> None:
    """4 bits: the same weights, so the same bits. 8 bits: the same integers, so all but the last rounding."""
    prompt = random_prompt(random.Random(1), 50)
    by_kernel = [
        pass_logits(load_decoder(saved(quant), torch.float32, "auto", kernel), prompt)
        for kernel in ("reference", "bitsandbytes")
    ]
    if quant in FOUR_BIT:
        assert torch.equal(*by_kernel)
    else:
        assert float((by_kernel[0] - by_kernel[1]).abs().max()) < 1e-3 * float(by_kernel[0].abs().max())


@pytest.mark.parametrize("quant", ["nf4", "int8-plain"])
def test_modules_to_skip_are_stored_unquantized(
    quant: str,
    saved: Save,
    checkpoint_folder: Callable[[str], Path],
    load_decoder: Callable[..., Any],
    reference: Callable[..., Any],
) -> None:
    folder = saved(quant, skip="lm_head down_proj model.layers.0.self_attn")
    decoder = load_decoder(folder, torch.bfloat16, "auto")
    ours = dict(decoder.quant_linears())
    assert set(ours) == set(quantized_by_transformers(reference(folder, torch.bfloat16)))
    assert not any("down_proj" in path or "layers.0.self_attn" in path for path in ours)
    assert len(ours) == 7 * 3 - 3 - 4
    skip = ("down_proj", "model.layers.0.self_attn")
    in_flight = load_decoder(checkpoint_folder(BASE), torch.bfloat16, quant, skip_modules=skip)
    prompt = random_prompt(random.Random(2), 20)
    assert torch.equal(pass_logits(decoder, prompt), pass_logits(in_flight, prompt))


@pytest.mark.parametrize("quant", ["nf4", "fp4-single", "int8-plain"])
def test_a_quantized_output_head(
    quant: str, saved: Save, load_decoder: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """Which transformers makes of an empty list of modules to skip."""
    folder = saved(quant, dtype=torch.float32, skip="")
    decoder = load_decoder(folder, torch.float32, "auto")
    ours = {path.removesuffix(".linear"): linear for path, linear in decoder.quant_linears()}
    model = reference.__wrapped__(folder, torch.float32)  # type: ignore[attr-defined]  # one of its own
    theirs = quantized_by_transformers(model)
    assert set(ours) == set(theirs) and "lm_head" in ours and len(ours) == 7 * 3 + 1
    for path, linear in ours.items():
        assert torch.equal(linear.dequantize(), dense_by_transformers(theirs[path])), path
    prompt = random_prompt(random.Random(5), 40)
    logits = pass_logits(decoder, prompt).double()
    expected = oracle_logits(make_dense(model) if quant in FOUR_BIT else model, prompt)
    error = (logits - expected).abs()
    assert float(error.max() if quant in FOUR_BIT else error.square().mean().sqrt()) < (
        1e-4 if quant in FOUR_BIT else 0.02 * float(expected.square().mean().sqrt())
    )


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_several_files_with_an_index(quant: str, saved: Save, load_decoder: Callable[..., Any]) -> None:
    """As transformers splits them: a weight's statistics may lie in another file than its codes."""
    folder = saved(quant, shard="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    whole, sharded = (load_decoder(f, torch.bfloat16, "auto") for f in (saved(quant), folder))
    prompt = random_prompt(random.Random(6), 30)
    assert torch.equal(pass_logits(sharded, prompt), pass_logits(whole, prompt))


BLOCKSIZES = (32, 64, 128, 256, 1024, 4096)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(
    blocksize: int,
    double: bool,
    kernel: str,
    checkpoint_folder: Callable[[str], Path],
    tmp_path: Path,
    load_decoder: Callable[..., Any],
) -> None:
    """transformers only writes blocks of 64; bitsandbytes itself quantizes these, and config.json does not tell."""
    folder = Path(shutil.copytree(checkpoint_folder(BASE), tmp_path / "blocks"))
    weights, expected = load_file(folder / WEIGHTS), {}
    functional = bitsandbytes().functional
    for name in [n for n in weights if "proj.weight" in n]:
        kind = "fp4" if "down_proj" in name else "nf4"  # nor of the code, which each weight names for itself
        packed, state = functional.quantize_4bit(
            weights[name], blocksize=blocksize, quant_type=kind, compress_statistics=double
        )
        weights |= {f"{name}.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
        shape, weights[name] = state.shape, packed
        state.shape = torch.Size((1, shape.numel()))  # with rows that end within a block, its AVX512 code errs
        expected[name.removesuffix(".weight")] = functional.dequantize_4bit(packed, state).reshape(shape)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = bnb_config("nf4", "uint8", torch.float32).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    modules = resolve_spec(QuantSettings(), checkpoint.quantization, "there").stored_modules(checkpoint.tensors)
    assert {module.group_size for module in modules} == {blocksize}
    assert {module.code for module in modules} == {"nf4", "fp4"}
    linears = dict(load_decoder(folder, torch.float32, "auto", kernel).quant_linears())
    assert set(linears) == set(expected)
    for path, linear in linears.items():
        assert torch.equal(linear.dequantize(), expected[path]), path
        assert linear.stored_bytes == next(m.num_bytes for m in modules if m.path == path)


FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
VARIANTS = {
    "no method": ("nf4", FOUR | NF4),
    "the first ones": ("nf4", FOUR | {"load_in_8bit": False} | NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}),
    "underscores alone": ("nf4", {"quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False} | NF4),
    "no flag": ("nf4", {"quant_method": "bitsandbytes"} | NF4),
    "no type": ("nf4", {"quant_method": "bitsandbytes"} | FOUR),
    "method in capitals": ("nf4", {"quant_method": "BITSANDBYTES"} | FOUR | NF4),
    "8 bits, no method": ("int8", EIGHT),
    "8 bits, underscores alone": ("int8", {"quant_method": "bitsandbytes", "_load_in_8bit": True}),
    "8 bits, no threshold": ("int8", {"quant_method": "bitsandbytes", "llm_int8_threshold": None} | EIGHT),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_of_older_and_newer_tools(
    variant: str, copy_of: Callable[[str], Path], saved: Save, load_decoder: Callable[..., Any]
) -> None:
    quant, told = VARIANTS[variant]
    folder = copy_of(quant)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": told}
    (folder / "config.json").write_text(json.dumps(config))
    prompt = random_prompt(random.Random(7), 30)
    expected = pass_logits(load_decoder(saved(quant), torch.bfloat16, "auto"), prompt)
    assert torch.equal(pass_logits(load_decoder(folder, torch.bfloat16, "auto"), prompt), expected)


def test_eight_bit_weights_are_not_cached_dequantized(saved: Save, load_decoder: Callable[..., Any]) -> None:
    """Their product is another one than the dense one."""
    decoder = load_decoder(saved("int8-plain"), torch.bfloat16, "auto")
    assert decoder.cache_dequantized(1 << 40) == 0


# --- neighbours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["reference", "bitsandbytes"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_without_threshold_do_not_look_at_neighbours(
    kernel: str, dtype: torch.dtype, saved: Save, load_decoder: Callable[..., Any], build_engine: Callable[..., Any]
) -> None:
    rng = random.Random(3)
    rows = [
        Request(
            id=n,
            prompt_ids=random_prompt(rng, rng.choice([1, 9, 40, 130])),
            sampling=SamplingParams(max_new_tokens=6, temperature=n % 2, seed=n),
            candidates=((5, 6), (7,)) if n % 3 == 0 else (),
        )
        for n in range(30)
    ]
    under_test = build_engine(saved("int8-plain"), dtype, "auto", slots=16, kernel=kernel)
    together = under_test.answer(rows)
    assert under_test.answer(reversed(rows)) == together
    for row in rows[::4]:
        assert under_test.answer([row]) == {row.id: together[row.id]}


def test_a_threshold_that_is_reached_makes_a_row_depend_on_its_neighbours(
    checkpoint_folder: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    """Which is why the spec says so: the columns that are not quantized are found over the whole pass."""
    spec = resolve_spec(QuantSettings(method="bnb-int8", int8_threshold=2.0), {}, "there")
    assert spec.batch_invariant is False
    decoder = load_decoder(checkpoint_folder(BASE), torch.float32, "int8", int8_threshold=2.0)
    prompt = random_prompt(random.Random(4), 40)
    long, short = pass_logits(decoder, prompt)[:20], pass_logits(decoder, prompt[:20])
    assert float((long - short).abs().max()) > 0


# --- contradictions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["none", "bnb", "bnb-fp4", "bnb-int8"])
@pytest.mark.parametrize(("quant", "fitting"), [("nf4", "bnb"), ("fp4-single", "bnb-fp4"), ("int8", "bnb-int8")])
def test_what_contradicts_the_checkpoint_is_refused_with_what_would_work(
    quant: str, fitting: str, asked: str, saved: Save
) -> None:
    config = open_checkpoint(str(saved(quant))).quantization
    if asked == fitting:
        assert resolve_spec(QuantSettings(method=asked), config, "there").stored
        return
    with pytest.raises(ConfigError, match=f"quant={asked} contradicts the checkpoint: model.path=there") as caught:
        resolve_spec(QuantSettings(method=asked), config, "there")
    assert f"use quant=auto or quant={fitting}" in str(caught.value)
    assert quant.split("-")[0].upper() in str(caught.value)


def test_the_threshold_asked_for_goes_before_the_stored_one(saved: Save) -> None:
    config = open_checkpoint(str(saved("int8"))).quantization
    plain = QuantSettings(method="bnb-int8", int8_threshold=0.0)
    assert resolve_spec(plain, config, "there").int8_threshold == 0.0
    assert resolve_spec(QuantSettings(), config, "there").int8_threshold == 6.0


# --- broken checkpoints -----------------------------------------------------------------------------------------


def pop(leaf: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.pop(f"{UP}.{leaf}")


def put(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({f"{UP}.{leaf}": change(weights[f"{UP}.{leaf}"]).contiguous()})


def state(**changes: Any) -> Callable[[Tensor], Tensor]:
    """Other values in the JSON among the statistics."""

    def change(tensor: Tensor) -> Tensor:
        values = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    return change


STATE = "weight.quant_state.bitsandbytes__nf4"
BROKEN = {
    "nf4-no-state": ("nf4", pop(STATE)),
    "nf4-no-absmax": ("nf4", pop("weight.absmax")),
    "nf4-no-nested-map": ("nf4", pop("weight.nested_quant_map")),
    "nf4-no-nested-absmax": ("nf4", pop("weight.nested_absmax")),
    "nf4-no-weight": ("nf4", pop("weight")),
    "nf4-short-absmax": ("nf4", put("weight.absmax", lambda t: t[:-1])),
    "nf4-short-nested-absmax": ("nf4", put("weight.nested_absmax", lambda t: t[:0])),
    "nf4-short-weight": ("nf4", put("weight", lambda t: t[:-32])),
    "nf4-no-json": ("nf4", put(STATE, lambda t: t[:-5])),
    "nf4-not-a-state": ("nf4", put(STATE, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8))),
    "nf4-other-code": ("nf4", put(STATE, state(quant_type="nf3"))),
    "nf4-other-shape": ("nf4", put(STATE, state(shape=[64, 128]))),
    "nf4-no-shape": ("nf4", put(STATE, state(shape=None))),
    "nf4-blocksize-0": ("nf4", put(STATE, state(blocksize=0))),
    "nf4-single-no-absmax": ("nf4-single", pop("weight.absmax")),
    "int8-no-scales": ("int8", pop("SCB")),
    "int8-no-weight": ("int8", pop("weight")),
    "int8-short-scales": ("int8", put("SCB", lambda t: t[:-1])),
    "int8-other-weight": ("int8", put("weight", lambda t: t.to(torch.int16))),
    "int8-other-shape": ("int8", put("weight", lambda t: t[:, :-1])),
    "int8-other-layout": ("int8", put("weight_format", lambda t: torch.full_like(t, 2))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_statistics_name_file_and_module(
    name: str, copy_of: Callable[[str], Path], load_decoder: Callable[..., Any]
) -> None:
    quant, change = BROKEN[name]
    folder = copy_of(quant)
    change_weights(folder, change)
    with pytest.raises(ConfigError) as caught:
        load_decoder(folder, torch.bfloat16, "auto")
    assert UP in str(caught.value)
    assert str(folder / WEIGHTS) in str(caught.value)
    assert "fetch" in str(caught.value)


def test_the_vocabulary_of_the_checkpoint_is_the_tests_own(saved: Save) -> None:
    """The head and the embedding were saved unquantized."""
    shapes = {n: i.shape for n, i in open_checkpoint(str(saved("nf4"))).tensors.items() if "head" in n or "embed" in n}
    assert shapes == {"lm_head.weight": (VOCAB, 64), "model.embed_tokens.weight": (VOCAB, 64)}
