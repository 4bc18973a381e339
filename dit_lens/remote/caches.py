"""nnsight's names and ours.

Modules renamed, and recordings of `tracer.cache()` opened as one of our caches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from einops import rearrange
from torch import Tensor

from hooked_models import DiTCache, GenerationCache, HookedTextToImage
from hooked_models.pixart.dit import HookedDiT

RENAME = {
    "transformer": "dit",
    "transformer_blocks": "blocks",
    "attn1": "attn",
    "attn2": "cross_attn",
    "ff": "mlp",
    "norm1": "ln1",
    "norm2": "ln2",
    "norm_out": "ln_final",
}
"""For `nnsight.DiffusionModel(…, rename=RENAME)`, as nnterp does it: a module of diffusers → its
name here.
"""

OUTPUTS = {
    "adaln_single.emb": "hook_t_emb",
    "adaln_single.linear": "hook_t_mod",
    "caption_projection": "hook_caption",
    "norm_out": "ln_final.hook_normalized",
    "norm1": "ln1.hook_normalized",
    "attn1": "hook_attn_out_pre_gate",
    "attn1.to_q": "attn.hook_q",
    "attn1.to_k": "attn.hook_k",
    "attn1.to_v": "attn.hook_v",
    "attn2": "hook_cross_attn_out",
    "attn2.to_q": "cross_attn.hook_q",
    "attn2.to_k": "cross_attn.hook_k",
    "attn2.to_v": "cross_attn.hook_v",
    "norm2": "ln2.hook_normalized",
    "ff.net.0.proj": "mlp.hook_pre",
    "ff": "hook_mlp_out_pre_gate",
    "": "hook_resid_post",
}
"""A module of diffusers' denoiser (within a block, where it is in one) → the tensor that is its
output.
"""
INPUTS = {
    "caption_projection": "hook_text",
    "attn1.to_out.0": "attn.hook_z",
    "attn2": "hook_resid_mid",
    "attn2.to_out.0": "cross_attn.hook_z",
    "norm2": "hook_resid_mid_cross",
    "ff.net.2": "mlp.hook_post",
    "": "hook_resid_pre",
}
"""And its first input."""


def open_cache(
    view: Any, model: HookedTextToImage | HookedDiT, guided: bool = True
) -> GenerationCache | DiTCache:
    """Open a recording of `tracer.cache(…)` as a cache under our names.

    Two kinds are opened. A trace of the hooked denoiser itself
    (`nnsight.NNsight(model.dit).trace(…)`) becomes a DiTCache with every HookPoint recorded. A
    generation (`nnsight.DiffusionModel(…).generate(…)`, renamed or not) becomes a GenerationCache
    of those modules of the denoiser whose output (and, with `include_inputs=True`, input) has a
    name here, for every step and branch.

    Args:
        view: returned by `tracer.cache`, after the trace.
        model: the hooked denoiser that was traced, or the model of the generation (a
            `RemoteTextToImage` serves).
        guided: whether the generation's guidance was above 1, so that its rows are those of two
            branches.

    Raises:
        ValueError: nothing in it has a name here.

    Example:
        >>> import copy, nnsight, torch
        >>> from hooked_models import HookedTextToImage
        >>> dit = HookedDiT(
        ...     copy.deepcopy(HookedTextToImage.from_pretrained("rte-nano").dit.wrapped)
        ... )
        >>> latents, text = torch.randn(1, 24, 16, 16), torch.randn(1, 5, dit.cfg.d_text)
        >>> traced = nnsight.NNsight(dit)
        >>> with (
        ...     torch.no_grad(),
        ...     traced.trace(latents, text, torch.tensor([900.0]), return_dict=False) as tracer,
        ... ):
        ...     view = tracer.cache()
        >>> open_cache(view, dit)["pattern", 2, "cross_attn"].shape
        torch.Size([1, 3, 64, 5])
    """
    found: dict[str, Tensor] = {}
    for path in view.keys():  # noqa: SIM118  (a view has no iterator)
        if isinstance(model, HookedDiT):
            name = path.removeprefix("model.")
            found |= {name: view[path].output} if name in model.hook_dict else {}
            continue
        for inner, kind in _names_here(path):
            for step, tensor in enumerate(_values(view[path], kind)):
                if isinstance(tensor, Tensor):
                    parts = _branches(_by_head(tensor, inner, model.cfg.n_heads), guided)
                    found |= {
                        f"steps.{step}.{branch}.{inner}": part for branch, part in parts.items()
                    }
    if not found:
        raise ValueError(
            "Nothing that was recorded has a name here: cache modules of the denoiser, with "
            "include_inputs=True."
        )
    return DiTCache(found, model) if isinstance(model, HookedDiT) else GenerationCache(found, model)


_OUTSIDE = ("adaln_single.emb", "adaln_single.linear", "caption_projection", "norm_out")


def _names_here(path: str) -> Iterator[tuple[str, Literal["output", "input"]]]:
    """(name in our denoiser, which tensor of the module) for a module's path."""
    name, layer = _in_diffusers(path)
    if name is None or (layer is None) != (name in _OUTSIDE):
        return
    prefix = "" if layer is None else f"blocks.{layer}."
    if name in OUTPUTS:
        yield prefix + OUTPUTS[name], "output"
    if name in INPUTS:
        yield prefix + INPUTS[name], "input"


def _by_head(tensor: Tensor, name: str, n_heads: int) -> Tensor:
    if name.rpartition(".")[2] not in ("hook_q", "hook_k", "hook_v", "hook_z"):
        return tensor
    return rearrange(tensor, "batch pos (head d_head) -> batch pos head d_head", head=n_heads)


def _branches(tensor: Tensor, guided: bool) -> dict[str, Tensor]:
    return (
        dict(zip(("uncond", "cond"), tensor.chunk(2), strict=True)) if guided else {"cond": tensor}
    )


def _in_diffusers(path: str) -> tuple[str | None, int | None]:
    """Module and layer of one of diffusers' names, renamed or not; (None, None) elsewhere.

    ("attn2.to_q", 3) of "model.transformer.transformer_blocks.3.attn2.to_q".
    """
    back = {ours: theirs for theirs, ours in RENAME.items()}
    parts = [back.get(part, part) for part in path.split(".")]
    if parts[:2] != ["model", "transformer"]:
        return None, None
    inside = re.fullmatch(r"transformer_blocks\.(\d+)\.?(.*)", ".".join(parts[2:]))
    return (inside[2], int(inside[1])) if inside else (".".join(parts[2:]), None)


def _values(entries: Any, kind: str) -> list[Any]:
    """Recorded values, step by step."""
    value = getattr(entries, kind)
    return value if isinstance(value, list) else [value]
