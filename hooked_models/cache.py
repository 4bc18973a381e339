"""The cache of a whole generation, and how much it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from transformer_lens import ActivationCache

from .dit_cache import DiTCache, expand_shorthand, look_up
from .names import FINAL, Branch, Site

if TYPE_CHECKING:
    from .text_to_image import HookedTextToImage


class GenerationCache(ActivationCache):
    """The cache of a whole generation, under full names (`steps.{s}.{cond|uncond}.…`).

    `cache["pattern", 2, "cross_attn", 0]` is (name, layer, sublayer, step); a fifth entry names the branch ("cond" unless
    said). `cache["steps.3.eps"]` is derived from the latent and the clean-image prediction of step 3.
    """

    model: HookedTextToImage

    def __init__(
        self, cache_dict: dict[str, Tensor], model: HookedTextToImage, noise_levels: Sequence[tuple[float, float]] = ()
    ) -> None:
        super().__init__(cache_dict, model)
        self.noise_levels = noise_levels

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str):
            if key not in self.cache_dict and key.startswith("steps.") and key.endswith(".eps"):
                return self._noise(int(key.split(".")[1]))
            return look_up(self.cache_dict, key if key in self.cache_dict else self.model.names.site(key).name)
        if len(key) < 4:
            raise KeyError(f"Say which step: cache[name, layer, sublayer, step], or cache.at(step=…)[{key!r}].")
        name, layer, sublayer, step, branch = (*key, "cond")[:5]
        inner = expand_shorthand(name, layer, sublayer, self.model.cfg.n_layers)
        if inner in self.model.names.sampler.hook_dict:
            return look_up(self.cache_dict, f"steps.{step}.{inner}")
        return look_up(self.cache_dict, f"steps.{step}.{branch}.{inner}")

    def _noise(self, step: int) -> Tensor:
        alpha, sigma = self.noise_levels[step]
        return (self[f"steps.{step}.hook_latent"] - alpha * self[f"steps.{step}.hook_x0"]) / sigma

    @property
    def steps(self) -> list[int]:
        """The denoising steps that something was cached at."""
        return sorted({int(name.split(".")[1]) for name in self.cache_dict if name.startswith("steps.")})

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.cache_dict.values())

    def at(self, step: int, branch: Branch = "cond") -> DiTCache:
        """The cache of one denoiser call, under canonical names: what TransformerLens' tools expect.

        Raises:
            KeyError: nothing was cached there.
        """
        prefix = f"steps.{step}.{branch}."
        found = {k.removeprefix(prefix): v for k, v in self.cache_dict.items() if k.startswith(prefix)}
        if not found:
            raise KeyError(f"Nothing is cached at step {step}, branch {branch!r}; steps with entries: {self.steps}.")
        return DiTCache(found, self.model.dit)

    def stack(self, name: str, layer: int | None = None, sublayer: str | None = None, branch: Branch = "cond") -> Tensor:
        """One tensor over the cached steps: [step batch …], steps ascending (`cache.steps`)."""
        inner = expand_shorthand(name, layer, sublayer, self.model.cfg.n_layers)
        middle = "" if inner in self.model.names.sampler.hook_dict else f"{branch}."
        names = [full for s in self.steps if (full := f"steps.{s}.{middle}{inner}") in self.cache_dict]
        if not names:
            return look_up(self.cache_dict, f"steps.*.{middle}{inner}")  # raises
        return torch.stack([self.cache_dict[full] for full in names])

    def __repr__(self) -> str:
        return f"GenerationCache({len(self)} tensors at steps {self.steps}, {human(self.nbytes)})"


# How much a cache will take


class CacheTooLargeError(MemoryError):
    """The cache asked for would not fit into `max_bytes`; the message says how to narrow it."""


def activation_shape(
    cfg: Any, site: Site, batch: int, grid: tuple[int, int], text_pos: int, image: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of a site's tensor, from arithmetic alone.

    `cfg`: that of the denoiser or, for its sites, of the text encoder. `grid`: latent rows and columns, `image`: pixel rows
    and columns.
    """
    pos = text_pos if site.part.endswith("text_encoder") else grid[0] * grid[1] // cfg.patch_size**2
    leaf = site.inner.rpartition(".")[2].removeprefix("hook_")
    key_pos = text_pos if "cross_attn" in site.inner else pos
    if site.inner == FINAL:
        return (batch, 3, *image)
    if site.part == "sampler":
        return (batch, cfg.out_channels if leaf in ("out_cond", "out_uncond") else cfg.in_channels, *grid)
    match leaf:
        case "q" | "z":
            return (batch, pos, cfg.n_heads, cfg.d_head)
        case "k" | "v":
            return (batch, key_pos, cfg.n_heads, cfg.d_head)
        case "attn_scores" | "pattern":
            return (batch, cfg.n_heads, pos, key_pos)
        case "rel_pos_bias":
            return (batch, cfg.n_heads, pos, pos)
        case "result" | "q_input" | "attn_in" | "cross_attn_in":
            return (batch, pos, cfg.n_heads, cfg.d_model)
        case "k_input" | "v_input":
            return (batch, key_pos, cfg.n_heads, cfg.d_model)
        case "pre" | "pre_linear" | "post":
            return (batch, pos, cfg.d_mlp)
        case "scale":
            return (batch, pos, 1)
        case "text":
            return (batch, text_pos, cfg.d_text)
        case "caption":
            return (batch, text_pos, cfg.d_model)
        case "t_emb":
            return (batch, cfg.d_model)
        case "t_mod":
            return (batch, 6 * cfg.d_model)
    return (batch, 1 if ".adaln." in site.inner else pos, cfg.d_model)


def activation_dtype(site: Site, dtype: torch.dtype) -> torch.dtype:
    """The type of a site's tensor in a model of type `dtype`: a norm's scale is never narrower than float32."""
    return torch.promote_types(dtype, torch.float32) if site.inner.endswith("hook_scale") else dtype


def free_bytes(device: torch.device) -> int:
    """Memory that is free where tensors on `device` live."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def refuse_if_too_large(sizes: Mapping[str, int], max_bytes: int | None, device: torch.device) -> None:
    """Raise CacheTooLargeError for a cache (name → bytes) above `max_bytes`, by default a quarter of what is free."""
    limit = free_bytes(device) // 4 if max_bytes is None else max_bytes
    total = sum(sizes.values())
    if total <= limit:
        return
    kinds: dict[str, int] = {}
    for name, size in sizes.items():
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + size
    largest = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
    limit_is = f"max_bytes={human(limit)}" if max_bytes is not None else f"a quarter of free memory ({human(limit)})"
    raise CacheTooLargeError(
        f"This cache would take {human(total)} in {len(sizes)} tensors, more than {limit_is}. Most of it is "
        f"{', '.join(f'{kind} ({human(kinds[kind])})' for kind in largest)}. Narrow it with names_filter= "
        "(for example lambda name: name.endswith('cross_attn.hook_pattern')), steps= or branch=; "
        "or run fewer prompts; or raise max_bytes=."
    )


def human(size: int | float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
