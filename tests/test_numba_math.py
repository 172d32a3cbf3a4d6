"""selective_scan/numba_math.py: elementary functions to the last places of float32, and whole vectors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from selective_scan import numba_math  # noqa: E402

LAST_PLACE = np.finfo(np.float32).eps


@numba.njit(error_model="numpy", fastmath=numba_math.FAST)
def exp2_of(x, y):
    for i in range(x.size):
        y[i] = numba_math.exp2(x[i])


@numba.njit(error_model="numpy", fastmath=numba_math.FAST)
def sigmoid_of(x, y):
    for i in range(x.size):
        y[i] = numba_math.sigmoid(x[i])


def softplus_of(x, y):
    numba_math.softplus(x, np.zeros_like(x), y, np.empty(0, np.float32))


def slope_of(x, y):
    numba_math.softplus(x, np.zeros_like(x), np.empty_like(x), y)


def right_sigmoid(x):
    return 1 / (1 + np.exp(-x))


RIGHT = {exp2_of: np.exp2, sigmoid_of: right_sigmoid, softplus_of: lambda x: np.logaddexp(0, x),
         slope_of: right_sigmoid}


@pytest.mark.parametrize("function", RIGHT, ids=lambda function: function.__name__)
def test_elementary_functions(function, seed):
    random = np.random.default_rng(seed)
    x = np.concatenate([random.uniform(-80, 80, 4000), random.normal(0, 1, 4000), random.normal(0, 1e-4, 99),
                        [0, -0.5, 0.5, 1, -1, 80, -80]]).astype(np.float32)
    y = np.empty_like(x)
    function(x, y)
    right = RIGHT[function](x.astype(np.float64))
    # An exponential's argument, rounded, tells up to |x| halves of a last place.
    allowed = LAST_PLACE if function is exp2_of else (4 + np.abs(x)) * LAST_PLACE
    assert (np.abs(y - right) <= allowed * right).all()


def test_exp2_at_the_ends_and_nan():
    x = np.array([127, -126, 128, 200, np.inf, -127, -200, -np.inf, np.nan], np.float32)
    y = np.empty_like(x)
    exp2_of(x, y)
    assert y[0] == 2.0**127 and y[1] == 2.0**-126
    assert (y[2:5] == np.inf).all() and (y[5:8] == 0).all() and np.isnan(y[8])


def test_sigmoid_at_the_ends_and_nan():
    x = np.array([1e38, np.inf, -1e38, -np.inf, np.nan], np.float32)
    for function in (sigmoid_of, slope_of):
        y = np.empty_like(x)
        function(x, y)
        assert (y[:2] == 1).all() and (y[2:4] == 0).all() and np.isnan(y[4])


@pytest.fixture
def config(monkeypatch):
    """Numba's settings as they are where the user has set nothing, put back afterwards."""
    for variable, value in (("CPU_NAME", None), ("CPU_FEATURES", None), ("ENABLE_AVX", 1)):
        monkeypatch.setattr(numba_math.config, variable, value)
    return numba_math.config


@pytest.mark.parametrize(("feature", "there", "wide"), [("avx512vbmi2", True, True),
                                                        ("avx512vbmi2", False, False),
                                                        ("avx512f", True, False)])
def test_whole_vectors_from_ice_lake_on(feature, there, wide, config, monkeypatch):
    class Features(dict):
        def flatten(self):
            return ",".join(("+" if there else "-") + name for name, there in self.items())

    monkeypatch.setattr(numba_math.binding, "get_host_cpu_features", lambda: Features({feature: there}))
    numba_math.use_whole_vectors()
    chosen = config.CPU_FEATURES
    assert chosen == (f"+{feature},-prefer-256-bit" if wide else None)


@pytest.mark.parametrize(("variable", "value"), [("CPU_NAME", "generic"), ("CPU_FEATURES", "+avx"),
                                                 ("ENABLE_AVX", 0)])
def test_what_the_user_has_set_stays(variable, value, config):
    setattr(config, variable, value)
    numba_math.use_whole_vectors()
    chosen = config.CPU_FEATURES
    assert chosen == (value if variable == "CPU_FEATURES" else None)


def test_a_kernel_from_before_a_change_here_is_forgotten(tmp_path):
    class Compiled:
        class stats:
            cache_path = str(tmp_path)

    source = tmp_path / "numba_math.py"
    source.touch()
    older, newer, other = (tmp_path / f"cpu.{name}-90.py311.nbi" for name in ("forward_task", "backward_task",
                                                                              "forward"))
    for index, seconds in ((older, -9), (newer, 9), (other, -9)):
        index.touch()
        os.utime(index, times=(source.stat().st_mtime + seconds,) * 2)
    for name in ("forward_task", "backward_task"):
        numba_math.forget_if_older(Compiled, name, source)
    assert not older.exists() and newer.exists() and other.exists()
    Compiled.stats.cache_path = str(tmp_path / "none")
    numba_math.forget_if_older(Compiled, "forward_task", source)


def test_its_kernels_are_kept_where_it_looks():
    x = np.zeros(3, np.float32)
    numba_math.softplus(x, x, np.empty(3, np.float32), np.empty(0, np.float32))
    kept = Path(numba_math.softplus.stats.cache_path).glob("numba_math.softplus-*.nbi")
    assert list(kept), "or forget_if_older would look for another name"
