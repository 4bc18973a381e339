"""Scores against exact effects of small interventions; the search against the exhaustive sweep; its
guarantee against known means; the bound against all cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.stats import hypergeom
from torch import Tensor

from dit_lens import sweep
from dit_lens.intervene.interventions import Intervention, Replace, Scale
from dit_lens.stats import count_bound
from dit_lens.sweep.clean import CleanRuns
from dit_lens.sweep.execute import Execution
from dit_lens.sweep.scores import Method, Question, scores_of_rows
from hooked_models import HookedTextToImage

from ..sweeps import PROMPTS, SEEDS, STEPS, shards, tiny

SMALL = 1e-4


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return tiny()


def scored(plan: sweep.Plan, score: Method, by: Any = None) -> pd.DataFrame:
    """Mean score and exact effect of every condition on the metric `m`."""
    metric = plan.metrics["m"] if by is None else sweep.Metric(by)
    question = Question("m", metric, "", score, tuple(range(len(plan.conditions))))
    with torch.no_grad():
        values, _ = scores_of_rows(plan, plan.inputs(), question, np.arange(plan.runs))
    exact = plan.run()["m_effect"].sel(interval="mean").values
    return pd.DataFrame(
        {"score": values.mean(axis=1), "exact": exact}, [one.label for one in plan.conditions]
    )


def energy(tensor: Tensor) -> Tensor:
    """A smooth number that says rows apart."""
    flat = tensor.flatten(1)
    return (flat * torch.linspace(-1, 2, flat.shape[1]).to(flat)).sum(dim=1) + flat.square().mean(
        dim=1
    )


SITES = {
    "z": Intervention("blocks.1.cross_attn.hook_z", [1], steps=1, action=Scale(1 + SMALL)),
    "several steps": Intervention(
        "blocks.*.attn.hook_v", tokens=[1, 3], branch="both", action=Scale(1 - SMALL)
    ),
    "uncond": Intervention(
        "blocks.0.hook_mlp_out", steps=[0, 2], branch="uncond", action=Scale(1 + SMALL)
    ),
    "words": Intervention("hook_caption", tokens="shape1", steps=1, action=Scale(1 + SMALL)),
    "latent": Intervention("hook_latent", steps=1, action=Scale(1 + SMALL)),
    "x0": Intervention("hook_x0", steps=0, action=Scale(1 + SMALL)),
}


@pytest.mark.parametrize("score", ["step", "attribution"])
@pytest.mark.parametrize("on", ["latent", "x0", "eps", "steps.1.hook_x0", "steps.1.hook_out_cond"])
def test_a_score_is_the_effect_of_a_small_change(model, on, score):
    """In every branch, at one step and at several, on words and between denoiser calls."""
    sites = {
        name: one for name, one in SITES.items() if not (name == "latent" and on.endswith("cond"))
    }
    plan = sweep.plan(
        model, PROMPTS, SEEDS, sites, {"m": sweep.Metric(energy, on=on)}, num_steps=STEPS, batch=3
    )
    found = scored(plan, score)
    unscored = found.index[found["score"].isna()].tolist()
    assert unscored == (["latent"] if on == "eps" else [])
    found = found.drop(unscored)
    np.testing.assert_allclose(found["score"], found["exact"], rtol=2e-3, atol=1e-9)
    assert (found["score"].abs() > 1e-7).all()


def test_a_step_is_taken_exactly(model):
    """At the last step and for a linear metric nothing is approximated: the score is the effect,
    where attribution is far off.
    """
    last = STEPS - 1
    cells = {
        "zero": Intervention("blocks.0.cross_attn.hook_z", [1], steps=last, branch="both"),
        "mean": Intervention("blocks.1.attn.hook_pattern", [0], None, last, "cond", "mean"),
        "hidden": Intervention(
            "blocks.0.cross_attn.hook_attn_scores", None, "relation", last, action="knockout"
        ),
        "modulation": Intervention("blocks.1.adaln.hook_scale_msa", steps=last),
        "tripled": Intervention("blocks.0.hook_mlp_out", None, [0, 3], last, "uncond", Scale(3.0)),
    }
    linear = sweep.Metric(
        lambda latent: (latent.flatten(1) * torch.linspace(-1, 2, latent[0].numel())).sum(1),
        on="latent",
    )
    plan = sweep.plan(model, PROMPTS, SEEDS, cells, {"m": linear}, num_steps=STEPS, batch=4)
    errors = {}
    for score in ("step", "attribution"):
        table = scored(plan, score)
        assert (table["exact"].abs() > 1e-4).all()
        errors[score] = ((table["score"] - table["exact"]) / table["exact"]).abs()
    assert errors["step"].max() < 1e-5
    assert np.isnan(errors["attribution"]["modulation"])
    assert errors["attribution"].max() > 0.05


def test_several_edits_of_one_tensor_are_scored_in_their_order(model):
    """And a run that the metric's step comes before has no score but 0."""
    site = "blocks.0.attn.hook_z"
    double, shift = (
        Intervention(site, steps=1, action=Scale(1 + SMALL)),
        Intervention(site, steps=1, action=Scale(1 - 3 * SMALL)),
    )
    cells = {"both": [double, shift], "late": Intervention(site, steps=2), "one": double}
    plan = sweep.plan(
        model,
        PROMPTS,
        SEEDS,
        cells,
        {"m": sweep.Metric(energy, on="steps.1.hook_x0")},
        num_steps=STEPS,
    )
    found = scored(plan, "step")
    np.testing.assert_allclose(found["score"], found["exact"], rtol=2e-3, atol=1e-12)
    assert found.loc["late", "score"] == 0
    assert found.loc["both", "score"] == pytest.approx(-2 * found.loc["one", "score"], rel=1e-3)


def test_a_masked_key_is_scored_by_the_pattern_that_comes_of_it(model):
    """As is the same pattern, put there."""
    name = "blocks.1.cross_attn.hook_pattern"
    hide = Intervention(name, [0], "relation", 1, action="knockout")
    with torch.no_grad(), model.hooks(hide.hooks(model, PROMPTS, num_steps=STEPS)):
        _, cache = model.run_with_cache(PROMPTS, 0, STEPS, names_filter=name, steps=1)
    cells = {
        "hide": hide,
        "put": Intervention(name, [0], None, 1, action=Replace(cache[f"steps.1.cond.{name}"])),
    }
    plan = sweep.plan(
        model, PROMPTS, 0, cells, {"m": sweep.Metric(energy, on="x0")}, num_steps=STEPS
    )
    found = scored(plan, "attribution")
    assert found["score"].iloc[0] == pytest.approx(found["score"].iloc[1], rel=1e-9)
    assert abs(found["score"].iloc[0]) > 1e-6


def heads(steps: range) -> dict[str, Intervention]:
    return sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), heads=range(2), steps=steps
    )


def test_a_search_with_money_for_everything_is_the_exhaustive_sweep(model, tmp_path):
    """And repeated, it computes nothing."""
    metrics = {"m": sweep.Metric(lambda tensor: {"energy": energy(tensor)}, on="latent")}
    cells = {
        **heads(range(STEPS)),
        "encoder": Intervention("text_encoder.hook_out", tokens="shape1", action="mean"),
    }
    plan = sweep.plan(model, PROMPTS, SEEDS, cells, metrics, num_steps=STEPS)
    found = sweep.search(plan, "m_energy", k=8, budget=40.0, out=tmp_path)
    whole, table = plan.run(), found.table.set_index("intervention")
    assert set(table.index) == set(cells)
    assert np.isnan(table.loc["encoder", "score"])
    assert table.loc["encoder", "drawn"] != ""
    assert (table["drawn"] == "top").sum() == 8
    assert (table["drawn"].iloc[:8] == "top").all()
    ran = found.found["intervention"].values
    assert set(ran) == set(table.index[table["drawn"] != ""])
    here, there = found.found["m_energy"], whole["m_energy"].sel(intervention=ran)
    known = ~np.isnan(here.values)
    np.testing.assert_allclose(here.values[known], there.values[known], rtol=0, atol=1e-12)
    assert (known.sum(axis=(1, 2)) == table.loc[ran, "scenes"]).all()
    last = table[table["scenes"] == plan.runs]  # on all scenes the estimate is the plain mean
    exact = whole["m_energy_effect"].sel(intervention=last.index.tolist(), interval="mean")
    assert len(last) >= 8
    np.testing.assert_allclose(last["exact"], exact, rtol=0, atol=1e-12)

    called = []
    handle = model.dit.register_forward_pre_hook(lambda *args: called.append(1))
    again = sweep.search(plan, "m_energy", k=8, budget=40.0, out=tmp_path)
    handle.remove()
    assert not called  # scores and effects are on disk
    xr.testing.assert_identical(again.found, found.found)
    pd.testing.assert_frame_equal(again.table, found.table)
    with pytest.raises(ValueError, match="other scores"):
        sweep.search(plan, "m_energy", k=8, by=energy, out=tmp_path)


def test_a_search_that_was_killed_goes_on(model, tmp_path, monkeypatch):
    """After its second exact round was lost in the middle."""
    metrics = {"m": sweep.Metric(energy, on="latent")}
    plan = sweep.plan(model, PROMPTS, SEEDS, heads(range(STEPS)), metrics, num_steps=STEPS)
    how: Any = {"k": 2, "budget": 5.0, "sample": 2}
    whole = sweep.search(plan, "m", **how)
    assert whole.table["rounds"].max() > 1

    class Killed(BaseException):
        pass

    done, run = [], Execution.run

    def dying(self: Execution, cluster: Any = None) -> None:
        done.append(int((~self.done).sum()))
        if len(done) == 2:
            raise Killed
        run(self, cluster)

    with monkeypatch.context() as patched:
        patched.setattr(Execution, "run", dying)
        with pytest.raises(Killed):
            sweep.search(plan, "m", **how, out=tmp_path)
    first = done[0]
    with monkeypatch.context() as patched:
        patched.setattr(Execution, "run", lambda self, c=None: (done.append(0), run(self, c)))
        found = sweep.search(plan, "m", **how, out=tmp_path)
    assert len(shards(tmp_path / "cells")) >= first  # the first round is not run again
    assert len(done) == 2 + (whole.table["rounds"].max() - 1)
    pd.testing.assert_frame_equal(found.table, whole.table, rtol=1e-9, atol=1e-12)


def test_a_search_runs_few_conditions_on_many_scenes(model):
    """Within its budget; what it left out is what its table says."""
    metrics = {"m": sweep.Metric(energy, on="latent")}
    cells = sweep.grid(
        Intervention("blocks.*.attn.hook_z"), layers=range(2), heads=range(2), steps=range(STEPS)
    )
    cells = {**{f"self {name}": one for name, one in cells.items()}, **heads(range(STEPS))}
    plan = sweep.plan(model, PROMPTS, [3, 4, 5, 6], cells, metrics, num_steps=STEPS)
    found = sweep.search(plan, "m", k=1, budget=4.0, sample=2)
    table, missed = found.table, found.missed()
    assert found.spent <= 4.3
    assert table["scenes"].iloc[0] == table["scenes"].max() > table["scenes"].min() == 0
    assert missed.beyond == pytest.approx(abs(table["exact"].iloc[0]))
    whole = abs(plan.run()["m_effect"].sel(interval="mean")).to_series()
    top = table["intervention"][table["drawn"] == "top"]
    assert (whole.drop(top) > missed.beyond).sum() <= missed.most
    assert "at most" in str(found)
    with pytest.raises(ValueError, match="ranks 1 to 1"):
        found.missed(rank=2)


def test_a_search_without_scores_runs_everything_first(model):
    """Score a distance from the run without intervention, which has no slope there."""
    moved = sweep.Metric(sweep.displacement, on="latent", given=["baseline"])
    plan = sweep.plan(model, PROMPTS, SEEDS, heads(range(STEPS)), {"m": moved}, num_steps=STEPS)
    with pytest.raises(ValueError, match="no slope"):
        sweep.search(plan, "m", k=2)
    found = sweep.search(plan, "m", k=2, score="none").table
    assert found["score"].isna().all()
    assert (found["rounds"] > 0).all()
    whole = plan.run()["m_effect"].sel(interval="mean").to_series().sort_values()
    assert set(found["intervention"][:2]) == set(whole.index[-2:])


def test_the_former_name_warns(model):
    metrics = {"m": sweep.Metric(energy, on="latent")}
    plan = sweep.plan(model, PROMPTS, 0, heads(range(1)), metrics, num_steps=STEPS)
    with pytest.warns(DeprecationWarning, match=r"sweep\.search"):
        found = sweep.two_stage(plan, "m", k=2, sample=1)
    assert (found.table["drawn"] == "top").sum() == 2


@pytest.mark.parametrize(("total", "drawn"), [(12, 4), (40, 15), (7, 7), (9, 0)])
def test_a_count_is_bounded_in_at_least_95_of_100_samples(total, drawn):
    """Whatever the true count is: exactly, over all samples."""
    hits = np.arange(drawn + 1)
    bounds = np.array(
        [count_bound(int(seen), drawn, total) if seen <= total else total for seen in hits]
    )
    for true in range(total + 1):
        covered = hypergeom.pmf(hits, total, true, drawn)[bounds >= true].sum()
        assert covered >= 0.95 - 1e-12
    assert count_bound(0, drawn, total) == (
        total if drawn == 0 else 0 if drawn == total else count_bound(0, drawn, total)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "energy"}, ValueError, "it has m, moved"),
        ({"metric": "moved"}, ValueError, "no slope"),
        (
            {"by": lambda tensor: (tensor > 0).flatten(1).sum(1)},
            TypeError,
            "cannot be differentiated",
        ),
        ({"k": 0}, ValueError, "at least 1"),
        ({"budget": 0}, ValueError, "above 0"),
    ],
)
def test_what_has_no_score_is_refused(model, arguments, error, message):
    metrics = {
        "m": sweep.Metric(energy, on="x0"),
        "moved": sweep.Metric(
            lambda x0, baseline: (x0 - baseline).square().flatten(1).sum(1),
            on="x0",
            given=["baseline"],
        ),
    }
    plan = sweep.plan(model, PROMPTS, 0, heads(range(1)), metrics, num_steps=STEPS)
    with pytest.raises(error, match=message):
        sweep.search(plan, **{"metric": "m", **arguments})


@pytest.mark.slow
def test_the_planted_circuit_stands_at_the_top(planted_model):
    """Exhaustively, and in the scores by step; attribution passes over a saturated head (measured:
    L1H4), as its bound allows.
    """
    model, truth = planted_model("two-stage", 0)
    needed = [head for head in truth.relation_heads if head.what.startswith("vertical")]
    needed += [head for head in truth.helper_heads if head.role == "presence"]
    layer = needed[0].layer

    def height(latent: Tensor) -> Tensor:
        # not clamped to [0, 1]
        images = model.codec.decode(latent / model.codec.config.scaling_factor, return_dict=False)[
            0
        ]
        return (
            (images[:, 0] - images[:, 2]) * torch.linspace(1, -1, images.shape[-1])[:, None]
        ).mean(dim=(1, 2))

    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=[layer], heads=range(model.cfg.n_heads)
    )
    metrics = {"height": sweep.Metric(height, on="latent")}
    plan = sweep.plan(model, "red circle is directly above blue square", 0, cells, metrics)
    whole = (
        abs(plan.run()["height_effect"].sel(interval="mean"))
        .to_series()
        .sort_values(ascending=False)
    )
    assert set(whole.index[: len(needed)]) == {f"L{head.layer}H{head.head}" for head in needed}
    for score in ("step", "attribution"):
        found = sweep.search(plan, "height", k=4, score=score, budget=1.0)
        top, missed = found.table["intervention"][:4], found.missed()
        assert (whole.drop(top) > missed.beyond).sum() <= missed.most
        if score == "step":
            assert set(whole.index[: len(needed)]) <= set(top)


@pytest.mark.parametrize("score", ["step", "attribution"])
def test_a_scenes_run_is_sampled_once(model, score, monkeypatch):
    """For its scores and for its exact effects, which are those of a plan that samples again."""
    cells = sweep.grid(
        Intervention("blocks.*.attn.hook_z"), layers=range(2), heads=range(2), steps=range(STEPS)
    )
    metrics = {"m": sweep.Metric(energy, on="latent")}
    plan = sweep.plan(model, PROMPTS, SEEDS, cells, metrics, num_steps=STEPS, batch=3)
    sample, sampled = CleanRuns.sample, []

    def counted(model: Any, inputs: Any, seeds: Any, rows: Any, *rest: Any) -> CleanRuns:
        sampled.extend(rows.tolist())
        return sample(model, inputs, seeds, rows, *rest)

    monkeypatch.setattr(CleanRuns, "sample", counted)
    found = sweep.search(plan, "m", k=2, sample=2, budget=4.0, score=score).found
    assert len(sampled) == len(set(sampled)) > 1
    expected = plan.run().sel(intervention=found["intervention"])
    ran = found["m"].notnull()
    np.testing.assert_allclose(found["m"].where(ran), expected["m"].where(ran), rtol=1e-6)
