from tests.train.conftest import run_config  # noqa: F401
