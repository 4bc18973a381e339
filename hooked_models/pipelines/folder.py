"""A pipeline folder's files, checked before anything large is read.

The classes that they name, and that they are whole.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from diffusers import ModelMixin, SchedulerMixin
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .hub import Source

LIBRARIES = ("diffusers", "transformers", "hooked_models")
"""Libraries whose classes a folder may name."""
NEEDED = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
"""Components without which nothing is drawn, where a pipeline's class has them; diffusers calls
some of them optional.
"""
KINDS: dict[str, tuple[type, ...]] = {
    "transformer": (ModelMixin,),
    "text_encoder": (PreTrainedModel,),
    "tokenizer": (PreTrainedTokenizerBase, ProcessorMixin),
    "vae": (ModelMixin,),
    "scheduler": (SchedulerMixin,),
}
"""Component, without its number → the classes that it may have."""
PIXART = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
TRANSFORMERS = ("PixArtTransformer2DModel", "Transformer2DModel")
"""Transformers of PixArt. Checkpoints of 2024 name the second, opened as the first."""


class Contents(NamedTuple):
    """Contents of a pipeline's folder; returned by `inspect_folder`."""

    model_index: dict[str, Any]
    """`model_index.json`."""
    pipeline: Any
    """Its class."""
    classes: dict[str, Any]
    """Class of each component that is there."""


def inspect_folder(
    source: Source, variant: str | None = None, given: Collection[str] = (), weights: bool = True
) -> Contents:
    """Read the folder's `model_index.json`, and look for everything that it names.

    Args:
        source: the folder, as `fetch` returns it.
        variant: "fp16" for files such as `model.fp16.safetensors`, where there are any.
        given: components that the caller has.
        weights: False for configurations alone.

    Raises:
        ValueError: the folder holds no pipeline that diffusers knows, one without a transformer or
            with one of no known family, or a damaged JSON file.
        FileNotFoundError: a component or its weights are missing.
        OSError: a weight file is truncated or damaged.
        TypeError: the pipeline has no component of a name in `given`.

    Example:
        >>> from hooked_models.pipelines.hub import fetch
        >>> inspect_folder(fetch("rte-nano")).classes["text_encoder"].__name__
        'RandomTokenEncoder'
    """
    index = read_index(source)
    pipeline = pipeline_class(source, index.get("_class_name"))
    known = components_of(pipeline)
    if unknown := [name for name in given if name not in known]:
        raise TypeError(
            f"from_pretrained has no argument {unknown[0]!r}: choose dtype, device_map, or a "
            f"component ({', '.join(known)})."
        )
    classes: dict[str, Any] = {}
    for name in known:
        library, cls = index[name] if _is_pair(index.get(name)) else (None, None)
        absent = library is None and cls is None and name not in needed_of(pipeline)
        if name in given or absent:
            continue
        if library is None or cls is None or not (source.folder / name).is_dir():
            raise FileNotFoundError(
                f"{source.name} has no {name}: pass one (from_pretrained(…, {name}=…)), or open a "
                "complete pipeline."
            )
        if name == "transformer":
            cls = _checked_transformer(source, pipeline.__name__, library, cls)
        classes[name] = component_class(source, name, library, cls)
        _check_files(source, name, classes[name], variant, weights)
    return Contents(index, pipeline, classes)


def _checked_transformer(source: Source, pipeline: str, library: str, cls: str) -> str:
    if pipeline not in PIXART:
        from ..families import check_known  # which few models need

        check_known(cls)
        return cls
    if library != "diffusers" or cls not in TRANSFORMERS:
        raise ValueError(
            f"{source.name} has a {cls} for its transformer; a PixArt has a {TRANSFORMERS[0]}."
        )
    return TRANSFORMERS[0]


def _check_files(source: Source, name: str, cls: Any, variant: str | None, weights: bool) -> None:
    """Raise ValueError or OSError for a damaged file of a component."""
    for file in sorted((source.folder / name).glob("*.json")):
        read_json(file)
    if weights and has_weights(cls):
        for file in weight_files(source, name, cls, variant):
            _raise_if_damaged(file)


def read_index(source: Source) -> dict[str, Any]:
    """Read the folder's `model_index.json`.

    Raises:
        ValueError: it is no index of a pipeline, or names a library that opening a folder must not
            import.
    """
    index = read_json(
        source.folder / "model_index.json", "is damaged, or is no index of a pipeline"
    )
    check_libraries(source.name, index)
    return index


def read_json(path: Path, wrong: str = "is damaged") -> dict[str, Any]:
    """Read a JSON file of a pipeline's folder.

    Raises ValueError, which begins with `wrong`, unless it holds an object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} {wrong}: save or download the pipeline again.")
    return found


def pipeline_class(source: Source, name: Any) -> Any:
    """Find the class of diffusers that an index names.

    Raises:
        ValueError: diffusers has no such pipeline, or it has no transformer.
    """
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{source.name} is a {name}, which diffusers {diffusers.__version__} has not: see "
            "model_index.json."
        )
    if "transformer" not in inspect.signature(found).parameters:
        raise ValueError(f"{source.name} is a {name}, which has no transformer to hook.")
    return found


def components_of(pipeline: Any) -> list[str]:
    """List the names of the components that a pipeline's class takes (and of its settings)."""
    return list(inspect.signature(pipeline).parameters)


def needed_of(pipeline: Any) -> list[str]:
    """List the components of a pipeline that a folder must have."""
    optional = getattr(pipeline, "_optional_components", ())
    parameters = inspect.signature(pipeline).parameters.values()
    return [
        p.name
        for p in parameters
        if p.name in NEEDED or (p.default is p.empty and p.name not in optional)
    ]


def check_libraries(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a `model_index.json` that would have other code imported than that of `LIBRARIES`.

    Args:
        name: of the model.
        index: component → (library, class), and other settings.

    Raises:
        ValueError: a component is of another library.

    Example:
        >>> check_libraries(
        ...     "m", {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["schedules", "Mine"]}
        ... )
        Traceback (most recent call last):
        ValueError: m takes its scheduler from 'schedules', but opening a folder ...
    """
    for part, value in index.items():
        if (
            not part.startswith("_")
            and isinstance(value, (list, tuple))
            and len(value) == 2
            and isinstance(value[0], str)
            and value[0] not in LIBRARIES
        ):
            raise ValueError(
                f"{name} takes its {part} from {value[0]!r}, but opening a folder imports "
                f"{', '.join(LIBRARIES)} only: "
                "build the pipeline yourself, and use HookedTextToImage.from_pipeline(pipe)."
            )


def component_class(source: Source, name: str, library: str, cls: str) -> Any:
    """Find the class of a component, which is one that holds weights, tokens or a schedule.

    Raises:
        ValueError: the library has no such class, or it is of another kind.
    """
    found = getattr(importlib.import_module(library), cls, None)
    kinds = KINDS.get(name.rstrip("_0123456789"))
    fits = isinstance(found, type) and (
        hasattr(found, "from_pretrained") if kinds is None else issubclass(found, kinds)
    )
    if not fits:
        kind = "component" if kinds is None else kinds[0].__name__
        raise ValueError(
            f"{source.name} names {library}.{cls} as its {name}, which is no {kind}: see "
            "model_index.json."
        )
    return found


def has_weights(cls: Any) -> bool:
    """True for a class whose folder has a file of weights."""
    return issubclass(cls, (ModelMixin, PreTrainedModel))


def weight_files(
    source: Source, component: str, cls: Any, variant: str | None = None
) -> Iterator[Path]:
    """Find the safetensors files of a component, one or several shards.

    Those of the variant if it has them.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: the index of the shards is damaged.
    """
    folder, stem = source.folder / component, _stem(cls)
    single, index = _weights(folder, stem, own_variant(source, component, cls, variant))
    if single.is_file():
        yield single
        return
    if index.is_file():
        for shard in _shards(index):
            if not (folder / shard).is_file():
                raise FileNotFoundError(
                    f"{source.name} lacks {component}/{shard}, one of several shards: download "
                    "it again."
                )
            yield folder / shard
        return
    there = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in (".bin", ".safetensors", ".msgpack", ".ckpt")
    )
    raise FileNotFoundError(
        f"{source.name} has no {component}/{stem}.safetensors (there is: "
        f"{', '.join(there) or 'no weight file'}). Pickled weights are not opened: save the "
        "pipeline once with safe_serialization=True. For *.fp16.safetensors pass variant='fp16'."
    )


def own_variant(source: Source, component: str, cls: Any, variant: str | None) -> str | None:
    """Return the variant if the component has files of it, else None."""
    files = _weights(source.folder / component, _stem(cls), variant)
    return variant if any(file.is_file() for file in files) else None


def _stem(cls: Any) -> str:
    return "model" if issubclass(cls, PreTrainedModel) else "diffusion_pytorch_model"


def _weights(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """The one file of a module's weights, and the index of several."""
    suffix = f".{variant}" if variant else ""
    index = folder / f"{stem}.safetensors.index{suffix}.json"
    return folder / f"{stem}{suffix}.safetensors", index


def _shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} is damaged: save or download the pipeline again.")
    return sorted(names)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )


def _raise_if_damaged(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass  # opening reads the header and compares the file's size with it
    except SafetensorError as error:
        size = file.stat().st_size
        raise OSError(
            f"{file} is truncated or damaged ({size:,} bytes; {error}): delete it and download it "
            "again."
        ) from None
