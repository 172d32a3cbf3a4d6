"""Fixtures of several test files: a script called as a command, the device, a seed that is new each run."""

from __future__ import annotations

import cpu_settings  # isort: skip  # noqa: F401  (before torch: it reads them once)

import gc
import os
import signal
import sys
import threading
from types import ModuleType

import hypothesis
import pytest
import torch

from errors import run_script
from tests.commands import Ended

# Hypothesis would fail a test whose examples are drawn slowly, and a busy machine draws slowly. A folder that
# is shared by the examples of a test is meant.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[
    hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the tests' random inputs; default: a new one each run")
    parser.addoption("--full", action="store_true", help="also the tests that repeat others with more inputs")


def pytest_configure(config) -> None:
    # A shell makes what it starts in the background deaf to Ctrl-C, and the tests, which send it to
    # themselves and to commands that they start, may be in there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "full: run with --full only")
    if config.getoption("--seed") is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="--full only"))


def pytest_collection_finish() -> None:
    # What is there to stay: PyTorch's modules and the tests. Or each full collection, which the benchmarks
    # ask for again and again, would look through half a second's worth of objects.
    gc.collect()
    gc.freeze()


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
def command(tmp_path, monkeypatch, capfd):
    """command(module, *arguments) → status, stdout and stderr of a script run here, in an empty folder.

    A command of its own takes several seconds to import PyTorch and all else, so that few tests start one.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # both set back after the test
    precision = torch.get_float32_matmul_precision()

    def call(script: ModuleType, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        status = 0
        capfd.readouterr()
        try:
            run_script(script.main)
        except SystemExit as ended:
            status = ended.code or 0
        return Ended(status, *capfd.readouterr())

    yield call
    torch.set_float32_matmul_precision(precision)


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
