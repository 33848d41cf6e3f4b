"""A store that misbehaves: answers that break off are asked for again, and every failure is one line with a
remedy and without a secret.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segcloud import storage
from segcloud.storage import put, read


class FaultyStore(ThreadingHTTPServer):
    """Keeps one object and plays a script: one fault per request, then all is well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.script: list[str] = []  # "403 Code", "truncate", "reset", "lose answer"
        self.seen: list[str] = []
        self.body: bytes | None = b"0123456789" * 1000
        self.headers: dict[str, str] = {}


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyStore

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        fault = self.server.script.pop(0) if self.server.script else ""
        body = b"" if self.command == "DELETE" else self.server.body
        if fault[:1].isdigit():
            status, _, code = fault.partition(" ")
            self.answer(int(status), f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())
        elif body is None:
            self.answer(404, b"")
        elif fault in ("truncate", "reset"):
            self.answer(200, body, self.server.headers, sent=len(body) // 2, reset=fault == "reset")
        else:
            self.answer(200, body, self.server.headers)

    do_HEAD = do_DELETE = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["If-None-Match"] and self.server.body is not None:
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        self.server.body = data
        named = [name for name in self.headers if name.lower().startswith("x-amz-meta-")]
        self.server.headers = {name: self.headers[name] for name in named}
        if self.server.script and self.server.script.pop(0) == "lose answer":
            self.close_connection = True
            return None
        return self.answer(200, b"")

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        sent: int | None = None,
        reset: bool = False,
    ) -> None:
        self.send_response(status)
        date = "Thu, 01 Jan 2026 00:00:00 GMT"
        fixed = {"Content-Length": str(len(body)), "ETag": '"e"', "Last-Modified": date}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True
        if reset:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close with RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    server = FaultyStore()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("NO_PROXY", "localhost")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["truncate", "reset"])
def test_a_read_outlasts_broken_answers(faulty: FaultyStore, fault: str) -> None:
    faulty.script = [fault, fault]
    assert read("s3://lab/x") == faulty.body
    assert len(faulty.seen) == 3


def test_a_read_gives_up_in_the_end(faulty: FaultyStore) -> None:
    faulty.script = ["truncate"] * 99
    with pytest.raises(storage.UnreachableError, match=r"s3://lab/x: the answer broke off; try again later"):
        read("s3://lab/x")
    assert len(faulty.seen) == storage.READ_ATTEMPTS


def test_a_fetch_outlasts_broken_answers(faulty: FaultyStore, tmp_path: Path) -> None:
    faulty.script = ["", "truncate", "reset"]
    storage.fetch("s3://lab/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == faulty.body


def test_a_fetch_that_gives_up_leaves_no_file(faulty: FaultyStore, tmp_path: Path) -> None:
    faulty.script = ["", *["truncate"] * 99]
    with pytest.raises(storage.UnreachableError, match="broke off"):
        storage.fetch("s3://lab/x", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_an_overloaded_store_is_asked_again(faulty: FaultyStore) -> None:
    faulty.script = ["503 SlowDown"]
    assert read("s3://lab/x") == faulty.body


def test_an_overloaded_store_is_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    faulty.script = ["503 SlowDown"]
    with pytest.raises(
        storage.UnreachableError, match=r"failing or overloaded \(503 SlowDown\); try again later"
    ):
        read("s3://lab/x")


DENIALS = {
    "403 AccessDenied": "check the credentials, the role and the bucket's policy",
    "403 InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "403 SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "400 ExpiredToken": "renew the credentials",
    "403 RequestTimeTooSkewed": "set this machine's clock",
}


@pytest.mark.parametrize("answer", DENIALS)
@pytest.mark.parametrize("operation", [storage.stat, read, storage.list_objects, storage.delete])
def test_a_denial_is_one_line_with_the_reason_and_no_secret(
    faulty: FaultyStore, answer: str, operation: Callable[[str], object]
) -> None:
    faulty.script = [answer] * 9
    with pytest.raises(storage.AccessDeniedError) as caught:
        operation("s3://lab/x")
    message = str(caught.value)
    assert message.startswith(f"s3://lab/x: access denied ({answer}); {DENIALS[answer]}")
    assert "very-secret" not in message
    assert "\n" not in message


def test_a_region_error_names_the_region(faulty: FaultyStore) -> None:
    faulty.script = ["400 AuthorizationHeaderMalformed"] * 9
    with pytest.raises(storage.StorageError, match="check AWS_DEFAULT_REGION"):
        read("s3://lab/x")


def test_a_create_whose_answer_was_lost_is_ours(faulty: FaultyStore) -> None:
    faulty.body, faulty.script = None, ["lose answer"]
    info = put(b"claim", "s3://lab/x", if_absent=True)
    assert [request.split()[0] for request in faulty.seen[:3]] == ["PUT", "PUT", "HEAD"]
    assert set(info.metadata) == {"sha256"}


def test_a_custom_endpoint_gets_path_style_addresses(faulty: FaultyStore) -> None:
    read("s3://lab/a/x")
    assert faulty.seen == ["GET /lab/a/x"]


def test_no_credentials_are_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(storage.AccessDeniedError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        read("s3://lab/x")


def test_an_unknown_profile_is_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(storage.AccessDeniedError, match="s3://lab/x: AWS_PROFILE names no profile"):
        read("s3://lab/x")


def test_a_wrong_endpoint_is_named_within_seconds(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(
        storage.UnreachableError, match=r"cannot reach endpoint http://127\.0\.0\.1:9; check AWS_END"
    ):
        storage.check_writable("s3://lab/x")
    assert time.monotonic() - begun < 5


def test_what_is_no_endpoint_is_named(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(storage.StorageError, match="AWS_ENDPOINT_URL: not a URL"):
        read("s3://lab/x")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("operation", [storage.stat, read, storage.list_objects, storage.check_writable])
def test_a_real_store_denies_a_wrong_key(
    real_s3_uri: str, monkeypatch: pytest.MonkeyPatch, variable: str, operation: Callable[[str], object]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(variable, "not-the-one")
        with pytest.raises(storage.AccessDeniedError) as caught:
            operation(real_s3_uri)
    message = str(caught.value)
    assert message.startswith(real_s3_uri)
    assert f"; check {variable}" in message
    assert "not-the-one" not in message
    assert "\n" not in message
