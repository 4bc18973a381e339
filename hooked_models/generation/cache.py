"""The cache of a whole generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from ..arguments import integer, one_of, shown
from ..hooks.errors import unknown_hook
from ..lazy_imports import renamed
from ..pipelines.hub import recorded_source
from ..pixart.cache import DiTCache, expand_shorthand, look_up
from .cache_estimate import human
from .cache_store import IMAGES, LazyTensors, open_cache
from .names import BRANCHES, Branch

if TYPE_CHECKING:
    from .model import HookedTextToImage

ESTIMATE = "hooked_models.generation.cache_estimate"
__getattr__ = renamed(
    __name__,
    {
        "refuse_if_too_large": f"{ESTIMATE}:check_memory",
        "refuse_if_does_not_fit": f"{ESTIMATE}:check_disk",
        **{
            name: f"{ESTIMATE}:{name}"
            for name in (
                *("CacheEstimate", "CacheTooLargeError", "activation_dtype", "activation_shape"),
                *("check_disk", "check_memory", "estimate", "estimate_recorded", "estimate_sites"),
                "free_bytes",
            )
        },
    },
)

KEEPS_BATCH = (
    "a whole generation's cache keeps its batch axis: use cache.at(step=s).remove_batch_dim() "
    "(TransformerLens' "
    "head_detector, which asks for this, looks for heads of causal language models)"
)


class GenerationCache(ActivationCache):
    """The cache of a whole generation, under full names (`steps.{s}.{cond|uncond}.…`).

    `cache["pattern", 2, "cross_attn", 0]` is (name, layer, sublayer, step); a fifth entry names the
    branch ("cond" unless said). `cache["steps.3.eps"]` is derived from the latent and the
    clean-image prediction of step 3.

    Example:
        >>> images, cache = model.run_with_cache(
        ...     "red circle above blue square", num_steps=2, names_filter="hook_text"
        ... )
        >>> cache.steps, cache["steps.1.cond.hook_text"].shape
        ([0, 1], torch.Size([1, 6, 256]))
    """

    model: HookedTextToImage
    heads: Mapping[int, Sequence[int]] | None
    """Layer → the heads that were kept of it, ascending; None for all heads of all layers."""

    def __init__(
        self,
        cache_dict: Mapping[str, Any],  # tensors; no item is read to check its type
        model: HookedTextToImage,
        noise_levels: Sequence[tuple[float, float]] = (),
        heads: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(cache_dict, model)
        self.noise_levels, self.heads = noise_levels, heads

    @classmethod
    def load(cls, folder: str | Path, model: HookedTextToImage | None = None) -> GenerationCache:
        """Open the cache that `run_with_cache(…, out=folder)` wrote; a tensor is read on first use.

        Args:
            folder: the folder of the cache; it is not written to.
            model: the one that it was made with; without it, a model without weights is opened,
                which has all names.

        Raises:
            FileNotFoundError: the folder holds no cache, its generation has not ended, or a file is
                missing.
            OSError: a file is damaged; found out at the latest when a tensor is read from it.
            ValueError: no model was given, and none that can be found again was recorded.
        """
        folder = Path(folder)
        index = open_cache(folder)
        if index is None:
            raise FileNotFoundError(
                f"{folder} holds no finished cache: run_with_cache(…, out={str(folder)!r}) writes "
                "one."
            )
        index.path(IMAGES)
        tensors, facts = LazyTensors(index), index.facts
        if tensors.digest != facts["names"]:
            for name in index.files:
                index.path(name)  # raises
        if model is None:
            source = facts["source"] and recorded_source(*facts["source"])
            if not source:
                raise ValueError(
                    f"{folder} does not say which model it is of: pass it, "
                    "GenerationCache.load(folder, model)."
                )
            from .. import HookedTextToImage  # looked up in the table of public names

            model = HookedTextToImage.from_pretrained(
                source, revision=facts["source"][1], weights=False
            )
        heads = (
            None
            if facts.get("heads") is None
            else {int(layer): some for layer, some in facts["heads"].items()}
        )
        return cls(
            tensors, model, [(alpha, sigma) for alpha, sigma in facts["noise_levels"]], heads
        )

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str):
            if key not in self.cache_dict and key.startswith("steps.") and key.endswith(".eps"):
                return self._noise(int(key.split(".")[1]))
            return look_up(
                self.cache_dict, key if key in self.cache_dict else self.model.names.site(key).name
            )
        if not isinstance(key, tuple) or not 4 <= len(key) <= 5:
            raise KeyError(
                "Say which step: cache[name, layer, sublayer, step], or "
                f"cache.at(step=…)[{shown(key)}]."
            )
        name, layer, sublayer, step, branch = (*key, "cond")[:5]
        return self[f"steps.{self._step(step)}.{self._inner(name, layer, sublayer, branch)}"]

    def _step(self, step: Any) -> int:
        """A cached step; negative ones count the cached steps from the end."""
        found, steps = integer("step", step), self.steps
        found = steps[found] if -len(steps) <= found < 0 else found
        if found not in steps:
            raise KeyError(f"Nothing is cached at step {step}: this cache has steps {steps}.")
        return found

    def _inner(self, name: Any, layer: Any, sublayer: Any, branch: Any) -> str:
        """The name after the step: with the branch, where the tensor belongs to one."""
        inner = expand_shorthand(name, layer, sublayer, self.model.cfg.n_layers)
        if inner in self.model.names.sampler.hook_dict:
            return inner
        if inner not in self.model.dit.mod_dict:
            raise unknown_hook(
                inner, [known for known in self.model.dit.mod_dict if "hook_" in known]
            )
        return f"{one_of('branch', branch, BRANCHES)}.{self.model.dit.mod_dict[inner].name}"

    def __fingerprint__(self) -> dict[str, Tensor]:
        """Identify the cache in the settings of results: by its tensors, not its model."""
        return dict(self.cache_dict)

    def _noise(self, step: int) -> Tensor:
        alpha, sigma = self.noise_levels[step]
        return (self[f"steps.{step}.hook_latent"] - alpha * self[f"steps.{step}.hook_x0"]) / sigma

    @property
    def steps(self) -> list[int]:
        """The denoising steps that something was cached at."""
        return sorted(
            {int(name.split(".")[1]) for name in self.cache_dict if name.startswith("steps.")}
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, in memory or on disk; a tensor with several names counts once."""
        if isinstance(self.cache_dict, LazyTensors):
            return self.cache_dict.nbytes
        return sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in self.cache_dict.values()}.values()
        )

    def at(self, step: int, branch: Branch = "cond") -> DiTCache:
        """The cache of one denoiser call, under canonical names.

        TransformerLens' tools take it.

        Raises:
            KeyError: nothing was cached there.
        """
        prefix = f"steps.{self._step(step)}.{one_of('branch', branch, BRANCHES)}."
        found = {
            k.removeprefix(prefix): self.cache_dict[k]
            for k in self.cache_dict
            if k.startswith(prefix)
        }
        if not found:
            raise KeyError(
                f"Nothing is cached at step {step}, branch {branch!r}; steps with entries: "
                f"{self.steps}."
            )
        return DiTCache(found, self.model.dit)

    def stack(
        self,
        name: str,
        layer: int | None = None,
        sublayer: str | None = None,
        branch: Branch = "cond",
    ) -> Tensor:
        """One tensor over the cached steps: [step batch …], steps ascending (`cache.steps`)."""
        inner = self._inner(name, layer, sublayer, branch)
        names = [full for s in self.steps if (full := f"steps.{s}.{inner}") in self.cache_dict]
        if not names:
            return look_up(self.cache_dict, f"steps.*.{inner}")  # raises
        return torch.stack([self.cache_dict[full] for full in names])

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> GenerationCache:
        """Some prompts of the batch. Raises TypeError for a single number: the batch axis stays."""
        if isinstance(batch_slice, int):
            raise TypeError(
                f"A whole generation's cache keeps its batch axis: take slice({batch_slice}, "
                f"{batch_slice + 1})."
            )
        sliced = super().apply_slice_to_batch_dim(batch_slice).cache_dict
        return GenerationCache(sliced, self.model, self.noise_levels, self.heads)

    def remove_batch_dim(self) -> GenerationCache:
        """Raises TypeError: `run_with_cache` says why."""
        raise TypeError(KEEPS_BATCH)

    def __repr__(self) -> str:
        return f"GenerationCache({len(self)} tensors at steps {self.steps}, {human(self.nbytes)})"


# How much a cache will take
