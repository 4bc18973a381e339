"""A generation's cache on disk: a safetensors file for each step, written as the step ends, read when a tensor is asked for.

`index.json` says what was run and kept. While the run lasts, `state.safetensors` holds the sampler before the next step, so that
a run which was killed goes on there and ends with the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..store import Index, Store, digest
from .sampling import Sampler, SamplerState

if TYPE_CHECKING:
    from .capture import Recorder

STATE, IMAGES = "state.safetensors", "images.safetensors"
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class LazyTensors(Mapping[str, Tensor]):
    """Full name → tensor, read from the files that a folder's index lists, each time it is asked for.

    A file's bytes are compared with its digest when the first tensor is read from it.

    Raises:
        FileNotFoundError: a file is missing.
        OSError: a file is damaged; the message says which.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._where: dict[str, tuple[str, str]] = {}
        same: dict[str, str] = {}
        self.nbytes = 0
        files = [name for name in index.files if name.endswith(".safetensors") and name not in (STATE, IMAGES)]
        for file in sorted(files, key=lambda name: (name != "text.safetensors", name == "final.safetensors", name)):
            with _opened(index, file) as opened:
                for name in opened.keys():  # noqa: SIM118  (a handle, not a mapping)
                    self._where[name] = (file, name)
                    part = opened.get_slice(name)
                    self.nbytes += prod(part.get_shape()) * SIZES[part.get_dtype()]
                same |= json.loads((opened.metadata() or {}).get("same", "{}"))
        self._where |= {name: self._where[first] for name, first in same.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._where[name]
        with safe_open(self.index.path(file), "pt") as opened:
            return opened.get_tensor(stored)

    def read(self, name: str, rows: slice) -> Tensor:
        """Some rows of the batch, without reading the others."""
        file, stored = self._where[name]
        with safe_open(self.index.path(file), "pt") as opened:
            return opened.get_slice(stored)[rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def digest(self) -> str:
        """Hash of the names alone."""
        return digest(*sorted(self._where))


def record_to_folder(recorder: Recorder, out: str | Path, arguments: tuple[Any, ...]) -> Float[Tensor, "batch 3 height width"]:
    """Run a generation (`arguments` of its `_begin`), or what is left of it, and write what the recorder keeps, step by step.

    Returns the images. Raises ValueError if the folder holds another generation.
    """
    model = recorder.model
    if model.hooked_inside:
        raise ValueError("A folder cannot record hooks inside the denoiser or the text encoder: attach them to the model itself.")
    _, _, num_steps, guidance, _ = arguments
    attached = sorted({hook.site.name for hook in model.firing_in_run(num_steps, guidance)})
    with model.hooks(recorder.hooks()), ExitStack() as stack:
        inputs, state = model._begin(*arguments)
        recorder.inputs, sampler = inputs, inputs.sampler
        settings = {
            "model": digest(str(sorted(model.dit.config.items(), key=str)), *model.dit.state_dict().values()),
            "codec": digest(str(sorted(model.codec.config.items(), key=str)), *model.codec.state_dict().values()),
            "scheduler": digest(type(model.scheduler).__name__, str(sorted(model.scheduler.config.items(), key=str))),
            "text": digest(inputs.text.text, "" if inputs.text.bias is None else inputs.text.bias),
            "noise": digest(state.latent),
            "num_steps": sampler.num_steps,
            "guidance": inputs.guidance,
            "names": digest(*(site.name for site in recorder.sites)),
            "heads": str(recorder.heads),
            "patterns": recorder.patterns,
            "hooks": attached,
        }
        source = model.source and [model.source.lasting_name, model.source.commit]
        levels = sampler.noise_levels if sampler.predicts_x0 else []
        facts = {"source": source, "noise_levels": levels, "heads": recorder.heads}
        folder = stack.enter_context(closing(CacheFolder(out, settings, facts)))
        if folder.images is not None:
            return folder.images.to(model.device)
        folder.write("text", recorder.take())
        state = folder.resume(sampler, state)
        steps, console = range(state.step, sampler.num_steps), Console(stderr=True)
        run = islice(model._run(inputs, state), 1, None)
        for step in track(steps, "caching", transient=True, console=console, disable=not console.is_terminal):
            state = next(run)
            folder.write(f"step-{step:03d}", recorder.take(), recorder.same)
            folder.save_state(sampler, state)
        images = model.decode(state.latent)
        folder.write("final", recorder.take())
        folder.finish(images)
    return images


def open_cache(folder: str | Path) -> Index | None:
    """The index of a finished cache, or None of any other folder.

    Raises:
        OSError: the index is damaged.
    """
    index = Index.read(folder, remedy_for(Path(folder)))
    return index if index is not None and IMAGES in index.files else None


def remedy_for(folder: Path) -> str:
    """What to do about a damaged cache."""
    return f"delete the folder {folder} and run again"


class CacheFolder:
    """The folder of one generation.

    Raises:
        ValueError: it holds another generation, the message says in what they differ; or another process writes to it.
        OSError: a file is damaged, missing or cannot be written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """`settings` decide what is in the folder, `facts` merely go with it."""
        self.path = Path(path)
        new = Index.read(path, remedy_for(self.path)) is None
        self.store = Store(path, settings, facts=facts, remedy=remedy_for(self.path))
        if settings.get("hooks") and not new:
            self.close()
            raise ValueError(
                f"{self.path} holds a generation with hooks on {', '.join(settings['hooks'][:3])}, and whether these are the "
                "same cannot be told: choose another folder, or delete it."
            )

    def close(self) -> None:
        """Let other processes write to the folder."""
        self.store.close()

    @property
    def images(self) -> Tensor | None:
        """The final images, of a generation that has ended."""
        if IMAGES not in self.store.files:
            return None
        with safe_open(self.store.path(IMAGES), "pt") as opened:
            return opened.get_tensor("images")

    def write(self, part: str, tensors: Mapping[str, Tensor], same: Mapping[str, str] | None = None) -> None:
        """A file of tensors, whole or not at all; `same`: names whose tensor stands in an earlier file."""
        same = {name: first for name, first in (same or {}).items() if name in tensors}
        own = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in same}
        if own or same:
            metadata = {"same": json.dumps(same)}
            self.store.put(f"{part}.safetensors", lambda path: save_file(own, path, metadata))

    def save_state(self, sampler: Sampler, state: SamplerState) -> None:
        """The sampler as it is between two steps: what differs from a fresh one."""
        fresh, tensors = sampler.start(state.latent).memory, {"latent": state.latent.detach().contiguous()}
        changed = {name: value for name, value in state.memory.items() if not same_value(value, fresh.get(name))}
        memory = {name: pack(value, name, tensors) for name, value in changed.items()}
        metadata = {"state": json.dumps({"step": state.step, "memory": memory})}
        self.store.put(STATE, lambda path: save_file(tensors, path, metadata))

    def resume(self, sampler: Sampler, first: SamplerState) -> SamplerState:
        """The state that was saved last, or `first`."""
        if STATE not in self.store.files:
            return first
        with safe_open(self.store.path(STATE), "pt") as opened:
            saved = json.loads(opened.metadata()["state"])
            tensors = {name: opened.get_tensor(name).to(first.latent.device) for name in opened.keys()}  # noqa: SIM118
        memory = {name: unpack(value, tensors) for name, value in saved["memory"].items()}
        return SamplerState(saved["step"], tensors["latent"], {**first.memory, **memory})

    def finish(self, images: Tensor) -> None:
        """Write the images, which says that all is there."""
        self.store.facts["names"] = LazyTensors(self.store).digest
        self.store.put(IMAGES, lambda path: save_file({"images": images.detach().contiguous()}, path))
        self.store.drop(STATE)


def _opened(index: Index, file: str) -> Any:
    """A file that is read in part. Raises OSError, as `Index.path`, if it cannot be opened."""
    try:
        return safe_open(index.folder / file, "pt")
    except (OSError, SafetensorError):
        return safe_open(index.path(file), "pt")


def same_value(a: Any, b: Any) -> bool:
    """Equality of what schedulers remember."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b)


def pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; tensors in it go to `tensors` under names that begin with `key`.

    Raises:
        TypeError: a scheduler remembers something that is neither tensor, number, text nor list of these.
    """
    if isinstance(value, Tensor):
        tensors[key] = value.detach().clone()  # a view would share its memory, which safetensors does not write
        return {"tensor": key}
    if isinstance(value, (list, tuple)):
        return {"list": [pack(each, f"{key}.{i}", tensors) for i, each in enumerate(value)], "tuple": isinstance(value, tuple)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"The scheduler's {key} is a {type(value).__name__}, which cannot be saved: cache without out=.")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "list" in value:
        parts = [unpack(each, tensors) for each in value["list"]]
        return tuple(parts) if value["tuple"] else parts
    return value["value"]
