"""Checks of a family's declaration against the live model, made when it is hooked.

Names must fire once each, patterns must be those the model reads, and every position must be where
the family declares it. For the last, one image token (and one text token) of each row is changed,
while the attention kernels, which mix positions, return their recorded outputs: then queries, keys,
values and residual streams may change at that one position alone, in every block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint

from ..hooks.table import JOINT_POSITIONS, TEXT_POSITIONS
from ..pipelines.checks import TOLERANCE, random_pattern, rows_sum_to_one
from .adapter import FamilyModel, submodule
from .kernel_tap import native_backend
from .layout import Layout, LayoutError

PLACES = ("hook_q", "hook_k", "hook_v", "hook_resid_pre", "hook_resid_post")
"""Hook points at which a token's own position changes when its input does."""


@torch.no_grad()
def failures(model: FamilyModel) -> list[str]:
    """List the faults of a hooked model of a family, one sentence each."""
    inputs = model.family.inputs(model.wrapped)
    reference = first(model.wrapped(**inputs))
    if not bool(reference.isfinite().all()):
        return ["output is not finite even without hooks (a model in float16 may need bfloat16)"]
    tolerance = TOLERANCE[reference.dtype] * float(reference.abs().max())
    fired: Counter[str] = Counter()
    explicit: dict[str, Tensor] = {}

    def look(tensor: Tensor, hook: HookPoint) -> None:
        fired[str(hook.name)] += 1
        explicit[str(hook.name)] = tensor.clone()

    try:
        output = first(model.run_with_hooks(fwd_hooks=[(lambda name: True, look)], **inputs))
    except (LayoutError, RuntimeError, NotImplementedError) as error:
        return [str(error)]
    found = []
    if not (difference := float((output - reference).abs().max())) <= tolerance:
        found.append(
            f"output with hooks differs from the original's by {difference:.3g} (allowed: "
            f"{tolerance:.3g})"
        )
    if wrong := [f"{name} ({fired[name]} times)" for name in model.names(None) if fired[name] != 1]:
        found.append(f"names do not fire once each: {', '.join(wrong[:5])}")
    return found + _patterns(model, inputs, explicit, output) + misplaced(model, inputs)


def first(output: Any) -> Tensor:
    """The prediction of a call, stacked where it is a list of rows."""
    sample = output[0]
    return torch.stack(list(sample)) if isinstance(sample, (list, tuple)) else sample


def _patterns(
    model: FamilyModel, inputs: Mapping[str, Any], clean: Mapping[str, Tensor], output: Tensor
) -> list[str]:
    """Rows sum to one, and other patterns change z and the output."""
    by_kind: dict[str, list[str]] = {}
    for name in model.names(lambda name: name.endswith("hook_pattern")):
        by_kind.setdefault(name.split(".")[2], []).append(name)
        if not rows_sum_to_one(clean[name], or_zero=True):
            return [f"{name} has rows that do not sum to one"]

    found = []
    for kind, names in by_kind.items():
        z: dict[str, Tensor] = {}

        def look(tensor: Tensor, hook: HookPoint, z: dict[str, Tensor] = z) -> None:
            z[str(hook.name)] = tensor.clone()

        sites = [name.replace("hook_pattern", "hook_z") for name in names]
        hooks: list[Any] = [
            *((name, random_pattern) for name in names),
            *((site, look) for site in sites),
        ]
        edited = first(model.run_with_hooks(fwd_hooks=hooks, **inputs))
        if all(torch.equal(z[site], clean[site]) for site in sites) and any(
            bool(clean[site].any()) for site in sites
        ):
            found.append(f"{kind}.hook_z does not change when its pattern is edited")
        elif bool(output.any()) and torch.equal(
            edited, output
        ):  # an untrained output layer may be all zeros
            found.append(f"output does not change when the patterns of {kind} are edited")
    return found


# Positions


class _Pinned(TorchFunctionMode):
    """Records the outputs of attention kernels, in order, or returns the recorded ones."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.replay: Iterator[Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self.replay is not None:
            return next(self.replay)
        self.outputs.append(func(*args, **(kwargs or {})))
        return self.outputs[-1]


class _Pins:
    """Everything that mixes positions in a model.

    Attention kernels, and the modules that a family lists as `mixers`.
    """

    def __init__(self, model: FamilyModel) -> None:
        self.model, self.kernels = model, _Pinned()
        blocks = [
            block
            for where in model.family.blocks
            for block in model.wrapped.get_submodule(where.path)
        ]
        self.mixers = [
            module
            for block in blocks
            for path in model.family.mixers
            if (module := submodule(block, path)) is not None
        ]
        self.kept: dict[Any, Tensor] = {}

    @contextmanager
    def __call__(self, replay: bool) -> Iterator[None]:
        def pin(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return self.kept[module] if replay else self.kept.setdefault(module, output)

        self.kernels.replay = iter(self.kernels.outputs) if replay else None
        with ExitStack() as stack:
            for module in self.mixers:
                stack.callback(module.register_forward_hook(pin).remove)
            stack.enter_context(native_backend(list(self.model.wrapped.modules())))
            stack.enter_context(self.kernels)
            yield


def misplaced(model: FamilyModel, inputs: Mapping[str, Any]) -> list[str]:
    """Hook points at which a token shows elsewhere than declared.

    Tried on one image token and one text token of each row.
    """
    layout, pins = model.layout_of(**inputs), _Pins(model)
    names = model.names(lambda name: name.endswith(PLACES))

    def run(given: Mapping[str, Any], replay: bool) -> dict[str, Tensor]:
        with pins(replay):
            return model.run_with_cache(**given, names_filter=names, return_cache_object=False)[1]

    clean = run(inputs, replay=False)
    for stream, nudge in (("image", nudged_image), ("text", nudged_text)):
        given, tokens = nudge(model, layout, inputs)
        changed = run(given, replay=True)
        for name in names:
            for row, token in enumerate(tokens):
                moved = (
                    (changed[name][row] != clean[name][row])
                    .flatten(1)
                    .any(1)
                    .nonzero()
                    .flatten()
                    .tolist()
                )
                start, length = _span(model.axes(name)[1], layout, stream)
                expected = [start + token] if length else []
                spread = stream in model.family.spreads and {*expected} <= {*moved} <= {
                    *range(start, start + length)
                }
                if moved != expected and not spread:
                    return [
                        f"{name}: when {stream} token {token} of row {row} changes, positions "
                        f"{moved} change where the family declares {expected}"
                    ]
    return []


def _span(axis: str, layout: Layout, stream: str) -> tuple[int, int]:
    """First position and number of positions of the image or the text on an axis of positions."""
    if stream == "image":
        return 0, 0 if axis in TEXT_POSITIONS else layout.n_image
    joint = axis in JOINT_POSITIONS
    return layout.n_image if joint else 0, layout.text_mask.shape[
        1
    ] if joint or axis in TEXT_POSITIONS else 0


def nudged_image(
    model: FamilyModel, layout: Layout, inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Inputs with one image token changed in each row, and which."""
    family, live = model.family, model.wrapped
    name, given = family.image, family.by_row(live, inputs)
    rows = [row.clone() for row in given[name]]
    tokens = [(1 + row) % layout.n_image for row in range(len(rows))]
    for x, token in zip(rows, tokens, strict=True):
        patch = _image_token(model, layout, x, token)
        patch += 1 + torch.rand(patch.shape, generator=torch.Generator().manual_seed(2)).to(patch)
    return family.as_called(live, {**given, name: _as_given(rows, given[name])}), tokens


def nudged_text(
    model: FamilyModel, layout: Layout, inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[int]]:
    """Inputs with the last token of the (first) text changed in each row, and which."""
    family, live = model.family, model.wrapped
    name, given = family.text, family.by_row(live, inputs)
    rows = [row.clone() for row in given[name]]
    tokens = [int(layout.text_mask[row, : len(x)].nonzero().max()) for row, x in enumerate(rows)]
    for x, token in zip(rows, tokens, strict=True):
        x[token] += 1 + torch.rand(x[0].shape, generator=torch.Generator().manual_seed(2)).to(x)
    return family.as_called(live, {**given, name: _as_given(rows, given[name])}), tokens


def _as_given(rows: list[Tensor], like: Any) -> Any:
    return rows if isinstance(like, list) else torch.stack(rows)


def _image_token(model: FamilyModel, layout: Layout, x: Tensor, token: int) -> Tensor:
    """View of one image token in a row of latents: a position, or a patch of pixels."""
    axes = model.family.axes or {2: "nc", 3: "chw", 4: "cfhw"}[x.ndim]
    if axes == "nc":
        return x[token]
    rows, columns, frames = layout.grid
    place = {
        "f": (token // (rows * columns), frames),
        "h": (token // columns % rows, rows),
        "w": (token % columns, columns),
    }
    index: list[slice] = []
    for axis, size in zip(axes, x.shape, strict=True):
        at, n = place.get(axis, (0, 1))
        index.append(slice(at * size // n, (at + 1) * size // n))
    return x[tuple(index)]
