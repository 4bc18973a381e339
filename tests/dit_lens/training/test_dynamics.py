"""Records made while a model learns: against planted circuits, whose abilities and heads are
known, and made-up courses.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dit_lens import scenes, viz
from dit_lens.task import OPPOSITE
from dit_lens.task.rendering import shape_mask
from dit_lens.training import dynamics
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import ZOO

WANTED = scenes.sample(12, seed=1, split="held_out", color_words="both")


@pytest.fixture(scope="module")
def course() -> pd.DataFrame:
    """Four points at which the relation comes at the third, its head at the second, and a colour
    comes and goes.
    """
    rows = []
    values = {
        "color": (0.6, 0.9, 0.4, 0.9),
        "relation_loose": (0.0, 0.1, 0.5, 0.9),
        "shape": (1.0, 1.0, 1.0, 1.0),
    }
    cosines = {
        ("words", 1, 0): (0.1, -0.7, -0.8, -0.9),
        ("words", 0, 1): (0.0, 0.0, 0.1, 0.2),
        ("shape2", 1, 0): (0.0,) * 4,
    }
    p = {("words", 1, 0): 0.005, ("words", 0, 1): 0.04, ("shape2", 1, 0): 0.6}
    for i, step in enumerate((1, 10, 100, 1000)):
        point = {"step": step, "samples": step * 4}
        rows += [{**point, "quantity": name, "value": course[i]} for name, course in values.items()]
        for (source, layer, head), course in cosines.items():
            at = {**point, "source": source, "layer": layer, "head": head}
            rows += [
                {**at, "quantity": name, "value": value}
                for name, value in (
                    ("cosine", course[i]),
                    ("projection", 10 * course[i]),
                    ("p", p[source, layer, head]),
                )
            ]
    return pd.DataFrame(rows, columns=list(dynamics.COLUMNS)).astype(
        {"layer": "Int64", "head": "Int64"}
    )


def test_a_planted_circuit_is_measured_as_what_it_is(planted_model):
    model, truth = planted_model("two-stage", 0)
    table = dynamics.measure(model, WANTED[:6], step=7, samples=70)
    assert list(table.columns) == list(dynamics.COLUMNS)
    assert set(table["step"]) == {7}
    assert set(table["samples"]) == {70}
    value = table[table["layer"].isna()].set_index("quantity")["value"]
    assert value["relation_loose"] == value["unique_binding"] == 1
    heads = table[(table["source"] == "words") & (table["quantity"] == "p")]
    assert len(heads) == model.cfg.n_layers * model.cfg.n_heads
    ramps = {(head.layer, head.head) for head in truth.heads if head.role in ("relation", "decoy")}
    assert {*dynamics.strongest_heads(table, "words", 2)} <= ramps
    gains = table[
        (table["source"] == "words") & table["quantity"].isin(["gain_vertical", "gain_horizontal"])
    ]
    assert len(gains) == 2 * len(heads)
    assert gains.groupby("quantity")["value"].apply(lambda values: values.abs().max()).min() > 1


def test_the_color_moment_is_that_of_the_objects_areas_and_places():
    moment = dynamics.color_moment(scenes.render(WANTED).double().numpy())
    for scene, found in zip(WANTED, moment, strict=True):
        expected = np.zeros(2)
        for shape, color, x, y in (
            (scene.shape1, scene.color1, scene.x1, scene.y1),
            (scene.shape2, scene.color2, scene.x2, scene.y2),
        ):
            mask = shape_mask(shape)
            rows, columns = np.nonzero(mask)
            place = [
                x - mask.shape[1] // 2 + columns.mean() - 63.5,
                y - mask.shape[0] // 2 + rows.mean() - 63.5,
            ]
            expected += (1 if color == "red" else -1) * mask.sum() * np.array(place)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_dipole_points_where_the_caption_says():
    model = HookedTextToImage.from_pretrained("rte-micro")
    found = dynamics.dipole(model, WANTED)
    assert found.min() > 0.7
    # the captions stay
    opposite = [replace(scene, relation=OPPOSITE[scene.relation]) for scene in WANTED]
    np.testing.assert_allclose(dynamics.dipole(model, opposite), -found, atol=1e-6)
    recolored = [replace(scene, color1=scene.color2, color2=scene.color1) for scene in WANTED]
    assert dynamics.dipole(model, recolored).min() > 0.7  # other captions


def test_points_are_log_spaced_and_end_at_the_end():
    points = dynamics.record_points(8000, 24)
    assert (points[0], points[-1]) == (50, 8000)
    assert len(points) == 24
    ratios = np.diff(np.log(points))
    assert ratios.max() / ratios.min() < 1.2
    assert dynamics.record_points(4, 24) == [1, 2, 3, 4]
    assert dynamics.record_points(100, 0) == []
    assert dynamics.record_points(100, 1) == [100]


def test_words_that_an_encoder_does_not_mix_carry_no_relation():
    """Their effects are rounding, to which screening, which knows no scale, would give cosines and
    a small p.
    """
    # a phrase's length moves shape2
    for name, roles in (("rte-nano", ["shape1"]), ("rte-nopos-micro", ["shape1", "shape2"])):
        model = HookedTextToImage.from_pretrained(name)
        for role in roles:
            assert all(
                vector.norm() == 0 for vector in dynamics.relation_vectors(model, role).values()
            )
        found = dynamics.screen(model)
        assert found["words"]["p"].min() < 0.05
        assert all(found[role]["p"].min() == 1 for role in roles)
    kept = pd.read_parquet(ZOO / "rte-nopos-micro" / "dynamics.parquet")
    assert dynamics.last_screening(kept, "shape2")["p"].min() < 0.05  # of before: rounding
    assert dynamics.strongest_heads(kept, "shape2") == []


def test_emergence_is_when_a_thing_comes_and_when_it_comes_to_stay(course):
    found = dynamics.emergence(course).set_index("what")
    assert found.loc["color"].tolist() == [4, 0, 4000]
    assert found.loc["relation_loose"].tolist() == [400, 40, 400]
    assert found.loc["L1H0 (words)"].tolist() == [40, 4, 40]
    assert found.loc["L0H1 (words)"].isna().all()
    assert not any("shape2" in what for what in found.index)  # its head's p says chance
    assert dynamics.strongest_heads(course, "shape1") == []  # the run was not screened so


def test_learning_curves_draw_every_point(course):
    figure = viz.learning_curves(course, {"words": [(1, 0), (0, 1)]})
    abilities, heads = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in [*abilities.lines, *heads.lines]}
    assert drawn["relation"] == [0.0, 0.1, 0.5, 0.9]
    assert drawn["L1H0"] == [1.0, -7.0, -8.0, -9.0]
