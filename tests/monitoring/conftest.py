import shutil

import pytest

from tests.train.conftest import run_config  # noqa: F401  # a fixture


@pytest.fixture(scope="session", autouse=True)
def prometheus_is_here():
    if not (shutil.which("promtool") and shutil.which("prometheus")):
        pytest.fail("these tests run Prometheus and promtool: apt-get install prometheus")
