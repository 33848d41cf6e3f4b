"""Small tools that the tests of storage share."""

from segcloud import storage

MIB = 2**20


def uris(prefix: str, **options: object) -> list[str]:
    return [
        info.uri.removeprefix(prefix.rstrip("/") + "/") for info in storage.list_objects(prefix, **options)
    ]


def bucket_and_key(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}
