"""Metrics of a sweep: functions of one of the tensors between denoiser calls, or of the image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models.arguments import shown
from hooked_models.generation.attached import Extent
from hooked_models.generation.names import IMAGE_HOOK
from hooked_models.lazy_imports import renamed_arguments

from ..readout.screening import ramp
from ..task import DIRECTIONS, Scene, evaluate

Values = Tensor | np.ndarray | Mapping[str, Any]
"""One number for each row [batch], or several by name."""

FIRST_TOUCHED = -1
"""Stands for the first step that an intervention touches."""
ALIASES = {
    "image": IMAGE_HOOK,
    "latent": "latent",
    "x0": "hook_x0",
    "out": "hook_out",
    "eps": "eps",
}
BETWEEN = ("hook_latent", "hook_x0", "hook_out", "hook_out_cond", "hook_out_uncond", "eps")


class Read(NamedTuple):
    """Tensor that a metric is computed from."""

    inner: str
    """`hook_image`, `latent` (after the last step), or one of `BETWEEN`."""
    step: int | None = None
    """`FIRST_TOUCHED`, or a denoising step; None for tensors after the last."""

    def at(self, own: int) -> Read:
        """The same with the step in place of `FIRST_TOUCHED`."""
        return Read(self.inner, own) if self.step == FIRST_TOUCHED else self

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks between calls that it is made of."""
        return ("hook_latent", "hook_x0") if self.inner == "eps" else (self.inner,)


@dataclass(frozen=True)
class Metric:
    """Number, or several by name, for each row of a tensor.

    Args:
        function: tensor [batch …] → [batch], or several such by name. It is given the rows of many
            cells at once.
        on: the tensor. "image" [batch 3 height width] in [0, 1]; "latent", the final one; "x0",
            "out" (guided) or "eps" of the first step that an intervention touches: its one-step
            effect, for which nothing after that step is run; or one of a step that is named, as
            "steps.5.hook_x0" (`hook_latent`, `hook_out`, `hook_out_cond`, `hook_out_uncond`,
            `eps`).
        given: further keyword arguments of the function: `baseline`, the same tensor without
            intervention [batch …], and `prompt`, the index of each row's prompt, an integer array
            [batch].

    Example:
        >>> moved = Metric(
        ...     lambda x0, baseline: (x0 - baseline).flatten(1).norm(dim=1),
        ...     on="x0",
        ...     given=["baseline"],
        ... )
        >>> moved(torch.ones(1, 4), torch.zeros(1, 4), np.array([0]))
        {'': array([2.])}
    """

    function: Callable[..., Values]
    on: str = "image"
    given: Sequence[Literal["baseline", "prompt"]] = ()

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"The metric {shown(self.function)} is no function: give one of images [batch 3 "
                "height width]."
            )

    def __call__(
        self,
        tensor: Float[Tensor, "batch ..."],
        baseline: Float[Tensor, "batch ..."],
        prompt: Int[np.ndarray, " batch"],
    ) -> dict[str, Float[np.ndarray, " batch"]]:
        """Values by name ("" for a single one), in float64.

        Raises:
            ValueError: they are not one number for each row. Whatever the function raises.
        """
        offered: dict[str, Any] = {"baseline": baseline, "prompt": prompt}
        found = self.function(tensor, **{name: offered[name] for name in self.given})
        named = found if isinstance(found, Mapping) else {"": found}
        values = {str(name): _array(value) for name, value in named.items()}
        for value in values.values():
            if value.shape != (len(tensor),):
                raise ValueError(
                    f"the metric gave shape {value.shape} for {len(tensor)} rows: return one "
                    "number for each row, [batch]."
                )
        return values

    def read(self, extent: Extent) -> Read:
        """Tensor of the metric in runs of an extent.

        Raises ValueError if they have no such tensor.
        """
        step, inner = None, ALIASES.get(self.on)
        if inner is not None:
            step = None if inner in (IMAGE_HOOK, "latent") else FIRST_TOUCHED
        elif (found := re.fullmatch(r"steps\.(\d+)\.(\w+)", self.on)) and found[2] in BETWEEN:
            step, inner = int(found[1]), found[2]
            if step >= (steps := len(extent.solver)):
                raise ValueError(
                    f"{self.on} does not exist: this sweep goes over steps 0 to {steps - 1}."
                )
        else:
            raise ValueError(
                f"A metric cannot be taken on {self.on!r}: choose {', '.join(ALIASES)}, or "
                f"'steps.0.' with {', '.join(BETWEEN)}."
            )
        if inner in ("hook_x0", "eps") and not extent.solver.forms_x0:
            raise ValueError(
                f"{extent.solver.name} forms no clean-image prediction: take a metric on 'out' "
                "instead."
            )
        if inner == "hook_out_uncond" and step not in extent.uncond:
            raise ValueError(
                f"{self.on} does not exist: there is no unconditional branch at this step, with "
                "this guidance."
            )
        return Read(inner, step)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float64 if not value.is_complex() else None).numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"the metric gave {shown(value)}: return one number for each row, [batch]."
        ) from None


@renamed_arguments(wanted="scenes")
def scene_metric(
    scenes: Sequence[Scene],
    verdicts: Sequence[str] = (
        "color",
        "shape",
        "unique_binding",
        "relation_loose",
        "relation_strict",
    ),
) -> Metric:
    """Verdicts of `scenes.evaluate` as a metric of several values.

    Args:
        scenes: scenes of the prompts, in order.
        verdicts: variables of `scenes.evaluate`.

    Example:
        >>> drawn = scenes.sample(2, seed=0)
        >>> metric = scene_metric(drawn, ["shape"])
        >>> metric.function(scenes.render(drawn), np.arange(2))
        {'shape': array([1., 1.])}
    """

    def judge(images: Tensor, prompt: np.ndarray) -> dict[str, np.ndarray]:
        found = evaluate(images, [scenes[row] for row in prompt])
        return {verdict: found[verdict].values.astype(float) for verdict in verdicts}

    return Metric(judge, given=("prompt",))


@renamed_arguments(wanted="scenes")
def relation_metric(scenes: Sequence[Scene]) -> Metric:
    """Offset of the first object from the second along their relation.

    A smooth function of the image. The mean of (its color's channel − the other's) · a plane that
    rises along the relation: differentiable, unlike verdicts, so that it can be attributed.
    `scenes` as in `scene_metric`.

    Example:
        >>> drawn = scenes.sample(2, seed=0)
        >>> bool((relation_metric(drawn).function(scenes.render(drawn), np.arange(2)) > 0).all())
        True
    """

    def offset(images: Tensor, prompt: np.ndarray) -> Tensor:
        planes = torch.stack(
            [ramp(DIRECTIONS[scenes[row].relation], images.shape[-1]) for row in prompt]
        )
        red = torch.tensor([1.0 if scenes[row].color1 == "red" else -1.0 for row in prompt]).to(
            images
        )
        return red * ((images[:, 0] - images[:, 2]).flatten(1) * planes.to(images)).mean(dim=1)

    return Metric(offset, given=("prompt",))


def displacement(
    tensor: Float[Tensor, "batch ..."], baseline: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """Relative distance of a tensor from its baseline, ‖tensor − baseline‖ / ‖baseline‖.

    `Metric(displacement, on="eps", given=("baseline",))` is an intervention's one-step effect on
    the predicted noise.

    Example:
        >>> displacement(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]])).tolist()
        [0.5]
    """
    return (tensor - baseline).flatten(1).norm(dim=1) / baseline.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class ShareOf:
    """Share of a whole change that an intervention causes.

    Its own change is projected on the whole, in units of the whole. `Metric(ShareOf(corrupt -
    clean), on="x0", given=("baseline", "prompt"))`; each prompt has its own whole change.

    Example:
        >>> share = ShareOf(torch.tensor([[2.0, 0.0]]))
        >>> share(torch.tensor([[1.5, 1.0]]), torch.tensor([[1.0, 0.0]]), np.array([0])).tolist()
        [0.25]
    """

    whole: Float[Tensor, "prompt ..."]

    def __call__(
        self,
        tensor: Float[Tensor, "batch ..."],
        baseline: Float[Tensor, "batch ..."],
        prompt: Int[np.ndarray, " batch"],
    ) -> Float[Tensor, " batch"]:
        """⟨tensor − baseline, whole⟩ / ‖whole‖² of each row."""
        whole = self.whole[torch.as_tensor(prompt, device=self.whole.device)].flatten(1)
        return ((tensor - baseline).flatten(1) * whole).sum(1) / whole.square().sum(1)
