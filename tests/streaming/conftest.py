import pytest

from equiav.data.local_s3 import LocalS3
from tests.streaming.toys import make_dataset


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server; the credentials are in the environment, as users have them."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "clips").mkdir()
    with pytest.MonkeyPatch.context() as patch, LocalS3(folder) as server:
        patch.setenv("AWS_ACCESS_KEY_ID", server.key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server


@pytest.fixture(scope="session")
def remote(s3):
    """103 samples in 11 shards on S3: (url, options). Not to be changed."""
    make_dataset("s3://clips/toys", 103, **s3.options)
    return "s3://clips/toys", s3.options


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """The same in a folder. Not to be changed."""
    folder = tmp_path_factory.mktemp("local") / "toys"
    make_dataset(str(folder), 103)
    return str(folder)
