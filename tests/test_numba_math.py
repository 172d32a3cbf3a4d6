"""selective_scan/numba_math.py: elementary functions to the last places of float32, and whole vectors."""

from __future__ import annotations

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from selective_scan import numba_math  # noqa: E402

ULP = np.finfo(np.float32).eps


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
    allowed = 4 * ULP if function is exp2_of else (4 + np.abs(x)) * ULP
    assert (np.abs(y - right) <= allowed * right).all()


def test_exp2_at_the_ends_and_nan():
    x = np.array([127, 200, np.inf, -126, -200, -np.inf, np.nan], np.float32)
    y = np.empty_like(x)
    exp2_of(x, y)
    assert (y[:3] == 2.0**127).all() and (y[3:6] == 2.0**-126).all() and np.isnan(y[6])


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
