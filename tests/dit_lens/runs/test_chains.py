"""When a chain takes a run as it is recorded, and when it runs it again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_lens import attribution
from hooked_models import HookedTextToImage

from ..pairs import generations


def test_a_run_without_hooks_is_not_run_again(
    model: HookedTextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made with hooks, or is paired under some, is."""
    every = "steps.0.cond.hook_embed"
    one, other = generations(model)
    calls: list[Tensor] = []
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda *given: calls.append(given[0]) or denoise(*given))
    with torch.no_grad():
        assert torch.equal(attribution.pair(one, other).original.output, one.images)
        assert torch.equal(
            attribution.pair(one.take(torch.tensor([0, 1])), other).original.output, one.images
        )
        assert calls == []
        half = [(every, lambda x, hook: 0.5 * x)]
        moved = one.fork(0, half)
        assert not torch.equal(moved.images, one.images)
        assert torch.equal(attribution.pair(moved, other).original.output, one.images)
        with model.hooks(half):
            assert torch.equal(attribution.pair(one, other).original.output, moved.images)
        with model.dit.hooks([("hook_embed", lambda x, hook: 0.5 * x)]):
            assert not torch.equal(attribution.pair(one, other).original.output, one.images)
        # an original with hooks is run again, twice beside its own fork; so are both under hooks
        assert len(calls) == 2 + 2 + 4 + 4
