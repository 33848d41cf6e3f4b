"""The embedded S3 server: one request at a time, and gone without a trace when its program is."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from segcloud import storage
from segcloud.embedded_s3 import EmbeddedS3, _OneAtATime
from segcloud.storage import join, put, read
from tests.storage.helpers import bucket_and_key


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_server_takes_one_request_at_a_time() -> None:
    def application(environ: dict, start_response: object) -> list[bytes]:
        inside.append(len(busy))
        busy.append(1)
        time.sleep(0.01)
        busy.pop()
        return []

    inside, busy = [], []
    guarded = _OneAtATime(application)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: guarded({}, None), range(8)))
    assert inside == [0] * 8


def test_an_upload_cut_off_on_its_way_leaves_nothing(s3: EmbeddedS3, bucket_uri: str) -> None:
    place = bucket_and_key(join(bucket_uri, "x"))
    request = f"PUT /{place['Bucket']}/{place['Key']} HTTP/1.1\r\nHost: s3\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(s3.endpoint.rpartition(":")[2]))) as connection:
        connection.sendall(request.encode() + b"half")
    time.sleep(0.3)
    assert storage.stat(join(bucket_uri, "x")) is None


def test_the_environment_is_as_before_afterwards(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    before = dict(os.environ)
    with EmbeddedS3(bucket="second") as second:
        assert read(put(b"1", second.uri("x")).uri) == b"1"
        assert os.environ["AWS_ENDPOINT_URL"] == second.endpoint == second.env["AWS_ENDPOINT_URL"]
    assert dict(os.environ) == before
    assert refuses(int(second.endpoint.rpartition(":")[2]))


def test_the_server_dies_with_a_killed_program() -> None:
    # The forked child keeps the pipe to the server open, as a worker of the program may.
    program = """
import os, signal, time
from segcloud.embedded_s3 import EmbeddedS3
with EmbeddedS3() as s3:
    if os.fork() == 0:
        time.sleep(20), os._exit(0)
    print(s3.endpoint, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline().rpartition(":")[2])
    assert not refuses(port)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while not refuses(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert refuses(port)
