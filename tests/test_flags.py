"""flags.py: which flags were typed, and what a run's saved ones mean today."""

from __future__ import annotations

import pytest

from errors import UserError
from flags import differences, explicit, fill_in, parse_arguments


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


@pytest.mark.parametrize("off", [0.0, False, None])
def test_a_saved_flag_that_is_gone_matters_only_if_it_did_something(off):
    settings = parse_arguments(["--lr", "2e-3"])
    fill_in(settings)
    saved = vars(settings) | {"winds": off}
    assert differences(saved, settings) == {} and parse_arguments([], saved).lr == 2e-3
    saved["winds"] = 0.5
    assert differences(saved, settings) == {"winds": (0.5, None)}
    with pytest.raises(UserError, match="--winds"):
        parse_arguments([], saved)
