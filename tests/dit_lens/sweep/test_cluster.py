"""A sweep on the workers of a Ray cluster is the local one, also when a worker is lost on the
way.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
import torch
import xarray as xr
from ray import cloudpickle
from torch import Tensor

from dit_lens import sweep
from dit_lens.intervene.interventions import Intervention
from dit_lens.sweep import cluster
from dit_lens.sweep.clean import CleanRuns
from dit_lens.sweep.execute import Execution
from dit_lens.sweep.results import Results
from hooked_models import HookedTextToImage

from ..sweeps import METRICS, PROMPTS, SEEDS, STEPS, durable, shards, tiny


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return tiny()


def unpickled(keys: list[bytes]) -> list[Any]:
    """Stands for the object store."""
    return [pickle.loads(key) for key in keys]


class InThisProcess:
    """Stands for a cluster: what is sent is pickled, as Ray would, and advance on by one worker
    after the other.
    """

    def __init__(self, plan: Any, count: int) -> None:
        self.plan, self.count, self.sent, self.samples = plan, count, [], 0

    batch = cluster.Cluster.batch
    workers = 2

    def scores(self, *_: Any) -> Any:
        raise AssertionError("no sweep takes scores")

    def team(self, jobs: int) -> Any:
        model = self.plan.model
        sent = (
            cluster.parts_of(model),
            model.device.type,
            model.dit.dtype,
            cluster.settings_of(model),
            unpickled,
        )
        shared = cloudpickle.dumps(replace(self.plan, model=None))
        self.actors = [
            cluster.Worker(pickle.loads(shared), *pickle.loads(pickle.dumps(sent)))
            for _ in range(self.count)
        ]
        assert len({worker.digest() for worker in self.actors}) == 1
        return self

    def sample(self, rows: Any, reads: Any, batch: int) -> Any:
        parts = cluster.shares(rows, self.count, batch)
        self.samples = len(parts)
        sent = [
            cloudpickle.dumps(worker.sample(part, reads, batch))
            for worker, part in zip(self.actors, parts, strict=True)
        ]
        return CleanRuns.join([pickle.loads(part) for part in sent])

    def tables(self, work: Any, clean: Any, jobs: Any) -> Iterator[pd.DataFrame]:
        shared = cloudpickle.dumps(work.on(None))
        self.sent.append((len(cloudpickle.dumps(clean)), clean.inputs))
        for i in reversed(range(len(jobs))):
            rows = np.unique(np.concatenate([fork.rows for fork in jobs[i]])).tolist()
            runs = [cloudpickle.dumps(clean.alone(row)) for row in rows]
            self.sent += [
                (len(run), one.inputs) for run, one in zip(runs, unpickled(runs), strict=True)
            ]
            yield self.actors[i % self.count].rows([shared], runs, jobs[i])


def test_a_worker_has_all_it_needs_and_works_as_this_process_does(model):
    """With hooks behind a flag, which the worker's own model has to be told of, and without the
    model itself.
    """
    cells = {**durable(), "result": Intervention("blocks.1.attn.hook_result", [1], steps=1)}
    model.dit.set_use_attn_result(True)
    try:
        plan = sweep.plan(model, PROMPTS, SEEDS, cells, METRICS, num_steps=STEPS)
        local = plan.run()
        results, here = Results(None, {}), InThisProcess(plan, 2)
        with torch.no_grad():
            Execution(plan, results, np.zeros(plan.cells, dtype=bool)).run(here)  # type: ignore[arg-type]
    finally:
        model.dit.set_use_attn_result(False)
    table = results.table
    assert table["cell"].tolist() == list(range(plan.cells))
    values = local["latent_mean"].transpose("intervention", "seed", "prompt").values.flatten()
    np.testing.assert_allclose(table["latent_mean"], values, rtol=0, atol=1e-12)
    sizes = [size for size, _ in here.sent]
    assert max(sizes) < 2_000_000
    assert max(sizes[1:]) < sizes[0] / 2, "each row is sent by itself"
    assert {inputs for _, inputs in here.sent} == {None}
    assert here.samples == 2


def test_everybody_has_something_to_do(model):
    plan = sweep.plan(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS)
    two = cluster.Cluster(plan, workers=2)
    assert two.batch(rows=160, most=64) == 20
    assert two.batch(rows=3, most=64) == 1
    assert two.batch(rows=10_000, most=64) == 64


def test_without_ray_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"dit_lens\[ray\]"):
        sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, executor="ray", num_steps=STEPS)


def test_workers_are_those_of_a_cluster(model):
    with pytest.raises(ValueError, match="choose executor='ray'"):
        sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, workers=2, num_steps=STEPS)
    with pytest.raises(ValueError, match="at least one"):
        sweep.run(
            model, PROMPTS, SEEDS, durable(), METRICS, executor="ray", workers=0, num_steps=STEPS
        )


# On a cluster of two workers


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_give_the_same_dataset_and_shards(two_workers, model, tmp_path):
    whole = sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS)
    found = sweep.run(
        model, PROMPTS, SEEDS, durable(), METRICS, tmp_path, "ray", 2, num_steps=STEPS
    )
    xr.testing.assert_allclose(found, whole, rtol=0, atol=1e-10)
    assert sorted(shards(tmp_path)["cell"]) == list(range(whole["error"].size))
    # local goes on where a cluster was
    again = sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, tmp_path, num_steps=STEPS)
    xr.testing.assert_identical(again, found)


def lethal(folder: Path, times: int) -> sweep.Metric:
    """A metric that kills the worker that it runs in, the first `times` times."""
    driver = os.getpid()

    def mean(images: Tensor) -> Tensor:
        if os.getpid() != driver and len(list(folder.glob("killed-*"))) < times:
            (folder / f"killed-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return images.flatten(1).mean(dim=1)

    return sweep.Metric(mean)


@pytest.mark.slow
def test_a_lost_worker_loses_nothing(two_workers, model, tmp_path):
    whole = sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS)
    metrics = {"mean": lethal(tmp_path, times=1)}
    found = sweep.run(
        model,
        PROMPTS,
        SEEDS,
        durable(),
        metrics,
        tmp_path / "out",
        "ray",
        2,
        num_steps=STEPS,
        batch=5,
    )
    assert len(list(tmp_path.glob("killed-*"))) == 1
    np.testing.assert_allclose(found["mean"], whole["image_mean"], rtol=0, atol=1e-10)
    assert sorted(shards(tmp_path / "out")["cell"]) == list(range(whole["error"].size))


def lethal_worker(folder: Path) -> type[cluster.Worker]:
    """Workers of which the first that samples runs without intervention dies."""

    class Dying(cluster.Worker):
        def sample(self, *args: Any) -> CleanRuns:
            if not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().sample(*args)

    return Dying


@pytest.mark.slow
@pytest.mark.parametrize("score", ["step", "attribution"])
def test_a_search_by_two_workers_is_the_local_one(two_workers, model, score, tmp_path, monkeypatch):
    cells = sweep.grid(
        Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), heads=range(2), steps=range(2)
    )
    plan = sweep.plan(
        model,
        PROMPTS,
        SEEDS,
        cells,
        {"mean": sweep.Metric(lambda x: x.flatten(1).mean(1))},
        num_steps=STEPS,
    )
    here = sweep.search(plan, "mean", k=2, sample=3, score=score)
    started: list[int] = []
    start = cluster.Cluster._start
    monkeypatch.setattr(
        cluster.Cluster, "_start", lambda self, n: (started.append(n), start(self, n))
    )
    for _ in range(2):  # the second time, everything is in the folder
        there = sweep.search(
            plan, "mean", k=2, sample=3, score=score, out=tmp_path, executor="ray", workers=2
        )
        pd.testing.assert_frame_equal(here.table, there.table, rtol=1e-4, atol=1e-9)
        assert started == [2]


@pytest.mark.slow
def test_a_worker_that_is_lost_before_the_forks_loses_nothing(
    two_workers, model, tmp_path, monkeypatch
):
    whole = sweep.run(model, PROMPTS, SEEDS, durable(), METRICS, num_steps=STEPS)
    monkeypatch.setattr(cluster, "Worker", lethal_worker(tmp_path))
    found = sweep.run(
        model, PROMPTS, SEEDS, durable(), METRICS, tmp_path / "out", "ray", 2, num_steps=STEPS
    )
    assert (tmp_path / "killed").exists()
    xr.testing.assert_allclose(found, whole, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_worker_that_is_lost_again_and_again_is_reported(
    two_workers, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(cluster, "RESTARTS", 1)
    metrics = {"mean": lethal(tmp_path, times=1000)}
    with pytest.raises(RuntimeError, match="lost 2 times"):
        sweep.run(model, PROMPTS, SEEDS, durable(), metrics, None, "ray", 1, num_steps=STEPS)


@pytest.mark.slow
def test_a_model_that_was_changed_since_it_was_loaded_is_noticed(two_workers, tmp_path):
    """And sent, if it is said to come from nowhere."""
    tiny(torch.float32).save_pretrained(tmp_path)
    model = HookedTextToImage.from_pretrained(tmp_path)
    found = sweep.run(model, PROMPTS, 0, durable(), METRICS, None, "ray", 1, num_steps=STEPS)
    with torch.no_grad():
        model.codec.mean.add_(0.1)
    with pytest.raises(ValueError, match=r"model\.source = None"):
        sweep.run(model, PROMPTS, 0, durable(), METRICS, None, "ray", 1, num_steps=STEPS)
    model.source = None
    changed = sweep.run(model, PROMPTS, 0, durable(), METRICS, None, "ray", 1, num_steps=STEPS)
    assert (abs(changed["image_mean"] - found["image_mean"]) > 1e-3).any()
