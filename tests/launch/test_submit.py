"""What `python -m pipeline.submit` refuses, and the script it would run; tests/slurm runs it."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

import pytest

from pipeline import submit as command
from pipeline.config import credentials_in
from pipeline.launch.shared_paths import mount_of

DEMO = ["experiment=demo", "model.device=cpu"]
MOUNTS = """\
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 21 0:26 / /dev/shm rw shared:4 - tmpfs tmpfs rw
41 21 0:44 / /home rw,relatime shared:20 - nfs4 server:/home rw,vers=4.2
42 41 0:45 / /home/scratch rw - xfs /dev/sdb rw
43 21 0:46 / /my\\040data rw - fuse.sshfs host:/data rw
44 21 0:47 / /mnt rw - ext4 /dev/sdc rw
45 44 0:48 / /mnt rw - lustre mds:/fs rw
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which sinfo tells of two nodes elsewhere; the folder with the programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "sinfo", "printf 'gpu01\\ngpu02.example.org\\n'")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return programs


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command.main([*DEMO, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refusal(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2 and not out, (out, err)
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    return err


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/tmp/out", "ext4", False),
        ("/dev/shm/out", "tmpfs", False),
        ("/home/me/out", "nfs4", True),
        ("/home/scratch/out", "xfs", False),
        ("/homework", "ext4", False),
        ("/my data/out", "fuse.sshfs", True),
        ("/mnt/out", "lustre", True),
    ],
)
def test_which_file_systems_others_see(path: str, kind: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.launch.shared_paths._existing", lambda path: path)
    mount = mount_of(Path(path), MOUNTS)
    assert (mount.kind, mount.shared) == (kind, shared)


def test_the_real_table_of_mounts_is_understood() -> None:
    assert mount_of(Path("/proc/self"), Path("/proc/self/mountinfo").read_text()).kind == "proc"
    assert mount_of(Path("/no/such/folder"), Path("/proc/self/mountinfo").read_text()).point == Path("/")


def test_an_output_that_the_nodes_do_not_see(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(f"output.dir={tmp_path}/out", capsys=capsys)
    assert f"output.dir={tmp_path}/out" in message and "gpu01, gpu02" in message and "launcher.shared=true" in message
    assert not (tmp_path / "out").exists()
    code, out, _ = run(f"output.dir={tmp_path}/out", "--shared=true", "--dry-run", capsys=capsys)
    assert code == 0 and "label_array.sbatch" in out


def test_nodes_that_are_this_machine_see_everything(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(cluster / "sinfo", "hostname")
    code, out, _ = run(f"output.dir={tmp_path}/out", "--dry-run", capsys=capsys)
    assert code == 0 and "label_array.sbatch" in out


def test_a_model_that_is_not_here(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"output.dir={tmp_path}/out", "--shared=true", "--dry-run"]
    message = refusal("model=llama7b", *where, capsys=capsys)
    assert "model.path=huggyllama/llama-7b is not here" in message
    assert "hf download huggyllama/llama-7b" in message and "launcher.network=true" in message
    assert "model.adapter" in refusal("model.adapter=some/adapter", *where, capsys=capsys)
    assert run("model=llama7b", *where, "--network=true", capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task.prompt='{{ nosuch }}'", "task.prompt_file=null"], "nosuch"),
        (["data.path=/no/such/file.parquet"], "/no/such/file.parquet"),
        (["model=path", "model.path=/no/such/model"], "/no/such/model"),
        (["sampling.seed=x"], "sampling.seed"),
        (["--tasks=0"], "launcher.tasks must be at least 1"),
        (["--tasks"], "--tasks has no value"),
        (["--gpus=all"], "launcher.gpus must be a number of GPUs for each task"),
        (["--nosuch=1"], "launcher.nosuch"),
        (["shard.index=7", "shard.count=2"], "shard.index"),
        (["data.storage_options={secret: hush}"], "data.storage_options"),
        (["+data.storage_options.secret=hush"], "data.storage_options.secret"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_every_task_would_stumble_over(
    arguments: list[str], said: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(f"output.dir={tmp_path}/out", "--shared=true", *arguments, capsys=capsys)


def test_without_slurm_there_is_only_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no sbatch here" in refusal(f"output.dir={tmp_path}/out", capsys=capsys)
    assert run(f"output.dir={tmp_path}/out", "--dry-run", capsys=capsys)[0] == 0


def sbatch_lines(script: str) -> list[list[str]]:
    return [
        shlex.split(line.partition("$(")[2].partition(")")[0]) for line in script.splitlines() if "$(sbatch" in line
    ]


def test_what_is_asked_of_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "task.prompt='What is \"it\"? {{ ticket }}'"
    code, out, err = run(
        f"output.dir={tmp_path}/my out", template, "task.prompt_file=null", "--tasks", "8", "--at-once=2",
        "--time=4:00:00", "--partition", "low", "--gpus=2", "--cpus=4", "--mem=10G", "--name=x y", "--shared=true",
        "--options", "--exclude=n1 --nice=5", "--requeues=3", "--dry-run",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    array, finish = sbatch_lines(out)
    for option in ("--array=0-7%2", "--time=4:00:00", "--partition=low", "--gres=gpu:2", "--cpus-per-task=4",
                   "--mem=10G", "--job-name=x y", "--exclude=n1", "--nice=5"):  # fmt: skip
        assert option in array
    assert "REQUEUES=3" in out
    script = next(word for word in array if word.endswith(".sbatch"))
    assert Path(script).name == "label_array.sbatch" and Path(script).is_file()
    asked = array[array.index(script) + 1 :]
    assert asked == [*DEMO, f"output.dir={tmp_path}/my out", template, "task.prompt_file=null", "launcher.gpus=all"]
    assert "--partition=low" in finish and not any(word.startswith(("--gres", "--array")) for word in finish)
    assert "--dependency=afterany:$array" in finish
    assert not (tmp_path / "my out").exists()


def test_the_launcher_by_its_own_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.__main__ import main

    arguments = [*DEMO, f"output.dir={tmp_path}/out", "launcher=slurm", "launcher.tasks=3", "launcher.shared=true"]
    assert main([*arguments, "dry_run=true"]) == 0
    array, _ = sbatch_lines(capsys.readouterr().out)
    assert "--array=0-2" in array and "--gres=none" in array
    assert array[-2:] == [DEMO[1], f"output.dir={tmp_path}/out"]


def test_credentials_are_found_and_references_are_not() -> None:
    secret = "data.storage_options.secret"
    assert credentials_in([f"+{secret}=hush", "data.path=x"]) == [secret]
    assert credentials_in(["data.path=s3://user:hush@host/x"]) == ["data.path"]
    assert credentials_in([f"+{secret}=${{oc.env:SECRET}}", "data.path=s3://bucket/x", "sampling.seed=3"]) == []
    assert credentials_in(["task.prompt='the secret key: {{ key }}'", "task.labels=[token, key]"]) == []


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--tasks", "--at-once", "--time", "--shared", "--network", "--dry-run"))
