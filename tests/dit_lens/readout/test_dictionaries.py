"""A dictionary reads what the hook has, changes what was changed of its features and nothing
else.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_lens.readout import dictionary
from hooked_models.hooks.errors import UnknownHookError

from ...hooked_models.pipelines import PROMPTS
from .test_heat_maps import SEEDS, opened

NAMES = {
    "PixArt": [
        "blocks.1.hook_resid_post",
        "blocks.0.cross_attn.hook_z",
        "text_encoder.blocks.1.hook_resid_post",
        "hook_x0",
    ],
    "FLUX.1 true CFG": ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"],
    "SD3": ["blocks.1.hook_mlp_out_pre_gate"],
    "SANA DPM++": ["blocks.1.hook_mlp_out_pre_gate", "blocks.0.cross_attn.hook_q"],
}
CASES = [(family, name) for family, names in NAMES.items() for name in names]


class Sparse:
    """A dictionary with an error: fewer directions than the tensor has, and a threshold."""

    def __init__(self, d: int, n: int = 3) -> None:
        self.down = torch.randn(d, n, generator=torch.Generator().manual_seed(0))
        self.up = torch.randn(n, d, generator=torch.Generator().manual_seed(1))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.down)

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.up


def first_up(features: Tensor) -> Tensor:
    return features + torch.tensor([3.0, 0.0, 0.0])


def first_reversed(features: Tensor) -> Tensor:
    return features * torch.tensor([-20.0, 1.0, 1.0])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_features_are_read_and_edited_beside_an_error_that_stays(family: str, name: str) -> None:
    model, n_steps, options = opened(family)
    full = (
        name
        if name.startswith("text_encoder")
        else f"steps.1.{name}"
        if name == "hook_x0"
        else f"steps.1.cond.{name}"
    )
    with torch.no_grad():
        own, cache = model.run_with_cache(PROMPTS, SEEDS, n_steps, names_filter=full, **options)
        x, sae = cache[full], Sparse(cache[full].shape[-1])
        ours = dictionary(name, sae.encode, sae.decode)
        found = ours.activations(model, PROMPTS, SEEDS, n_steps, **options)
        step = 0 if name.startswith("text_encoder") else 1
        expected = sae.encode(x).flatten(1, -2)
        assert torch.allclose(
            torch.from_numpy(found["activation"].sel(step=step).values), expected.amax(1), atol=1e-4
        )
        error = (x - sae.decode(sae.encode(x))).flatten(1).square().sum(1) / x.flatten(
            1
        ).square().sum(1)
        assert torch.allclose(
            torch.from_numpy(found["error"].sel(step=step).values), error, rtol=1e-3
        )
        mean = ours.activations(model, PROMPTS, SEEDS, n_steps, reduce="mean", **options)[
            "activation"
        ].sel(step=step)
        assert torch.allclose(torch.from_numpy(mean.values), expected.mean(1), atol=1e-4)

        same = model.run_with_hooks(
            PROMPTS, SEEDS, n_steps, fwd_hooks=ours.edit(lambda f: f), **options
        )
        assert torch.equal(same, own)
        edited = model.run_with_hooks(
            PROMPTS, SEEDS, n_steps, fwd_hooks=ours.edit(first_up, branch="cond"), **options
        )

        def by_hand(x: Tensor, hook: object) -> Tensor:
            return x + 3.0 * sae.up[0]

        def chosen(there: str) -> bool:
            return there == name or (
                there.startswith("steps.")
                and there.endswith(f"{'.' if name == 'hook_x0' else '.cond.'}{name}")
            )

        theirs = model.run_with_hooks(
            PROMPTS, SEEDS, n_steps, fwd_hooks=[(chosen, by_hand)], **options
        )
        assert torch.allclose(edited, theirs, atol=1e-4)
        assert not torch.allclose(edited, own, atol=1e-4)


def test_a_transcoder_reads_one_hook_and_writes_to_another() -> None:
    model, n_steps, options = opened("SD3")
    before, after = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out_pre_gate"
    n_image = 16
    sae = Sparse(16)
    ours = dictionary(before, lambda x: sae.encode(x[:, :n_image]), sae.decode, output=after)
    with torch.no_grad():
        own = model(PROMPTS, SEEDS, n_steps, **options)
        assert torch.equal(
            model.run_with_hooks(
                PROMPTS, SEEDS, n_steps, fwd_hooks=ours.edit(lambda f: f), **options
            ),
            own,
        )
        edited = model.run_with_hooks(
            PROMPTS, SEEDS, n_steps, fwd_hooks=ours.edit(first_reversed, steps=1), **options
        )
        held = {}

        def read(x: Tensor, hook: object) -> None:
            held["off"] = sae.encode(x[:, :n_image])[..., :1] * 21 * sae.up[0]

        def write(y: Tensor, hook: object) -> Tensor:
            return y - held["off"]

        hooks = [
            (f"steps.1.{b}.{name}", fn)
            for b in ("cond", "uncond")
            for name, fn in ((before, read), (after, write))
        ]
        theirs = [
            model.run_with_hooks(PROMPTS, SEEDS, n_steps, fwd_hooks=pair, **options)
            for pair in (hooks[:2], hooks[2:])
        ]
        apart = [
            model.run_with_hooks(
                PROMPTS,
                SEEDS,
                n_steps,
                fwd_hooks=ours.edit(first_reversed, steps=[1], branch=b),
                **options,
            )
            for b in ("cond", "uncond")
        ]
        for one, other in zip(apart, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
            assert not torch.allclose(one, own, atol=1e-4)
        assert not torch.allclose(edited, apart[0], atol=1e-4)
        found = ours.activations(
            model, PROMPTS, SEEDS, n_steps, reduce="none", steps=[0, 2], **options
        )
    assert found["activation"].shape == (2, 2, n_image, 3)
    assert found["step"].values.tolist() == [0, 2]


def test_an_unknown_name_is_refused() -> None:
    model, n_steps, options = opened("SANA DPM++")
    with pytest.raises(UnknownHookError, match=r"did you mean 'blocks\.1\.hook_resid_post'"):
        dictionary("blocks.1.hook_resid_pots", torch.relu, torch.relu).activations(
            model, PROMPTS, SEEDS, n_steps, **options
        )
    with pytest.raises(UnknownHookError, match="linear"):
        dictionary("blocks.1.attn.hook_z", torch.relu, torch.relu).activations(
            model, PROMPTS, SEEDS, n_steps, **options
        )
