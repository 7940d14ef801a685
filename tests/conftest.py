import os

import pytest
import torch

os.environ.setdefault("COLUMNS", "120")  # messages are not cut to a narrow terminal

from equiav.config import Config, from_dict
from tests import forks


def pytest_configure(config):
    """Where tests run: not in the process that hands them out to others."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        forks.SERVER.start()
        forks.install()


def tiny_config(**sections) -> Config:
    sections.setdefault("model", {}).setdefault("size", "tiny")
    return from_dict(Config, sections, "test")


@pytest.fixture
def make_config():
    """A tiny config with some values replaced: make_config(objective={"centroid_size": 4})."""
    return tiny_config


@pytest.fixture
def config() -> Config:
    return tiny_config(objective={"centroid_size": 3})


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
