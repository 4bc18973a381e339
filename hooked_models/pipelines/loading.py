"""A pipeline folder as a live pipeline; its index is checked before anything large is read.

Source: `PixArtAlphaPipeline` and `PixArtSigmaPipeline` (diffusers 0.42), whose folders these are. T5 was trained in bfloat16 and
overflows in float16, where it is therefore never put; nor is an autoencoder whose configuration asks for `force_upcast`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel, SchedulerMixin
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .hub import Source
from .quiet import quiet_loading

PIPELINES = {cls.__name__: cls for cls in (PixArtAlphaPipeline, PixArtSigmaPipeline)}
COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
LIBRARIES = ("diffusers", "transformers", "hooked_models")
"""Libraries whose classes a folder may name."""
KINDS = {
    "transformer": ModelMixin,
    "text_encoder": PreTrainedModel,
    "tokenizer": PreTrainedTokenizerBase,
    "vae": ModelMixin,
    "scheduler": SchedulerMixin,
}
TRANSFORMERS = ("PixArtTransformer2DModel", "Transformer2DModel")
"""The second is what PixArt checkpoints of 2024 name; diffusers opens them as the first."""


def open_pipeline(
    source: Source,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
    **components: Any,
) -> Any:
    """The live pipeline of a folder.

    Args:
        variant: "fp16" for files such as `model.fp16.safetensors`, where there are any.
        device_map: as in diffusers: a device, or "balanced" for whole components on several GPUs.
        components: used in place of the folder's; `transformer` may also be a folder or hub id that has one.

    Raises:
        FileNotFoundError, ValueError, OSError: see `inspect_folder`.
        TypeError: there is no such component.
    """
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise TypeError(
            f"from_pretrained has no argument {unknown[0]!r}: choose dtype, device_map, or a component ({', '.join(COMPONENTS)})."
        )
    if isinstance(components.get("transformer"), (str, Path)):
        with quiet_loading():
            components["transformer"] = PixArtTransformer2DModel.from_pretrained(
                components["transformer"], subfolder="transformer", dtype=dtype, use_safetensors=True
            )
    index = inspect_folder(source, variant, components)
    half = dtype == torch.float16
    types: Any = dtype
    if half and index["text_encoder"][1] == "T5EncoderModel":
        types = {"default": dtype, "text_encoder": torch.bfloat16}
    with quiet_loading():
        pipe = PIPELINES[index["_class_name"]].from_pretrained(
            source.folder, variant=variant, dtype=types, device_map=device_map, use_safetensors=True, **components
        )
    if half and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    return pipe


def empty_pipeline(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder without its weights, on the meta device: names, shapes and sizes at no cost.

    Raises:
        FileNotFoundError, ValueError: see `inspect_folder`.
    """
    index = inspect_folder(source, weights=False)
    parts: dict[str, Any] = {}
    for name in COMPONENTS:
        cls = component_class(source, name, *index[name])
        folder = source.folder / name
        if name not in WEIGHTS:
            parts[name] = cls.from_pretrained(folder)
            continue
        with init_empty_weights(include_buffers=True):
            if name == "text_encoder":
                parts[name] = cls(cls.config_class.from_pretrained(folder))
            else:
                cls = PixArtTransformer2DModel if name == "transformer" else cls
                parts[name] = cls.from_config(cls.load_config(folder))
        parts[name].to(dtype)
    return PIPELINES[index["_class_name"]](**parts)


def inspect_folder(
    source: Source, variant: str | None = None, given: Collection[str] = (), weights: bool = True
) -> Mapping[str, Any]:
    """The folder's `model_index.json`, once everything that it names was found to be there and whole.

    Args:
        given: components that the caller has.

    Raises:
        ValueError: it is a pipeline, or has a transformer, of another kind.
        FileNotFoundError: a component or its weights are missing.
        OSError: a weight file is truncated or damaged.
    """
    index = read_index(source)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        raise ValueError(
            f"{source.name} is a {kind}, and HookedTextToImage opens {' and '.join(PIPELINES)}. The denoisers of some other "
            "pipelines can be hooked on their own: hooked_models.families.hook(pipe.transformer)."
        )
    for name in COMPONENTS:
        if name in given:
            continue
        library, cls = index[name] if _is_pair(index.get(name)) else (None, None)
        if library is None or cls is None or not (source.folder / name).is_dir():
            raise FileNotFoundError(
                f"{source.name} has no {name}: pass one (from_pretrained(…, {name}=…)), or open a complete pipeline."
            )
        if name == "transformer" and (library != "diffusers" or cls not in TRANSFORMERS):
            raise ValueError(f"{source.name} has a {cls} for its transformer; a PixArt has a {TRANSFORMERS[0]}.")
        component_class(source, name, library, cls)
        for file in weight_files(source, name, variant) if weights and name in WEIGHTS else ():
            _refuse_damaged(file)
    return index


def read_index(source: Source) -> dict[str, Any]:
    """The folder's `model_index.json`.

    Raises:
        ValueError: it is no index of a pipeline, or names a library that opening a folder must not import.
    """
    path = source.folder / "model_index.json"
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict):
        raise ValueError(f"{path} is damaged, or is no index of a pipeline: save or download the pipeline again.")
    check_libraries(source.name, index)
    return index


def check_libraries(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a `model_index.json` that would have other code imported than that of `LIBRARIES`.

    Args:
        name: of the model.
        index: component → (library, class), and other settings.

    Raises:
        ValueError: a component is of another library.

    Example:
        >>> check_libraries("m", {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["schedules", "Mine"]})
        Traceback (most recent call last):
        ValueError: m takes its scheduler from 'schedules', but opening a folder imports diffusers, ...
    """
    for part, value in index.items():
        if (
            not part.startswith("_")
            and isinstance(value, (list, tuple))
            and len(value) == 2
            and value[0] not in (None, *LIBRARIES)
        ):
            raise ValueError(
                f"{name} takes its {part} from {value[0]!r}, but opening a folder imports {', '.join(LIBRARIES)} only: "
                "build the pipeline yourself, and use HookedTextToImage.from_pipeline(pipe)."
            )


def component_class(source: Source, name: str, library: str, cls: str) -> Any:
    """The class of a component, which is one that holds weights, tokens or a schedule.

    Raises:
        ValueError: the library has no such class, or it is of another kind.
    """
    found = getattr(importlib.import_module(library), cls, None)
    if not (isinstance(found, type) and issubclass(found, KINDS[name])):
        raise ValueError(
            f"{source.name} names {library}.{cls} as its {name}, which is no {KINDS[name].__name__}: see model_index.json."
        )
    return found


def weight_files(source: Source, component: str, variant: str | None = None) -> Iterator[Path]:
    """The safetensors files of a component: those of the variant if it has them, one or several shards.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
    """
    folder, stem = source.folder / component, WEIGHTS[component]
    for suffix in dict.fromkeys((f".{variant}" if variant else "", "")):
        if (single := folder / f"{stem}{suffix}.safetensors").is_file():
            yield single
            return
        shards = folder / f"{stem}.safetensors.index{suffix}.json"
        if shards.is_file():
            for shard in sorted(set(json.loads(shards.read_text())["weight_map"].values())):
                if not (folder / shard).is_file():
                    raise FileNotFoundError(f"{source.name} lacks {component}/{shard}, one of several shards: download it again.")
                yield folder / shard
            return
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors", ".msgpack", ".ckpt"))
    raise FileNotFoundError(
        f"{source.name} has no {component}/{stem}.safetensors (there is: {', '.join(there) or 'no weight file'}). "
        "Pickled weights are not opened: save the pipeline once with safe_serialization=True. For *.fp16.safetensors pass "
        "variant='fp16'."
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _refuse_damaged(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass  # opening reads the header and compares the file's size with it
    except SafetensorError as error:
        size = file.stat().st_size
        raise OSError(f"{file} is truncated or damaged ({size:,} bytes; {error}): delete it and download it again.") from None
