"""The size of a cache before anything is run, and the refusal of one that is too large."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from jaxtyping import Int
from torch import Tensor

from ..hooks.module import NameFilter
from ..hooks.table import axis_sizes
from .capture import TEXT_KV, Heads, Patterns, Recorder, head_axis, heads_by_layer
from .names import IMAGE_HOOK, Branch, Site

if TYPE_CHECKING:
    from .model import HookedTextToImage


class CacheTooLargeError(MemoryError):
    """The cache would not fit into `max_bytes`; the message says how to narrow it.

    Example:
        >>> model.run_with_cache("red circle above blue square", max_bytes=1000)
        Traceback (most recent call last):
        hooked_models.generation.cache_estimate.CacheTooLargeError: This cache would take ...
    """


def activation_shape(
    cfg: Any, site: Site, batch: int, grid: tuple[int, int], text_pos: int, image: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of a site's tensor, from arithmetic alone.

    `cfg`: that of the denoiser or, for its sites, of the text encoder. `grid`: latent rows and
    columns, `image`: pixel rows and columns.
    """
    sizes = axis_sizes(cfg, batch, text_pos, grid, image)
    return tuple(sizes[axis] for axis in site.row.axes)


def activation_dtype(site: Site, dtype: torch.dtype) -> torch.dtype:
    """The type of a site's tensor in a model of type `dtype`.

    A norm's scale is never narrower than float32.
    """
    return torch.promote_types(dtype, torch.float32) if site.inner.endswith("hook_scale") else dtype


def free_bytes(device: torch.device) -> int:
    """Memory that is free where tensors on `device` live."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class CacheEstimate:
    """Size of a cache, from arithmetic alone. In memory or on disk, it is `nbytes`."""

    sizes: Mapping[str, int]
    """Name → bytes of its tensor."""
    shared: frozenset[str]
    """Names that take nothing, because their tensor is an earlier step's: the text's keys and
    values.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those of the text once."""
        return sum(size for name, size in self.sizes.items() if name not in self.shared)

    @property
    def largest_step(self) -> int:
        """Bytes of the largest step: the memory that a cache written to disk needs."""
        steps: dict[str, int] = {}
        for name, size in self.sizes.items():
            step = name.split(".")[1] if name.startswith("steps.") else name.split(".")[0]
            steps[step] = steps.get(step, 0) + size
        return max(steps.values())

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes by the last part of the name, most first."""
        kinds: dict[str, int] = {}
        for name, size in self.sizes.items():
            if name not in self.shared:
                kinds[name.rpartition(".")[2]] = kinds.get(name.rpartition(".")[2], 0) + size
        return dict(sorted(kinds.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {human(size)}" for kind, size in list(self.by_kind.items())[:3])
        return (
            f"{len(self.sizes)} tensors, {human(self.nbytes)} ({kinds}); at most "
            f"{human(self.largest_step)} a step"
        )


def estimate(
    model: HookedTextToImage,
    prompts: str | Sequence[str] | Int[Tensor, "batch text_pos"] | tuple[int, int],
    num_steps: int = 14,
    guidance: float | None = None,
    *,
    names_filter: NameFilter = None,
    steps: int | Sequence[int] | slice | None = None,
    branch: Branch | Literal["both"] = "cond",
    heads: Heads | None = None,
    patterns: Patterns = "whole",
    grid: Sequence[int] | None = None,
    **options: Any,
) -> CacheEstimate:
    """Estimate the cache of `run_with_cache` with these arguments.

    Nothing is run, and a model without weights will do.

    Args:
        model: any hooked text-to-image model, with or without weights.
        prompts: as there, or (PixArt) their number and the tokens of the longest with EOS.
        num_steps: as in `run_with_cache`.
        guidance: as in `run_with_cache`.
        names_filter: as in `run_with_cache`.
        steps: as in `run_with_cache`.
        branch: as in `run_with_cache`.
        heads: as in `run_with_cache`.
        patterns: as in `run_with_cache`.
        grid: rows and columns of PixArt's latents, of another size than the model's own.
        options: as there.
    """
    if isinstance(prompts, tuple) and all(isinstance(part, int) for part in prompts):
        solver, uncond = (
            model.solver(num_steps),
            (model.default_guidance if guidance is None else guidance) > 1,
        )
        sites = model.names.select(
            names_filter, steps, branch, len(solver), uncond, solver.forms_x0
        )
        recorder = Recorder(
            model, sites, heads_by_layer(heads, model.cfg.n_layers, model.cfg.n_heads), patterns
        )
        return estimate_recorded(recorder, prompts[0], prompts[1], grid)
    draft = model.draft(prompts, 0, num_steps, guidance, **options)
    if grid is not None:
        draft = replace(
            draft, latents=draft.latents[..., :1, :1].expand(*draft.latents.shape[:2], *grid)
        )
    known = model.names.select(
        names_filter, steps, branch, len(draft.solver), draft.guided, draft.solver.forms_x0
    )
    sites = [site for site in known if draft.extent.fires(site)]
    recorder = Recorder(
        model, sites, heads_by_layer(heads, model.cfg.n_layers, model.cfg.n_heads), patterns
    )
    return estimate_sites(recorder, lambda site: model.shape(draft, site))


def estimate_recorded(
    recorder: Recorder, batch: int, text_pos: int, grid: Sequence[int] | None = None
) -> CacheEstimate:
    """Estimate a recorder's tensors of one generation by PixArt."""
    model = recorder.model
    rows, columns = grid or (model.cfg.sample_size,) * 2
    image = model.image_size((rows, columns))

    def shape(site: Site) -> tuple[int, ...]:
        cfg = model.text_encoder.cfg if site.part.endswith("text_encoder") else model.cfg
        return activation_shape(cfg, site, batch, (rows, columns), text_pos, image)

    return estimate_sites(recorder, shape)


def _is_summary(recorder: Recorder, site: Site) -> bool:
    """True if a summary of the pattern is kept."""
    return (
        recorder.patterns != "whole" and site.part == "dit" and site.inner.endswith("hook_pattern")
    )


def estimate_sites(
    recorder: Recorder, shape_of: Callable[[Site], tuple[int, ...]]
) -> CacheEstimate:
    """Bytes that a recorder will keep of one generation, from the shapes of its sites' tensors."""
    model, heads = recorder.model, recorder.heads
    sizes, shared, seen = {}, set(), set()
    dtypes: dict[int, torch.dtype] = {}
    for site in recorder.sites:
        module = (
            model.codec
            if site.inner == IMAGE_HOOK
            else model.text_encoder
            if site.part.endswith("text_encoder")
            else model.dit
        )
        shape = list(shape_of(site))
        if id(module) not in dtypes:  # a look through all of its parameters
            dtypes[id(module)] = module.dtype
        dtype = activation_dtype(site, dtypes[id(module)])
        if heads is not None and (axis := head_axis(site)) is not None and site.layer is not None:
            shape[axis] = len(heads[site.layer])
        if _is_summary(recorder, site):
            del shape[2 if recorder.patterns == "received" else 3]
            dtype = torch.float32
        sizes[site.name] = torch.Size(shape).numel() * dtype.itemsize
        if site.inner.endswith(TEXT_KV):
            key = (site.inner, site.branch)
            shared |= {site.name} if key in seen and model.text_keys_are_constant else set()
            seen.add(key)
    return CacheEstimate(sizes, frozenset(shared))


def check_memory(estimate: CacheEstimate, max_bytes: int | None, device: torch.device) -> None:
    """Raise CacheTooLargeError above `max_bytes`, by default a quarter of the free memory."""
    limit = free_bytes(device) // 4 if max_bytes is None else max_bytes
    if estimate.nbytes <= limit:
        return
    limit_is = (
        f"max_bytes={human(limit)}"
        if max_bytes is not None
        else f"a quarter of free memory ({human(limit)})"
    )
    kinds = [f"{kind} ({human(size)})" for kind, size in list(estimate.by_kind.items())[:3]]
    raise CacheTooLargeError(
        f"This cache would take {human(estimate.nbytes)} in {len(estimate.sizes)} tensors, more "
        f"than {limit_is}. Most of it is {', '.join(kinds)}. Narrow it with names_filter= (for "
        "example lambda name: name.endswith('cross_attn.hook_pattern')), steps=, branch=, heads= "
        "or patterns=; write it to disk with out=; run fewer prompts; or raise max_bytes=."
    )


def check_disk(estimate: CacheEstimate, out: str | Path) -> None:
    """Raise CacheTooLargeError for a cache that the disk of `out` has no room for."""
    place = next(
        path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists()
    )
    if estimate.nbytes > (free := shutil.disk_usage(place).free):
        raise CacheTooLargeError(
            f"This cache is {estimate}; on the disk of {out} {human(free)} are free. Narrow it, or "
            "free some."
        )


def human(size: int | float) -> str:
    """Bytes for a message.

    Example:
        >>> human(1536)
        '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
