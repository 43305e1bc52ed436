"""The job scripts as they are, on a real Slurm of two nodes: killed, requeued, preempted, lost, and every row once."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from harness import REPOSITORY, TICKETS, Ended, environment, nothing_left_over, parts, stats, write
from lab import CHUNK_ROWS, SlurmLab, run_args

pytestmark = pytest.mark.slow

JOBS = REPOSITORY / "jobs"
NUM_CHUNKS = 2000 // CHUNK_ROWS


class Cluster:
    """What a user of the lab types, in a folder of their own."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.out = folder / "out"
        self.args = run_args(self.out)
        self.env = environment(**{**lab.env, "PIPELINE_PYTHON": sys.executable})

    def sbatch(self, script: str, *arguments: str, **env: str) -> str:
        """Submit one of the job scripts as it is; options of sbatch begin with -. Returns the job's id."""
        options = [a for a in arguments if a.startswith("-")]
        rest = [a for a in arguments if not a.startswith("-")]
        command = ["sbatch", "--parsable", "--gres=none", *options, str(JOBS / script), *self.args, *rest]
        return self.lab.run(*command, env=self.env | env, cwd=self.folder)

    def python(self, module: str, *arguments: str, **env: str) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=self.env | env, cwd=self.folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr, 0.0)

    def until_parts(self, count: int) -> None:
        self.lab.until(lambda: len(parts(self.out)) >= count, f"no {count} parts: {self.log()}", 120)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.rglob("*.log")))

    def finished(self, *jobs: str) -> str:
        """Run the finish job after these, and give what it says."""
        job = self.lab.run(
            "sbatch", "--parsable", f"--dependency=afterany:{':'.join(jobs)}", str(JOBS / "finish.sbatch"), *self.args,
            env=self.env, cwd=self.folder,
        )  # fmt: skip
        states = self.lab.wait(*jobs, job, seconds=300)
        log = next(self.folder.glob(f"*-{job}.log")).read_text()
        return f"{states[job]} {log.strip().splitlines()[-1]}"


@pytest.fixture
def cluster(lab: SlurmLab, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(lab, tmp_path)
    lab.tries("scancel", "--full", "--me")
    lab.until(lambda: not lab.run("squeue", "-h"), "jobs stay in the queue")
    lab.until(lambda: {lab.node_state(n) for n in ("n1", "n2")} == {"idle"}, "nodes do not come to rest", 60)


def assert_as_alone(out: Path, alone: Path) -> None:
    """Every row once, and each as the single process had it: by DuckDB, from the files."""
    both = [f"'{folder}/results/*.parquet'" for folder in (out, alone)]
    counts = duckdb.sql(f"select count(*), count(distinct row_id) from {both[0]}").fetchall()
    assert counts == [(2000, 2000)]
    for one, other in (both, both[::-1]):
        assert duckdb.sql(f"(from {one}) except all (from {other})").fetchall() == []
    assert nothing_left_over(out)


def all_well(out: Path) -> str:
    """The last line of the finish job."""
    return f"{out}: 2,000 rows in 50 of 50 parts, nothing wrong"


def restarts(lab: SlurmLab, job: str) -> int:
    return int(lab.show(job)["Restarts"])


def test_submit_makes_an_array_and_a_look_at_it(cluster: Cluster, alone: Path) -> None:
    said = cluster.python("pipeline.submit", *cluster.args, "--tasks", "4", "--time", "30", "--requeues=2").done()
    array, finish = re.findall(r"job (\d+)", said.out)
    states = cluster.lab.wait(array, finish, seconds=300)
    assert set(states.values()) == {"COMPLETED"}, cluster.log()
    assert len(states) == 5
    assert_as_alone(cluster.out, alone)
    logs = sorted(path.name for path in (cluster.out / "slurm").iterdir())
    assert logs == sorted([f"pipeline-{array}_{task}.log" for task in range(4)] + [f"pipeline-finish-{finish}.log"])
    last = (cluster.out / "slurm" / f"pipeline-finish-{finish}.log").read_text()
    assert last == f"{cluster.out}: 2,000 of 2,000 rows done, 0 errors\n{all_well(cluster.out)}\n"
    seen = stats(cluster.out)
    assert {one["job"] for one in seen} <= {f"{array}_{task}" for task in range(4)}
    assert sum(one["rows"] for one in seen) == 2000
    shards = {one["job"]: re.search(r'"index": (\d)', one["config"])[1] for one in seen}
    assert all(job.endswith(f"_{shard}") for job, shard in shards.items())


def test_killed_told_to_stop_and_preempted(cluster: Cluster, alone: Path) -> None:
    """One task dies for good, one is told to stop, and then all that run are preempted."""
    lab = cluster.lab
    array = cluster.sbatch("label_array.sbatch", "--array=0-3")
    cluster.until_parts(1)
    lab.run("scancel", "--signal=KILL", f"{array}_0")
    lab.run("scancel", "--signal=USR1", f"{array}_1")
    lab.until(lambda: lab.states(array)[f"{array}_0"] == "CANCELLED", "the killed task does not end")
    lab.until(lambda: restarts(lab, f"{array}_1") == 1, f"was not put back in the queue: {cluster.log()}")
    cluster.until_parts(5)
    first = lab.run("sbatch", "--parsable", "-p", "high", "-n4", "--nodes=2", "--wrap", "sleep 1", cwd=cluster.folder)
    lab.until(lambda: lab.states(first)[first] == "COMPLETED", "nobody was preempted", 60)
    assert cluster.finished(array) == f"COMPLETED {all_well(cluster.out)}"
    states = lab.states(array)
    assert states.pop(f"{array}_0") == "CANCELLED", "for good"
    assert set(states.values()) == {"COMPLETED"}, cluster.log()
    assert {restarts(lab, f"{array}_{task}") for task in (1, 2, 3)} <= {1, 2, 3}
    assert_as_alone(cluster.out, alone)


def test_a_node_that_loses_contact_and_one_that_is_drained(cluster: Cluster, alone: Path) -> None:
    """The lost node's workers go on writing beside those that Slurm starts in their place."""
    lab = cluster.lab
    array = cluster.sbatch("label_array.sbatch", "--array=0-3", "--ntasks=1", "--cpus-per-task=1")
    cluster.until_parts(1)
    lab.kill_node("n2")
    try:
        lab.until(lambda: lab.node_state("n2").startswith("down"), "n2 is still taken for well", 60)
    finally:
        lab.start_node("n2")
    lab.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    try:
        assert cluster.finished(array) == f"COMPLETED {all_well(cluster.out)}"
    finally:
        lab.run("scontrol", "update", "nodename=n1", "state=resume")
    lab.until(lambda: not workers_left(cluster.out), "workers of the lost node do not end", 60)
    assert_as_alone(cluster.out, alone)


def workers_left(out: Path) -> bool:
    return subprocess.run(["pgrep", "-f", f"pipeline .*output.dir={out}"], capture_output=True).returncode == 0


def test_a_time_limit_is_planned_by(cluster: Cluster, alone: Path) -> None:
    """Seven seconds are too few for all rows: each start saves what it can. Within a minute a start gets on."""
    said = {}
    for margin_s, requeues in ((53, 2), (5, 20)):
        options = [f"launcher.margin_s={margin_s}", "--time=1", "--signal=CONT@1"]
        job = cluster.sbatch("label.sbatch", *options, REQUEUES=str(requeues))
        said[margin_s] = cluster.finished(job)
        assert "Slurm job" in cluster.log() or "while loading" in cluster.log()
        assert "DUE TO TIME LIMIT" not in cluster.log()
        assert margin_s == 5 or (restarts(cluster.lab, job) == 2 and len(parts(cluster.out)) < NUM_CHUNKS)
    assert said[53].startswith("FAILED") and said[5].startswith("COMPLETED"), cluster.log()
    assert_as_alone(cluster.out, alone)


def test_eight_tasks_are_cancelled_and_three_finish(cluster: Cluster, alone: Path) -> None:
    eight = cluster.sbatch("label_array.sbatch", "--array=0-7")
    cluster.until_parts(3)
    cluster.lab.run("scancel", eight)
    cluster.lab.wait(eight)
    assert len(parts(cluster.out)) < NUM_CHUNKS
    three = cluster.sbatch("label_array.sbatch", "--array=5-9:2")
    assert cluster.finished(three) == f"COMPLETED {all_well(cluster.out)}"
    assert_as_alone(cluster.out, alone)


def test_a_full_disk_is_a_failure_and_room_lets_it_go_on(cluster: Cluster, alone: Path) -> None:
    """A limit on the size of files, which Slurm hands on to the job, stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7_000, hard))
    try:
        array = cluster.sbatch("label_array.sbatch", "--array=0-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cluster.finished(array).startswith("FAILED"), cluster.log()
    assert set(cluster.lab.states(array).values()) == {"FAILED"}, "put back in the queue for nothing"
    assert "could not be written" in cluster.log()
    again = cluster.sbatch("label_array.sbatch", "--array=0-1")
    assert cluster.finished(again).startswith("COMPLETED")
    assert_as_alone(cluster.out, alone)


def test_what_never_gets_done_goes_back_only_so_often(cluster: Cluster) -> None:
    """No chunk fits into the time: 75 at every start, also of the last task, whose job id is the whole array's."""
    job = cluster.sbatch("label_array.sbatch", "--array=2-3", "--time=5", "launcher.margin_s=100000", REQUEUES="2")
    said = cluster.finished(job)
    assert said.startswith("FAILED") and "0 of 2,000 rows done" in said
    for task in (f"{job}_2", f"{job}_3"):
        assert restarts(cluster.lab, task) == 2
        assert cluster.lab.show(task)["ExitCode"] == "75:0"


def test_one_task_and_one_node_of_several_processes(cluster: Cluster, alone: Path) -> None:
    node = cluster.sbatch("label_node.sbatch", "launcher.gpus=null", "launcher.processes=2")
    cluster.until_parts(2)
    cluster.lab.run("scancel", "--signal=USR1", node)
    cluster.lab.until(lambda: restarts(cluster.lab, node) == 1, f"was not put back in the queue: {cluster.log()}")
    assert cluster.finished(node).startswith("COMPLETED"), cluster.log()
    assert_as_alone(cluster.out, alone)
    one = cluster.sbatch("label.sbatch")
    assert cluster.lab.wait(one) == {one: "COMPLETED"}, "it finds everything done"


def test_a_scheduled_job_labels_what_is_new(cluster: Cluster) -> None:
    """nightly.sh three times, as a job: on a folder, unchanged, and with a file more."""
    inbox = cluster.folder / "inbox"
    texts = ["the parcel has not come", "i cannot log in", "you charged me twice"]
    cluster.args += [f"data.path={inbox}", "task.prompt_file=null", "task.prompt='{{ ticket }}'", "task.truth=null"]
    new = []
    for night, files in enumerate((["b"], ["b"], ["b", "a"])):
        for name in files:
            if not (inbox / f"{name}.parquet").exists():
                write(inbox / f"{name}.parquet", {"ticket": [f"{text} {name}" for text in texts]})
        script = f"{JOBS / 'nightly.sh'} {' '.join(map(quote, cluster.args))}"
        job = cluster.lab.run(
            "sbatch", "--parsable", f"--output=night-{night}.log", f"--wrap={script}",
            env=cluster.env | {"PIPELINE_LOG": str(cluster.folder / "run.txt")}, cwd=cluster.folder,
        )  # fmt: skip
        assert cluster.lab.wait(job) == {job: "COMPLETED"}, cluster.log()
        said = (cluster.folder / f"night-{night}.log").read_text().splitlines()
        assert len(said) == 1, said
        new.append(re.fullmatch(r"nightly \(exit code 0\): .*: (\d) of \d rows done, 0 errors, (\d) rows new", said[0]))
    assert [match.groups() for match in new if match] == [("3", "3"), ("3", "0"), ("6", "3")]
    answered = duckdb.sql(f"select ticket from '{cluster.out}/results/*.parquet' order by row_id").fetchall()
    assert [ticket for (ticket,) in answered] == [f"{text} {name}" for name in "ba" for text in texts]


def test_a_dataset_that_grows_during_an_array(cluster: Cluster) -> None:
    """Lines and a file come while tasks work, and a half-written line gets its end; one task is put back and sees
    them, and all of them finish what it registers. A file that comes then is said, and is the next submission's."""
    lab, inbox, texts = cluster.lab, cluster.folder / "inbox", tickets()
    cluster.args += [
        "data=jsonl", f"data.path={inbox}", "data.chunk_rows=20", "task.prompt_file=null",
        "task.prompt='{{ ticket }}'", "task.truth=null",
    ]  # fmt: skip
    half = line(texts[800])[:20]
    append(inbox / "b.jsonl", *map(line, texts[:800]), half)
    array = cluster.sbatch("label_array.sbatch", "--array=0-2")
    cluster.until_parts(1)
    append(inbox / "b.jsonl", line(texts[800])[20:], *map(line, texts[801:820]))
    append(inbox / "a.jsonl", *map(line, texts[820:860]))
    assert len(parts(cluster.out)) < 41, "the tasks were too quick for what comes"
    lab.run("scancel", "--signal=USR1", f"{array}_1")
    lab.until(lambda: restarts(lab, f"{array}_1") == 1, f"was not put back in the queue: {cluster.log()}")
    lab.wait(array, seconds=300)
    append(inbox / "c.jsonl", *map(line, texts[860:870]))
    ended = f"{cluster.out}: 860 rows in 44 of 44 parts, nothing wrong"
    assert cluster.finished(array) == f"COMPLETED {ended}", cluster.log()
    assert set(lab.states(array).values()) == {"COMPLETED"}
    assert "860 of 860 rows done, 0 errors, 10 rows in 1 new file came since; the next run takes them" in cluster.log()
    assert f"note: {inbox / 'c.jsonl'} came since, with 10 rows; the next run takes them" in cluster.log()
    before = {part.name: part.read_bytes() for part in parts(cluster.out)}
    answered = sum(one["rows"] for one in stats(cluster.out))
    assert answered in (860, 861), "the half-written line may have been answered before it had its end"
    again = cluster.sbatch("label_array.sbatch", "--array=0-1")
    assert cluster.finished(again) == f"COMPLETED {cluster.out}: 870 rows in 45 of 45 parts, nothing wrong"
    assert sum(one["rows"] for one in stats(cluster.out)) == answered + 10
    after = {part.name: part.read_bytes() for part in parts(cluster.out)}
    assert {name: after[name] for name in before} == before
    one = cluster.folder / "one"
    cluster.python("pipeline", *[f"output.dir={one}" if a.startswith("output.dir") else a for a in cluster.args]).done()
    both = [f"(select * exclude row_id from '{out}/results/*.parquet')" for out in (cluster.out, one)]
    assert duckdb.sql(f"select count(*) from {both[0]} where error is null").fetchall() == [(870,)]
    for this, other in (both, both[::-1]):
        assert duckdb.sql(f"(from {this}) except all (from {other})").fetchall() == []
    assert nothing_left_over(cluster.out)


def tickets() -> list[str]:
    texts: list[str] = pq.read_table(TICKETS)["ticket"].to_pylist()
    return texts


def line(ticket: str) -> bytes:
    return json.dumps({"ticket": ticket}).encode() + b"\n"


def append(path: Path, *content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(content))


def quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def test_a_second_submission_leaves_a_locked_one_alone(cluster: Cluster) -> None:
    submit = ["pipeline.submit", *cluster.args, "--lock=true", "--tasks=2"]
    first = cluster.python(*submit).done()
    array = re.findall(r"job (\d+)", first.out)[0]
    second = cluster.python(*submit)
    assert second.code == 75
    assert f"job {array} is at work on it already" in second.err
    other = [a if not a.startswith("output.dir") else f"output.dir={cluster.folder}/other" for a in submit]
    cluster.python(*other).done()


def test_what_slurm_refuses_is_one_sentence(cluster: Cluster) -> None:
    refused = cluster.python("pipeline.submit", *cluster.args, "--partition=nosuch")
    assert refused.code == 1
    assert len(refused.err.splitlines()) == 1 and "nosuch" not in refused.out
    assert "partition" in refused.err.lower()


def test_the_printed_script_submits_the_same(cluster: Cluster) -> None:
    printed = cluster.python("pipeline.submit", *cluster.args, "--tasks=2", "--dry-run").done()
    assert not cluster.lab.run("squeue", "-h")
    assert not cluster.out.exists()
    script = cluster.folder / "submit.sh"
    script.write_text(printed.out)
    array, _ = cluster.lab.run("bash", str(script), env=cluster.env | {"PATH": os.environ["PATH"]}).split()
    assert len(cluster.lab.states(array)) == 2
