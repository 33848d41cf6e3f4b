"""Object storage for the tests: one embedded S3 server, and every backend of the contract suite."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from segcloud import storage
from segcloud.embedded_s3 import EmbeddedS3

REAL_S3 = "SEGCLOUD_TEST_S3_URI"
# As the caller set it, before the embedded server points the variables to itself.
_CALLER_ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.fixture(scope="session")
def s3() -> Iterator[EmbeddedS3]:
    """An embedded S3 server, to which the AWS variables of the whole session point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "20")  # short pages, so that listings have several
        with EmbeddedS3(bucket="segcloud-tests") as server:
            yield server


@pytest.fixture
def bucket_uri(s3: EmbeddedS3) -> str:
    """A prefix of its own for one test, on the embedded server."""
    return s3.uri(f"test-{uuid.uuid4().hex}")


@pytest.fixture
def real_s3_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A prefix of its own for one test, in the bucket that the caller names."""
    if REAL_S3 not in os.environ:
        pytest.skip(f"set {REAL_S3}=s3://bucket/prefix, and AWS_… for it, to run against a real store")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _CALLER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    uri = storage.join(os.environ[REAL_S3], f"test-{uuid.uuid4().hex}")
    yield uri
    for info in storage.list_objects(uri):
        storage.delete(info.uri)


@pytest.fixture(params=["local", "embedded", "real"])
def storage_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty prefix on each storage backend in turn; what holds here holds everywhere."""
    if request.param == "local":
        return str(tmp_path / "store")
    return request.getfixturevalue("bucket_uri" if request.param == "embedded" else "real_s3_uri")
