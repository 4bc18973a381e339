"""The recipe on sizes and seeds: its rules on made-up tables, exchanges against patched runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import ablation, scenes
from dit_lens.text.prompts import token_roles
from dit_lens.training import dynamics
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import ZOO
from recipes import recurrence
from recipes.knockouts import FOUND_COSINE, FOUND_P


def ranking(cosines: list[float], p: float = 0.001) -> pd.DataFrame:
    """Heads 0, 1 of every layer, strongest first as given."""
    layer, head = np.divmod(np.arange(len(cosines)), 2)
    return pd.DataFrame({"layer": layer, "head": head, "cosine": cosines, "projection": cosines, "p": p})


def images(**opposite: list[float]) -> pd.DataFrame:
    """By condition (underscores for blanks), which of four images show the opposite relation."""
    return pd.concat(
        pd.DataFrame(
            {"condition": name.replace("__", " | ").replace("_", " "), "scene": range(4), "opposite": np.asarray(values, float)}
        )
        for name, values in opposite.items()
    ).assign(binding=1.0)


def test_the_screening_of_a_run_without_weights_is_that_of_its_last_step():
    course = pd.read_parquet(ZOO / "rte-micro" / "seed-1" / "dynamics.parquet")
    found = recurrence.last_screening(course)
    found = found[found["source"] == "words"].reset_index(drop=True)
    assert len(found) == 18
    assert found["projection"].abs().is_monotonic_decreasing
    strongest = dynamics.strongest_heads(course, "words", n=1)[0]
    assert tuple(found.loc[0, ["layer", "head"]].astype(int)) == strongest
    last = course[(course["step"] == course["step"].max()) & (course["source"] == "words") & (course["quantity"] == "cosine")]
    value = last.set_index(["layer", "head"])["value"]
    assert [value[row.layer, row.head] for row in found.itertuples()] == found["cosine"].tolist()
    assert recurrence.kept_course_only("rte-micro/seed-1")
    assert not recurrence.kept_course_only("rte-nano")


def test_at_most_half_of_the_heads_are_taken():
    assert recurrence.strongest_half(ranking([0.9, -0.8, 0.1, 0.2])) == ["L0H0", "L0H1"]
    assert recurrence.strongest_half(ranking([0.9, -0.8, 0.7, 0.6])) == ["L0H0", "L0H1"]
    assert recurrence.strongest_half(ranking([0.9] * 4, p=FOUND_P * 2)) == []
    assert recurrence.strongest_half(ranking([FOUND_COSINE - 0.01] * 4)) == []


def test_heads_are_counted_and_their_depth_is_between_the_first_and_the_last_layer():
    count, depth = recurrence.head_claims("model", "words", ranking([0.9, 0.1, -0.8, 0.2, 0.1, 0.1]))
    assert count.here == (2, 2, 2)
    assert count.control == "L0H0 +0.90, L1H0 -0.80"
    assert depth.here.mean == 0.25
    assert len(recurrence.head_claims("model", "shape1", ranking([0.1, 0.1]))) == 1


def test_what_is_drawn_is_told_against_random_heads_scene_by_scene():
    rows = images(none=[0, 0, 0, 0], relation=[1, 1, 1, 0], relation__random_heads=[1, 0, 0, 0])
    drawn, beyond = recurrence.turned_claims("model", "rte", rows)
    assert drawn.here.mean == 0.75
    assert beyond.here.mean == 0.5
    assert beyond.control == "random heads 0.250"
    same = recurrence.more(rows, "relation", "relation")  # four scenes that agree leave room for some that do not
    assert same.mean == 0
    assert -1 < same.low < 0 < same.high < 1
    assert recurrence.turned_claims("model", "t5", images(none=[0] * 4)) == []


def test_the_carrier_is_the_word_that_turns_the_layout():
    turned = {"relation": -0.9, "shape1": 0.8, "shape2": 0.9}
    looks = pd.DataFrame(
        [
            {"intervention": role, "prompt": i, "layout": at, "layout_baseline": 0.9}
            for role, at in turned.items()
            for i in range(5)
        ]
    )
    claims = {claim.what.split(", ")[1]: claim for claim in recurrence.carrier_claims("model", "rte", looks)}
    assert claims["relation words from the opposite caption"].here.mean == pytest.approx(-1.8)
    assert claims["relation words from the opposite caption"].verdict == "as predicted"
    assert claims["first shape word from the opposite caption"].here.mean == pytest.approx(-0.1)
    assert claims["second shape word from the opposite caption"].verdict == "as predicted"


@torch.no_grad()
def test_an_exchange_in_all_heads_is_a_run_whose_word_was_replaced_before_cross_attention():
    model = HookedTextToImage.from_pretrained("t5-micro")
    exchange = recurrence.Exchange(model, 2, seed=6)
    assert [scenes.caption(scene) for scene in exchange.opposite] != exchange.texts
    _, other = model.run_with_cache(
        [scenes.caption(scene) for scene in exchange.opposite], seed=0, names_filter="steps.0.cond.hook_caption", num_steps=1
    )

    def word(caption: torch.Tensor, hook: object) -> torch.Tensor:
        for row, text in enumerate(exchange.texts):
            at = [i for i, role in enumerate(token_roles(model, text)) if role == "shape1"]
            caption[row, at] = other["steps.0.cond.hook_caption"][row, at]
        return caption

    wanted = model.run_with_hooks(
        exchange.texts, seed=[0, 1], num_steps=3, fwd_hooks=[(f"steps.{s}.cond.hook_caption", word) for s in range(3)]
    )
    hooks = [hook for one in exchange.of("shape1") for hook in one.hooks(model, exchange.texts, num_steps=3)]
    found = model.run_with_hooks(exchange.texts, seed=[0, 1], num_steps=3, fwd_hooks=hooks)
    assert (found - wanted).abs().max() < 1e-5
    assert (found - model(exchange.texts, seed=[0, 1], num_steps=3)).abs().max() > 1e-2
    some = exchange.of("shape1", ["L1H1", "L2H0"])
    assert {(one.site, one.heads) for one in some} == {
        (f"blocks.{layer}.cross_attn.hook_{part}", (head,)) for layer, head in ((1, 1), (2, 0)) for part in "kv"
    }
    others = ablation.random_heads(model, some, np.random.default_rng(0))
    drawn = {part: {(one.site[:9], one.heads) for one in others if one.site.endswith(part)} for part in ("hook_k", "hook_v")}
    assert drawn["hook_k"] == drawn["hook_v"]  # both of the same heads
