"""cpu_settings.py: how OpenMP's threads wait, unless the user has said so."""

from __future__ import annotations

import importlib
import os

import pytest

import cpu_settings

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(("given", "expected"), [
    ({}, ("10000", "PASSIVE")), ({"OMP_WAIT_POLICY": "ACTIVE"}, (None, "ACTIVE")),
    ({"GOMP_SPINCOUNT": "7"}, ("7", "PASSIVE"))], ids=str)
def test_threads_spin_for_a_moment_unless_told_otherwise(given, expected, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(cpu_settings)
    assert tuple(os.environ.get(name) for name in NAMES) == expected
