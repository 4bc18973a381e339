"""The recipes on heads: their computations against planted circuits, made-up tables and independent
runs.
"""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr

from dit_lens import ablation, planted, scenes, screening, steering, synopsis, variance
from dit_lens.intervene.interchange import Interchange
from dit_lens.planted.recovery import auroc, ramp_heads
from dit_lens.readout.circuits import ov_outputs, parse_head
from dit_lens.stats import Interval
from dit_lens.task import DIRECTIONS
from dit_lens.task.scene import Relation
from dit_lens.text.prompts import role_mask
from dit_lens.text.variance import encode
from dit_lens.training.dynamics import layout
from hooked_models import HookedTextToImage
from recipes import (
    attention_synopsis,
    knockouts,
    object_heads,
    relation_heads,
    robustness,
    t5_fusion,
)
from recipes.claims import independent
from recipes.knockouts import screened


@functools.cache
def rte() -> HookedTextToImage:
    return HookedTextToImage.from_pretrained("rte-micro")


def made_up(prompts: int = 8, steps: int = 10) -> xr.DataArray:
    """One head of four that reads: in object 1 the relation at step 0; one the red object's own
    shape, most at step 5.
    """
    rng = np.random.default_rng(0)
    roles = [*attention_synopsis.ROLES]
    dims = ("prompt", "layer", "head", "step", "image_group", "text_group")
    shape = (prompts, 2, 2, steps, 3, len(roles))
    seen = xr.DataArray(rng.uniform(0, 0.02, shape), dims=dims)
    seen = seen.assign_coords(
        {name: range(size) for name, size in zip(dims[:4], shape[:4], strict=True)}
    )
    colors = ["red", "red", "blue", "blue"] * (prompts // 4)
    seen = seen.assign_coords(
        image_group=["object1", "object2", "background"],
        text_group=roles,
        color1=("prompt", colors),
    )
    seen.loc[
        {"layer": 0, "head": 1, "step": 0, "image_group": "object1", "text_group": "relation"}
    ] = 0.8
    for prompt in range(prompts):
        red = "1" if seen["color1"].values[prompt] == "red" else "2"
        at = {
            "prompt": prompt,
            "layer": 1,
            "head": 0,
            "image_group": f"object{red}",
            "text_group": f"shape{red}",
        }
        seen.loc[{**at, "step": slice(4, 8)}] = 0.6
        seen.loc[{**at, "step": 5}] = 0.7
    return seen


def test_a_synopsis_survives_its_table_and_names_words_as_objects_see_them():
    seen = made_up()
    table = seen.rename("attention").to_dataframe().reset_index()
    again = attention_synopsis.labelled([table, table])
    np.testing.assert_array_equal(
        again.values[8:], seen.sel(image_group=again["image_group"], text_group=again["text_group"])
    )
    assert again["color1"].values.tolist() == seen["color1"].values.tolist() * 2
    named = attention_synopsis.by_object(seen)
    for region, own, other in (("object1", "1", "2"), ("object2", "2", "1")):
        for word in ("shape", "color"):
            plain = seen.sel(image_group=region)
            there = named.sel(image_group=region)
            np.testing.assert_array_equal(
                there.sel(text_group=f"own {word}"), plain.sel(text_group=f"{word}{own}")
            )
            np.testing.assert_array_equal(
                there.sel(text_group=f"other {word}"), plain.sel(text_group=f"{word}{other}")
            )
    np.testing.assert_array_equal(
        named.sel(image_group="red")[:2], named.sel(image_group="object1")[:2]
    )
    np.testing.assert_array_equal(
        named.sel(image_group="red")[2:4], named.sel(image_group="object2")[2:4]
    )


def test_questions_pick_the_heads_that_were_made_to_read():
    seen = attention_synopsis.by_object(made_up())
    relation = attention_synopsis.pick(seen, attention_synopsis.RELATION)
    assert relation == ("object1", 0, 1)
    assert str(attention_synopsis.pick(seen, attention_synopsis.OWN_SHAPE)) == "L1H0"
    claims = {claim.what: claim for claim in attention_synopsis.shape_claims("m", seen)}
    step = claims["m: the same head, step of most attention to own shape"].here
    assert step == (5, 5, 5)
    assert claims[
        "m: own shape, the head of either colour, its colour minus the other"
    ].control.startswith("red L1H0 +0.6")


def test_the_excess_is_attention_minus_what_label_shuffles_give_on_average():
    seen = made_up()
    ranked = synopsis.rank_heads(
        seen.expand_dims(branch=["cond"]), "object1", "relation", step=0, shuffles=2000
    )
    top = ranked.iloc[0]
    beyond = (
        attention_synopsis.excess(seen)
        .sel(image_group="object1", text_group="relation", step=0)
        .mean("prompt")
    )
    expected = float(beyond.sel(layer=int(top["layer"]), head=int(top["head"])))
    assert expected == pytest.approx(top["mean"] - top["control"], abs=0.01)
    assert expected > 0.6


def test_knock_outs_are_the_runs_that_they_say():
    """Against plain generations and hooks, image by image; changes are paired by scene whatever the
    order of rows.
    """
    conditions = {"all": (ablation.knockout_role("relation"), ["tokens"])}
    rows = knockouts.knocked_out(rte(), conditions, 2, seed=2)
    assert set(rows["condition"]) == {"none", "all", "all | random tokens"}
    wanted, noise = knockouts.scenes_of(2, 2)
    texts = [scenes.caption(scene) for scene in wanted]
    hooks = [hook for part in conditions["all"][0] for hook in part.hooks(rte(), texts)]
    with torch.no_grad():
        images = {
            "none": rte()(texts, seed=noise.tolist()),
            "all": rte().run_with_hooks(texts, seed=noise.tolist(), fwd_hooks=hooks),
        }
    for name, drawn in images.items():
        expected = scenes.evaluate(drawn, wanted)
        for verdict in ("shape", "unique_binding", "relation_loose"):
            found = rows[rows["condition"] == name].sort_values("scene")[verdict]
            np.testing.assert_array_equal(found, expected[verdict].values.astype(float))
    table = pd.DataFrame(
        [
            {"condition": name, "seed": seed, "scene": scene, "shape": float(value)}
            for name, values in (("none", (1, 1, 0, 1)), ("x", (0, 1, 0, 1)))
            for (seed, scene), value in zip(((0, 0), (0, 1), (1, 0), (1, 1)), values, strict=True)
        ]
    )
    assert knockouts.change(table.iloc[::-1], "x", "shape").mean == -0.25
    assert np.isnan(knockouts.change(table, "y", "shape").mean)


def test_the_slope_of_a_ramp_is_along_its_relation():
    slopes: tuple[tuple[Relation, int], ...] = (("above", 1), ("left", -3), ("upper_left", 1))
    maps = np.stack(
        [
            factor * screening.ramp(DIRECTIONS[name], 8).numpy().reshape(8, 8)
            for name, factor in slopes
        ]
    )
    relations = ("phrase", ["above", "left", "left"])
    found = xr.DataArray(maps, dims=("phrase", "y", "x"), coords={"relation": relations})
    np.testing.assert_allclose(relation_heads.degrees_off(found), [0, 0, 45], atol=1e-4)
    turned = found.assign_coords(relation=("phrase", ["right", "above", "upper_right"]))
    np.testing.assert_allclose(relation_heads.degrees_off(turned), [90, 90, 90], atol=1e-4)


def test_ways_name_heads_by_their_thresholds_and_agreement_is_between_them():
    scores = {
        "L0H0": (0.5, 0.4, 0.6),
        "L0H1": (0.04, 0.03, 0.05),
        "L1H0": (-0.2, 0.9, -0.3),
        "L1H1": (0.0, 0.0, 0.0),
    }
    looks = pd.DataFrame(
        {"condition": head, "kind": "single", "heads": 1, "seed": 0, "scene": i, "lost": value}
        for head, values in scores.items()
        for i, value in enumerate(values)
    )
    table = relation_heads.by_layout(looks)
    assert knockouts.names_of(table.index[table["named"]]) == ["L0H0"]
    assert relation_heads.agreement(table, {(0, 0)}).mean == 1
    for positive in ({(1, 1)}, {(0, 1), (1, 0)}):
        assert relation_heads.agreement(table, positive).mean == pytest.approx(
            auroc(table["score"], positive)
        )
    assert np.isnan(relation_heads.agreement(table, set()).mean)
    ranking = pd.DataFrame(
        {
            "layer": [0, 0, 1],
            "head": [0, 1, 0],
            "cosine": [-0.9, 0.9, 0.2],
            "projection": [-3.0, 2.0, 9.0],
        }
    )
    ranking["p"] = [0.002, 0.2, 0.002]
    named = relation_heads.by_weights(ranking)
    assert knockouts.names_of(named.index[named["named"]]) == ["L0H0"]
    all_ways = {"screening": table[["score", "named"]], "synopsis": table, "knock-out": table}
    assert relation_heads.unanimous(all_ways).here == (1, 1, 1)
    assert relation_heads.unanimous(
        {**all_ways, "screening": all_ways["screening"].assign(named=False)}
    ).here == (0, 0, 0)


def test_a_first_look_is_the_run_with_the_word_masked():
    looks = relation_heads.first_look(rte(), ["L2H2", "L2H1"], 2, seed=0)
    assert set(looks["kind"]) == {"single", "found", "random"}
    by = looks.set_index(["condition", "scene"])["lost"]
    np.testing.assert_allclose(by["first 1"], by["L2H2"], atol=1e-6)
    wanted, _ = knockouts.scenes_of(2, 0)
    texts = [scenes.caption(scene) for scene in wanted]
    hide = [
        h
        for part in ablation.knockout_role("relation", ["L2H1", "L2H2"], steps=0)
        for h in part.hooks(rte(), texts)
    ]
    lost = []
    for noise in (0, 1):
        seen: list[torch.Tensor] = []
        look = ("steps.0.hook_x0", lambda x0, hook, seen=seen: seen.append(x0.clone()))
        with torch.no_grad():
            for hooks in ([look], [*hide, look]):
                rte().trajectory(texts, noise, until=0).fork(0, hooks, until=1)
            before, after = (layout(rte().decode(x0), wanted) for x0 in seen)
        lost.append(before - after)
    np.testing.assert_allclose(by["first 2"], np.mean(lost, axis=0), atol=1e-4)


@pytest.mark.slow
def test_weights_and_patterns_name_the_planted_relation_heads(planted_model):
    """The vertical ones: most of `knockouts.WORDS` are vertical, so screening asks for those.

    Decoys that share their ramps pass both ways, so a knock-out has to be the third.
    """
    model, truth = planted_model("two-stage", 0)
    seen = attention_synopsis.by_object(
        attention_synopsis.labelled([attention_synopsis.reading(model, 8, 0)])
    )
    tables = (relation_heads.by_weights(screened(model)[0]), relation_heads.by_attention(seen))
    weights, patterns = ({*table.index[table["named"]]} for table in tables)
    vertical = {
        (head.layer, head.head) for head in truth.relation_heads if head.writes[0].endswith("_y")
    }
    assert vertical < weights & patterns <= ramp_heads(truth)
    assert {(head.layer, head.head) for head in truth.relation_heads} <= patterns
    assert relation_heads.agreement(tables[1], vertical).mean > 0.8


# Object heads


def test_a_receiver_that_reads_what_relation_heads_write_is_flat_before_and_selective_after():
    """Planted: its query reads only where the relation heads put object 1, its key tells the first
    shape word from the second.
    """
    model, truth = planted.planted_circuit("two-stage", seed=0)
    senders = [
        head
        for head in truth.relation_heads
        if any(name.startswith("side1") for name in head.writes)
    ]
    names = [f"L{head.layer}H{head.head}" for head in senders]
    words = {word: screening.word_vector(model, word) for word in ("above", "left")}
    wanted, _ = knockouts.scenes_of(16, 0)
    texts = [scenes.caption(scene) for scene in wanted]
    with torch.no_grad():
        read = torch.zeros(model.cfg.d_model)
        for name in names:
            written = torch.tensor(ov_outputs(model.dit, name, words).values, dtype=read.dtype)
            strongest = written[written.norm(dim=1).argmax()]
            read += strongest / strongest.norm() ** 2
        caption = encode(model, model.to_tokens(texts), "caption")
        first, second = (caption[role_mask(model, texts, role)] for role in ("shape1", "shape2"))
        target = torch.cat([torch.ones(len(first)), -torch.ones(len(second))])
        key = torch.linalg.lstsq(
            torch.cat([first, second]), target[:, None], driver="gelsd"
        ).solution[:, 0]
        attn = model.dit.blocks[3].cross_attn
        attn.W_Q[0].zero_()[:, 0] = read
        attn.W_K[0].zero_()[:, 0] = key
        attn.b_Q[0].zero_()
    maps = object_heads.selectivity(model, names, "L3H0", 16, seed=0)
    spread, along = (maps.groupby("written")[column].mean() for column in ("spread", "along"))
    assert spread["nothing"] < 0.02 * spread["relation heads"]
    assert along["relation heads"] > 0.7
    claims = object_heads.map_claims(maps, "L3H0")
    assert claims[1].here.low > 10
    assert claims[2].verdict == "as predicted"


@pytest.mark.parametrize("head", ["L3H2", "L1H0"])
def test_what_an_rte_head_writes_from_the_first_shape_word_is_that_shape_alone(head):
    """An identity: the word's vector is the word's and the place's, and the place is the same in
    all prompts.
    """
    layer, index = parse_head(head)
    attn = rte().dit.blocks[layer].cross_attn
    vectors, factors = variance.word_vectors(
        rte(), variance.factorial_prompts(), "shape1", at="caption"
    )
    written = (vectors @ attn.W_V[index] @ attn.W_O[index]).detach()
    table = variance.partition(written, factors[["shape1", "relation"]], permutations=0)
    assert table["r2_marginal"]["shape1"] == pytest.approx(1, abs=1e-6)
    assert table["r2_partial"]["relation"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("role", ["shape1", "shape2"])
def test_without_an_encoder_that_mixes_words_a_shape_word_is_the_plain_prompts(role):
    """Identities, so no findings: a shape word's exchange changes nothing, that of all relation
    words is the other prompt.
    """
    wanted = scenes.sample(3, seed=0, split="all", color_words="both")
    swap = Interchange(rte(), wanted, [scenes.opposite(scene) for scene in wanted])
    view, tokens = rte().at(step=0, prompts=swap.texts, seed=[0, 1, 2], guidance=1.0, returns="x0")
    others = [scenes.caption(scenes.opposite(scene)) for scene in wanted]
    turned, same = rte().at(step=0, prompts=others, seed=[0, 1, 2], guidance=1.0, returns="x0")
    with torch.no_grad():
        torch.testing.assert_close(
            view.run_with_hooks(tokens, fwd_hooks=swap.hooks(None, role, 0, view)), view(tokens)
        )
        exchanged = view.run_with_hooks(tokens, fwd_hooks=swap.hooks(None, "relation", 0, view))
        torch.testing.assert_close(exchanged, turned(same), atol=1e-4, rtol=1e-4)


def test_relation_arithmetic_on_a_shape_word_of_an_rte_adds_next_to_nothing():
    """An identity but for rounding, so no finding: its vector does not know the relation."""
    prompts = ["red circle is above blue square", "blue square is left of red circle"]
    words = steering.swap_vectors(rte(), prompts, ["below", "right"], "relation")
    shape = steering.swap_vectors(rte(), prompts, ["below", "right"], "shape1")
    assert float(shape.norm(dim=-1).max()) < 1e-5 * float(words.norm(dim=-1).max())


def test_object_heads_are_those_of_either_color_strongest_first():
    assert object_heads.object_heads(attention_synopsis.by_object(made_up())) == ["L1H0"]


def test_swaps_are_counted_against_the_original():
    rows = [
        (object_heads.TO_OBJECTS, 0.0, 1.0),
        (object_heads.TO_OBJECTS, 0.0, 0.0),
        ("another", 1.0, 1.0),
        ("another", 0.0, 0.0),
    ]
    swaps = pd.DataFrame(rows, columns=["path", "original", "patched"])
    claim = object_heads.swap_claim(swaps)
    assert claim.here.mean == 0.5
    exact = scipy.stats.binomtest(0, 2).proportion_ci(method="exact")
    assert claim.control == f"another 0.000 [0.000, {exact.high:.3f}]"


def test_a_share_of_the_total_is_of_sums():
    part = pd.DataFrame({"moved": [1.0, 0.5, 0.5], "total": [2.0, 1.0, 1.0]})
    assert object_heads.share_of_total(part).mean == 0.5


@pytest.mark.slow
def test_a_path_from_the_whole_text_to_the_image_is_the_opposite_prompt():
    wanted, _ = knockouts.scenes_of(2, 0)
    paths = {"all": (["text"], ["image"]), "none": (["cross_attn.L5H2"], ["image"])}
    found = object_heads.patched_paths(
        rte(), paths, 2, 0, lambda images: torch.from_numpy(layout(images, wanted))
    ).set_index("path")
    np.testing.assert_allclose(found.loc["all", "patched"], found.loc["all", "source"], atol=1e-3)
    assert (found.loc["all", "source"] < 0).all()
    assert (found.loc["none", "patched"] > 0.5).all()


# T5 models


def test_masks_and_vectors_are_judged_by_axis():
    """Made up: the vertical axis' word is hidden and half of the layouts are right; everything else
    changes nothing.
    """
    rows = []
    for axis, own in t5_fusion.CARRIER.items():
        for condition in ("none", "random word", *t5_fusion.NAMES, "own, early", "own, late"):
            right = [i % 2 if condition in (own, "own, early") else 1 for i in range(200)]
            part = {
                "axis": axis,
                "condition": condition,
                "scene": range(200),
                "asked": np.asarray(right, float),
            }
            rows.append(pd.DataFrame({**part, "binding": 1.0}))
    claims = t5_fusion.mask_claims("m", pd.concat(rows))
    assert {claim.verdict for claim in claims} == {"as predicted"}
    assert claims[0].questions == len(claims) == 12


def test_random_vectors_have_the_norms_of_the_others():
    vectors = torch.zeros(2, 3, 8)
    vectors[0, 1] = 2.0
    drawn = t5_fusion.random_like(vectors, seed=0)
    torch.testing.assert_close(drawn.norm(dim=-1), vectors.norm(dim=-1))
    assert abs(float(torch.cosine_similarity(drawn[0, 1], vectors[0, 1], dim=0))) < 0.95


def test_a_share_of_what_was_lost_is_a_ratio_of_means():
    rng = np.random.default_rng(0)
    lost = rng.uniform(0.5, 1.5, 400)
    found = robustness.share_of(0.6 * lost + rng.normal(0, 0.05, 400), lost)
    assert found.low < 0.6 < found.high
    assert found.high - found.low < 0.03
    assert np.isnan(robustness.share_of(lost, 0 * lost).mean)


def test_a_repair_adds_the_negative_shift_at_its_words_alone():
    model = HookedTextToImage.from_pretrained("t5-micro")
    wanted = scenes.sample(3, seed=0, split="all", color_words="both")
    named = {name: (texts, added) for name, texts, added in robustness.conditions(model, wanted)}
    texts, added = named[robustness.NOTHING]
    assert texts == [robustness.the_second(scenes.caption(scene)) for scene in wanted]
    words = role_mask(model, texts, "shape2")
    assert bool((added[~words] == 0).all())
    torch.testing.assert_close(added[words], -robustness.shift(model, "shape2").expand(3, -1))
    everywhere = named[robustness.EVERYWHERE][1]
    place = len(texts[0].split()) - 3
    assert texts[0].split()[place] == "the"
    assert float(everywhere[0, place].abs().max()) == 0
    assert float(everywhere[0, : place + 1].abs().max()) > 0


def test_the_difference_of_independent_estimates():
    found = independent(Interval(0.5, 0.2, 0.8), Interval(0.9, 0.5, 1.3))
    assert found == pytest.approx((-0.4, -0.9, 0.1))


# Names


def test_heads_are_parsed_as_they_are_named():
    assert [parse_head(name) for name in knockouts.names_of([(2, 1), (0, 11)])] == [(0, 11), (2, 1)]
