"""The same numbers on every machine, and no network."""

import random
import socket

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "suite", derandomize=True, deadline=None, database=None, max_examples=30
)
settings.load_profile("suite")


def pytest_configure(config):
    # One thread sums in one order whatever the machine, and small problems gain nothing
    # from a second.
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # else only the first test to meet a warning fails


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
