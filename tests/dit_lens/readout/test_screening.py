"""Screening of heads against maps written out, planted heads and heads without a relation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, pearsonr
from scipy.stats import t as student

from dit_lens import circuits, scenes, screening
from dit_lens.task import PHRASES
from hooked_models import HookedDiT, HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))


def test_a_words_vector_is_its_row_plus_its_place(model):
    encoder = model.text_encoder
    # "red circle is above …": the fourth token
    expected = encoder.W_E[8] + encoder.wrapped.position_code(4)[3]
    assert torch.allclose(screening.word_vector(model, "above"), expected)
    with pytest.raises(ValueError, match="needs a"):
        screening.word_vector(model, "above", "red circle")


def test_the_ramp_is_the_papers_template():
    # arXiv 2601.06338, appendix B.7
    assert screening.ramp((1, 0), 8).norm().item() == pytest.approx(5.237, abs=1e-3)
    left = screening.ramp((-1, 0), 8).reshape(8, 8)
    assert (left[:, 0] > left[:, -1]).all()
    assert (left[0] == left[5]).all()
    above = screening.ramp((0, -1), 8).reshape(8, 8)
    assert (above[0] > above[-1]).all()
    assert screening.ramp((1, 1), 8).norm().item() == pytest.approx(5.237, abs=1e-3)


def test_directions_of_words_are_those_of_the_relations_that_they_name():
    for word, direction in screening.WORD_DIRECTIONS.items():
        named = [
            scenes.DIRECTIONS[relation]
            for relation, phrases in PHRASES.items()
            if word == relation or any(word in phrase.split() for phrase in phrases)
        ]
        common = tuple(
            one.pop() if len(one) == 1 else 0 for one in map(set, zip(*named, strict=True))
        )
        assert direction == common, word


def plant(dit: HookedDiT, layer: int, head: int, vectors: dict[str, torch.Tensor]) -> None:
    """Set one head's queries to the position's coordinates and its keys to the word's direction."""
    side = dit.cfg.sample_size // dit.cfg.patch_size
    # [pos 2]
    coordinates = torch.stack([screening.ramp((1, 0), side), screening.ramp((0, 1), side)], dim=1)
    # [word 2]
    directions = torch.tensor([screening.WORD_DIRECTIONS[w] for w in vectors], dtype=torch.float64)
    captions = dit.project_caption(torch.stack(list(vectors.values()))).double()
    attn = dit.blocks[layer].cross_attn
    with torch.no_grad():
        attn.W_Q[head].zero_()
        attn.W_K[head].zero_()
        attn.b_Q[head].zero_()
        attn.b_K[head].zero_()
        attn.W_Q[head][:, :2] = (
            20
            * torch.linalg.lstsq(dit.W_pos.double(), coordinates, driver="gelsd").solution.float()
        )
        attn.W_K[head][:, :2] = torch.linalg.lstsq(
            captions, directions, driver="gelsd"
        ).solution.float()


RELATIONS = [str(relation) for relation in scenes.DIRECTIONS]


@pytest.fixture(scope="module")
def relation_vectors() -> dict[str, torch.Tensor]:
    """Random word vectors, one a relation."""
    vectors = torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    return dict(zip(RELATIONS, vectors, strict=True))


def test_screening_numbers_are_those_of_the_written_out_maps(model, relation_vectors):
    table = screening.screen_heads(model.dit, relation_vectors, null_draws=2).set_index(
        ["layer", "head"]
    )
    maps = (
        circuits.position_word_maps(model.dit, torch.stack(list(relation_vectors.values())))
        .double()
        .detach()
    )
    maps = maps - maps.mean(-1, keepdim=True)
    ramps = torch.stack([screening.ramp(scenes.DIRECTIONS[r], 8) for r in scenes.DIRECTIONS])
    ramps = ramps / ramps.norm(dim=1, keepdim=True)
    projection = (maps * ramps).sum(-1)
    for layer, head in np.ndindex(2, 2):
        row = table.loc[(layer, head)]
        assert row.projection == pytest.approx(projection[layer, head].mean().item(), rel=1e-4)
        assert row.energy == pytest.approx(maps[layer, head].norm(dim=-1).mean().item(), rel=1e-4)
        assert row.cosine == pytest.approx(
            (projection / maps.norm(dim=-1))[layer, head].mean().item(), rel=1e-4
        )


def test_screening_finds_the_planted_heads_of_either_sign_and_its_control_does_not(
    relation_vectors,
):
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))
    blank = screening.screen_heads(model.dit, relation_vectors)
    assert blank.cosine.abs().max() < 0.9
    plant(model.dit, 1, 0, relation_vectors)
    plant(model.dit, 0, 1, relation_vectors)
    with torch.no_grad():
        model.dit.blocks[0].cross_attn.W_Q[1].neg_()
    table = screening.screen_heads(model.dit, relation_vectors).set_index(["layer", "head"])
    assert table.loc[(1, 0)].cosine > 0.95
    assert table.loc[(0, 1)].cosine < -0.95
    assert table.index[:2].sort_values().tolist() == [(0, 1), (1, 0)]
    assert table.p_positions[:2].tolist() == [1 / (1 + 500)] * 2  # no draw is as large
    assert (table.p[:2] < 0.01).all()
    assert table.cosine[2:].abs().max() < 0.9
    # the same maps, the wrong ramps
    rotated = {word: relation_vectors[RELATIONS[i - 3]] for i, word in enumerate(RELATIONS)}
    assert (
        abs(
            screening.screen_heads(model.dit, rotated)
            .set_index(["layer", "head"])
            .loc[(1, 0)]
            .cosine
        )
        < 0.8
    )
    with pytest.raises(ValueError, match="sideways has no direction"):
        screening.screen_heads(model.dit, {"sideways": relation_vectors["left"]})


def test_a_ramp_that_is_the_same_for_every_word_is_no_relation_head(relation_vectors):
    """However unevenly the words' directions are chosen."""
    up_twice = {
        word: relation_vectors[word]
        for word in ("above", "upper_left", "upper_right", "left", "right")
    }
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))
    plant(model.dit, 1, 0, relation_vectors)
    attn, caption = (
        model.dit.blocks[1].cross_attn,
        model.dit.project_caption(torch.stack(list(up_twice.values()))),
    )
    with torch.no_grad():
        attn.W_K[0].zero_()
        attn.W_K[0][:, 1] = (
            -20 * torch.linalg.lstsq(caption, torch.ones(5, 1), driver="gelsd").solution[:, 0]
        )
    row = screening.screen_heads(model.dit, up_twice).set_index(["layer", "head"]).loc[(1, 0)]
    assert row.cosine > 0.4
    assert row.p > 0.2


@pytest.mark.parametrize("at", ["text", "caption"])
def test_p_values_are_uniform_or_larger_without_a_relation_head(at):
    """Random words in a random model: 4 heads × 60 draws of words, p ≤ 0.1 in about a tenth of them
    or less.
    """
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        vectors = dict(zip(RELATIONS, torch.randn(8, 16, generator=generator), strict=True))
        found += screening.screen_heads(model.dit, vectors, at=at, null_draws=40)["p"].tolist()
    hits = int((np.array(found) <= 0.1).sum())
    assert binomtest(hits, len(found), 0.1, alternative="greater").pvalue > 0.01
    assert np.median(found) > 0.3


def test_gains_are_slopes_of_the_written_out_maps(model, relation_vectors):
    caption = dict(
        zip(
            RELATIONS,
            model.dit.project_caption(torch.stack(list(relation_vectors.values()))),
            strict=True,
        )
    )
    table = screening.screen_axes(
        model.dit, screening.half_differences(caption, list(screening.ENDS))
    )
    maps = (
        circuits.position_word_maps(model.dit, torch.stack(list(relation_vectors.values())))
        .double()
        .detach()
    )
    maps = dict(zip(RELATIONS, maps.movedim(2, 0), strict=True))
    for axis, (plus, minus) in screening.ENDS.items():
        ramp = screening.ramp(scenes.DIRECTIONS[plus], 8)
        gain = ((maps[plus] - maps[minus]) / 2) @ (ramp / ramp.norm()) / model.cfg.d_head**0.5
        rows = table[table["axis"] == axis].set_index(["layer", "head"]).sort_index()
        np.testing.assert_allclose(rows["gain"], gain.flatten(), rtol=1e-4)
        np.testing.assert_allclose(rows["share"], (gain**2 / (gain**2).sum()).flatten(), rtol=1e-3)


def test_chance_of_an_axis_is_that_of_a_turned_word_and_of_permuted_positions(model):
    """Head by head: Student's t of the cosine of word and slope, in the caption's dimensions, and
    scipy's Pearson correlation of map and ramp; for a random word, and for one along a head's
    slope, which only the positions can speak against.
    """
    ramp = screening.ramp(scenes.DIRECTIONS["right"], 8).double().numpy()

    def to_word(layer: int, head: int) -> np.ndarray:
        attention = model.dit.blocks[layer].cross_attn
        q, k = (weight[head].detach().double().numpy() for weight in (attention.W_Q, attention.W_K))
        return model.dit.W_pos.detach().double().numpy() @ q @ k.T

    def slope(layer: int, head: int) -> np.ndarray:
        return (ramp - ramp.mean()) @ to_word(layer, head)

    random = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(3)).numpy()
    for word in (random.astype(float), slope(1, 1)):
        found = screening.screen_axes(model.dit, {"horizontal": torch.from_numpy(word)})
        for row in found.itertuples():
            place = row.layer, row.head
            along = pearsonr(to_word(*place) @ word, ramp)
            assert row.cosine == pytest.approx(along.statistic, abs=1e-6)
            cosine = slope(*place) @ word / np.linalg.norm(slope(*place)) / np.linalg.norm(word)
            dof = len(word) - 1
            t = abs(cosine) * np.sqrt(dof / max(1 - cosine**2, 1e-12))
            expected = max(along.pvalue, 2 * student.sf(t, dof))
            assert row.p == pytest.approx(expected, rel=1e-3)


def test_a_head_of_one_axis_is_found_on_that_axis_alone(relation_vectors):
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))
    plant(model.dit, 1, 0, relation_vectors)
    with torch.no_grad():
        model.dit.blocks[1].cross_attn.W_Q[0][:, 1].zero_()  # the column that reads y
    caption = dict(
        zip(
            RELATIONS,
            model.dit.project_caption(torch.stack(list(relation_vectors.values()))),
            strict=True,
        )
    )
    first = (
        screening.screen_axes(model.dit, screening.half_differences(caption))
        .groupby("axis")
        .nth(0)
        .set_index("axis")
    )
    assert tuple(first.loc["horizontal", ["layer", "head"]]) == (1, 0)
    assert first.loc["horizontal", "share"] > 0.9
    assert first.loc["horizontal", "cosine"] > 0.95
    assert tuple(first.loc["vertical", ["layer", "head"]]) != (1, 0)


def test_p_of_an_axis_is_uniform_or_larger_without_a_relation_head(model):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(25):
        ends = {name: torch.randn(model.cfg.d_model, generator=generator) for name in RELATIONS[:4]}
        found += screening.screen_axes(model.dit, screening.half_differences(ends))["p"].tolist()
    hits = int((np.array(found) <= 0.1).sum())
    assert binomtest(hits, len(found), 0.1, alternative="greater").pvalue > 0.01
    nothing = screening.screen_axes(model.dit, {"vertical": torch.zeros(model.cfg.d_model)})
    assert (nothing["p"] == 1).all()
    assert (nothing["share"] == 0).all()


def test_chance_is_of_the_mean_of_words_of_one_direction(model):
    """And the energy scales with the words."""
    above, up, below = torch.randn(3, model.cfg.d_model, generator=torch.Generator().manual_seed(5))
    screened = [
        screening.screen_heads(model.dit, words, at="caption", null_draws=50).sort_values(
            ["layer", "head"], ignore_index=True
        )
        for words in (
            {"above": above, "up": up, "below": below},
            {"above": (above + up) / 2, "below": below},
            {"above": above / 1000, "up": up / 1000, "below": below / 1000},
        )
    ]
    np.testing.assert_array_equal(screened[0]["p_words"], screened[1]["p_words"])
    np.testing.assert_array_equal(screened[0]["p_positions"], screened[1]["p_positions"])
    np.testing.assert_allclose(screened[0]["energy"], 1000 * screened[2]["energy"], rtol=1e-4)


def test_only_the_tokens_of_a_phrase_are_compared():
    """Screen a T5, whose other tokens differ, too."""
    model = HookedTextToImage.from_pretrained("t5-micro")
    ends = []
    for word in ("below", "above"):
        tokens = model.to_tokens(f"red circle is {word} blue square")
        text = model.text_encoder(tokens, attention_mask=torch.ones_like(tokens))[0]
        ends.append(model.dit.project_caption(text)[0, 3])
    found = screening.phrase_contrasts(model, {"vertical": ("below", "above")})["vertical"]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / 2)


def test_phrases_are_compared_token_by_token():
    model = HookedTextToImage.from_pretrained("rte-nano")
    words = {
        w: model.dit.project_caption(screening.word_vector(model, w)[None])[0]
        for w in ("above", "below")
    }
    of_words = screening.phrase_contrasts(model, {"vertical": ("below", "above")})["vertical"]
    torch.testing.assert_close(of_words, (words["below"] - words["above"]) / 2)
    longer = screening.phrase_contrasts(model, {"vertical": ("directly below", "directly above")})[
        "vertical"
    ]
    last = [
        model.dit.project_caption(screening.word_vector(model, f"directly {w}")[None])[0]
        for w in ("below", "above")
    ]
    # "directly" is the same in both
    torch.testing.assert_close(longer, (last[0] - last[1]) / 2, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="number of tokens"):
        screening.phrase_contrasts(model, {"vertical": ("below", "directly above")})
