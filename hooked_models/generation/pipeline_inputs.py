"""Everything that a run of a diffusers pipeline is computed from.

`Bound` holds the arguments of one call of its transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..families.adapter import FamilyModel
from ..hooks.layout import Layout
from ..hooks.wrapping import Stamp
from ..store import digest
from .attached import Extent
from .loops import Call, rows_of
from .names import Branch


@dataclass(frozen=True)
class Bound:
    """The arguments of one call of a transformer, apart from its latents."""

    arguments: Mapping[str, Any]
    rows: int
    image: str = "hidden_states"
    """Argument that holds the latents."""
    listed: bool = False
    """True if latents come and go as a list of rows."""
    as_called: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Makes of these arguments, in which rows are every first axis, those that the transformer
    takes.
    """

    before: int = 0
    """Positions before the image's in the latents and predictions of the transformer itself."""
    second: bool = False
    """True for a call of the transformer that computes the unconditional branch alone."""

    def take(self, index: Int[Tensor, " row"]) -> Bound:
        """Those of some rows."""
        some = {key: rows_of(value, index, self.rows) for key, value in self.arguments.items()}
        return replace(self, arguments=some, rows=len(index))

    def given(self, latents: Tensor) -> dict[str, Any]:
        """All arguments as the transformer takes them, latents included."""
        latents_ = list(latents) if self.listed else latents
        return self.as_called({self.image: latents_, **self.arguments})

    def call(self, module: Any, latents: Tensor) -> Tensor:
        """The prediction of `module`, its rows stacked."""
        module = (getattr(module, "second", None) or module) if self.second else module
        found = module(**self.given(latents))[0]  # some give no tuple for return_dict=False
        found = torch.stack(list(found)) if isinstance(found, (list, tuple)) else found
        return found[:, self.before :] if self.before else found

    def opened(self, text: str) -> Bound:
        """With the text as the beginning of a graph of its own."""

        def open_(value: Any) -> Any:
            if isinstance(value, list):
                return [open_(one) for one in value]
            closed = (
                isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
            )
            return value.detach().requires_grad_() if closed else value

        return replace(
            self, arguments={k: open_(v) if k == text else v for k, v in self.arguments.items()}
        )

    def expanded(self) -> Bound:
        """One row of text for each row of latents, where a pipeline relies on broadcasting."""

        def row_each(key: str, value: Any) -> Any:
            one = (
                isinstance(value, Tensor)
                and value.ndim > 1
                and len(value) == 1
                and key.startswith("encoder_hidden_states")
            )
            return value.expand(self.rows, *value.shape[1:]) if one else value

        return replace(
            self, arguments={key: row_each(key, value) for key, value in self.arguments.items()}
        )


@dataclass(frozen=True)
class PipelineInputs:
    """Everything that a pipeline's generation is computed from.

    The counterpart of `trajectory.Inputs`.
    """

    pipe: Any = field(repr=False)
    dit: FamilyModel = field(repr=False)
    prompts: tuple[str, ...]
    options: Mapping[str, Any]
    """Further arguments of the pipeline's call."""
    seeds: tuple[int, ...]
    latents: Tensor | None
    """The pipeline's own argument; None: drawn from each row's generator."""
    encoded: tuple[Any, ...] = ()
    """Results of `encode_prompt`, call by call."""
    drawn: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Further arguments of the pipeline's call, drawn for each row from its seed."""
    solver: Any = field(default=None, repr=False)
    """A `Solver`; None before the draft."""
    calls: tuple[Call, ...] = ()
    """Denoiser calls of the run, in order."""
    branches: tuple[Branch, ...] = ("cond",)
    """In the order of the first step's rows or calls."""
    uncond: frozenset[int] = frozenset()
    """Steps with an unconditional branch."""
    guidance: float = 1.0
    """The pipeline's main argument that guides."""
    layouts: Mapping[Branch, Layout] = field(default_factory=dict, repr=False)
    """Positions of each branch's rows."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Shapes of the tensors between calls, by hook; "cond.hook_text" is a branch's text."""
    weights: Stamp = ()

    def __len__(self) -> int:
        """Rows."""
        return len(self.prompts)

    @property
    def guided(self) -> bool:
        """True if some step has an unconditional branch."""
        return bool(self.uncond)

    @property
    def extent(self) -> Extent:
        """Tensors that a run computes."""
        return Extent(self.solver, self.uncond)

    def rows(self, branch: Branch) -> slice:
        """The rows of a branch in the first call that has it."""
        return slice(0, len(self))

    def bias(self, attention: str, branch: Branch, scores: Any) -> Tensor | None:
        """As in `trajectory.Inputs`.

        The bias that the kernel of the running call adds, in the branch's rows.
        """
        found = scores.bias()
        if found is None or len(found) <= len(self):
            return found
        start = self.branches.index(branch) * len(self)
        return found[start : start + len(self)]

    def same_noise(self, other: PipelineInputs) -> bool:
        """As in `trajectory.Inputs`."""
        given = [each.latents for each in (self, other)]
        equal = given[0] is given[1] or (None not in given and torch.equal(given[0], given[1]))  # type: ignore[arg-type]
        return self.seeds == other.seeds and equal

    @property
    def settings(self) -> dict[str, Any]:
        """As in `trajectory.Inputs`."""
        return {
            "text": digest(*self.prompts, *tensors_of(self.encoded)),
            "noise": digest("" if self.latents is None else self.latents),
            "seeds": list(self.seeds),
            "options": digest(str(sorted(self.options.items(), key=str))),
            "guidance": self.guidance,
        }

    @property
    def num_steps(self) -> int:
        """As requested of the pipeline."""
        return int(self.options["num_inference_steps"])

    def take(self, rows: Int[Tensor, " row"]) -> PipelineInputs:
        """The inputs of some rows; rows may repeat."""
        some, of = rows.tolist(), len(self)
        encoded = tuple(
            tuple(rows_of(part, rows, of) for part in one)
            if isinstance(one, tuple)
            else rows_of(one, rows, of)
            for one in self.encoded
        )
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in some),
            options={key: rows_of(value, rows, of) for key, value in self.options.items()},
            drawn=rows_of(dict(self.drawn), rows, of),
            seeds=tuple(self.seeds[row] for row in some),
            latents=None if self.latents is None else self.latents[rows.to(self.latents.device)],
            encoded=encoded,
            calls=tuple(replace(call, rows=len(some)) for call in self.calls),
            layouts={branch: layout.take(rows) for branch, layout in self.layouts.items()},
            shapes={name: (len(some), *shape[1:]) for name, shape in self.shapes.items()},
        )


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_of(one)
