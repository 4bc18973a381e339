"""Circuits read off weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from dit_lens import circuits
from hooked_models import HookedDiT, HookedTextToImage, NotFoldedError

from ...hooked_models.pipelines import PROMPTS, tiny_pipeline
from ...hooked_models.tiny import tiny_transformer


@pytest.mark.parametrize(
    ("kind", "sender", "receiver"),
    [
        ("Q", "cross_attn", "cross_attn"),
        ("Q", "attn", "cross_attn"),
        ("K", "cross_attn", "attn"),
        ("V", "attn", "attn"),
    ],
)
@torch.no_grad()
def test_composition_scores_are_norms_of_the_written_out_products(
    kind: str, sender: str, receiver: str
) -> None:
    dit = HookedDiT(tiny_transformer().double()).fold_timestep(300.0)
    scores = circuits.composition_scores(dit, kind, sender, receiver)  # type: ignore[arg-type]
    for layer_s, head_s, layer_r, head_r in itertools.product(
        range(2), range(3), range(2), range(3)
    ):
        first = layer_s < layer_r or (
            layer_s == layer_r and (sender, receiver) == ("attn", "cross_attn")
        )
        found = float(scores[layer_s, head_s, layer_r, head_r])
        assert np.isnan(found) == (not first)
        if first:
            s, r = getattr(dit.blocks[layer_s], sender), getattr(dit.blocks[layer_r], receiver)
            writes = s.W_V[head_s] @ s.W_O[head_s]
            reads = {
                "Q": r.W_Q[head_r] @ r.W_K[head_r].T,
                "K": r.W_K[head_r] @ r.W_Q[head_r].T,
                "V": r.W_V[head_r] @ r.W_O[head_r],
            }[kind]
            assert found == pytest.approx(
                float((writes @ reads).norm() / writes.norm() / reads.norm()), abs=1e-12
            )


def test_composition_that_does_not_exist_or_would_be_wrong_is_refused() -> None:
    dit = HookedDiT(tiny_transformer())
    with pytest.raises(ValueError, match="come from the text alone"):
        circuits.composition_scores(dit, "K", receiver="cross_attn")
    with pytest.raises(NotFoldedError, match="fold_timestep"):
        circuits.composition_scores(dit, "Q", sender="attn")
    assert circuits.composition_scores(dit).notnull().sum() == 9  # cross → cross needs no folding


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline(dtype=torch.float64))


@pytest.mark.parametrize("expand_heads", [False, True])
@torch.no_grad()
def test_logit_terms_sum_to_the_scores(model: HookedTextToImage, expand_heads: bool) -> None:
    _, cache = model.run_with_cache(PROMPTS, num_steps=2)
    view, tokens = model.at(1, PROMPTS, num_steps=2)
    for found in (cache.at(step=1), view.run_with_cache(tokens)[1]):
        for layer, head in itertools.product(range(2), range(2)):
            terms = circuits.logit_terms(found, (layer, head), expand_heads)
            pads = (model.to_tokens(PROMPTS) == 0)[:, None]
            scores = (found["attn_scores", layer, "cross_attn"][:, head] + 10000 * pads).numpy()
            np.testing.assert_allclose(terms.sum(("query_part", "key_part")), scores, atol=1e-10)
            assert (
                abs(terms).max(("prompt", "image_pos", "text_pos")).drop_sel(query_part="bias")
                > 1e-6
            ).all()
    parts = list(terms.query_part.values)
    assert parts[:3] == ["embed", "pos_embed", "0_attn_out"]
    assert ("cross_L0H1" in parts) == expand_heads


@torch.no_grad()
def test_the_position_word_term_is_the_position_word_map(model: HookedTextToImage) -> None:
    _, cache = model.run_with_cache(PROMPTS[0], num_steps=1)
    found = cache.at(step=0)
    terms = circuits.logit_terms(found, "L1H1").sel(key_part="text")[0]
    maps = circuits.position_word_maps(model.dit, cache["text_encoder.hook_out"][0])[1, 1] * 8**-0.5
    np.testing.assert_allclose(
        terms.sel(query_part=["pos_embed", "bias"]).sum("query_part"), maps.T, atol=1e-12
    )


@torch.no_grad()
def test_two_heads_compose_as_an_intervention_on_the_model_shows(model: HookedTextToImage) -> None:
    """Run the model with a residual stream of nothing but the position code, then let one head of
    layer 0 write into it.
    """
    prompt = PROMPTS[0]
    maps = circuits.two_head_maps(model, prompt, "L0H1", "L1H0", gain=2.0)
    found = {}

    def only_position(tensor, hook):
        return model.dit.W_pos.expand_as(tensor)

    def only_one_head(tensor, hook):
        z = found["z"].clone()
        z[:, :, 0] = 0
        return 2.0 * torch.einsum("bphe,hed->bpd", z, model.dit.blocks[0].cross_attn.W_O)

    def keep(name):
        return lambda tensor, hook: found.update({name: tensor.clone()})

    def zero(tensor, hook):
        return torch.zeros_like(tensor)

    for name, write in (("alone", zero), ("composed", only_one_head)):
        hooks = [
            ("blocks.0.hook_resid_pre", only_position),
            *(
                (f"blocks.{layer}.hook_{part}_out", zero)
                for layer in (0, 1)
                for part in ("attn", "mlp")
            ),
            ("blocks.0.cross_attn.hook_z", keep("z")),
            ("blocks.0.hook_cross_attn_out", write),
            ("blocks.1.cross_attn.hook_attn_scores", keep("scores")),
        ]
        model.run_with_hooks(
            prompt, num_steps=1, fwd_hooks=[(f"steps.0.cond.{site}", hook) for site, hook in hooks]
        )
        attn = model.dit.blocks[1].cross_attn
        scores = found["scores"][0, 0]
        stream = (
            model.dit.W_pos if name == "alone" else model.dit.W_pos + only_one_head(None, None)[0]
        )
        scores = scores - attn.scale * (stream @ attn.W_Q[0] + attn.b_Q[0]) @ attn.b_K[0][:, None]
        np.testing.assert_allclose(
            maps[name].values.reshape(len(scores.T), -1), (scores - scores.mean(0)).T, atol=1e-6
        )
    assert abs(maps["composed"] - maps["alone"]).max() > 1e-3
    assert list(maps.token.values) == model.to_str_tokens(prompt)
    with pytest.raises(ValueError, match="must be in an earlier layer"):
        circuits.two_head_maps(model, prompt, "L1H1", "L1H0")


@torch.no_grad()
def test_what_a_head_writes_and_reads(model: HookedTextToImage) -> None:
    dit = model.dit
    words = {word: model.text_encoder.W_E[i].detach() for i, word in [(5, "circle"), (6, "square")]}
    written = circuits.ov_outputs(dit, "L0H1", words)
    scores = circuits.content_word_scores(
        dit, "L1H0", {w: torch.tensor(written.sel(word=w).values) for w in words}, words
    )
    for word, other in itertools.product(words, words):
        caption = {w: dit.project_caption(words[w].double()) for w in words}
        np.testing.assert_allclose(
            written.sel(word=word), caption[word] @ dit.cross_OV.AB[0, 1], atol=1e-12
        )
        expected = caption[word] @ dit.cross_OV.AB[0, 1] @ dit.cross_QK.AB[1, 0] @ caption[other]
        assert float(scores.sel(content=word, word=other)) == pytest.approx(
            float(expected), abs=1e-12
        )


@pytest.mark.parametrize(
    "head", ["L2H0", "L0H2", (2, 0), (0, 2), (1, -1), (-1, 1), (0.5, 1), "H1", "L1"]
)
def test_a_head_that_is_not_there_is_refused(head: object) -> None:
    dit = HookedTextToImage.from_pipeline(tiny_pipeline()).dit
    assert (dit.cfg.n_layers, dit.cfg.n_heads) == (2, 2)
    # past the type checker
    map_of = getattr(circuits.position_word_map, "__wrapped__", circuits.position_word_map)
    refused = r"no head|names no head|give an integer|Type-check error"  # the last by TYPES=1
    with pytest.raises((ValueError, TypeCheckError), match=refused):
        map_of(dit, head, torch.zeros(16))
    assert circuits.position_word_map(dit, (1, 1), torch.zeros(16)).shape == (2, 2)


@pytest.fixture(scope="module")
def fine() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))


def test_a_position_word_map_is_an_exact_term_of_the_attention_score(fine):
    """Add E_pos to the residual stream: the scores change by exactly the map (its query part, over
    √d_head).
    """
    dit = fine.dit
    vector = fine.text_encoder.W_E[3]
    maps = circuits.position_word_maps(dit, vector[None])
    for layer, block in enumerate(dit.blocks):
        attn = block.cross_attn
        residual = torch.randn(
            1, len(dit.W_pos), dit.cfg.d_model, generator=torch.Generator().manual_seed(layer)
        )
        caption = dit.project_caption(vector[None, None])

        def scores(x, attn=attn, caption=caption):
            both = torch.einsum(
                "bqhe,bkhe->hqk",
                attn.queries(x),
                attn.keys(torch.cat([caption, 0 * caption], dim=1)),
            )
            # against a key of nothing but the bias: what a pattern can depend on
            return both[..., 0] - both[..., 1]

        difference = scores(residual + dit.W_pos) - scores(residual)
        # the map has the query bias, the difference has not
        bias = scores(torch.zeros_like(residual))
        assert torch.allclose(difference + bias, maps[layer, :, 0], atol=1e-4)
        assert difference.std() > 0.01


def test_map_of_one_head_is_a_picture(fine):
    vector = fine.text_encoder.W_E[4]
    picture = circuits.position_word_map(fine.dit, "L1H0", vector)
    assert picture.dims == ("y", "x")
    assert np.allclose(
        picture.values.ravel(),
        circuits.position_word_maps(fine.dit, vector[None])[1, 0, 0].detach(),
    )
    with pytest.raises(ValueError, match="2 layers of 2 heads"):
        circuits.position_word_map(fine.dit, "L2H0", vector)
    with pytest.raises(ValueError, match="such as 'L2H8'"):
        circuits.parse_head("head 3")
    assert circuits.parse_head("L2H8") == circuits.parse_head((2, 8)) == (2, 8)
