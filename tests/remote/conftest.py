"""A real S3-speaking server with a faulty network before it; time-outs are short."""

import zlib
from collections.abc import Iterator

import fsspec
import pytest
from faulty_s3 import Bucket, proxy

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
_S3 = {"config_kwargs": {"connect_timeout": 2, "read_timeout": 0.5, "retries": {"max_attempts": 1}}}


@pytest.fixture(scope="session")
def server() -> Iterator[Bucket]:
    """The server, its proxy and the settings that lead to them."""
    import aiohttp
    import s3fs
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    with pytest.MonkeyPatch.context() as patch, proxy(port) as (proxy_port, faults):
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy_port}")
        patch.setitem(fsspec.config.conf, "s3", _S3)
        patch.setattr(s3fs.S3FileSystem, "retries", 3)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=0.5)
        patch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"timeout": timeout}})
        s3fs.S3FileSystem.clear_instance_cache()
        patient = {"config_kwargs": {"read_timeout": 60}, "skip_instance_cache": True}
        direct = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", **patient)
        yield Bucket("s3:/", f"http://127.0.0.1:{proxy_port}", faults, direct, "")
        s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


@pytest.fixture
def bucket(server: Bucket, request: pytest.FixtureRequest) -> Bucket:
    name = f"b{zlib.crc32(request.node.nodeid.encode()):08x}"
    server.faults.reset()
    server.direct.call_s3("create_bucket", Bucket=name, ACL="public-read")
    return Bucket(f"{server.url}/{name}", f"{server.http_url}/{name}", server.faults, server.direct, name)
