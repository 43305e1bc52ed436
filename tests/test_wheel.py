"""The wheel: built, installed beside nothing else, run from another folder."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline import __version__, config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def check(*command: str | Path, cwd: Path, site: Path | None = None) -> str:
    """Standard output of a command; with `site`, that folder's packages come before all others."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` builds."""
    folder = tmp_path_factory.mktemp("wheel")
    check(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    check(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_configuration_and_assets_are_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"pipeline/conf/{file.relative_to(ROOT / 'conf').as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "pipeline").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert conf <= names
    assert {f"pipeline/jobs/{file.name}" for file in (ROOT / "jobs").iterdir()} <= names
    assert package <= names
    assert not [name for name in names if not name.startswith(("pipeline/", "quantized_batch_pipeline-"))]


def test_the_installed_copy_runs_from_another_folder(site: Path, tmp_path: Path) -> None:
    where = check(sys.executable, "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path, site=site)
    assert Path(where.strip()).is_relative_to(site)
    shown = check(sys.executable, "-m", "pipeline", "--help", cwd=tmp_path, site=site)
    assert all(choice in shown for choice in config.choices("model"))


def test_the_installed_copy_plans_the_demo(site: Path, tmp_path: Path) -> None:
    plan = check(sys.executable, "-m", "pipeline", "dry_run=true", "experiment=demo", cwd=tmp_path, site=site)
    assert str(site) in plan, "the model or the data of another copy"
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_the_console_script_resolves(site: Path, tmp_path: Path) -> None:
    [entry_points] = site.glob("*.dist-info/entry_points.txt")
    parsed = configparser.ConfigParser()
    parsed.read(entry_points)
    assert parsed["console_scripts"]["pipeline"] == "pipeline.__main__:main"
    assert check(sys.executable, site / "bin" / "pipeline", "--version", cwd=tmp_path, site=site).strip() == __version__
