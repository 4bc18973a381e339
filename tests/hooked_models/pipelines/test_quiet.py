"""Loading a model and drawing with it prints nothing and warns of nothing."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from hooked_models import HookedTextToImage, list_models


@pytest.mark.parametrize("name", list_models())
def test_loading_and_drawing_is_silent(
    name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = HookedTextToImage.from_pretrained(name)
        with torch.no_grad():
            model(["red circle is above blue square"], seed=0, num_steps=2)
    assert capfd.readouterr() == ("", "")
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ] == []
