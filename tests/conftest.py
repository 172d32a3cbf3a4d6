"""Fixtures of several test files: the device, and a seed that is new each run."""

from __future__ import annotations

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import os

import pytest
import torch


def pytest_addoption(parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the tests' random inputs; default: a new one each run")
    parser.addoption("--full", action="store_true", help="also the tests that repeat others with more inputs")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "full: run with --full only")
    if config.getoption("--seed") is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="--full only"))


def pytest_report_header(config) -> str:
    return f"random inputs: --seed={config.getoption('--seed')}"


@pytest.fixture
def seed(request) -> int:
    """Seeds PyTorch with the run's seed; printed, so that pytest shows it where a test fails."""
    seed = request.config.getoption("--seed")
    torch.manual_seed(seed)
    print(f"the same inputs again: pytest --seed={seed}")
    return seed


@pytest.fixture
def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads; set back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
