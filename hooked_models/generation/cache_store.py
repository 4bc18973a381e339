"""A generation's cache on disk.

A safetensors file for each step, written while the next step runs, read when a tensor is asked for.
`index.json` has the run's arguments and the names kept. While the run lasts, `state-….safetensors`
hold each step's part of the record, so that a run which was killed goes on there and ends with the
same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..store import Index, Store, digest
from .attached import select
from .trajectory import Record

if TYPE_CHECKING:
    from .capture import Recorder

STATE, IMAGES = "state-", "images.safetensors"
SIZES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class LazyTensors(Mapping[str, Tensor]):
    """Full name → tensor, read from a folder's files each time it is asked for.

    The folder's index lists the files. A file's bytes are compared with its digest when the first
    tensor is read from it.

    Raises:
        FileNotFoundError: a file is missing.
        OSError: a file is damaged; the message says which.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._where: dict[str, tuple[str, str]] = {}
        same: dict[str, str] = {}
        self.nbytes = 0
        files = [
            name
            for name in index.files
            if name.endswith(".safetensors") and name != IMAGES and not name.startswith(STATE)
        ]
        for file in sorted(
            files, key=lambda name: (name != "text.safetensors", name == "final.safetensors", name)
        ):
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


def record_to_folder(
    recorder: Recorder,
    out: str | Path,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Run a generation, or the rest of it, and write the recorder's tensors step by step.

    `arguments` and `options` are those of `HookedTextToImage.prepare`. Returns the images.

    Raises:
        ValueError: the folder holds another generation.
    """
    model = recorder.model
    if model.has_hooks_inside:
        raise ValueError(
            "A folder cannot record hooks inside the denoiser or the text encoder: attach them to "
            "the model itself."
        )
    own = model.attached
    with model.hooks(recorder.hooks()), ExitStack() as stack:
        recorder.inputs = inputs = model.prepare(*arguments, **(options or {}))
        sites = select(own, inputs.extent.fires, lambda: model.names.sites(len(inputs.solver)))
        attached = sorted({hook.site.name for hook in sites})
        settings = {
            "model": digest(
                str(sorted(model.dit.config.items(), key=str)), *model.dit.state_dict().values()
            ),
            "codec": digest(
                str(sorted(model.codec.config.items(), key=str)), *model.codec.state_dict().values()
            ),
            "scheduler": digest(
                type(model.scheduler).__name__, str(sorted(model.scheduler.config.items(), key=str))
            ),
            **inputs.settings,
            "names": digest(*(site.name for site in recorder.sites)),
            "heads": str(recorder.heads),
            "patterns": recorder.patterns,
            "hooks": attached,
        }
        source = model.source and [model.source.lasting_name, model.source.commit]
        facts = {
            "source": source,
            "noise_levels": list(inputs.solver.noise_levels),
            "heads": recorder.heads,
        }
        folder = stack.enter_context(closing(CacheFolder(out, settings, facts)))
        if folder.images is not None:
            return folder.images.to(model.device)
        folder.write("text", recorder.take())
        record, total, console = (
            folder.resume(model.device),
            len(inputs.solver),
            Console(stderr=True),
        )
        with (
            Progress(transient=True, console=console, disable=not console.is_terminal) as progress,
            ThreadPoolExecutor(1) as writer,  # writes a step while the next one runs
        ):
            task = progress.add_task("caching", total=total, completed=len(record))
            writing: list[Future[None]] = []

            def keep(
                step: int, tensors: Mapping[str, Tensor], same: dict[str, str], so_far: Record
            ) -> None:
                folder.write_step(step, tensors, same, so_far)
                progress.advance(task)

            def after(step: int, so_far: Record, latent: Tensor) -> None:
                if step >= len(record):
                    if writing:  # one step at most waits in memory
                        writing.pop().result()
                    now = replace(so_far, predictions=dict(so_far.predictions))
                    taken = recorder.take(), dict(recorder.same), now
                    writing.append(writer.submit(keep, step, *taken))

            images = model.run(inputs, record, len(record), after=after).images
            for last in writing:
                last.result()
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
    """Remedy for a damaged cache, for messages."""
    return f"delete the folder {folder} and run again"


class CacheFolder:
    """The folder of one generation.

    Raises:
        ValueError: it holds another generation, and the message names the differences; or another
            process writes to it.
        OSError: a file is damaged, missing or cannot be written.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """`settings` decide the folder's content, `facts` merely go with it."""
        self.path = Path(path)
        new = Index.read(path, remedy_for(self.path)) is None
        self.store = Store(path, settings, facts=facts, remedy=remedy_for(self.path))
        if settings.get("hooks") and not new:
            self.close()
            raise ValueError(
                f"{self.path} holds a generation with hooks on {', '.join(settings['hooks'][:3])}, "
                "and whether these are the "
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

    def write(
        self, part: str, tensors: Mapping[str, Tensor], same: Mapping[str, str] | None = None
    ) -> None:
        """A file of tensors, whole or not at all.

        `same`: names whose tensor stands in an earlier file.
        """
        self.store.put_all(_part(part, tensors, same or {}))

    def write_step(
        self, step: int, tensors: Mapping[str, Tensor], same: Mapping[str, str], record: Record
    ) -> None:
        """As `write`, with the step's part of the record, from which the run can go on."""
        state = {"latent": record.latents[step], "out": record.outs[step]} | {
            ".".join(("call", *branches)): each
            for (at, branches), each in record.predictions.items()
            if at == step
        }
        own = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }  # views would share memory
        self.store.put_all(
            _part(f"step-{step:03d}", tensors, same)
            | {f"{STATE}{step:03d}.safetensors": lambda path: save_file(own, path)}
        )

    def resume(self, device: torch.device) -> Record:
        """The record of the steps that are there."""
        latents, outs = [], []
        predictions: dict[tuple[int, tuple[Any, ...]], Tensor] = {}
        for step, file in enumerate(self.states):
            with safe_open(self.store.path(file), "pt") as opened:
                found = {name: opened.get_tensor(name).to(device) for name in opened.keys()}  # noqa: SIM118
            latents.append(found.pop("latent"))
            outs.append(found.pop("out"))
            predictions |= {(step, tuple(key.split(".")[1:])): found[key] for key in found}
        return Record(tuple(latents), predictions, tuple(outs))

    @property
    def states(self) -> list[str]:
        """Files of the record, step by step."""
        found = [name for name in self.store.files if name.startswith(STATE)]
        return sorted(found, key=lambda name: (len(name), name))

    def finish(self, images: Tensor) -> None:
        """Write the images, which says that all is there."""
        self.store.facts["names"] = LazyTensors(self.store).digest
        self.store.put(
            IMAGES, lambda path: save_file({"images": images.detach().contiguous()}, path)
        )
        self.store.drop(*self.states)


def _part(
    part: str, tensors: Mapping[str, Tensor], same: Mapping[str, str]
) -> dict[str, Callable[[Path], object]]:
    """The file of some tensors, and how it is written; none if there is no tensor."""
    same = {name: first for name, first in same.items() if name in tensors}
    own = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in same}
    metadata = {"same": json.dumps(same)}
    write = {f"{part}.safetensors": lambda path: save_file(own, path, metadata)}
    return write if own or same else {}


def _opened(index: Index, file: str) -> Any:
    """A file that is read in part. Raises OSError, as `Index.path`, if it cannot be opened."""
    try:
        return safe_open(index.folder / file, "pt")
    except (OSError, SafetensorError):
        return safe_open(index.path(file), "pt")
