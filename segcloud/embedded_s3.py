"""An S3 server on this machine, for the demo and the tests: nothing to install, nothing to configure.

It is moto in a process of its own, behind real HTTP on 127.0.0.1, so that segcloud, Ray and pyarrow speak to
it exactly as to a store in the cloud. (As a thread of the program it answers a busy program 3.5 times more
slowly: a GET of 20 MB took 0.37 s against 0.11 s.)

What it does not do: check signatures, permissions or checksums, or keep anything after its end. Objects live
in memory, large ones under TMPDIR.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import secrets
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from segcloud.errors import SegcloudError, UsageError
from segcloud.storage import s3_client

_HOST = "127.0.0.1"
_LONGEST_START = 60  # seconds; about half a second is usual
_LONGEST_STOP = 5
# Each would win over what we set.
_IN_THE_WAY = ("AWS_ENDPOINT_URL_S3", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_SESSION_TOKEN")
_IN_THE_WAY += ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")


class EmbeddedS3:
    """A running S3 server with one empty bucket, and the environment to reach it.

        with EmbeddedS3() as s3:
            storage.put(b"...", s3.uri("scans/1.nii.gz"))

    While it runs, `os.environ` points to it, so that every S3 client of this process and of its children uses
    it; afterwards the environment is as before. It ends with the `with` block or with this process, however
    that dies.

    Attributes:
        bucket: The bucket's name.
        endpoint: The server's URL.
        env: The variables that a worker or subprocess needs in order to reach it.
    """

    def __init__(self, bucket: str = "segcloud") -> None:
        self.bucket = bucket
        self.endpoint = ""
        self.env: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None
        self._replaced: dict[str, str | None] = {}

    def uri(self, key: str = "") -> str:
        """The URI of a key in the bucket, or of the bucket."""
        return f"s3://{self.bucket}/{key}".rstrip("/")

    def __enter__(self) -> Self:
        """Start the server and create the bucket.

        Raises:
            UsageError: moto's server is not installed.
            SegcloudError: The server did not start.
        """
        self._process = _start()
        try:
            self.endpoint = f"http://{_HOST}:{_port_of(self._process)}"
            self.env = _environment(self.endpoint)
            self._point_environment()
            s3_client().create_bucket(Bucket=self.bucket)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server, forget its objects, restore the environment."""
        for name, value in self._replaced.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._replaced = {}
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def _point_environment(self) -> None:
        self._replaced = {name: os.environ.get(name) for name in (*self.env, *_IN_THE_WAY)}
        for name in _IN_THE_WAY:
            os.environ.pop(name, None)
        os.environ.update(self.env)


def _environment(endpoint: str) -> dict[str, str]:
    unproxied = {
        name: ",".join(filter(None, (os.environ.get(name), _HOST, "localhost")))
        for name in ("NO_PROXY", "no_proxy")
    }
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        **unproxied,
    }


def _start() -> subprocess.Popen[str]:
    if not all(importlib.util.find_spec(module) for module in ("moto", "flask", "flask_cors")):
        raise UsageError("the embedded S3 server needs moto: pip install 'segcloud[demo]'")
    # With a safe path, because the folder that the program was started in must not shadow modules; in a
    # session of its own, because Ctrl-C is for the program, which may still want to save.
    command = [sys.executable, "-P", "-m", "segcloud.embedded_s3"]
    here = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(  # noqa: S603 our own module
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": here},
    )


def _port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None  # noqa: S101 a pipe, see _start
    if select.select([process.stdout], [], [], _LONGEST_START)[0] and (line := process.stdout.readline()):
        return int(line)
    raise SegcloudError(
        f"the embedded S3 server did not start within {_LONGEST_START} s; its messages tell why"
    )


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 pipes, see _start
    process.stdin.close()  # the server's sign to end
    try:
        process.wait(_LONGEST_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


# ---- In the server's process ---------------------------------------------------------------------------


class _OneAtATime:
    """Lets moto see one request at a time, and only complete ones.

    moto checks If-None-Match, stores the body and then the metadata, in three steps; in turns they are the
    one step that they are in a real store.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length:
            body = environ["wsgi.input"].read(length)
            if len(body) != length:
                start_response("400 Bad Request", [("Content-Length", "0"), ("Connection", "close")])
                return []
            environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            return self._application(environ, start_response)


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request otherwise
    application = _OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server(_HOST, 0, application, threaded=True)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads the pipe any more
    server.serve_forever()


def _end_with_parent(parent: int) -> None:
    """Exit when the parent closes our standard input or is gone.

    Both are needed: a forked child of the parent keeps the pipe open. The kernel's parent-death signal is no
    substitute, because it comes when the *thread* that started us ends.
    """
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 1.0)[0] and not sys.stdin.read(1):
            break
    os._exit(0)


if __name__ == "__main__":
    _serve()
