"""Object stores on loopback: S3 by moto, Google's by gcp-storage-emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import fsspec
import pytest

from tests.services.slurm import free_port


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


@contextmanager
def running_gs(bucket: str) -> Iterator[None]:
    """Send all requests for gs:// of this process and those that it starts to a store that has one empty bucket."""
    import gcsfs
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_GS_TOKEN", "anon")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # of which only a new process asks the environment
        gcsfs.GCSFileSystem.clear_instance_cache()  # they remember their endpoint
        try:
            yield
        finally:
            gcsfs.GCSFileSystem.clear_instance_cache()
            server.stop()
