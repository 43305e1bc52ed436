"""A Slurm for the session, and the run that everything is compared with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

from harness import results, run_cli
from lab import SlurmLab, missing_programs, run_args

REQUIRED = "PIPELINE_TESTS_NEED_SLURM"
"""Set where Slurm has been installed for the tests (.ci/run): then nothing may be skipped for want of it."""


@pytest.fixture(scope="session")
def lab() -> Iterator[SlurmLab]:
    missing = missing_programs()
    if missing and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but there is no {', '.join(missing)}")
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing): sudo scripts/install_slurm.sh")
    slurm = SlurmLab()
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process without Slurm."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run_cli(*run_args(out)).done()
    assert results(out).num_rows == 2000
    return out
