"""Sweeps that search, ablations and steering on every family: the same assertions on tiny random
pipelines of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
import xarray as xr
from ray import cloudpickle
from torch import Tensor
from transformers.utils import output_capturing

from dit_lens import Intervention, Scale, ablation, prompts, scenes, steering, sweep, variance
from dit_lens.intervene import doses
from dit_lens.sweep import cluster

from ..hooked_models.pipelines import PROMPTS
from .family_cases import LAST, SEEDS, STEPS, UNABLE, Case, case_of, close


@pytest.fixture(autouse=True)
def _float64() -> None:
    """In place of the folder's own fixture: these tests run in float32, as users do."""


def mean_of(images: Tensor) -> Tensor:
    return images.flatten(1).mean(1)


def plan_of(case: Case, cells: dict[str, Any], metrics: dict[str, Any]) -> sweep.Plan:
    how = {"num_steps": STEPS, "guidance": case.guidance, "batch": 5}
    return sweep.plan(case.model, PROMPTS, SEEDS, cells, metrics, **how)


@pytest.mark.parametrize("way", ["step", "attribution"])
def test_a_searchs_scores_and_effects(case: Case, way: Any) -> None:
    """Scores against a change of the guided output (or of the tensor itself) times autograd's
    slope there; effects of the chosen against runs of their own.
    """
    site = f"blocks.{case.layer}.{case.attention}.hook_z"
    cells = {f"head {head}": Intervention(site, heads=[head], steps=1) for head in (0, 1)}
    cells["stream"] = Intervention("blocks.1.hook_resid_pre", steps=1, action=Scale(0.9))
    plan = plan_of(case, cells, {"m": mean_of})
    found = sweep.search(plan, "m", k=1, sample=1, score=way, budget=100.0)  # all scenes
    table = found.table.set_index("intervention")
    assert set(found.found.intervention.values) == set(table.index[table["drawn"] != ""])
    draws = case.model.run_with_hooks
    for label in cells:
        by_hand, exact = [], []
        for seed in SEEDS:
            run = case.alone[seed]
            hooks = cells[label].hooks(case.model, list(PROMPTS), num_steps=STEPS)
            by_hand.append(first_order(run, hooks, "steps.1.hook_out" if way == "step" else None))
            if label in found.found.intervention:
                edited = draws(PROMPTS, seed, STEPS, case.guidance, fwd_hooks=hooks)
                exact.append(float((mean_of(edited) - mean_of(run.images)).mean()))
        size = max(abs(mean_of(run.images)))
        assert abs(table.score[label] - np.mean(by_hand)) < 1e-5 * size + 1e-3 * abs(
            np.mean(by_hand)
        )
        if exact:
            assert abs(table.exact[label] - np.mean(exact)) < 2e-5 * size


def first_order(run: Any, hooks: list[Any], name: str | None) -> float:
    """Change of one tensor by hooks · slope of the images' mean there; `name` None: the tensor
    that is hooked.
    """
    ((site, _),) = hooks
    name = name or site
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor.detach().clone())

    def open_(tensor: Tensor, hook: Any) -> Tensor:
        kept.append(tensor.detach().clone().requires_grad_())
        return kept[-1]

    run.fork(1, [*hooks, (name, keep)], until=2)
    with torch.enable_grad():
        total = mean_of(run.fork(1, [(name, open_)]).images).mean()
        (slope,) = torch.autograd.grad(total, kept[1])
    return float(((kept[0] - kept[1].detach()) * slope).sum())


def test_ablations_by_hand(case: Case) -> None:
    """Heads at the batch's mean, and words that no query sees, against hooks written here; random
    controls spare the heads and words that are ablated.
    """
    name, texts = case.attention, list(PROMPTS)
    lengths = set(case.model.layout(PROMPTS).text_mask.sum(1).tolist())
    joint = "joint_pos" in case.model.dit.axes(f"blocks.{case.layer}.{name}.hook_z")
    means = ablation.ablate_heads(f"L{case.layer}H1", "mean", name, steps=LAST)
    if not joint or len(lengths) == 1:
        full = f"steps.{LAST}.cond.blocks.{case.layer}.{name}.hook_z"

        def to_mean(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, 1] = (z[0, :, 1] + z[1, :, 1]) / 2
            return z

        (one,) = means
        ours = case.images(one.hooks(case.model, texts, num_steps=STEPS))
        assert close(ours, case.images([(full, to_mean)]))
        assert not torch.equal(ours, case.clean.images)
    control = ablation.random_heads(case.model, means, np.random.default_rng(0))
    assert (f"blocks.{case.layer}." not in control[0].site) or control[0].heads != (1,)
    hide = ablation.knockout_role(
        prompts.word("circle"), layers=case.layer, steps=LAST, sublayer=name
    )
    scores = f"steps.{LAST}.cond.blocks.{case.layer}.{name}.hook_attn_scores"
    words = prompts.token_mask(case.model, texts, prompts.word("circle"))
    n_image = 0 if name == "cross_attn" else case.model.layout(PROMPTS).n_image

    def unseen(found: Tensor, hook: Any) -> Tensor:
        keys = torch.zeros(len(found), found.shape[-1], dtype=torch.bool)
        n = min(words.shape[1], found.shape[-1] - n_image)
        keys[:, n_image : n_image + n] = words[:, :n]
        return found.masked_fill(keys[:, None, None], -1e4)

    ours = case.images(hide[0].hooks(case.model, texts, num_steps=STEPS))
    assert close(ours, case.images([(scores, unseen)]))
    assert not torch.equal(ours, case.clean.images)
    others = ablation.random_tokens(case.model, texts, hide, np.random.default_rng(0))
    (drawn, _), (chosen, _) = (one.token_masks(case.model, texts) for one in (others[0], hide[0]))
    assert not (drawn & chosen).any()
    assert drawn.sum(1).tolist() == chosen.sum(1).tolist()


def test_ablation_effects_are_those_of_runs_with_hooks(case: Case, monkeypatch: Any) -> None:
    """Condition minus none, image by image, against runs of their own. Images' means stand in for
    verdicts, which random images do not have.
    """

    def evaluate(images: Tensor, drawn: Any) -> xr.Dataset:
        found = mean_of(images).double().numpy()
        return xr.Dataset(dict.fromkeys(ablation.VERDICTS, ("image", found)))

    monkeypatch.setattr(ablation, "evaluate", evaluate)
    drawn = [scene for scene in scenes.sample(40, seed=0) if scene.relation == "above"][:2]
    texts = [scenes.caption(scene) for scene in drawn]
    heads = ablation.ablate_heads(f"L{case.layer}H0", "zero", case.attention)
    how = {"num_steps": STEPS, "guidance": case.guidance, "controls": 1}
    found = ablation.ablation_effects(case.model, drawn, {"head": heads}, SEEDS, **how)
    assert found["condition"].values.tolist() == ["none", "head", "head | random heads 1"]
    changes = []
    for number, seed in enumerate(SEEDS):
        hooks = [h for one in heads for h in one.hooks(case.model, texts, num_steps=STEPS)]
        edited, plain = (
            mean_of(case.model.run_with_hooks(texts, seed, STEPS, case.guidance, fwd_hooks=some))
            for some in (hooks, [])
        )
        ours = found["color"].isel(seed=number)
        assert close(torch.from_numpy(ours.sel(condition="none").values), plain.double())
        assert close(torch.from_numpy(ours.sel(condition="head").values), edited.double())
        changes.append(float((edited - plain).mean()))
    effect = float(found["color_effect"].sel(condition="head")[0])
    assert effect == pytest.approx(np.mean(changes), abs=2e-5)
    assert abs(effect) > 1e-6


@pytest.mark.slow
def test_relations_swapped_in_text_space(case: Case, monkeypatch: Any) -> None:
    """`swap_vectors` against means of what hooks read in sentences written out here; doses of
    `dose_response` against runs with the vectors added by hand. Images' means stand in for
    verdicts.
    """
    name = "steps.0.cond.hook_text"
    drawn = [scene for scene in scenes.sample(60, seed=0) if scene.relation == "above"][:2]
    drawn = [replace(scene, phrase="above") for scene in drawn]
    texts = [scenes.caption(scene) for scene in drawn]
    assert all(" above " in text for text in texts)
    ours = steering.swap_vectors(case.model, texts, ["below"] * 2)
    read: list[tuple[Tensor, list[bool]]] = []
    means = []
    for word in ("above", "below"):
        sentences = variance.factorial_prompts([word])
        run = (sentences, 0, 1, case.guidance)
        _, cache = case.model.run_with_cache(*run, names_filter=["hook_text"])
        mask = prompts.token_mask(case.model, sentences, prompts.word(word))
        read = list(zip(cache[name], mask.tolist(), strict=True))
        means.append(torch.stack([x[torch.tensor(at)] for x, at in read]).mean(0))
    by_hand = torch.zeros_like(ours)
    by_hand[prompts.token_mask(case.model, texts, prompts.word("above"))] = torch.cat(
        [means[1] - means[0]] * 2
    )
    assert close(ours, by_hand, 1e-4)
    assert float(by_hand.norm()) > 1e-3

    def judge(images: Tensor, *scenes_: Any) -> dict[str, Any]:
        return dict.fromkeys(steering.METRICS, mean_of(images).double().numpy())

    monkeypatch.setattr(doses, "_judge", judge)
    how: Any = {"num_steps": STEPS, "draws": 1, "seeds": SEEDS[:1], "doses": (0, 2.0)}
    how |= {} if case.guidance is None else {"guidance": case.guidance}
    found = steering.dose_response(case.model, drawn, "below", **how)["color"].isel(seed=0)
    for k in (0.0, 2.0):
        hooks = [
            (f"steps.{step}.cond.hook_text", lambda text, hook, k=k: text + k * by_hand)
            for step in range(STEPS)
        ]
        run = (texts, SEEDS[0], STEPS, case.guidance)
        images = case.model.run_with_hooks(*run, fwd_hooks=hooks)
        dose = torch.from_numpy(found.sel(condition="steered", k=k).values)
        assert close(dose, mean_of(images).double(), 1e-4)
    changed = found.sel(k=2.0) - found.sel(k=0)
    assert float(abs(changed).min()) > 0
    controls = {str(name).rpartition(" ")[0] for name in found["condition"].values[1:]}
    assert controls == {"random_vector", "wrong_token"}


@contextmanager
def empty(table: dict[Any, Any]) -> Iterator[None]:
    """A table without its entries at the beginning of the block."""
    before = dict(table)
    table.clear()
    yield
    table |= before


class OneWorker(cluster.Cluster):
    """Stands for a cluster: pickles, as Ray does, all that a worker is sent and sends back."""

    def __init__(self, plan: sweep.Plan) -> None:
        sent = (
            replace(plan, model=None),
            cluster.parts_of(plan.model),
            "cpu",
            torch.float32,
            cluster.settings_of(plan.model),
            list,
        )
        with empty(output_capturing._CAN_RECORD_REGISTRY):  # as in a process that made no encoder
            self.worker = cluster.Worker(*cloudpickle.loads(cloudpickle.dumps(sent)))
        assert self.worker.digest() == plan.model.digest()

    def batch(self, rows: int, most: int) -> int:
        return most

    def team(self, jobs: int) -> OneWorker:
        return self

    def sample(self, *args: Any) -> Any:
        return cloudpickle.loads(cloudpickle.dumps(self.worker.sample(*args)))

    def scores(self, *args: Any) -> Any:
        raise AssertionError("nothing is searched")

    def tables(self, work: Any, clean: Any, jobs: Any) -> Iterator[Any]:
        shared = cloudpickle.loads(cloudpickle.dumps(work.on(None)))
        for forks in jobs:
            rows = np.unique(np.concatenate([fork.rows for fork in forks])).tolist()
            runs = cloudpickle.loads(cloudpickle.dumps([clean.alone(row) for row in rows]))
            yield self.worker.rows([shared], runs, forks)


def test_a_clusters_worker_gives_cells_as_alone(case: Case) -> None:
    """A sweep by a worker that has got its model and each batch through a pickle, against runs of
    their own.
    """
    cells = {
        "head": Intervention(f"blocks.{case.layer}.{case.attention}.hook_z", heads=[1], steps=1),
        "late": Intervention("blocks.1.hook_resid_post", steps=LAST, action=Scale(0.5)),
    }
    plan = plan_of(case, cells, {"m": sweep.Metric(mean_of)})
    worker: Any = OneWorker(plan)
    found = plan.run_by(worker, None)
    assert (found["error"] == "").all()
    for number, seed in enumerate(SEEDS):
        for label, one in cells.items():
            hooks = one.hooks(case.model, list(PROMPTS), num_steps=STEPS)
            run = (PROMPTS, seed, STEPS, case.guidance)
            exact = mean_of(case.model.run_with_hooks(*run, fwd_hooks=hooks)).double()
            cell = found["m"].sel(intervention=label).isel(seed=number).values
            assert close(torch.from_numpy(cell), exact), label


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FLUX.1", "Qwen-Image"])
def test_a_sweep_on_ray_is_the_local_one(name: str) -> None:
    """A pipeline that is sent to two workers of a cluster on this machine."""
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        case = case_of(name)
        cell = Intervention("blocks.0.attn.hook_z", heads=[1], steps=1)
        plan = plan_of(case, {"head": cell}, {"m": sweep.Metric(lambda x: x.flatten(1).mean(1))})
        here, there = plan.run(), plan.run(executor="ray", workers=2)
    finally:
        ray.shutdown()
    xr.testing.assert_allclose(here, there, rtol=0, atol=1e-6)
    assert float(abs(there["m"] - there["m_baseline"]).max()) > 1e-5


def test_prompts_of_unequal_length_are_as_alone(case: Case) -> None:
    """Cells of a sweep in one batch against runs of one prompt, whose texts are shorter."""
    hide = Intervention(
        f"blocks.{case.layer}.{case.attention}.hook_pattern",
        tokens=prompts.word("circle"),
        steps=LAST,
        action="knockout",
    )
    head = Intervention(f"blocks.{case.layer}.{case.attention}.hook_z", heads=[1], steps=1)
    cells = {"hide": hide, "head": head}
    metric = sweep.Metric(lambda images: {"mean": mean_of(images), "at": images.flatten(1)[:, 7]})
    found = plan_of(case, cells, {"m": metric}).run()
    one_row = {
        name: value[:1] for name, value in case.model.options.items() if isinstance(value, list)
    }
    padded = (case.name, "unequal prompts") in UNABLE
    for row, text in enumerate(PROMPTS):
        for label, one in cells.items():
            with one_prompt(case, one_row):
                hooks = one.hooks(case.model, [text], num_steps=STEPS)
                run = (SEEDS[0], STEPS, case.guidance)
                alone = case.model.run_with_hooks([text], *run, fwd_hooks=hooks)
            cell = found.sel(intervention=label).isel(prompt=row, seed=0)
            for name, value in (("m_mean", mean_of(alone)), ("m_at", alone.flatten(1)[:, 7])):
                same = float(cell[name]) == pytest.approx(float(value[0]), abs=1e-4)
                assert same or (padded and text == min(PROMPTS, key=len)), (label, name)


@contextmanager
def one_prompt(case: Case, options: dict[str, Any]) -> Iterator[None]:
    """Options of the pipeline's call that are lists, as long as one prompt."""
    several = case.model.options
    case.model.options = {**several, **options}
    yield
    case.model.options = several


def test_guidance_that_ends_early_says_so() -> None:
    """Lumina 2 guides its first steps alone on request: later ones have one branch."""
    case = case_of("Lumina 2")
    run = (PROMPTS, SEEDS, STEPS, case.guidance)
    with torch.no_grad():
        images = case.model(*run, cfg_trunc_ratio=0.4)
        assert torch.equal(images, case.plain(cfg_trunc_ratio=0.4))
        name = "steps.{}.uncond.blocks.0.hook_resid_post"
        how = {"names_filter": "blocks.0.hook_resid_post", "branch": "both"}
        _, cache = case.model.run_with_cache(*run, cfg_trunc_ratio=0.4, **how)
        assert [step for step in range(STEPS) if name.format(step) in cache] == [0]
        halve: Any = lambda tensor, hook: tensor / 2  # noqa: E731
        edit = {"fwd_hooks": [(name.format(0), halve)], "cfg_trunc_ratio": 0.4}
        assert not torch.equal(case.model.run_with_hooks(*run, **edit), images)
        edit["fwd_hooks"] = [(name.format(2), halve)]
        with pytest.raises(ValueError, match=r"no unconditional branch at step 2 .* at 0 alone"):
            case.model.run_with_hooks(*run, **edit)
