"""Preparation on Ray and Slurm: the bytes of local processes. Ray runs here for real; Slurm's commands are scripts."""

import os
import signal
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from conftest import FakeRay, quiet, shortcut, write_texts
from kill import folder_sha256  # benchmarks/kill.py

from shortcut_cli.config import reading
from shortcut_cli.data import executors
from shortcut_cli.demo import material as demo_material
from shortcut_cli.errors import Rejected, ShortcutError, Unavailable, UsageError
from shortcut_cli.stages import preparation

LIMITS = {"timeout_s": 20, "memory_mb": 500}
CHARS = ("tokenizer.algorithm=chars", "tokenizer.alphabet=\n abcdefghijklmnopqrstuvwxyz0123456789")


def run(name, paths, out, *settings, workers=1, **where):
    config = reading.read(name, [f"data.shards={out}", *settings])
    options = {"n_workers": workers, "max_bad": "100%", "report": quiet, **where}
    return preparation.prepare(config, [str(path) for path in paths], out, **options)


def misbehave(job):
    if job == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "is bad":
        raise Rejected("is bad")
    if job == "hangs":
        time.sleep(600)
    return f"{job} in {os.getcwd()}"


def spelled(results):
    return [(job, str(result), getattr(result, "passing", None)) for job, result in results]


JOBS = ["good", "crashes", "is bad", "good 2", "good 3"]


@pytest.fixture
def no_ray_left():
    yield
    with suppress(ImportError):
        import ray

        assert not ray.is_initialized()


@pytest.mark.filterwarnings("default")  # of Ray's own, about its processes and sockets
def test_ray_gives_the_bytes_of_local_processes(tmp_path, monkeypatch, no_ray_left):
    pytest.importorskip("ray", reason="needs Ray (the extra `ray`)")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine forgets them
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "BATCHES", 1)
    write_texts(tmp_path / "in", 9)
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff\xfe\xff")
    settings = (*CHARS, "data.file_memory_mb=1024")
    handler = signal.getsignal(signal.SIGTERM)
    run("text-tiny", ["in"], tmp_path / "ray", *settings, workers=3, executor="ray")
    assert signal.getsignal(signal.SIGTERM) is handler
    run("text-tiny", ["in"], tmp_path / "local", *settings)
    assert folder_sha256(tmp_path / "ray") == folder_sha256(tmp_path / "local")
    for number in (1, 2, 3, 4):
        config = reading.read("text-tiny", [f"data.shards={tmp_path / 'tasks'}", *settings])
        task = {"task": (number, 4), "n_workers": 1, "report": quiet}
        preparation.prepare_part(config, ["in"], tmp_path / "tasks", **task)
    run("text-tiny", ["in"], tmp_path / "tasks", *settings, merge=True)
    assert folder_sha256(tmp_path / "tasks") == folder_sha256(tmp_path / "local")


@pytest.mark.filterwarnings("default")
def test_a_job_fails_on_ray_as_it_does_here(tmp_path, monkeypatch, no_ray_left):
    pytest.importorskip("ray", reason="needs Ray (the extra `ray`)")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine forgets them
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))  # for Ray to find `misbehave`
    on_ray = executors.named("ray", folder=tmp_path)
    expected = spelled(executors.workers.in_order(misbehave, JOBS, (), workers=1, **LIMITS))
    assert spelled(on_ray(misbehave, JOBS, (), workers=1, **LIMITS)) == expected
    with pytest.raises(UsageError, match="no machine of the Ray cluster has the 900,000,000 MB"):
        list(on_ray(misbehave, JOBS, (), workers=1, timeout_s=9, memory_mb=900_000_000))
    with pytest.raises(UsageError, match=r"the Ray cluster at 127\.0\.0\.1:1 does not answer"):
        executors.named("ray", folder=tmp_path, ray_address="127.0.0.1:1")
    write_texts(tmp_path / "texts", 3)
    shortcut(
        *("prepare", "text", "texts", "--recipe", "text-tiny", "--out", "o"),
        *("--executor", "ray", "--ray-address", "127.0.0.1:1"),
        cwd=tmp_path,
        check=2,
    )
    assert not (tmp_path / "o").exists()  # a command that is wrong leaves nothing


SBATCH = """#!{python}
# Runs the elements of the array of a submission file one after the other once it has returned, as Slurm would.
import os, re, subprocess, sys, time
text = open(sys.argv[1]).read()
if len(sys.argv) == 2:
    open(r"{asked}", "w").write(text)
    subprocess.Popen([*sys.argv, "run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print("Submitted batch job 7")
    sys.exit()
folder = os.path.dirname(re.search(r"--output=(\\S+)", text)[1])
for element in range(int(re.search(r"--array=0-(\\d+)", text)[1]) + 1):
    while not os.path.exists(f"{{folder}}/7_{{element}}_submitted.pkl"):
        time.sleep(0.05)
    numbers = dict(SLURM_JOB_ID=str(70 + element), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(element))
    numbers |= dict(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0")
    numbers |= dict(SLURM_JOB_NODELIST="host")
    subprocess.run(["bash", f"{{folder}}/7_submission.sh"], env=os.environ | numbers, check=False)
"""
SRUN = """#!{python}
import subprocess, sys
sys.exit(subprocess.run(sys.argv[sys.argv.index(sys.executable):], check=False).returncode)
"""
SACCT = """#!{python}
print("JobID|State|NodeList")
for element in range(100):
    print(f"7_{{element}}|RUNNING|host")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A PATH with stand-ins for Slurm's commands; returns the file with what sbatch was asked."""
    pytest.importorskip("submitit", reason="needs submitit (the extra `slurm`)")
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        path = tmp_path / "bin" / name
        path.write_text(text.format(python=sys.executable, asked=tmp_path / "asked"))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "asked"


@pytest.mark.filterwarnings("default")
def test_slurm_gives_the_bytes_of_local_processes(slurm, tmp_path):
    (tmp_path / "in").mkdir()
    demo_material.write_midi(tmp_path / "in", pieces=5, seed=3)
    run("music-tiny", [tmp_path / "in"], tmp_path / "slurm", workers=1, executor="slurm")
    run("music-tiny", [tmp_path / "in"], tmp_path / "local", workers=1)
    assert folder_sha256(tmp_path / "slurm") == folder_sha256(tmp_path / "local")
    asked = slurm.read_text()
    assert "--array=0-2%1" in asked  # five files in at most four batches of two
    assert "--cpus-per-task=1" in asked
    assert "--mem=5096M" in asked  # data.file_memory_mb, and a gigabyte for the process itself
    assert "--time=240" in asked  # two files of data.file_timeout_s


def test_a_missing_executor_says_how_to_get_it(tmp_path, monkeypatch):
    write_texts(tmp_path / "in", 3)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    for name, extra in (("ray", "ray"), ("slurm", "slurm")):
        with pytest.raises(Unavailable) as refused:
            run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, executor=name)
        assert f"shortcut-cli[{extra}]" in refused.value.hint
    assert not (tmp_path / "s").exists()


def test_without_slurm_its_executor_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="needs submitit (the extra `slurm`)")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="Slurm is not there"):
        list(executors.named("slurm", folder=tmp_path / "jobs")(misbehave, JOBS, (), workers=1, **LIMITS))


def test_batches_hold_all_jobs_in_order():
    for count in (0, 1, 5, 100):
        for workers in (1, 3, 200):
            batches = list(executors._batches(range(count), workers))
            assert [job for batch in batches for job in batch] == list(range(count))
            assert all(batches)
            assert len(batches) <= executors.BATCHES * workers


def test_of_very_many_jobs_only_some_are_made_at_once(monkeypatch):
    made = []
    monkeypatch.setattr(executors, "BATCH", 3)
    batches = executors._batches((made.append(job) or job for job in range(100)), 2)
    for number, batch in enumerate(batches, 1):
        assert batch == list(range(3 * number - 3, min(3 * number, 100)))
        assert len(made) <= max(executors.BATCHES * 2 * 3, 3 * number)
    assert made == list(range(100))


def test_a_lost_machine_is_an_error_that_says_what_to_do():
    class Ray(FakeRay):
        def nodes(self):
            return [{"Alive": True, "Resources": {"memory": 1e12}}]

        def cluster_resources(self):
            return {"CPU": 2.0}

        def put(self, _):
            pass

        def remote(self, **needs):
            assert needs == {"num_cpus": 1, "memory": 500_000_000, "max_retries": 3}
            return lambda _: SimpleNamespace(remote=lambda *_: 0)

        def get(self, _):
            raise self.exceptions.RayError("The node died\nand more")

    with pytest.raises(ShortcutError, match=r"Ray lost a task 4 times: The node died$") as lost:
        list(executors._on_ray(Ray(), "", misbehave, JOBS, (), workers=2, **LIMITS))
    assert lost.value.hint == "run the same command again"


def test_a_task_takes_no_executor(tmp_path):
    write_texts(tmp_path / "in", 3)
    failed = shortcut("prepare", "text", "in", "--task", "1/2", "--executor", "ray", cwd=tmp_path, check=2)
    assert "--task and --executor exclude each other" in failed.stderr
