"""A run: the inputs of a generation and its denoiser's predictions, call by call.

Enough to run it again from any step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import chosen_steps, integer, row_indices
from ..hooks.wrapping import Stamp, stamp
from ..pixart.text_state import TextState
from ..store import digest
from .attached import AttachedHook, Extent
from .hooks import Hooks
from .loops import RunInputs, branches_of
from .names import Branch
from .sampling import Solver

if TYPE_CHECKING:
    from .model import HookedTextToImage

MOST_COPIES = 10**6
"""Largest number of copies of a run."""


@dataclass(frozen=True)
class Inputs:
    """Everything that a generation is computed from."""

    tokens: Int[Tensor, "batch text_pos"]
    text: TextState
    """Rows [uncond; cond] with guidance, else cond alone."""
    latents: Float[Tensor, "batch channel rows columns"]
    """Standard normal noise, before the scheduler scales it."""
    seeds: tuple[int, ...]
    """Seed of each row's generator."""
    drawn: bool
    """True if `latents` are the first numbers of these generators, False if they were given."""
    guidance: float
    solver: Solver
    weights: Stamp = ()
    """Stamp of the denoiser's weights."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.tokens)

    @property
    def num_steps(self) -> int:
        """As requested; the run takes `len(self.solver)` steps."""
        return self.solver.num_steps

    @property
    def guided(self) -> bool:
        """True if there is an unconditional branch."""
        return self.guidance > 1

    @property
    def branches(self) -> tuple[Branch, ...]:
        """In the order of the denoiser's rows."""
        return branches_of(self.guidance)

    @property
    def extent(self) -> Extent:
        """Tensors that a run computes."""
        return Extent.of(self.solver, self.guided)

    def bias(self, attention: str, branch: Branch, scores: Any) -> Tensor | None:
        """Addend of an attention's scores [batch 1 1 key_pos] in one branch.

        Args:
            attention: its name in the denoiser.
            branch: guidance branch, whose text is masked.
            scores: the hooked attention, which knows the bias of a call where the text does not.
        """
        text = self.text.bias if attention.endswith("cross_attn") else None
        return None if text is None else text[self.rows(branch), None]

    def same_noise(self, other: Inputs) -> bool:
        """True if both runs have the same noise, that of the steps included."""
        drawn = not self.solver.draws or self.seeds == other.seeds
        return (
            self.latents.shape == other.latents.shape
            and torch.equal(self.latents, other.latents)
            and drawn
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Identity of a run on disk, beside its model."""
        return {
            "text": digest(self.text.text, "" if self.text.bias is None else self.text.bias),
            "noise": digest(self.latents),
            "seeds": list(self.seeds) if self.solver.draws else [],
            "num_steps": self.num_steps,
            "guidance": self.guidance,
        }

    def take(self, rows: Int[Tensor, " row"]) -> Inputs:
        """The inputs of some rows; rows may repeat."""
        both = torch.cat([rows + i * len(self) for i in range(len(self.branches))])
        seeds = tuple(self.seeds[row] for row in rows.tolist())
        return replace(
            self,
            tokens=self.tokens[rows],
            text=self.text.take(both),
            latents=self.latents[rows],
            seeds=seeds,
        )

    def rows(self, branch: Branch) -> slice:
        """The rows of a branch in the denoiser's batch; without guidance, all of them."""
        start = self.branches.index(branch) * len(self) if self.guided else 0
        return slice(start, start + len(self))

    def generators(self) -> list[torch.Generator]:
        """A generator for each row, as it stands before step 0.

        None if the scheduler draws nothing.
        """
        if not self.solver.draws:
            return []
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        for generator in generators if self.drawn else ():
            torch.randn(self.latents.shape[1:], generator=generator)
        return generators


Calls = Mapping[tuple[int, tuple[Branch, ...]], Float[Tensor, "branch_batch ..."]]
"""(step, branches of the call's batch) → the denoiser's prediction."""


@dataclass(frozen=True)
class Record:
    """Latents, denoiser predictions and guided predictions of every step so far.

    The latter are given to the scheduler.
    """

    latents: tuple[Float[Tensor, "batch ..."], ...] = ()
    """As `hook_latent` left them."""
    predictions: Calls = field(default_factory=dict)
    """Call by call, before any hook between calls."""
    outs: tuple[Float[Tensor, "batch ..."], ...] = ()
    """As `hook_out` and `hook_x0` left them."""
    clean: bool = False
    """True if no hook was attached while it was made: its inputs give it again."""

    def __len__(self) -> int:
        """Steps."""
        return len(self.outs)

    def prediction(self, step: int, branch: Branch) -> Float[Tensor, "batch ..."]:
        """The denoiser's prediction for a branch."""
        for (at, branches), prediction in self.predictions.items():
            if at == step and branch in branches:
                return prediction.chunk(len(branches))[branches.index(branch)]
        raise KeyError(f"There is no prediction of step {step}, branch {branch!r}.")

    def take(self, rows: Int[Tensor, " row"], until: int | None = None) -> Record:
        """Some rows of the batch, of all steps or of those before `until`; rows may repeat."""

        def some(tensor: Tensor, branches: int = 1) -> Tensor:
            size = len(tensor) // branches
            index = torch.cat([rows + i * size for i in range(branches)])
            return tensor[index.to(tensor.device)]

        calls = {
            key: some(each, len(key[1]))
            for key, each in self.predictions.items()
            if until is None or key[0] < until
        }
        latents, outs = (tuple(map(some, each[:until])) for each in (self.latents, self.outs))
        return Record(latents, calls, outs, self.clean)

    @staticmethod
    def join(records: Sequence[Record]) -> Record:
        """The rows of several records of one number of steps, one after the other."""

        def rows(several: Iterable[Sequence[Tensor]]) -> list[Tensor]:
            return [torch.cat(parts) for parts in zip(*several, strict=True)]

        calls = {
            key: torch.cat(rows(r.predictions[key].chunk(len(key[1])) for r in records))
            for key in records[0].predictions
        }
        return Record(
            tuple(rows(r.latents for r in records)),
            calls,
            tuple(rows(r.outs for r in records)),
            all(r.clean for r in records),
        )


@dataclass(frozen=True, repr=False)
class Run:
    """A generation, or its beginning, that can be run again from any step on.

    Example:
        >>> run = model.trajectory("red circle is above blue square", seed=0, num_steps=4)
        >>> run.fork(2, [("steps.2.cond.blocks.0.attn.hook_z", lambda z, hook: 0 * z)]).images.shape
        torch.Size([1, 3, 128, 128])
    """

    model: HookedTextToImage
    inputs: RunInputs
    record: Record
    latent: Float[Tensor, "batch ..."]
    """After the last recorded step."""
    hooks: tuple[AttachedHook, ...] = ()
    """Those on `hook_image` that it was made with."""

    def __repr__(self) -> str:
        return (
            f"Trajectory({len(self.inputs)} prompts, before steps 0 to {len(self.record)} of "
            f"{len(self)})"
        )

    def __len__(self) -> int:
        """Steps of the whole run: evaluations of the denoiser."""
        return len(self.inputs.solver)

    @property
    def latents(self) -> tuple[Float[Tensor, "batch ..."], ...]:
        """Before every step that was made, and after the last."""
        return (*self.record.latents, self.latent)

    @property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """The final images, in [0, 1].

        Raises ValueError for a run that was stopped before its last step.
        """
        if len(self.record) < len(self):
            raise ValueError(
                f"There are no images: this trajectory was stopped before step {len(self.record)}."
            )
        return self.model.images_of(self)

    def take(self, rows: Int[Tensor, " row"]) -> Run:
        """The same run for some rows of its batch; rows may repeat."""
        rows = row_indices(rows, len(self.inputs)).to(self.latent.device)
        return replace(
            self,
            inputs=self.inputs.take(rows),
            record=self.record.take(rows),
            latent=self.latent[rows],
        )

    def repeat(self, times: int) -> Run:
        """The whole batch `times` times over, one copy after the other.

        A fork can treat the copies differently.
        """
        return self.take(
            torch.arange(len(self.inputs)).repeat(integer("times", times, 1, MOST_COPIES))
        )

    def fork(
        self,
        step: int,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        until: int | None = None,
        **how: Any,
    ) -> Run:
        """Run again from `step` on, with hooks.

        Bitwise as a full run with these hooks, at (T − step)/T of its cost.

        Args:
            step: first step that is computed, from 0; negative ones count from the end.
            fwd_hooks: hooks of the fork, by full names.
            bwd_hooks: hooks of its gradients.
            until: the step to stop before, as in `HookedTextToImage.trajectory`.
            how: further arguments of `HookedTextToImage.run`.

        Raises:
            ValueError: there is no such step; a hook lies before it, on the text encoder, or beyond
                the last; or the denoiser's weights have changed since, so that the steps before
                would be another model's.
        """
        with self.model.hooks(fwd_hooks, bwd_hooks):
            (step,) = chosen_steps(integer("step", step), len(self), "step")
            until = None if until is None else integer("until", until, step + 1, len(self))
            self.check_fork(step, until)
            return self.model.run(self.inputs, self.record, step, until, **how)

    def check_fork(self, step: int, until: int | None = None) -> None:
        """Raise as `fork` if a fork from `step` on would miss a hook that is attached."""
        if not 0 <= step < len(self):
            raise ValueError(
                f"Cannot fork at step {step}: this trajectory has steps 0 to {len(self) - 1}."
            )
        if step > len(self.record):
            raise ValueError(
                f"Cannot fork at step {step}: this trajectory was stopped before step "
                f"{len(self.record)}."
            )
        until = len(self) if until is None else until
        if not step < until <= len(self):
            raise ValueError(
                f"until={until}: a fork from step {step} can stop before steps {step + 1} to "
                f"{len(self)}."
            )
        self.model.check_wrapped()
        if self.inputs.weights and stamp(self.model.dit) != self.inputs.weights:
            raise ValueError(
                "The denoiser's weights have changed since this trajectory was made: make it again."
            )
        self.model.check_hooks(self.inputs.extent, range(step, until))


Trajectory = Run
"""The name under which `hooked_models` exports it."""
