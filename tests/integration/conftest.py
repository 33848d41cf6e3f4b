"""A real Ray cluster with token authentication, and jobs run as a user runs them: as processes."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from segcloud.cluster import SETTINGS
from segcloud.config import Config
from segcloud.embedded_s3 import EmbeddedS3
from tests.helpers import overrides

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_TIMEOUT_S = 300


@dataclass
class Job:
    """A job's process, its output read line by line."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)

    def wait_for(self, text: str) -> str:
        """Read output until a line holds `text`; fail if the job ends before."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return line
        raise AssertionError(f"the job ended without {text!r}:\n{self.output}")

    def finish(self) -> int:
        """Read the rest and return the exit code."""
        self.lines += [line.rstrip() for line in self.process.stdout]
        return self.process.wait(timeout=JOB_TIMEOUT_S)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)


@dataclass
class Cluster:
    """How to reach the test cluster, and to start jobs on it."""

    env: dict[str, str]
    temp: Path

    def start(self, *command: str, **env: str) -> Job:
        """Start ``python COMMAND`` in the repository, standard error among its output."""
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Job(process)

    def run(self, *command: str, **env: str) -> Job:
        """Start and finish."""
        job = self.start(*command, **env)
        job.finish()
        return job

    def train(self, config: Config) -> Job:
        """Start ``jobs/train.py`` with every field of a config."""
        return self.start("jobs/train.py", *overrides(config))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(urls: list[str], token: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while urls and time.monotonic() < deadline and process.poll() is None:
        request = urllib.request.Request(urls[0], headers={"Authorization": f"Bearer {token}"})
        try:
            urllib.request.urlopen(request, timeout=5).close()
            urls = urls[1:]
        except OSError:
            time.sleep(0.3)
    if urls:
        raise RuntimeError(f"the test cluster did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def cluster(s3: EmbeddedS3) -> Iterator[Cluster]:
    """A head node with two CPUs for the whole session; its workers reach the embedded S3 server."""
    temp = Path(tempfile.mkdtemp(prefix="scray-", dir="/tmp"))
    # all ports are chosen free: another Ray on this machine holds the default ones
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    ports = {name: _free_port() for name in (*names, "metrics-export-port", "ray-client-server-port")}
    token = secrets.token_hex(16)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        **SETTINGS,
        **s3.env,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SEGCLOUD_CACHE": str(temp / "cache"),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--temp-dir={temp}", "--object-store-memory=500000000"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = temp / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    agent = f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}/api/local_raylet_healthz"
    try:
        _wait_until_ready([f"{url}/api/version", agent], token, head, log)
        addresses = {"RAY_ADDRESS": f"127.0.0.1:{ports['port']}", "RAY_API_SERVER_ADDRESS": url}
        yield Cluster({**env, **addresses}, temp)
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


def _kill_matching(title: str, cluster: Cluster) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if title in command and str(cluster.temp).encode() in environment:
                os.kill(int(entry.name), signal.SIGKILL)
                return int(entry.name)
    raise AssertionError(f"no process {title!r} to kill")


@pytest.fixture
def kill(cluster: Cluster) -> Callable[[str], int]:
    """SIGKILL one process of the test cluster whose title holds a text; returns its pid."""
    return lambda title: _kill_matching(title, cluster)
