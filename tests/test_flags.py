"""flags.py: which flags were typed."""

from __future__ import annotations

import pytest

from errors import UserError
from flags import explicit


@pytest.mark.parametrize(("typed", "settings"), [
    ("", {}),
    ("--lr 2e-3 --no-augment", {"lr": 2e-3, "augment": "none"}),
    ("--preset tiny --no-bidirectional", {"preset": "tiny", "bidirectional": False}),
    ("--epochs 20 --image-size 28x32", {"epochs": 20, "image_size": (28, 32)}),
])
def test_what_was_typed_is_told_apart_from_presets_and_defaults(typed, settings):
    assert explicit(typed.split()) == settings


def test_a_wrong_flag_is_refused():
    with pytest.raises(UserError, match="--lr"):
        explicit(["--lr", "fast"])
