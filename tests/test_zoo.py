"""Bundled models: cards and docs/models.md say what the files beside the weights say, and the
weights draw as recorded.
"""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from dit_lens import evaluation, scenes
from hooked_models import HookedTextToImage, list_models
from hooked_models.pipelines.hub import ZOO
from recipes import zoo_cards


@pytest.mark.parametrize("name", list_models())
def test_cards_are_up_to_date(name):
    assert (ZOO / name / "README.md").read_text() == zoo_cards.card(ZOO / name), (
        "run `python -m recipes.zoo_cards`"
    )


def test_the_table_of_models_is_up_to_date():
    text = zoo_cards.PAGE.read_text()
    assert text == zoo_cards.page(text), "run `python -m recipes.zoo_cards`"
    assert all(
        f"[`{name}`](../hooked_models/zoo/{name}/README.md)" in text for name in list_models()
    )


def test_a_card_states_what_was_not_reached():
    facts = zoo_cards.training(ZOO / "rte-micro")
    reached = zoo_cards.held_out(ZOO / "rte-micro")
    lines = zoo_cards.aims(
        ZOO / "rte-micro", [*facts["targets"], "relation_strict 1.01"]
    ).splitlines()
    assert len(lines) == len(facts["targets"]) + 1
    for line, target in zip(lines, [*facts["targets"], "relation_strict 1.01"], strict=True):
        metric, aim = target.split()
        assert ("**not reached**" in line) == (reached.loc[metric, "mean"] < float(aim))


@pytest.mark.parametrize("name", list_models())
def test_the_weights_draw_what_the_evaluation_records(name):
    rows = pd.read_parquet(ZOO / name / "evaluation.parquet")
    recorded = rows[(rows["split"] == "held_out") & (rows["scene"] < 12)]
    wanted = scenes.sample(12, seed=100, split="held_out", color_words="both")
    assert recorded["prompt"].tolist() == [scenes.caption(scene) for scene in wanted]
    with torch.no_grad():
        images = HookedTextToImage.from_pretrained(name)(
            recorded["prompt"].tolist(), seed=list(range(12))
        )
    verdict = scenes.evaluate(images, wanted)
    differ = sum(
        (verdict[metric].values != recorded[metric].to_numpy())
        for metric in evaluation.METRICS[:-1]
    )
    assert (differ > 0).sum() <= 1  # another machine's rounding may tip a doubtful shape


def test_files_are_small_enough():
    sizes = [path.stat().st_size for path in ZOO.rglob("*") if path.is_file()]
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 120e6
