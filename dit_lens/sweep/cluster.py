"""A plan's batches on the workers of a Ray cluster.

Scheduling, transport and replacing lost workers are Ray's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedModel

from hooked_models import HookedTextToImage
from hooked_models.hooks.module import HookedModule
from hooked_models.pipelines.hub import Source

from .clean import CleanRuns, Fork, Rows

if TYPE_CHECKING:
    from .execute import SweepContext
    from .metrics import Read
    from .plan import Plan
    from .scores import Question

RESTARTS = 3
"""How often a worker, and a batch, is tried again after being lost."""
BATCHES = 4
"""For each worker, at least: so that one that is done early finds more to do."""


class Worker:
    """A process of the cluster with a model of its own."""

    def __init__(
        self,
        plan: Plan,
        model: Source | tuple[Any, ...],
        device: str,
        dtype: torch.dtype,
        settings: Settings,
        fetch: Callable[[Sequence[Any]], list[Any]],
    ) -> None:
        """Load the model on its device.

        `model`: where to load it from, or what `parts_of` gives; `fetch`: gives the objects of keys
        in the object store.
        """
        if isinstance(model, Source):
            name = model.folder if model.commit is None else model.name
            loaded = HookedTextToImage.from_pretrained(
                name, revision=model.commit, dtype=dtype, check=False
            )
        elif len(model) == 1:
            _register_recorders(*model)
            loaded = HookedTextToImage.from_pipeline(*model)
        else:
            loaded = HookedTextToImage(*model).eval()
        self.model = loaded.to(device)
        if settings.options is not None:
            pipeline: Any = self.model
            pipeline.pipe.to(device)
            pipeline.options = settings.options
        for module, switched in zip(_flagged(self.model), settings.flags, strict=True):
            for flag, on in switched.items():
                if getattr(module.cfg, flag) != on:
                    getattr(module, f"set_{flag}")(on)
        self.plan, self.fetch = replace(plan, model=self.model), fetch
        self.inputs = self.plan.inputs()
        self.held: tuple[Sequence[Any], SweepContext] | None = None

    def digest(self) -> str:
        """Digest of the model."""
        return self.model.digest()

    @torch.no_grad()
    def sample(self, rows: Rows, reads: set[Read], batch: int) -> CleanRuns:
        """Sample rows without intervention; sent back without the model and the inputs."""
        clean = CleanRuns.sample(self.model, self.inputs, self.plan.noise, rows, reads, batch)
        return clean.on(None, None)

    def scores(
        self, question: Question, rows: Rows
    ) -> tuple[Float[np.ndarray, "condition row"], CleanRuns]:
        """As `scores.scores_of_rows`; runs are sent back without the model and the inputs."""
        from .scores import scores_of_rows

        with torch.no_grad():
            values, clean = scores_of_rows(self.plan, self.inputs, question, rows)
        return values, clean.on(None, None)

    @torch.no_grad()
    def rows(
        self, shared: Sequence[Any], runs: Sequence[Any], forks: Sequence[Fork]
    ) -> pd.DataFrame:
        """As `SweepContext.rows`.

        Keys stand in lists, or Ray would fetch their objects before the call.

        Args:
            shared: the key of the `SweepContext`, without the model; fetched once.
            runs: keys of the runs that the forks leave, in the order of their rows.
            forks: forks of one batch.
        """
        if self.held is None or self.held[0] != shared:
            self.held = shared, *self.fetch(shared)
        clean = CleanRuns.join(self.fetch(runs)).on(self.model, self.inputs)
        return self.held[1].on(self.model).rows(clean, forks)


class Settings(NamedTuple):
    """State of a model besides its weights."""

    flags: list[dict[str, bool]]
    """The hooks that are switched on, in the denoiser and in the text encoder."""
    options: dict[str, Any] | None
    """Arguments of a pipeline's call; None for a PixArt."""


class Cluster:
    """A Ray cluster: the one connected, the one of RAY_ADDRESS, or a new one on this machine.

    Its workers serve a plan and every selection of the plan's conditions, and end with the `with`
    block.
    """

    def __init__(self, plan: Plan, workers: int | None = None) -> None:
        """Raises ImportError if Ray is not installed."""
        try:
            import ray
        except ImportError:
            raise ImportError(
                "executor='ray' needs Ray: pip install 'dit_lens[ray]', or choose executor='local'."
            ) from None
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers}: at least one has to do the work.")
        self.ray, self.plan, self.workers = ray, plan, workers
        self.actors: list[Any] = []
        self.arguments: tuple[Any, ...] = ()
        """Arguments of `Worker`; kept, for a worker that is lost is made of them again."""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raises RuntimeError if a worker was lost more often than `RESTARTS` times."""
        from ray.exceptions import RayActorError

        for actor in self.actors:
            self.ray.kill(actor)
        if isinstance(error, RayActorError):
            raise RuntimeError(
                f"A worker was lost {RESTARTS + 1} times ({error}). Finished cells are kept if "
                "out= names a folder: run again, with a smaller batch= if memory was short."
            ) from error

    @cached_property
    def count(self) -> int:
        """Number of workers that can hold a model of its kind of device."""
        if self.workers is not None:
            return self.workers
        if not self.ray.is_initialized():
            self.ray.init()
        kind = "GPU" if self.plan.model.device.type == "cuda" else "CPU"
        return int(self.ray.cluster_resources().get(kind, 1))

    def batch(self, rows: int, most: int) -> int:
        """Rows that run together, so that there is something to do for everybody."""
        return min(most, max(1, rows // (BATCHES * (self.workers or BATCHES))))

    def team(self, jobs: int) -> Team:
        """As many workers as there is work for; those that are missing are started.

        Raises:
            ValueError: workers load another model than the one given.
        """
        missing = min(self.count, jobs) - len(self.actors)
        if missing > 0:
            self._start(missing)
        return Team(self.ray, self.actors)

    def _start(self, count: int) -> None:
        model = self.plan.model
        if not self.ray.is_initialized():
            self.ray.init()
        found = model.source  # the workers' working directory may be another
        self.arguments = self.arguments or (
            self.ray.put(replace(self.plan, model=None)),
            replace(found, folder=found.folder.resolve())
            if found
            else self.ray.put(parts_of(model)),
            model.device.type,
            model.dit.dtype,
            settings_of(model),
            self.ray.get,
        )
        gpus = int(model.device.type == "cuda")
        remote = self.ray.remote(
            num_cpus=1, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
        )(Worker)
        new: list[Any] = [remote.remote(*self.arguments) for _ in range(count)]
        self.actors += new
        digests = self.ray.get([actor.digest.remote() for actor in new])
        if set(digests) != {model.digest()}:
            raise ValueError(
                f"The model is not the one in {found and found.name} any more: save it and "
                "load it again (save_pretrained, from_pretrained), or set model.source = "
                "None, so that it is sent to the workers."
            )


@dataclass
class Team:
    """Workers that have loaded the model; see `execute.Workers`."""

    ray: Any
    actors: list[Any]

    def sample(self, rows: Rows, reads: set[Read], batch: int) -> CleanRuns:
        """Sample the runs without intervention, each worker its share.

        A lost worker's share is sampled again.
        """
        from ray.util import ActorPool

        parts = shares(rows, len(self.actors), batch)
        sampled = ActorPool(self.actors).map(
            lambda actor, some: actor.sample.remote(some, reads, batch), parts
        )
        return CleanRuns.join(list(sampled))

    def scores(
        self, question: Question, groups: Sequence[Rows]
    ) -> Iterator[tuple[Float[np.ndarray, "condition row"], CleanRuns]]:
        """As `execute.Workers`."""
        from ray.util import ActorPool

        yield from ActorPool(self.actors).map(
            lambda actor, rows: actor.scores.remote(question, rows), list(groups)
        )

    def tables(
        self, work: SweepContext, clean: CleanRuns, jobs: Sequence[Sequence[Fork]]
    ) -> Iterator[pd.DataFrame]:
        """The rows of every job's cells, in the order in which they are ready.

        Each machine fetches a row's run without intervention once, however many of its batches
        leave it.
        """
        from ray.util import ActorPool

        shared = [self.ray.put(work.on(None))]
        put = cache(lambda row: self.ray.put(clean.alone(row)))

        def send(actor: Any, forks: Sequence[Fork]) -> Any:
            rows = np.unique(np.concatenate([fork.rows for fork in forks])).tolist()
            return actor.rows.remote(shared, [put(row) for row in rows], forks)

        yield from ActorPool(self.actors).map_unordered(send, list(jobs))


def shares(rows: Rows, workers: int, batch: int) -> list[Rows]:
    """Cut rows into as few parts as give every worker equally many and fit into a batch.

    Example:
        >>> [part.tolist() for part in shares(np.arange(5), workers=2, batch=64)]
        [[0, 1, 2], [3, 4]]
    """
    most = min(batch, -(-len(rows) // workers))
    return np.array_split(rows, -(-len(rows) // most))


def parts_of(model: HookedTextToImage) -> tuple[Any, ...]:
    """The modules, or the pipeline, that a model is made around, to make an equal one."""
    if model.text_encoder is None:
        return (_without_recorders(model.as_diffusers()),)
    encoder = getattr(model.text_encoder, "wrapped", model.text_encoder)
    return model.dit.wrapped, encoder, model.tokenizer, model.codec, model.scheduler


RECORDERS = "transformers.utils.output_capturing"


def _without_recorders(pipe: Any) -> Any:
    """A pipeline with the same weights, without recorders of hidden states.

    transformers' encoders record by hooks, which cannot be pickled, and are installed again in the
    next call.
    """
    found = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            shared = [*part.parameters(), *part.buffers()]
            vars(found)[name] = one = copy.deepcopy(part, {id(tensor): tensor for tensor in shared})
            for module in one.modules():
                hooks = module._forward_hooks
                for key in [key for key, hook in hooks.items() if hook.__module__ == RECORDERS]:
                    del hooks[key]
                if getattr(module, "_output_capturing_hooks_installed", False):
                    module._output_capturing_hooks_installed = False  # type: ignore[assignment]
    return found


def _register_recorders(pipe: Any) -> None:
    """Make an empty encoder of each class.

    Transformers registers then which hidden states a class records, and unpickling makes none.
    """
    for part in pipe.components.values():
        if isinstance(part, PreTrainedModel):
            with torch.device("meta"):
                type(part)(part.config)


def _flagged(model: HookedTextToImage) -> list[HookedModule]:
    return [
        module for module in (model.dit, model.text_encoder) if isinstance(module, HookedModule)
    ]


def settings_of(model: HookedTextToImage) -> Settings:
    """All that a worker's model has to be told of."""
    flags = [
        {flag: getattr(module.cfg, flag) for flag in set(module.hook_flags.values())}
        for module in _flagged(model)
    ]
    return Settings(flags, getattr(model, "options", None))
