"""Tools on one denoiser call of every family: the same assertions on tiny random pipelines of each
kind.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import patching as tl_patching

from dit_lens import attribution, patching

from .family_cases import TEXTS, Case, close
from .test_every_family_paths import arguments_of, flat_mean, rows_of_output


@pytest.fixture(autouse=True)
def _float64() -> None:
    """In place of the folder's own fixture: these tests run in float32, as users do."""


def bound(case: Case, given: dict[str, Any], pos: Any = "image") -> tuple[Any, Tensor]:
    """The view of a call with these arguments."""
    family, rest = case.model.dit.family, dict(given)
    when = next(name for name in ("timestep", "timesteps", "t") if name in rest)
    parts = [rest.pop(name) for name in (family.image, when, family.text)]
    return case.model.dit.bind(*parts, pos=pos, **rest)


def test_transformer_lens_patches_one_call(case: Case) -> None:
    """Views of one denoiser call: its activation patching against the transformer with one
    position of a stream replaced by a torch hook's own record.
    """
    dit, name, place = case.model.dit, "blocks.1.hook_resid_pre", 3
    given = arguments_of(case, case.run(TEXTS))
    joint = "joint_pos" in dit.axes("blocks.0.hook_resid_pre")  # of every block
    whole = rows_of_output(case.pipe.transformer(**given)[0])
    layout = dit.layout_of(**given)
    n_text, metric = layout.text_mask.shape[1], lambda out: out.double().mean()
    start = {"joint": 0, "text": layout.n_image, "image": 0}
    for pos in ("joint", "text") if joint else ("image",):
        view, tokens = bound(case, given, pos)
        assert close(view(tokens), whole)
        _, cache = view.run_with_cache(tokens[:1], names_filter=[name])
        assert tokens.shape == (2, layout.n_image if pos == "image" else cache[name].shape[1])
        assert pos != "text" or tokens.shape[1] in (n_text, layout.length("joint") - layout.n_image)
        found = tl_patching.generic_activation_patch(
            view,
            tokens[1:],
            cache,
            metric,
            patch_setter=tl_patching.layer_pos_patch_setter,
            activation_name="resid_pre",
            index_axis_names=None,
            index_df=pd.DataFrame({"layer": [1], "pos": [place]}),
        )

        def patch(tensor: Tensor, hook: Any, pos: str = pos, kept: Tensor = cache[name]) -> Tensor:
            tensor = tensor.clone()
            tensor[1, start[pos] + place] = kept[0, place]
            return tensor

        by_hand = rows_of_output(dit.run_with_hooks(**given, fwd_hooks=[(name, patch)])[0])
        assert float(found[0]) == pytest.approx(float(metric(by_hand[1])), rel=1e-4, abs=1e-6)
        assert not torch.equal(by_hand[1], whole[1])


def test_paths_and_scores_of_one_call(case: Case) -> None:
    """Path patching and attribution between two calls: one head's value of the source call against
    a run with that edit by hand, and autograd's slope there.
    """
    dit, name = case.model.dit, f"blocks.{case.layer}.{case.attention}.hook_z"
    original, source = (arguments_of(case, run) for run in case.counterfactuals)
    kept: dict[str, Tensor] = {}

    def keep(z: Tensor, hook: Any) -> None:
        kept["z"] = z.clone()

    def patch(z: Tensor, hook: Any) -> Tensor:
        kept["original"] = z.clone()
        z = z.clone()
        z[:, :, 1] = kept["z"][:, :, 1]
        return z

    def run(given: dict[str, Any], hook: Any) -> Tensor:
        return rows_of_output(dit.run_with_hooks(**given, fwd_hooks=[(name, hook)])[0])

    run(source, keep)
    by_hand = flat_mean(run(original, patch))
    views = [bound(case, given)[0] for given in (original, source)]
    sender = f"{case.attention}.L{case.layer}H1"
    exact = patching.path_patch(*views, sender, "output", flat_mean, "exact")
    assert exact["patched"].item() == pytest.approx(float(by_hand), rel=1e-4, abs=1e-6)
    assert abs((exact["patched"] - exact["original"]).item()) > 1e-7
    found = attribution.nodes(attribution.pair(*views), flat_mean, [case.attention])

    def open_(z: Tensor, hook: Any) -> Tensor:
        kept["open"] = z.detach().requires_grad_()
        return kept["open"]

    with torch.enable_grad():
        total = flat_mean(run(original, open_)).sum()
        (slope,) = torch.autograd.grad(total, kept["open"])
    score = ((kept["z"] - kept["original"]) * slope)[:, :, 1].double().sum()
    ours = float(found.scores[case.attention].sel(layer=case.layer, head=1).squeeze())
    assert ours == pytest.approx(float(score), rel=1e-3, abs=1e-7)
