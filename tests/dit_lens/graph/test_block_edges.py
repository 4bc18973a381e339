"""Edges between blocks against derivatives taken with hooks of one's own; every family is in
tests/conformance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_lens import attribution
from hooked_models import families


def metric(out: torch.Tensor) -> torch.Tensor:
    return out.square().flatten(1).mean(1)


def calls() -> tuple[Any, Any]:
    family = families.SUPPORTED["FluxTransformer2DModel"]
    dit = families.hook(family.small().eval().double())
    given = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in family.inputs(dit.wrapped).items()
    }
    latents, time, text = (
        given.pop(name) for name in ("hidden_states", "timestep", "encoder_hidden_states")
    )
    return tuple(dit.bind(latents, time, one, **given)[0] for one in (text, text.flip(0)))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("hook", "end", "over"),
    [
        ("blocks.2.hook_resid_post", {"receiver": "output"}, "sender"),
        ("blocks.0.hook_resid_pre", {"sender": "embed"}, "receiver"),
    ],
)
def test_edges_of_an_end_add_up_to_its_streams_difference_times_gradient(hook, end, over):
    original, source = calls()
    found = attribution.edges(attribution.pair(original, source), metric).scores
    streams = []
    for view in (original, source):
        kept: list[torch.Tensor] = []
        with view.hooks([(hook, lambda x, hook, kept=kept: kept.append(x))]):
            out = view(view.to_tokens())
        streams.append((kept[0], out))
    (stream, out), (other, _) = streams
    (gradient,) = torch.autograd.grad(metric(out).sum(), stream)
    expected = ((other - stream) * gradient).flatten(1).sum(1).detach()
    assert expected.abs().max() > 0
    summed = found.sel(**end).sum(over).squeeze()
    torch.testing.assert_close(torch.as_tensor(summed.values), expected)
