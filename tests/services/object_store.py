"""An S3 store on loopback, by moto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest


@contextmanager
def running_s3(bucket: str) -> Iterator[None]:
    """Send all S3 requests of this process, and of those that it starts, to a store that has one empty bucket."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (given | {"DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()  # they remember their endpoint
        boto3.client("s3").create_bucket(Bucket=bucket)
        try:
            yield
        finally:
            urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()
