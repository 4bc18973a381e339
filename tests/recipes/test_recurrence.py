"""The recipe on sizes and seeds: its rules on made-up tables, the course of a run against its own screening; whole, slow."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from dit_lens.training import dynamics
from hooked_models import HookedTextToImage
from hooked_models.hub import ZOO
from recipes import recurrence
from recipes.relation_head import FOUND_COSINE, FOUND_P


def ranking(cosines: list[float], p: float = 0.001) -> pd.DataFrame:
    """Heads 0, 1 of every layer, strongest first as given."""
    layer, head = np.divmod(np.arange(len(cosines)), 2)
    return pd.DataFrame({"layer": layer, "head": head, "cosine": cosines, "projection": cosines, "p": p})


def rows(**losses: list[float]) -> pd.DataFrame:
    """Verdicts of the conditions; without any, every relation is drawn."""
    drawn = {"none": [1.0] * 8} | losses
    return pd.concat(
        pd.DataFrame({"condition": name, "seed": 0, "scene": range(8), "relation_loose": values, "unique_binding": 1.0})
        for name, values in drawn.items()
    )


def test_the_screening_of_a_run_without_weights_is_that_of_its_last_step():
    course = pd.read_parquet(ZOO / "rte-micro" / "seed-1" / "dynamics.parquet")
    found = recurrence.last_screening(course, "words")
    assert len(found) == 18
    assert found["projection"].abs().is_monotonic_decreasing
    strongest = dynamics.strongest_heads(course, "words", n=1)[0]
    assert tuple(found.loc[0, ["layer", "head"]].astype(int)) == strongest
    last = course[(course["step"] == course["step"].max()) & (course["source"] == "words") & (course["quantity"] == "cosine")]
    value = last.set_index(["layer", "head"])["value"]
    assert [value[row.layer, row.head] for row in found.itertuples()] == found["cosine"].tolist()


def test_at_most_half_of_the_heads_are_knocked_out():
    assert recurrence.found_heads(ranking([0.9, -0.8, 0.1, 0.2])) == ["L0H0", "L0H1"]
    assert recurrence.found_heads(ranking([0.9, -0.8, 0.7, 0.6])) == ["L0H0", "L0H1"]
    assert recurrence.found_heads(ranking([0.9] * 4, p=FOUND_P * 2)) == []
    assert recurrence.found_heads(ranking([FOUND_COSINE - 0.01] * 4)) == []


def test_heads_are_counted_and_their_depth_is_between_the_first_and_the_last_layer():
    count, depth = recurrence.head_claims("model", "rte", ranking([0.9, 0.1, -0.8, 0.2, 0.1, 0.1]))
    assert count.here == (2, 2, 2)
    assert count.control == "L0H0 +0.90, L1H0 -0.80"
    assert depth.here.mean == 0.25
    assert len(recurrence.head_claims("model", "rte", ranking([0.1, 0.1]))) == 1


def test_text_encoders_are_compared_scene_by_scene():
    none, half, whole = [0.0] * 8, [0.0, 1.0] * 4, [1.0] * 8
    drawn = {"t5": rows(**{recurrence.EVERYWHERE: half}), "rte": rows(**{recurrence.EVERYWHERE: none})}
    assert recurrence.contrast("rte", "t5", drawn).here.mean == -0.5
    same = recurrence.contrast("rte", "t5", {"t5": drawn["t5"], "rte": drawn["t5"]}).here
    assert same == (0, 0, 0)  # paired: no interval where every scene agrees
    unhurt = recurrence.contrast("rte", "t5", {"t5": rows(**{recurrence.EVERYWHERE: whole}), "rte": drawn["rte"]}).here
    assert unhurt == (-1, -1, -1)


def test_a_knock_out_is_told_against_its_random_heads():
    found, random = recurrence.FOUND, f"{recurrence.FOUND} | random heads"
    conditions = {found: [0.0] * 8, random: [0.0] + [1.0] * 7, recurrence.EVERYWHERE: [0.0] * 8}
    alone, against, everywhere = recurrence.knockout_claims("model", "rte", rows(**conditions))
    assert alone.here.mean == -1
    assert against.here.mean == -0.875
    assert "-0.125" in against.control
    assert everywhere.here.mean == -1
    assert len(recurrence.knockout_claims("model", "t5", rows(**{recurrence.EVERYWHERE: [1.0] * 8}))) == 1


@pytest.mark.slow
def test_it_runs_from_end_to_end_and_goes_on(tmp_path, monkeypatch, capsys):
    config = recurrence.Config(
        rte=("rte-nano", "rte-micro/seed-1"), t5=("t5-micro",), same_size=("rte-nano",), pairs=4, out=tmp_path
    )
    recurrence.main(config)
    first = capsys.readouterr().out
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert {name for claim in claims for name in (*config.rte, *config.t5) if claim["claim"].startswith(name)} == {
        *config.rte,
        *config.t5,
    }
    assert (tmp_path / "recurrence.png").exists()

    def again(*_: object) -> None:
        raise AssertionError("what was measured is measured again")

    monkeypatch.setattr(recurrence, "knockouts", again)
    monkeypatch.setattr(HookedTextToImage, "forward", again)
    recurrence.main(config)
    assert capsys.readouterr().out == first
