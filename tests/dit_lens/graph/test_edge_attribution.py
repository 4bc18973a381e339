"""Edges against path patching between the same ends."""

from __future__ import annotations

import pytest

from dit_lens import attribution, patching

from ..pairs import generations, metric


def test_path_patching_finds_the_same_effects_under_the_same_names(model, images):
    original, source = generations(model)
    table = attribution.edges(images, metric).verify(k=4, sample=0).table
    for row in table.itertuples():
        ends = [patching.Nodes(name, steps=int(row.step)) for name in (row.sender, row.receiver)]
        found = patching.path_patch(original, source, *ends, metric)
        assert row.exact == pytest.approx(
            (found["patched"] - found["original"]).mean().item(), abs=1e-12
        )
