"""GPTQ checkpoints that GPTQModel has calibrated, by `pipeline.quantize` and by itself: run as GPTQModel runs them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from oracle import pass_logits, random_prompt, save_checkpoint
from safetensors.torch import load_file

from pipeline.models.checkpoint import open_checkpoint
from pipeline.quant.detect import resolve_spec
from pipeline.quant.gptq_spec import GptqSpec
from pipeline.quant.spec import QuantSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed (make setup)"),
]

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "pipeline" / "assets"
SHAPE = {"vocab_size": 2048, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 2}
ROWS = [f"data.path={ASSETS / 'tickets' / 'tickets.parquet'}", "data.limit=32", 'task.prompt="{{ ticket }}"']
PROMPTS = [random_prompt(random.Random(n), n) for n in (1, 17, 60)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Overrides of pipeline.quantize, or the settings of GPTQModel's QuantizeConfig; and how many Linears come out."""

    base: str = "llama"
    overrides: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    quantized: int = 14


CASES = {
    "ours": Case(overrides=("quant.group_size=32",)),
    "ours, all defaults": Case(base="qwen2"),
    "ours, asymmetric in order of activations": Case(
        overrides=("quant.bits=8", "quant.group_size=64", "quant.symmetric=false", "quant.act_order=true")
    ),
    "ours, one group of 3 bits": Case(overrides=("quant.bits=3", "quant.group_size=-1")),
    "asymmetric in order of activations": Case(config={"bits": 4, "group_size": 32, "sym": False, "desc_act": True}),
    "group aware": Case(base="qwen2", config={"bits": 4, "group_size": 64, "sym": True}),
    "2 bits": Case(config={"bits": 2, "group_size": 32, "sym": False, "desc_act": False}),
    "head": Case(config={"bits": 4, "group_size": 64, "lm_head": True, "desc_act": False}, quantized=15),
    "dynamic": Case(
        config={
            "bits": 4,
            "group_size": 32,
            "desc_act": False,
            "dynamic": {
                r"-:model\.layers\.0\.mlp\.down_proj": {},
                r"+:.*self_attn\..*": {"bits": 8, "group_size": 64},
            },
        },
        quantized=13,
    ),
    "v2": Case(config={"bits": 4, "group_size": 128, "sym": False, "desc_act": False, "format": "gptq_v2"}),
}
each_case = pytest.mark.parametrize("case", CASES)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": str(ROOT)}


def source(root: Path, base: str) -> Path:
    folder = save_checkpoint(base, root / base, **SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSETS / "tiny" / name, folder)
    return folder


def quantize(*overrides: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "pipeline.quantize", *overrides]
    return subprocess.run(program, capture_output=True, text=True, env=environment(), cwd=cwd, check=False)


def asked(folder: Path) -> list[str]:
    return ["model=path", f"model.path={folder}", "model.dtype=bfloat16", "quant=gptq"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unquantized checkpoints by their name."""
    root = tmp_path_factory.mktemp("sources")
    return {base: source(root, base) for base in {case.base for case in CASES.values()}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]) -> dict[str, Path]:
    """Every checkpoint of CASES, and beside it, in oracle.safetensors, what GPTQModel computes with it."""
    root = tmp_path_factory.mktemp("calibrated")
    found = {name: root / name.replace(" ", "-").replace(",", "") for name in CASES}
    jobs: list[dict[str, Any]] = []
    for name, case in CASES.items():
        job: dict[str, Any] = {"folder": str(found[name])}
        if case.config:
            job |= {"source": str(sources[case.base]), "config": case.config}
        else:
            done = quantize(*asked(sources[case.base]), *case.overrides, *ROWS, f"output.dir={found[name]}")
            assert done.returncode == 0, done.stderr[-3000:]
        jobs.append(job | {"prompts": PROMPTS, "target": str(root / f"{found[name].name}.oracle.safetensors")})
    program = [sys.executable, str(Path(__file__).with_name("calibrate_gptq.py"))]
    done = subprocess.run(
        program, input=json.dumps(jobs), capture_output=True, text=True, env=environment(), cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found


def oracle(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder.with_name(f"{folder.name}.oracle.safetensors"))


@each_case
def test_weights_are_those_that_gptqmodel_dequantizes_bit_for_bit(
    case: str, folders: dict[str, Path], load_decoder: Callable[..., Any]
) -> None:
    linears = dict(load_decoder(folders[case], torch.float32, "auto").quant_linears())
    weights = {n.removeprefix("weight."): t for n, t in oracle(folders[case]).items() if n.startswith("weight.")}
    assert {path.removesuffix(".linear") for path in linears} == set(weights)
    assert len(linears) == CASES[case].quantized
    for path, linear in linears.items():
        assert torch.equal(linear.dequantize(), weights[path.removesuffix(".linear")]), path


@each_case
def test_logits_are_those_of_gptqmodel(case: str, folders: dict[str, Path], load_decoder: Callable[..., Any]) -> None:
    """In float32 within rounding; in float16 no further from them than GPTQModel's own float16."""
    expected = oracle(folders[case])
    decoder, half = (load_decoder(folders[case], dtype, "auto") for dtype in (torch.float32, torch.float16))
    ours, theirs = [], []
    for n, prompt in enumerate(PROMPTS):
        exact = expected[f"logits.{n}"]
        assert float((pass_logits(decoder, prompt) - exact).abs().max()) < 2e-4 * float(exact.abs().max())
        ours.append(pass_logits(half, prompt) - exact)
        theirs.append(expected[f"half.{n}"] - exact)
    our_error, their_error = (float(torch.cat(errors).square().mean().sqrt()) for errors in (ours, theirs))
    assert our_error < 1.2 * their_error


def test_the_head_has_bits_and_groups_of_its_own(folders: dict[str, Path]) -> None:
    """GPTQModel takes 8 bits in groups of 32 for it, whatever the rest has, and writes that down as an override."""
    checkpoint = open_checkpoint(str(folders["head"]))
    spec = resolve_spec(QuantSettings(), checkpoint.quantization, "there")
    formats = {m.path: (m.bits, m.group_size) for m in spec.stored_modules(checkpoint.tensors)}
    assert formats["lm_head"] == (8, 32)
    assert formats["model.layers.0.mlp.up_proj"] == (4, 64)


@pytest.mark.parametrize("case", ["ours", "ours, all defaults", "ours, asymmetric in order of activations"])
def test_what_was_asked_for_is_what_is_written(case: str, folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(folders[case]))
    spec = resolve_spec(QuantSettings(), checkpoint.quantization, "there")
    assert isinstance(spec, GptqSpec)
    wanted = {"bits": 4, "group_size": 128, "symmetric": True, "act_order": False}
    for override in CASES[case].overrides:
        key, value = override.removeprefix("quant.").split("=")
        wanted[key] = json.loads(value)
    assert {key: getattr(spec, key) for key in wanted} == wanted
    assert checkpoint.config["dtype"] == "bfloat16"
    assert (folders[case] / "chat_template.jinja").read_bytes() == (
        ASSETS / "tiny" / "chat_template.jinja"
    ).read_bytes()
    for name in ("config.json", "quantize_config.json"):
        assert "/tmp" not in (folders[case] / name).read_text(), "a folder of this machine"


def test_calibration_counts(sources: dict[str, Path], tmp_path: Path) -> None:
    """Other rows give other codes: it is not rounding to nearest."""
    codes = []
    (tmp_path / "here").mkdir()
    for number, words in enumerate(("{{ ticket }}", "other words " * 9 + "{{ topic }}")):
        more = [*ROWS[:1], "data.limit=16", f'task.prompt="{words}"', f"output.dir={tmp_path / str(number)}"]
        done = quantize(*asked(sources["llama"]), *more, cwd=tmp_path / "here")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "calibrating on 16 rows" in done.stderr
        weights = load_file(tmp_path / str(number) / "model.safetensors")
        codes.append(weights["model.layers.1.mlp.down_proj.qweight"])
    assert not torch.equal(*codes)
    assert not list((tmp_path / "here").iterdir()), "the library's logs are nobody's matter"


def test_interrupted_it_leaves_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    overrides = [*asked(sources["llama"]), *ROWS, f"output.dir={tmp_path / 'out'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.quantize", *overrides], stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    while "calibrating on" not in (line := process.stderr.readline()):
        assert line, "ended before"
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 75, err
    assert "stopped while calibrating; nothing was left in output.dir" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
    assert not any(child.is_running() for child in children), "the library's process has ended too"


def test_what_the_library_cannot_do_is_a_failure_that_leaves_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    """Groups that do not divide the inputs."""
    overrides = [*asked(sources["llama"]), *ROWS, "quant.group_size=100", f"output.dir={tmp_path / 'out'}"]
    done = quantize(*overrides)
    assert done.returncode == 1, done.stderr
    assert "error: gptqmodel could not quantize" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
