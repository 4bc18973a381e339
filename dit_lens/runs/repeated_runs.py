"""A denoiser call and a whole generation, run on several copies of their batch at once.

Hooks can so pass values between the copies. Rows are copies of the batch, one after the other:
[copy · batch, …].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import Trajectory
from hooked_models.families.views import FamilyView
from hooked_models.generation.names import BRANCHES, IMAGE_HOOK, Branch
from hooked_models.hooks.module import HookFunction
from hooked_models.pixart.views import DenoiserView

from ..graph.nodes import Place
from ..text.prompts import Role, Tokens, as_choice, position_mask, roles_of, token_mask

Hooks = Sequence[tuple[str, HookFunction]]
CallView = DenoiserView | FamilyView
"""Denoiser calls that can be run in copies, and differentiated."""

STEPS = "num_inference_steps"
NO_WORDS = "A denoiser call does not know its words: give token positions, such as 'text[4,5]'."
MASKED = -10000.0
"""Bias of a text position that is not attended to."""
OUTPUT = "output"
"""Key of a denoiser call's output; no hook's name."""


@dataclass(frozen=True)
class RepeatedCall:
    """One denoiser call, `dit.bind(…)[0]`."""

    view: CallView
    num_steps = 1
    result = OUTPUT
    """Tensor that a metric is taken on by default."""

    def __len__(self) -> int:
        return len(self.view.table)

    @property
    def dit(self) -> Any:
        """The denoiser."""
        return self.view.dit

    @property
    def branches(self) -> tuple[Branch, ...]:
        """One call has one branch."""
        return ("cond",)

    @property
    def conditions(self) -> dict[str, Tensor | None]:
        """Inputs of gates: where two runs have the same, a head's z is the same contribution."""
        return self.view.conditions

    def step_of(self, name: str) -> int:
        """The last step that the tensor `name` depends on."""
        return 0

    def name(self, place: Place, inner: str) -> str:
        """The full name of a denoiser's hook."""
        return hook_in(self.dit, inner)

    def text_bias(self, branch: Branch) -> Float[Tensor, "batch text_pos"]:
        """Bias of the scores: 0 where the text may be attended to."""
        return _bias(self.view.text_mask)

    def tokens(self, chosen: Tokens, length: int) -> Bool[Tensor, "batch text_pos"]:
        """Mask of the text positions that are chosen.

        Raises:
            ValueError: words or roles are named, which a denoiser call does not know.
        """
        mask = position_mask(as_choice(chosen), len(self), length, "the text")
        if mask is None:
            raise ValueError(NO_WORDS)
        return mask

    def roles(self) -> list[list[Role]]:
        """The role of every token of every row."""
        raise ValueError(NO_WORDS)

    def run(
        self, read: Collection[str], hooks: Hooks = (), copies: int = 1, first: int | None = None
    ) -> dict[str, Tensor]:
        """The tensors called `read`, of a run with hooks from step `first` on."""
        kept, keep = _keepers(name for name in read if name != OUTPUT)
        return {
            OUTPUT: self.view.run_with_hooks(
                self.view.to_tokens().repeat(copies, 1), [*hooks, *keep]
            ),
            **kept,
        }


@dataclass(frozen=True)
class RepeatedRun:
    """A whole generation, with the same members as `RepeatedCall`."""

    trajectory: Trajectory
    result = IMAGE_HOOK

    def __len__(self) -> int:
        return len(self.trajectory.inputs)

    @property
    def dit(self) -> Any:
        """The denoiser."""
        return self.trajectory.model.dit

    @property
    def num_steps(self) -> int:
        """Denoiser evaluations of the run."""
        return len(self.trajectory)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Guidance branches of the run."""
        return BRANCHES if self.trajectory.inputs.guided else ("cond",)

    @property
    def conditions(self) -> dict[str, Tensor | None]:
        """As in `RepeatedCall`: timesteps, and if there is guidance."""
        inputs = self.trajectory.inputs
        return {
            "timesteps": inputs.solver.scheduler.timesteps,
            "guided": torch.tensor(inputs.guided),
        }

    def step_of(self, name: str) -> int:
        """As in `RepeatedCall`.

        Raises:
            ValueError: the tensor is computed before the first step.
        """
        step = (
            self.num_steps - 1
            if name == IMAGE_HOOK
            else self.trajectory.model.names.site(name).step
        )
        if step is None:
            raise ValueError(
                f"{name} is computed before the first step: no path in the denoiser leads to it."
            )
        return step

    def name(self, place: Place, inner: str) -> str:
        """As in `RepeatedCall`: with step and branch."""
        return f"steps.{place.step}.{place.branch}.{hook_in(self.dit, inner)}"

    def text_bias(self, branch: Branch) -> Float[Tensor, "batch text_pos"]:
        """As in `RepeatedCall`, in one branch."""
        inputs: Any = self.trajectory.inputs
        if hasattr(inputs, "layouts"):
            return _bias(inputs.layouts[branch].text_mask)
        text = inputs.text
        bias = text.text.new_zeros(text.text.shape[:2]) if text.bias is None else text.bias[:, 0]
        return bias[inputs.rows(branch)]

    @property
    def texts(self) -> list[str]:
        """The prompts."""
        inputs: Any = self.trajectory.inputs
        if hasattr(inputs, "prompts"):
            return list(inputs.prompts)
        return self.trajectory.model.tokenizer.batch_decode(inputs.tokens, skip_special_tokens=True)

    def tokens(self, chosen: Tokens, length: int) -> Bool[Tensor, "batch text_pos"]:
        """As in `RepeatedCall`, words and roles included.

        Raises:
            ValueError: a prompt has none of the tokens, or token ids are not those of their text.
        """
        mask = position_mask(as_choice(chosen), len(self), length, "the text")
        if mask is not None:
            return mask
        self._check_tokens()
        given = getattr(self.trajectory.inputs, "options", {})
        options = {name: value for name, value in given.items() if name != STEPS}
        return token_mask(self.trajectory.model, self.texts, chosen, length=length, **options)

    def roles(self) -> list[list[Role]]:
        """The role of every token of every row."""
        self._check_tokens()
        model: Any = self.trajectory.model
        length = getattr(self.trajectory.inputs, "tokens", torch.empty(0, 0)).shape[1]
        return roles_of(model.encoded_texts(self.texts, length or None))

    def _check_tokens(self) -> None:
        """Raise ValueError if token ids that the run was given are not those of their text."""
        model = self.trajectory.model
        for row in getattr(self.trajectory.inputs, "tokens", ()):
            text = model.tokenizer.decode(row, skip_special_tokens=True)
            if not torch.equal(model.to_tokens(text, length=len(row))[0], row):
                raise ValueError(
                    f"The tokens of {text!r} are not those of its text: give token positions, such "
                    "as 'text[4,5]'."
                )

    def run(
        self, read: Collection[str], hooks: Hooks = (), copies: int = 1, first: int | None = None
    ) -> dict[str, Tensor]:
        """As in `RepeatedCall`; steps before `first` are taken from the record."""
        inner = [name for name in read if name != IMAGE_HOOK]
        steps = [self.step_of(name) for name in inner]
        until = self.num_steps if IMAGE_HOOK in read else max(steps) + 1
        first = min(steps, default=until) if first is None else first
        kept, keep = _keepers(inner)
        trajectory = self.trajectory if copies == 1 else self.trajectory.repeat(copies)
        if first < until:
            trajectory = trajectory.fork(first, [*hooks, *keep], until=until)
        return {**kept, IMAGE_HOOK: trajectory.images} if IMAGE_HOOK in read else kept


def hook_in(dit: Any, inner: str) -> str:
    """The hook of a denoiser that a path starts or ends at, or its neighbour before the gate.

    Raises:
        ValueError: the denoiser's family has neither.
    """
    if inner not in dit.mod_dict and f"{inner}_pre_gate" in dit.mod_dict:
        return f"{inner}_pre_gate"  # the gate is the same in all copies
    if inner not in dit.mod_dict and hasattr(dit, "family"):
        raise ValueError(
            f"{dit.family.name} has no {inner} to patch: of such a model, heads and MLPs send; "
            "heads' q, k and v, the output and the image receive."
        )
    return inner


def _bias(mask: Bool[Tensor, "batch text_pos"]) -> Float[Tensor, "batch text_pos"]:
    return mask.logical_not().float() * MASKED


def _keepers(names: Iterable[str]) -> tuple[dict[str, Tensor], Hooks]:
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint, name: str) -> None:
        kept[name] = tensor.clone()

    return kept, [(name, partial(keep, name=name)) for name in names]
