"""`pytest` runs the CPU tier, and the GPU tier where CUDA is; `pytest --slow` adds the long comparisons."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # before anything imports triton: kernels run as plain Python
    torch.set_num_threads(1)                    # models this small wait longer for threads than they compute


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes)")


@pytest.fixture(autouse=True)
def no_tuning_of_yours(tmp_path_factory, monkeypatch):
    """What --tune has found on this machine is no part of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run pytest --slow"))
