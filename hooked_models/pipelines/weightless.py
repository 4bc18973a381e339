"""Pipelines without weights: their own code runs, with text encoders that return zeros."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def has_weights_on(module: nn.Module) -> bool:
    """Return False for a module on the meta device.

    Example:
        >>> has_weights_on(nn.Linear(1, 1)), has_weights_on(nn.Linear(1, 1, device="meta"))
        (True, False)
    """
    return all(parameter.device.type != "meta" for parameter in module.parameters())


def weightless(pipe: Any, layerwise: Any = None) -> Any:
    """A copy of a pipeline on the meta device that computes no text.

    It goes through its loop on the CPU. The pipeline itself stays as it is.

    Args:
        pipe: any pipeline whose modules are on the meta device.
        layerwise: embedding and layers of a text encoder whose layers the pipeline runs one by one,
            from the encoder; None where it calls the encoder.
    """
    found = copy.copy(pipe)
    found.__class__ = _on_cpu(type(pipe), _execution_device=property(lambda self: CPU))
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            vars(found)[name] = (
                _passing_zeros(part, layerwise) if layerwise else _returning_zeros(part)
            )
        elif name == "vae":  # a pipeline may read statistics of latents from there
            vars(found)[name] = _with_buffers(part)
    return found


def _with_buffers(part: nn.Module) -> Any:
    """A copy whose buffers are zeros on the CPU."""
    found = copy.deepcopy(part)
    for module in found.modules():
        module._buffers.update(
            {key: moved(buffer, "cpu") for key, buffer in module._buffers.items()}
        )
    return found


def _passing_zeros(encoder: nn.Module, layerwise: Any) -> nn.Module:
    """The encoder with an embedding of zeros, which its layers pass on."""
    found = _with_buffers(encoder)
    found.__class__ = _on_cpu(type(encoder))
    embedding, layers = layerwise(found)
    shape, dtype = (embedding.embedding_dim,), embedding.weight.dtype
    vars(embedding)["forward"] = lambda ids: torch.zeros(*ids.shape, *shape, dtype=dtype)
    for layer in layers:
        vars(layer)["forward"] = lambda x, **how: x
    return found


def _returning_zeros(encoder: Any) -> nn.Module:
    """The encoder goes once through its layers for arguments of the same shapes."""
    kind, made = type(encoder), dict[str, Any]()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.pop("input_ids", None) if not args else args[0]
        masked = kwargs.pop("attention_mask", None) is not None or len(args) > 1
        if masked:  # with one that is whole, no kernel is chosen by its values
            kwargs["attention_mask"] = torch.zeros(
                len(ids), 1, ids.shape[1], ids.shape[1], dtype=encoder.dtype
            )
        ids, kwargs = moved(ids, "meta"), moved(kwargs, "meta")
        shapes = repr((ids, kwargs))  # a meta tensor shows its shape and dtype
        if shapes not in made:
            made[shapes] = kind.forward(encoder, ids, **kwargs)
        return moved(made[shapes], "cpu")

    found = copy.copy(encoder)
    found.__class__ = _on_cpu(kind, forward=forward)
    vars(found).pop("forward", None)  # of a library that wraps it on the instance
    return found


def _on_cpu(kind: Any, **more: Any) -> Any:
    return type(
        kind.__name__,
        (kind,),
        {"device": property(lambda self: CPU), "__module__": kind.__module__, **more},
    )


def moved(value: Any, device: str) -> Any:
    """Tensors on a device; those that come from the meta device are zeros.

    Example:
        >>> moved((torch.ones(2, device="meta"), 3), "cpu")
        (tensor([0., 0.]), 3)
    """
    if isinstance(value, Tensor):
        return (
            torch.zeros(value.shape, dtype=value.dtype)
            if value.is_meta and device == "cpu"
            else value.to(device)
        )
    if isinstance(value, (tuple, list)):
        return type(value)(moved(one, device) for one in value)
    if isinstance(value, Mapping):
        new = copy.copy(value)
        for key in value:
            new[key] = moved(value[key], device)  # type: ignore[index]
        return new
    return value
