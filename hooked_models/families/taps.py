"""The ways from a running module to a hook point and back.

An attention kernel, a module's inputs, a module's outputs. A tap exists for the time of one call,
in which its hook point has a hook; a model whose points nobody watches runs as it is.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from ..hooks.layout import Layout
from ..hooks.module import has_hooks
from ..hooks.streams import Axes, batch_first, joined, parted
from ..lazy_imports import renamed

__getattr__ = renamed(
    __name__,
    {
        "FamilyHeads": "hooked_models.families.kernel_tap:FamilyHeads",
        "HEAD_POINTS": "hooked_models.families.kernel_tap:HEAD_POINTS",
        "KernelTap": "hooked_models.families.kernel_tap:KernelTap",
        "native_backend": "hooked_models.families.kernel_tap:native_backend",
    },
)


class SilentHookError(RuntimeError):
    """A hook point that has a hook did not fire in a call that should have reached it."""


@runtime_checkable
class Tap(Protocol):
    """Something that a call passes through."""

    layer: int

    def has_hooks(self) -> bool:
        """Return True if a hook could see or change the tensor."""

    def sides(self, point: HookPoint) -> tuple[set[str], set[str]] | None:
        """Streams of a point's (query) positions and of its key positions.

        The result is None for a point of another tap.
        """

    def attach(self, layout: Layout) -> list[RemovableHandle]:
        """Hook the modules for the time of one call."""

    def silent(self) -> list[str]:
        """Names of hooked points that have not fired since `attach`."""


@dataclass
class StreamTap:
    """A hook point on tensors [batch pos d_model] that enter or leave a module.

    Several streams are joined in the order in which they are given (the image's first), then
    ordered [image, text].
    """

    module: nn.Module
    point: HookPoint
    layer: int
    streams: tuple[str, ...]
    """Stream of each tensor."""
    arguments: tuple[str, ...] = ()
    """Names of the inputs, one for each stream; none: the outputs."""
    call: int = 0
    """Which call of the module in one block, where it is called more than once."""
    axes: Axes = "batch pos d"
    keeps_text: bool = True
    """False for an output whose text is None."""
    fired: bool = False
    calls: int = 0
    parameters: tuple[str, ...] = field(default=(), init=False)

    def has_hooks(self) -> bool:
        """As in `Tap`."""
        return has_hooks(self.point)

    def sides(self, point: HookPoint) -> tuple[set[str], set[str]] | None:
        """As in `Tap`."""
        streams = {stream for stream in self.streams if self.keeps_text or stream != "text"}
        return (streams, streams) if point is self.point else None

    def attach(self, layout: Layout) -> list[RemovableHandle]:
        """As in `Tap`."""
        self.fired, self.calls = False, 0

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._inputs(layout, args, kwargs)

        def after(module: nn.Module, inputs: Any, output: Any) -> Any:
            self.calls += 1
            return self._outputs(layout, output) if self.calls == self.call + 1 else None

        if self.arguments:
            return [self.module.register_forward_pre_hook(here(before), with_kwargs=True)]
        return [self.module.register_forward_hook(here(after))]

    def silent(self) -> list[str]:
        """As in `Tap`."""
        return [] if self.fired else [str(self.point.name)]

    def _inputs(
        self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.parameters = (
            self.parameters or tuple(inspect.signature(type(self.module).forward).parameters)[1:]
        )
        names = {name: index for index, name in enumerate(self.parameters)}
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        new = dict(
            zip(
                self.arguments,
                self._through(layout, [given[name] for name in self.arguments]),
                strict=True,
            )
        )
        positional = list(args)
        for name in [name for name in new if name not in kwargs]:
            positional[names[name]] = new.pop(name)
        return tuple(positional), kwargs | new

    def _outputs(self, layout: Layout, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._through(layout, [output])[0]
        n = len(self.streams)
        return (*self._through(layout, list(output[:n])), *output[n:])

    def _through(self, layout: Layout, tensors: list[Tensor | None]) -> list[Tensor | None]:
        self.fired = True
        present = [i for i, x in enumerate(tensors) if x is not None]
        places = sorted(present, key=lambda i: self.streams[i])  # image before text
        streams = tuple(self.streams[i] for i in places)
        given: list[Any] = [tensors[i] for i in places]
        for stream, x in zip(streams, given, strict=True):
            found = batch_first(x, self.axes).shape[1]
            layout.check(str(self.point.name), found, (stream,))
        there, back = layout.order(streams)
        whole = same_shape(self.point, joined(given, self.axes, there))
        new = list(tensors)
        for i, part in zip(places, parted(whole, given, self.axes, back), strict=True):
            new[i] = part
        return new


def same_shape(point: HookPoint, x: Tensor) -> Tensor:
    """Output of a hook point for a tensor.

    Raises:
        ValueError: a hook returns a tensor of another shape.
    """
    y = point(x)
    if y.shape != x.shape:
        raise ValueError(
            f"A hook on {point.name} returned shape {tuple(y.shape)}; it must be {tuple(x.shape)}."
        )
    return y


def here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A torch hook that acts in the thread that made it.

    Another thread may be in a call of the same module.
    """
    thread = threading.get_ident()

    def only_here(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return only_here
