"""A pipeline folder as a live pipeline.

T5 was trained in bfloat16 and overflows in float16, where it is therefore never put; nor is an
autoencoder whose configuration has `force_upcast`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from ..lazy_imports import renamed
from .folder import has_weights, inspect_folder, own_variant
from .hub import Source
from .quiet import quiet_loading

__getattr__ = renamed(
    __name__,
    {
        "weight_files": "hooked_models.pipelines.folder:weight_files",
        "check_libraries": "hooked_models.pipelines.folder:check_libraries",
        "component_class": "hooked_models.pipelines.folder:component_class",
        "read_index": "hooked_models.pipelines.folder:read_index",
    },
)


def open_pipeline(
    source: Source,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
    **components: Any,
) -> Any:
    """Open the live pipeline of a folder.

    Args:
        source: the folder, as `fetch` returns it.
        variant: "fp16" for files such as `model.fp16.safetensors`, where there are any.
        dtype: of the weights.
        device_map: as in diffusers: a device, or "balanced" for whole components on several GPUs,
            for which files are read twice: diffusers does not say which weights it missed.
        components: used in place of the folder's; `transformer` may also be a folder or hub id that
            has one.

    Raises:
        FileNotFoundError, ValueError, OSError, TypeError: see `inspect_folder` and `load_whole`.
    """
    _, cls, classes = inspect_folder(source, variant, components)
    balanced = device_map == "balanced"
    with quiet_loading():
        if isinstance(components.get("transformer"), (str, Path)):
            place = components["transformer"]
            kind = inspect.signature(cls, eval_str=True).parameters["transformer"].annotation
            components["transformer"] = load_whole(
                kind, place, f"{place}'s transformer", subfolder="transformer", dtype=dtype
            )
        types = _types(classes, dtype)
        for name, kind in classes.items():
            if has_weights(kind):
                one = types.get(name, dtype) if isinstance(types, dict) else dtype
                module = load_component(source, name, kind, variant, one)
                if not balanced:
                    components[name] = module.to(device_map or "cpu")
        pipe = cls.from_pretrained(
            source.folder,
            variant=variant,
            dtype=types,
            device_map=device_map if balanced else None,
            use_safetensors=True,
            **components,
        )
    if dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    return pipe


def _types(classes: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Type of the weights, by component if a T5 would overflow in float16."""
    overflowing = [name for name, kind in classes.items() if kind.__name__ == "T5EncoderModel"]
    if not overflowing or dtype != torch.float16:
        return dtype
    return {"default": dtype, **dict.fromkeys(overflowing, torch.bfloat16)}


def load_component(
    source: Source, name: str, cls: Any, variant: str | None, dtype: torch.dtype
) -> nn.Module:
    """Load one module of a pipeline's folder; see `load_whole`."""
    own, place = own_variant(source, name, cls, variant), source.folder / name
    return load_whole(cls, place, f"{source.name}'s {name}", variant=own, dtype=dtype)


def load_whole(cls: Any, place: str | Path, what: str, **how: Any) -> Any:
    """Call `from_pretrained` of a module's class, and refuse weights that its files lack.

    diffusers and transformers draw such weights at random, and only log it.

    Args:
        cls: class of diffusers or transformers.
        place: folder of the module's files.
        what: the module, for the message.
        how: further arguments of `from_pretrained`.

    Raises:
        OSError: a weight is missing.
    """
    module, found = cls.from_pretrained(
        place, use_safetensors=True, output_loading_info=True, **how
    )
    if missing := sorted(found["missing_keys"]):
        raise OSError(
            f"{what} lacks {len(missing)} of its weights "
            f"({missing[0]}{', …' if missing[1:] else ''}), which would be drawn at "
            "random: download or save it again."
        )
    return module


def empty_pipeline(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    """Make the pipeline of a folder without its weights, on the meta device.

    Names, shapes and sizes at no cost.

    Raises:
        FileNotFoundError, ValueError: see `inspect_folder`.
    """
    index, cls, classes = inspect_folder(source, weights=False)
    parts: dict[str, Any] = {}
    for name, kind in classes.items():
        folder = source.folder / name
        if not has_weights(kind):
            parts[name] = kind.from_pretrained(folder)
            continue
        with init_empty_weights(include_buffers=True):
            if issubclass(kind, PreTrainedModel):
                parts[name] = kind(kind.config_class.from_pretrained(folder))
            else:
                parts[name] = kind.from_config(kind.load_config(folder))
        nn.Module.to(parts[name], dtype)  # diffusers' own warns of an empty list of modules
    for name, parameter in inspect.signature(cls).parameters.items():
        if name not in parts and (parameter.default is parameter.empty or name in index):
            value = index.get(name)
            is_component = isinstance(value, list) and any(
                part is None or isinstance(part, str) for part in value
            )
            parts[name] = None if is_component else value
    with quiet_loading():
        return cls(**parts)
