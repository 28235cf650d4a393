"""The same numbers on every machine, and no network."""

import os
import random
import shutil
import signal
import socket

# Every process of the suite, and each that it starts, works with one thread: several of
# them share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

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
    # A shell ignores SIGINT for what it runs in the background, and children inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    look_up = socket.getaddrinfo

    def refuse(host, *args, **kwargs):
        if host in ("127.0.0.1", "localhost"):  # engines of this machine
            return look_up(host, *args, **kwargs)
        raise OSError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser():
    """Chromium, where it is installed."""
    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()
