"""A check that a wrapped module still is the one that was wrapped.

Later replacements and additions would be ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

STANDARD_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
Stamp = tuple[tuple[int, int], ...]
"""Identity and version of every tensor of a module."""


def stamp(module: nn.Module) -> Stamp:
    """A mark that changes when a parameter or buffer is replaced or written to.

    Writes through `.data` are not seen.
    """
    return tuple(
        (id(tensor), tensor._version)
        for part in module.modules()
        for tensor in (*part._parameters.values(), *part._buffers.values())
        if tensor is not None
    )


def is_foreign(hook: Callable[..., Any]) -> bool:
    """True for a torch hook that may change something.

    Transformers leaves its own, which record hidden states, in place.
    """
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")


def has_foreign_hooks(module: nn.Module) -> bool:
    """True if one of a module's forward hooks or pre-hooks is foreign."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(map(is_foreign, hooks))


class Wrapped:
    """The submodules of a wrapped module when it was wrapped.

    Also those of them that the hooked module never calls.

    Args:
        module: the wrapped module.
        hooked: the module around it, made of some of its submodules.
    """

    def __init__(self, module: nn.Module, hooked: nn.Module) -> None:
        self.module = module
        self.children = [
            (f"{path}.{name}".lstrip("."), parent, name, child)
            for path, parent in module.named_modules()
            for name, child in parent._modules.items()
        ]
        called = set(map(id, hooked.modules()))
        self.bypassed = [
            (path, part) for path, part in module.named_modules() if id(part) not in called
        ]

    def check(self) -> None:
        """Raise ValueError for a part replaced, hooked or given another attention processor.

        Example:
            >>> from torch import nn
            >>> inner = nn.Sequential(nn.Linear(2, 2))
            >>> wrapped = Wrapped(inner, nn.ModuleList(inner))
            >>> wrapped.check()
            >>> inner[0] = nn.Linear(2, 2)
            >>> wrapped.check()
            Traceback (most recent call last):
            ...
            ValueError: 0 of the wrapped Sequential was replaced after wrapping, and ...
        """
        kind = type(self.module).__name__
        for path, parent, name, child in self.children:
            if parent._modules.get(name) is not child:
                raise ValueError(
                    f"{path} of the wrapped {kind} was replaced after wrapping, and the hooked "
                    "model would ignore it: wrap it again."
                )
        for path, part in self.bypassed:
            own = vars(part)
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
            if (hooked and has_foreign_hooks(part)) or (
                "forward" in own and part is not self.module
            ):
                raise ValueError(
                    f"{path or kind} of the wrapped {kind} has a torch hook or a forward of its "
                    "own, and the hooked model would "
                    "ignore it: attach hooks by name to the hooked model."
                )
            processor = own.get("processor") or own["_modules"].get("processor")
            if processor is not None and type(processor).__name__ not in STANDARD_PROCESSORS:
                raise ValueError(
                    f"{path} of the wrapped {kind} has the attention processor "
                    f"{type(processor).__name__}, and the hooked model "
                    "would ignore it: set_default_attn_processor() first."
                )
