"""What can go wrong, and the one place where foreign exceptions become ours."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as boto
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
from urllib3.exceptions import HTTPError

from segcloud.errors import SegcloudError


class StorageError(SegcloudError):
    """A storage operation failed; the message is one line: the URI, what is wrong, what to do."""


class NotFoundError(StorageError):
    """The object, file or folder does not exist."""


class AccessDeniedError(StorageError):
    """The credentials are missing, wrong or expired, or do not allow the operation."""


class BucketMissingError(StorageError):
    """The bucket does not exist."""


class AlreadyExistsError(StorageError):
    """A create-only put met an existing object."""


class CorruptError(StorageError):
    """What arrived is not what was written: size, sha256 or format differ."""


class UnreachableError(StorageError):
    """The store does not answer, or not completely; a later try may succeed."""


class ReplacedError(StorageError):
    """The object was overwritten while it was being read."""


class BrokenBodyError(UnreachableError):
    """An answer began and broke off, which botocore does not retry."""


_S3_ERRORS = (boto.BotoCoreError, boto.ClientError, RetriesExceededError, S3DownloadFailedError, HTTPError)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
_NO_CREDENTIALS += (boto.TokenRetrievalError, boto.NoAuthTokenError, boto.SSOError)
_REMEDY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role"
_BROKEN_OFF = (RetriesExceededError, boto.IncompleteReadError, HTTPError)
_UNREACHABLE = (boto.HTTPClientError, boto.ConnectionError)
# In order: the first that fits speaks.
_CAUSES: tuple[tuple[Any, type[StorageError], str], ...] = (
    (boto.ProfileNotFound, AccessDeniedError, "AWS_PROFILE names no profile; correct or unset it"),
    (_NO_CREDENTIALS, AccessDeniedError, f"no credentials found; {_REMEDY}"),
    (boto.SSLError, UnreachableError, "certificate of {endpoint} not trusted; set AWS_CA_BUNDLE"),
    (boto.ReadTimeoutError, UnreachableError, "no answer from {endpoint} in time; try again later"),
    (_UNREACHABLE, UnreachableError, "cannot reach endpoint {endpoint}; check AWS_ENDPOINT_URL"),
    (_BROKEN_OFF, UnreachableError, "answers of {endpoint} broke off; try again later"),
    (boto.FlexibleChecksumError, CorruptError, "the checksum does not match; write the object again"),
    (boto.ParamValidationError, StorageError, "not a valid bucket or key; correct the URI"),
    (S3DownloadFailedError, ReplacedError, "replaced while being read; try again"),
    (_S3_ERRORS, StorageError, "{kind}; check the AWS configuration"),
    (FileNotFoundError, NotFoundError, "{file}no such file; check the path"),
    (PermissionError, AccessDeniedError, "{file}no permission; check owner and mode"),
    (OSError, StorageError, "{file}{reason}; check path and disk"),
)
_DENIED = {
    "ExpiredToken": "renew the credentials",
    "InvalidToken": "renew AWS_SESSION_TOKEN, or unset it",
    "RequestTimeTooSkewed": "set this machine's clock",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, and that AWS_ENDPOINT_URL is the store that issued it",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
}


@contextlib.contextmanager
def translated(uri: str, endpoint: Callable[[], str]) -> Iterator[None]:
    """What boto3 and the system raise becomes a StorageError; `endpoint` is for those that do not know it."""
    try:
        yield
    except boto.ClientError as error:
        raise _from_answer(error, uri, _shown(endpoint())) from error
    except (*_S3_ERRORS, OSError) as error:
        file = getattr(error, "filename", None)
        facts = {
            "endpoint": _shown(getattr(error, "kwargs", {}).get("endpoint_url") or endpoint()),
            "kind": type(error).__name__,
            "file": f"{file}: " if file and str(file) != uri else "",
            "reason": getattr(error, "strerror", None),
        }
        ours, text = next((ours, text) for kind, ours, text in _CAUSES if isinstance(error, kind))
        raise ours(f"{uri}: {text.format(**facts)}") from error


def _from_answer(error: boto.ClientError, uri: str, endpoint: str) -> StorageError:
    status, code = http_status(error), error.response.get("Error", {}).get("Code", "")
    answer = f"{status}" if code in ("", str(status)) else f"{status} {code}"
    if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
        bucket = uri.removeprefix("s3://").partition("/")[0]
        remedy = "create it or correct the bucket in the URI"
        return BucketMissingError(f"{uri}: no such bucket {bucket!r}; {remedy}")
    if status == 404:
        return NotFoundError(f"{uri}: no such object; check the URI")
    if status in (401, 403) or code in _DENIED:
        remedy = _DENIED.get(code, "check the credentials, the role and the bucket's policy")
        return AccessDeniedError(f"{uri}: access denied ({answer}); {remedy}")
    if status == 412:
        return ReplacedError(f"{uri}: replaced while being read; try again")
    if status in (429, 500, 502, 503, 504):
        return UnreachableError(f"{uri}: {endpoint} is failing or overloaded ({answer}); try again later")
    if status in (411, 501):
        remedy = "for an older store set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        return StorageError(f"{uri}: the store does not know such a request ({answer}); {remedy}")
    return StorageError(f"{uri}: the store refused ({answer}); check AWS_DEFAULT_REGION, bucket and key")


def already_exists(uri: str) -> AlreadyExistsError:
    """Another writer was first."""
    return AlreadyExistsError(f"{uri}: exists already; delete it or choose another name")


def http_status(error: boto.ClientError) -> int:
    """The status of the answer that the error is about; 0 if there was none."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _shown(url: str) -> str:
    """Scheme and host alone: a URL in the environment may hold a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the store"
