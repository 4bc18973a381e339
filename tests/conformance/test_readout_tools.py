"""Reading the output off the residual stream and circuits off the weights: logit lens, DLA, SVD,
composition.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import FactoredMatrix, SVDInterpreter
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens, logit_readout
from transformer_lens.utilities import composition_scores

from hooked_models import HookedDiT, HookedTextToImage, NotFoldedError

from .oracles import Bound, equal, tool

pytestmark = pytest.mark.usefixtures("no_grad")
CHANNELS = '"tokens" are output channels; bind with returns="patches"'
FOLD = "unfolded: ignores shift, scale and gate; fold first"


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


# The output, read off the residual stream


@tool(
    "logit_lens.logit_lens",
    "fold",
    check="last entry = the output's patches, 1e-10; the others by hand",
    note=f"{CHANNELS}; incl_mid has 0_mid_cross if a cache is passed",
)
def test_logit_lens(bound: Bound, folded: Bound) -> None:
    output = bound.dit.patches(bound.plain(slice(0, 6)))  # of the unfolded model
    lens = logit_lens(folded.clean_cache, positions=None, incl_mid=True)
    assert lens.labels == [
        "0_pre",
        "0_mid",
        "0_mid_cross",
        "1_pre",
        "1_mid",
        "1_mid_cross",
        "final_post",
    ]
    equal(lens.values[-1], output, 1e-10)
    names = [f"blocks.{i}.hook_resid_{x}" for i in range(2) for x in ("pre", "mid", "mid_cross")]
    for entry, name in zip(lens.values, names, strict=False):
        # an intervention: a model in which everything after this point writes nothing
        later = [
            n for n in bound.dit.hook_dict if n.endswith(("attn_out", "mlp_out")) and after(n, name)
        ]
        silent = [(n, lambda tensor, hook: torch.zeros_like(tensor)) for n in later]
        equal(entry, bound.dit.patches(bound.plain(slice(0, 6), silent)), 1e-10)
    equal(
        logit_lens(folded.view, folded.clean, positions=2).values,
        logit_lens(folded.view, folded.clean, positions=None).values[:, :, 2],
    )
    # caches what TransformerLens knows of
    own = logit_lens(folded.view, folded.clean, positions=None, incl_mid=True)
    assert own.labels == [label for label in lens.labels if "cross" not in label]
    equal(own.values, lens.values[[0, 1, 3, 4, 6]])
    equal(folded.clean_cache.logit_lens(positions=None, incl_mid=True).values, lens.values)
    chosen = logit_lens(folded.view, folded.clean, positions=None, targets=[3, 9])
    equal(chosen.values[-1], output[..., [3, 9]], 1e-10)
    equal(chosen.rank_trajectory(9)[-1], (output > output[..., [9]]).sum(-1))
    top = logit_lens(folded.view, folded.clean, positions=None, top_k=4).readout
    equal(top.values[-1], output.topk(4).values, 1e-10)
    equal(top.top_ids[-1], output.topk(4).indices)


def after(write: str, residual: str) -> bool:
    """True if a write comes after a point of the residual stream."""
    order = ["pre", "attn_out", "mid", "cross_attn_out", "mid_cross", "mlp_out", "post"]

    def place(name: str) -> tuple[int, int]:
        layer, leaf = int(name.split(".")[1]), name.rpartition("hook_")[2]
        return layer, order.index(leaf.removeprefix("resid_"))

    return place(write) > place(residual)


@tool("logit_lens.logit_readout", "fold", check="norm and unembedding by hand", note=CHANNELS)
def test_readout_of_any_vector(folded: Bound) -> None:
    vectors = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    found = logit_readout(folded.view, vectors, return_type="log_probs")
    variance = vectors.var(-1, unbiased=False, keepdim=True)
    normed = (vectors - vectors.mean(-1, keepdim=True)) / (variance + folded.dit.cfg.eps).sqrt()
    logits = normed @ folded.dit.W_U + folded.dit.b_U
    # TransformerLens takes the softmax in float32
    equal(found.values.double(), logits.log_softmax(-1), 1e-5)
    equal(logit_readout(folded.view, vectors, vocab=[1, 0]).values, logits[..., [1, 0]])
    equal(
        logit_readout(folded.view, vectors, apply_ln=False).values,
        vectors @ folded.dit.W_U + folded.dit.b_U,
    )


@tool(
    "direct_logit_attribution", "fold", check="components + b_U = the output, 1e-10", note=CHANNELS
)
@pytest.mark.parametrize("position", [-1, 1, None])
def test_direct_attribution(bound: Bound, folded: Bound, position: int | None) -> None:
    output = bound.dit.patches(bound.plain(slice(0, 6)))
    at = slice(None) if position is None else position
    for channel, minus in ((3, None), (7, 20)):
        expected = output[:, at, channel] - folded.dit.b_U[channel]
        if minus is not None:
            expected = expected - (output[:, at, minus] - folded.dit.b_U[minus])
        for unit in ("component", "head", "layer"):
            found = direct_logit_attribution(
                folded.view, folded.clean, channel, minus, unit=unit, pos=position
            )
            assert found.attribution.shape == (len(found.labels), *expected.shape)
            total = found.attribution[-1] if unit == "layer" else found.attribution.sum(0)
            equal(total, expected, 1e-10)
        parts = direct_logit_attribution(
            folded.view,
            answer_tokens=channel,
            incorrect_tokens=minus,
            pos=position,
            cache=folded.clean_cache,
        )
        direction = folded.dit.W_U[:, channel] - (0 if minus is None else folded.dit.W_U[:, minus])
        write = bound.clean_cache["cross_attn_out", 1]
        by_hand = (
            (write - write.mean(-1, keepdim=True))
            / bound.clean_cache["ln_final.hook_scale"]
            @ direction
        )[:, at]
        equal(parts.attribution[parts.labels.index("1_cross_attn_out")], by_hand, 1e-10)


@tool("logit_lens.logit_lens", "bind at", "refuses", check="the error", note=FOLD)
@tool("logit_lens.logit_readout", "bind at", "refuses", check="the error", note=FOLD)
@tool("direct_logit_attribution", "bind at", "refuses", check="the error", note=FOLD)
@tool("SVDInterpreter", "bind at", "refuses", check="the error", note=FOLD)
def test_readouts_need_a_folded_model(
    bound: Bound, folded: Bound, generation: HookedTextToImage
) -> None:
    step_view, step_tokens = generation.at(0, "red circle", num_steps=2)
    for view, tokens in ((bound.view, bound.clean), (step_view, step_tokens)):
        for call in (
            lambda: logit_lens(view, tokens),  # noqa: B023
            lambda: logit_readout(view, torch.zeros(1, 16)),  # noqa: B023
            lambda: direct_logit_attribution(view, tokens, 0),  # noqa: B023
            lambda: SVDInterpreter(view),  # noqa: B023
        ):
            with pytest.raises(NotFoldedError, match=r"fold_timestep\(t\)"):
                call()
    view, tokens = folded.dit.bind(
        *(folded.call[x] for x in ("hidden_states", "timestep", "encoder_hidden_states"))
    )
    # an image has no logits by position
    with pytest.raises(ValueError, match="readout is not that path"):
        logit_lens(view, tokens)
    with pytest.raises(TypeError, match="output channels are numbers"):
        direct_logit_attribution(folded.view, folded.clean, "red")


# Circuits, read off the weights


@tool(
    "SVDInterpreter",
    "fold",
    check="torch.linalg.svd by hand, up to sign",
    note="self-attention and MLP; for cross-attention `dit.cross_OV.svd()`; num_vectors ≤ d_head",
)
@pytest.mark.parametrize("count", [8, 3])
def test_singular_vectors(folded: Bound, count: int) -> None:
    for model in (folded.dit, folded.view):
        interpreter = SVDInterpreter(model)
        for layer, block in enumerate(folded.dit.blocks):
            matrices = {
                ("OV", head): block.attn.W_V[head] @ block.attn.W_O[head] for head in range(2)
            }
            matrices |= {("w_in", None): block.mlp.W_in.T, ("w_out", None): block.mlp.W_out}
            for (kind, head), matrix in matrices.items():
                found = interpreter.get_singular_vectors(
                    kind, layer, num_vectors=count, head_index=head
                )
                directions = torch.linalg.svd(matrix)[2][:count]
                equal(found[:, 0].abs(), (folded.dit.W_U.T @ directions.T).abs(), 1e-9)
                assert found.shape == (folded.dit.cfg.d_vocab, 1, count)
    with pytest.raises(AssertionError):  # the default is 10, and a head of this size has 8
        SVDInterpreter(folded.dit).get_singular_vectors("OV", 0, head_index=0)


def frobenius(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right).norm() / left.norm() / right.norm()


@tool(
    "utilities.composition_scores",
    "fold",
    check="dense matrices",
    note=(
        "`dit.QK`, `dit.OV`, `dit.cross_QK`, `dit.cross_OV`; cross-attention ones are exact "
        "unfolded too"
    ),
)
def test_composition_of_heads(dit: HookedDiT, folded: Bound) -> None:
    pairs = {
        "OV → QK": (folded.dit.OV, folded.dit.QK),
        "OV → OV": (folded.dit.OV, folded.dit.OV),
        # the text's head → head link, through the image
        "cross OV → cross QK": (dit.cross_OV, dit.cross_QK),
        "cross OV → QK": (dit.cross_OV, folded.dit.QK),
    }
    for left, right in pairs.values():
        found = composition_scores(left, right)
        assert found.shape == (2, 2, 2, 2)
        for a, b, c, d in product(range(2), repeat=4):
            equal(found[a, b, c, d], frobenius(left.AB[a, b], right.AB[c, d]), 1e-10)
    _, cache = folded.dit.run_with_cache(**folded.call)
    # and that is what runs: q kᵀ of the centred, scaled stream
    for layer, head in product(range(2), range(2)):
        x, c = cache[f"blocks.{layer}.ln1.hook_normalized"], cache["hook_caption"]
        attn, text = folded.dit.blocks[layer].attn, folded.dit.blocks[layer].cross_attn
        moved = (
            x @ folded.dit.QK.AB[layer, head] @ x.mT
            + (x @ attn.W_Q[head] @ attn.b_K[head])[:, :, None]
        )
        moved = (
            moved + (x @ attn.W_K[head] @ attn.b_Q[head])[:, None] + attn.b_Q[head] @ attn.b_K[head]
        )
        equal(cache["attn_scores", layer][:, head], moved * 8**-0.5, 1e-10)
        values = cache["pattern", layer, "cross_attn"][:, head] @ (c @ dit.cross_OV.AB[layer, head])
        bias = text.b_V[head] @ text.W_O[head]
        equal(values + bias, cache["z", layer, "cross_attn"][:, :, head] @ text.W_O[head], 1e-10)


@tool(
    "FactoredMatrix",
    "model",
    check="dense matrices",
    note="eigenvalues need d_caption = d_model, which PixArt has",
)
@pytest.mark.parametrize("circuit", ["QK", "OV", "cross_QK", "cross_OV"])
def test_factored_matrices(dit: HookedDiT, circuit: str) -> None:
    factored: FactoredMatrix = getattr(dit, circuit)
    dense = factored.AB
    assert factored.shape == (2, 2, 16, 16)
    u, s, v = factored.svd()
    equal(u * s[..., None, :] @ v.mT, dense, 1e-10)
    equal(s, torch.linalg.svdvals(dense)[..., :8], 1e-10)
    equal(factored.norm(), dense.norm(dim=(-2, -1)), 1e-10)
    equal(factored[1, 0].AB, dense[1, 0])
    equal(factored.T.AB, dense.mT)
    equal(factored.make_even().AB, dense, 1e-10)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    equal(factored @ vector, dense @ vector)
    equal(vector @ factored, vector @ dense)
    equal((factored[0] @ factored[1]).AB, dense[0] @ dense[1], 1e-10)
    trace = torch.diagonal(dense, dim1=-2, dim2=-1).sum(-1)
    equal(factored.eigenvalues.sum(-1).real, trace, 1e-10)
