"""Two hosts, which are network namespaces with addresses of their own: torchrun and Ray over a link, and the link cut.

They share the file system, as the machines of a cluster share a folder, and nothing else of the network.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import TEXT_SETTINGS, set_flags, shortcut, write_texts
from kill import folder_sha256  # benchmarks/kill.py
from test_parallel import skip_if_divided, together  # noqa: F401 - a fixture
from test_training import TINY, log_lines, weights_hash

HEAD, WORKER = "10.99.7.1", "10.99.7.2"
PATIENCE_S = 240
QUIET = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "RAY_AUTH_MODE": "disabled"}
PLAIN = ("train.precision=fp32", "train.batch_size=12", "train.log_every=1", "model.layers=2")


class Hosts:
    """Two namespaces, and the link between them."""

    def __init__(self):
        name = f"sc{os.getpid() % 100_000}"
        self.names = (f"{name}a", f"{name}b")
        self.started = []

    def open(self):
        """Make them. Raises CalledProcessError if this machine does not let us."""
        one, other = self.names
        for host in self.names:
            ip("netns", "add", host)
        ip("link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
        for host, address in ((one, HEAD), (other, WORKER)):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", host)
            ip("-n", host, "link", "set", host, "up")
            ip("-n", host, "link", "set", "lo", "up")

    def cut(self):
        """Nothing comes through any more, and no end learns of it, as if a cable were pulled in between."""
        # The end of this side stays up, so that what is sent there is lost without a word.
        ip("-n", self.names[1], "link", "set", self.names[1], "down")

    def start(self, host, *command, cwd, **environment):
        """Start a command on host 0 or 1; what it says is in a file there."""
        said = open(cwd / f"host-{host}-{len(self.started)}.txt", "w+b")  # noqa: SIM115 - until `close`
        whole = ["ip", "netns", "exec", self.names[host], *map(str, command)]
        process = subprocess.Popen(
            whole,
            cwd=cwd,
            env=os.environ | QUIET | environment,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append((process, said))
        return process, Path(said.name)

    def close(self):
        """End everything that runs there."""
        for host in self.names:
            found = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=False)
            for pid in map(int, found.stdout.split()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process, said in self.started:
            process.wait(PATIENCE_S)
            said.close()
        for host in self.names:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def ip(*command):
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    if not shutil.which("ip"):
        pytest.skip("needs `ip` (iproute2), to make network namespaces")
    made = Hosts()
    try:
        made.open()
    except subprocess.CalledProcessError as error:
        made.close()
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
    yield made
    made.close()


def torchrun(hosts, folder, settings, out):
    """A training on both hosts, one process each."""
    for host in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HEAD}:29507", "--rdzv-id", "run1"]
        launcher += ["--rdzv-conf", f"is_host={1 - host}"]
        launcher += ["--local-addr", (HEAD, WORKER)[host], "--max-restarts", 0, "-m", "shortcut_cli"]
        train = [
            "train",
            "--recipe",
            "text-tiny",
            "--out",
            out,
            "--device",
            "cpu",
            "--no-report",
            *set_flags(*settings),
        ]
        yield hosts.start(host, *launcher, *train, cwd=folder, GLOO_SOCKET_IFNAME=hosts.names[host])


def wait_for(ready, *processes):
    until = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < until
        for process, said in processes:
            assert process.poll() is None, said.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_hosts_train_one_run_until_the_link_between_them_is_cut(hosts, together, text_run, tmp_path, shard):  # noqa: F811
    """Each end says at which step the other does not answer; the run then goes on on one to the weights of one."""
    settings = [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", *TINY, *PLAIN, f"train.shard={shard}"]
    settings += ["train.steps=150", "train.eval_every=20", "train.eval_windows=4", "train.timeout_s=8"]
    skip_if_divided(settings)
    out = tmp_path / "run"
    both = list(torchrun(hosts, tmp_path, settings, out))
    wait_for(lambda: (out / "resume.pt").exists() and len(log_lines(out)) > 30, *both)
    hosts.cut()
    together(2, "train", settings=settings, folders=[str(tmp_path / "whole")])  # while they wait for each other
    (first, said_first), (_, said_second) = both
    assert first.wait(PATIENCE_S), said_first.read_text()
    # torchrun itself waits long there for its store, which is on the other side.
    wait_for(lambda: "does not answer" in said_second.read_text())
    first, second = said_first.read_text(), said_second.read_text()
    (step,) = set(re.findall(r"process 1 of 2 does not answer at step (\d+)", first))
    assert int(step) > 20
    assert "a process of the training does not answer" in second  # the board is on the other side
    done = shortcut(
        "train", "--recipe", "text-tiny", "--out", out, "--device", "cpu", "--no-report", *set_flags(*settings),
        "--devices", "2", cwd=tmp_path,
    )  # fmt: skip
    assert "resuming at step" in done.stderr
    assert weights_hash(out, "run.pt") == weights_hash(tmp_path / "whole", "run.pt")


@pytest.fixture
def short():
    """A folder whose name is short enough for Ray's sockets."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def test_ray_on_two_hosts_gives_the_bytes_of_one_though_the_worker_is_lost(hosts, tmp_path, short):
    """The worker's host is cut off while it has jobs: the head does them again."""
    pytest.importorskip("ray", reason="needs Ray (the extra `ray`)")
    write_texts(tmp_path / "in", 40)
    asked = ["prepare", "text", "in", "--recipe", "text-tiny", *set_flags(*TEXT_SETTINGS[:2])]
    shortcut(*asked, "--out", "local", cwd=tmp_path)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", 2]
    ray += ["--object-store-memory", 100_000_000, "--disable-usage-stats"]
    head = hosts.start(
        0, *ray, "--head", "--node-ip-address", HEAD, "--port", 6390, "--include-dashboard", "false",
        "--temp-dir", short / "0", cwd=tmp_path, RAY_health_check_timeout_ms="3000",
        RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="3",
    )  # fmt: skip
    wait_for(lambda: b"Ray runtime started" in head[1].read_bytes(), head)
    worker = hosts.start(
        1, *ray, "--address", f"{HEAD}:6390", "--node-ip-address", WORKER, "--temp-dir", short / "1", cwd=tmp_path
    )
    wait_for(lambda: b"Ray runtime started" in worker[1].read_bytes(), head, worker)
    command = [sys.executable, "-m", "shortcut_cli", *asked, "--executor", "ray", "--ray-address", f"{HEAD}:6390"]
    done = hosts.start(0, *command, "--workers", 4, "--out", "whole", cwd=tmp_path)
    assert not done[0].wait(PATIENCE_S), done[1].read_text()
    assert folder_sha256(tmp_path / "whole") == folder_sha256(tmp_path / "local")
    cut = hosts.start(0, *command, "--workers", 4, "--out", "cut", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "cut" / ".staging").exists() or cut[0].poll() is not None, head)
    hosts.cut()
    assert cut[0].poll() is None
    assert not cut[0].wait(PATIENCE_S), cut[1].read_text()
    assert folder_sha256(tmp_path / "cut") == folder_sha256(tmp_path / "local")
