"""Circuits by axis and carriers: verdicts against rendered scenes, claims against made-up tables,
heads against planted ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from dit_lens import scenes
from dit_lens.stats import proportion
from recipes import relation_circuit, relation_das, relation_figure, text_carrier

WANTED = scenes.sample(40, seed=4, split="all", color_words="both")


def test_verdicts_of_scenes_of_the_opposite_and_of_one_turned_axis():
    own = relation_circuit.verdicts(scenes.render(WANTED), WANTED)
    assert (own["own"] == 1).all()
    assert (own["layout_opposite"] == 0).all()
    mirrored = [replace(s, y1=128 - s.y1, y2=128 - s.y2) for s in WANTED]
    seen = relation_circuit.verdicts(scenes.render(mirrored), WANTED)
    vertical, diagonal = (seen["axis"] == axis for axis in ("vertical", "diagonal"))
    assert (seen.loc[vertical | diagonal, "y_turned"] == 1).all()
    assert (seen.loc[diagonal, "x_turned"] == 0).all()
    assert (seen.loc[vertical, "opposite"] == 1).all()
    assert seen.loc[vertical, "x_turned"].isna().all()


def rows_of(condition: str, hits: list[int], binding: int = 1) -> pd.DataFrame:
    values = np.array(hits, float)
    table = {
        "condition": condition,
        "scene": np.arange(len(hits)),
        "axis": "diagonal",
        "binding": float(binding),
    }
    names = ("opposite", "strict_opposite", "layout_opposite", "x_turned", "y_turned")
    return pd.DataFrame(table | {"both_colors": 1.0} | dict.fromkeys(names, values))


def made_up() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    sets = pd.DataFrame(
        {
            "axis": ["vertical", "horizontal"],
            "head": ["L1H0", "L2H2"],
            "share": [0.9, 0.8],
            "turned": 1.0,
        }
    )
    hits = {
        "none": [0] * 40,
        "set": [1] * 40,
        "without L1H0": [0] * 40,
        "without L2H2": [1] * 30 + [0] * 10,
    }
    hits |= {
        "random 0": [0] * 40,
        "steps 0-3": [1] * 40,
        "steps 4-13": [0] * 40,
        "vertical": [1] * 40,
        "horizontal": [0] * 40,
    }
    images = pd.concat(
        [rows_of(condition, some) for condition, some in hits.items()], ignore_index=True
    )
    paths = pd.DataFrame(
        {"frozen": np.repeat(list(relation_das.PARTS), 5), "lost": np.repeat([0.1, 0.02, 0.9], 5)}
    )
    return sets, images, paths


def test_claims_of_a_set_and_its_figure(tmp_path):
    sets, images, paths = made_up()
    claims = relation_circuit.set_claims("model", sets, images)
    size, drawn, random, least, fewer = claims
    assert size.here.mean == 2
    assert drawn.here == proportion(np.ones(40))
    assert random.here == proportion(np.zeros(40))
    assert least.what.endswith("L2H2")
    assert least.here.mean == pytest.approx(0.25)
    assert least.here.low < 0.25 < least.here.high
    assert fewer.here.mean == 0.75
    assert [claim.here.mean for claim in relation_circuit.step_claims("model", images)] == [1, 0]
    assert [claim.verdict for claim in relation_circuit.path_claims("model", paths)] == [
        "not as predicted",
        "as predicted",
        "exploratory",
    ]
    relation_figure.circuit_figure({"model": made_up()}).savefig(tmp_path / "figure.png")


def test_a_subspace_is_exchanged_and_the_rest_stays():
    frame = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0))).Q
    one, other = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    mixed = relation_das.exchanged(one, None, other, frame)
    torch.testing.assert_close(mixed @ frame, other @ frame)
    rest = torch.eye(6) - frame @ frame.T
    torch.testing.assert_close(mixed @ rest, one @ rest)


def test_vertical_and_horizontal_heads_of_a_planted_circuit_are_two_variables(planted_model):
    model, truth = planted_model("two-stage", 0)
    sets = {
        axis: [f"L{h.layer}H{h.head}" for h in truth.relation_heads if h.what.startswith(axis)]
        for axis in ("vertical", "horizontal")
    }
    bits = relation_circuit.two_variables(model, sets, 8)
    assert (bits["right"] == 1).all()
    assert bits["changed"].max() > 0


def test_the_carrier_is_predicted_by_readability_and_found_by_change():
    part = pd.DataFrame(
        {
            "word": ["relation", "shape2", "eos"] * 2,
            "r2": [0.99, 0.98, 0.2] * 2,
            "distance": [1.0, 3.0, 9.0] * 2,
            "base": 1.0,
            "moved": [1.0, -0.9, 1.0, 0.9, -1.0, 1.0],
        }
    )
    assert text_carrier.predicted_word(part) == "shape2"  # a tie, by distance
    assert text_carrier.predicted_word(part.assign(r2=[0.99, 0.9, 0.2] * 2)) == "relation"
    assert text_carrier.found_word(part) == "shape2"
    assert text_carrier.found_word(part.assign(moved=0.8)) == "none"
