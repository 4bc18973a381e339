"""Heat maps: attention from places of the image to words, summed as it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, get_args

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hooked_models import HookedTextToImage
from hooked_models.arguments import chosen_steps, one_of
from hooked_models.generation.loops import Call
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.generation.names import Site
from hooked_models.generation.noise import Seeds
from hooked_models.generation.trajectory import Run
from hooked_models.hooks.table import JOINT_POSITIONS, TEXT_POSITIONS

from ..intervene.interventions import Steps
from ..intervene.portable_ops import sums_of_attention
from ..remote.model import RemoteTextToImage
from ..remote.plan import GroupSum
from ..text.prompts import Word, token_mask, word
from .group_attention import cond_rows, run_reading

By = Literal["layer", "head", "step"]


@torch.no_grad()
def heatmap(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    words: str | Word | Sequence[str | Word | Sequence[int]],
    seed: Seeds = 0,
    num_steps: int = DEFAULT_STEPS,
    *,
    by: Sequence[By] = (),
    steps: Steps = None,
    **options: Any,
) -> xr.DataArray:
    """Attention from each image position to the tokens of a word, in the conditional branch.

    No pattern is kept: a word's column is exp(q·k − log-sum-exp), of which the fused kernel gives
    the last; where it does not (GPUs, other kernels), queries attend once more, with the words'
    indicators in place of values. Attached hooks act. In models with joint attention a query's
    attention to all of the image and the text sums to 1, in cross-attention its attention to the
    text. Source: Tang et al. 2022, arXiv 2210.04885 (DAAM), without its upsampling.

    Args:
        model: hooked model; hooks that are attached to it act.
        prompts: one prompt or several, each with every word.
        words: a word or phrase, `prompts.word("cat", nth=2)`, or several of them or of lists of
            text positions; tokens of all text encoders that spell a word count.
        seed: an int gives every prompt the same noise; a sequence has one seed a prompt.
        num_steps: denoising steps of the generation.
        by: dims to keep; the map is the mean over the others.
        steps: denoising steps that count, by default all.
        options: further arguments of the model's call (`guidance`, `height`, `max_sequence_length`,
            …).

    Returns:
        Dims (prompt, word, layer, head, step, y, x), those of `layer head step` that are in `by`; a
        video has `frame` before `y`. Layers without attention to the text are left out.

    Raises:
        ValueError: a prompt lacks a word (the message lists its words), or there is no such step.

    Example:
        >>> found = heatmap(
        ...     model,
        ...     "red circle is above blue square",
        ...     ["circle", "square"],
        ...     num_steps=2,
        ...     by=["layer"],
        ... )
        >>> dict(found.sizes)
        {'prompt': 1, 'word': 2, 'layer': 3, 'y': 8, 'x': 8}
    """
    run: dict[str, Any] = {"seed": seed, "num_steps": num_steps, **options}
    return heatmap_and_run(model, prompts, words, by, steps, **run)[0]


@torch.no_grad()
def heatmap_and_run(
    model: HookedTextToImage,
    prompts: str | Sequence[str],
    words: str | Word | Sequence[str | Word | Sequence[int]],
    by: Sequence[By] = (),
    steps: Steps = None,
    **run: Any,
) -> tuple[xr.DataArray, Run | None]:
    """`heatmap`, and the generation that it was read in; None behind nnsight.

    `run`: arguments of the model's call.

    Example:
        >>> maps, made = heatmap_and_run(model, "red circle", "circle", num_steps=1)
        >>> made.images.shape
        torch.Size([1, 3, 128, 128])
    """
    by = kept_dims(by, get_args(By))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    several = [words] if isinstance(words, (str, Word)) else list(words)
    masks = _word_masks(model, texts, several, run)
    remote = isinstance(model, RemoteTextToImage)
    inputs = model.draft(texts, **run) if remote else model.trajectory(texts, until=0, **run).inputs
    n_steps = len(inputs.solver)
    at_steps = list(chosen_steps(steps, n_steps))
    places = [at_steps.index(s) if s in at_steps else None for s in range(n_steps)]
    maps = _Maps(model, masks, places, len(at_steps), by)

    def readers(call: Call) -> dict[Any, _Reader]:
        return (
            {each.attention: each for each in maps.readers(call)} if call.step in at_steps else {}
        )

    made = None
    if isinstance(model, RemoteTextToImage):
        maps.ask(model, texts, inputs)
    else:
        made = run_reading(model, inputs, readers)
    names = [one if isinstance(one, str) else str(one) for one in several]
    return maps.labelled(texts, names, at_steps, model.layout(inputs).grid), made


def kept_dims(by: Any, known: Sequence[str]) -> list[Any]:
    """Dims to keep, from one or several. Raises ValueError for an unknown one."""
    return [one_of("by", dim, tuple(known)) for dim in ([by] if isinstance(by, str) else by)]


def _word_masks(
    model: HookedTextToImage,
    texts: Sequence[str],
    words: Sequence[str | Word | Sequence[int]],
    run: Mapping[str, Any],
) -> Bool[Tensor, "prompt text_pos word"]:
    known = ("seed", "num_steps", "guidance", "latents")
    of_call: dict[str, Any] = {}
    if hasattr(model.dit, "layout"):
        of_call = {name: value for name, value in run.items() if name not in known}
    chosen = [word(one) if isinstance(one, str) else one for one in words]
    return torch.stack([token_mask(model, texts, one, **of_call) for one in chosen], dim=-1)


def text_attentions(dit: Any) -> dict[int, str]:
    """Layer → the name of its attention whose keys hold text.

    Raises:
        ValueError: the denoiser has none.

    Example:
        >>> text_attentions(HookedTextToImage.from_pretrained("rte-nano").dit)[0]
        'cross_attn'
    """
    found: dict[int, str] = {}
    for name in dit.hook_dict:
        if (
            name.endswith(".hook_pattern")
            and dit.axes(name)[-1] in TEXT_POSITIONS + JOINT_POSITIONS
        ):
            _, layer, sublayer, _ = name.split(".")
            found[int(layer)] = sublayer
    if not found:
        raise ValueError(f"{type(dit).__name__} has no attention to a text.")
    return found


@dataclass
class _Maps:
    """Sums of maps, over the dims that are not kept."""

    model: HookedTextToImage
    masks: Bool[Tensor, "prompt text_pos word"]
    place: Sequence[int | None]
    """Weight of each step among those that count."""
    n_steps: int
    by: Sequence[By]
    sums: Float[Tensor, "prompt word layer head step pos"] | None = None
    attentions: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.attentions = text_attentions(self.model.dit)

    def readers(self, call: Call) -> list[_Reader]:
        """One for each attention to the text, for one denoiser call."""
        dit: Any = self.model.dit
        found = []
        for number, (layer, name) in enumerate(self.attentions.items()):
            joint = dit.axes(f"blocks.{layer}.{name}.hook_pattern")[-1] in JOINT_POSITIONS
            found.append(
                _Reader(self, dit.get_submodule(f"blocks.{layer}.{name}"), number, call, joint)
            )
        return found

    def add(self, number: int, step: int, found: Float[Tensor, "prompt head pos word"]) -> None:
        """Add the maps of one attention at one step."""
        n_prompts, n_heads, n_pos, n_words = found.shape
        sizes = {"layer": len(self.attentions), "head": n_heads, "step": self.n_steps}
        if self.sums is None:
            kept = [size if dim in self.by else 1 for dim, size in sizes.items()]
            self.sums = found.new_zeros(n_prompts, n_words, *kept, n_pos)
        maps = found.permute(0, 3, 1, 2)
        maps = maps if "head" in self.by else maps.sum(2, keepdim=True)
        at_step = self.place[step]
        assert at_step is not None
        self.sums[
            :, :, number if "layer" in self.by else 0, :, at_step if "step" in self.by else 0
        ] += maps

    def ask(self, model: RemoteTextToImage, prompts: Sequence[str], draft: Any) -> None:
        """Add the maps of a run behind nnsight, which are summed where the model is."""
        layout, sums = model.layout(draft), []
        for number, (layer, name) in enumerate(self.attentions.items()):
            pattern = Site("dit", f"blocks.{layer}.{name}.hook_pattern", 0, "cond")
            n_keys = model.shape(draft, pattern)[-1]
            start = layout.n_image if model.dit.axes(pattern.inner)[-1] in JOINT_POSITIONS else 0
            masks = self.masks[:, : n_keys - start].float()
            keys = torch.nn.functional.pad(masks, (0, 0, start, n_keys - start - masks.shape[1]))
            sums += [
                GroupSum(
                    f"blocks.{layer}.{name}",
                    *(step, "cond", None, keys, "sum"),
                    key=(number if "layer" in self.by else 0, place if "step" in self.by else 0),
                    over_heads="head" not in self.by,
                )
                for step, place in enumerate(self.place)
                if place is not None
            ]
        added = model.ask(prompts, draft, sums=sums)["added"]
        maps = {key: one[:, :, : layout.n_image].permute(0, 3, 1, 2) for key, one in added.items()}
        layers, steps = (sorted({key[axis] for key in maps}) for axis in (0, 1))
        by_layer = [torch.stack([maps[layer, step] for step in steps], dim=3) for layer in layers]
        self.sums = torch.stack(by_layer, dim=2)

    def labelled(
        self,
        prompts: Sequence[str],
        words: Sequence[str],
        steps: Sequence[int],
        grid: tuple[int, int, int],
    ) -> xr.DataArray:
        assert self.sums is not None
        dit: Any = self.model.dit
        coords: dict[str, Any] = {
            "layer": list(self.attentions),
            "head": range(dit.cfg.n_heads),
            "step": steps,
        }
        divisor = prod(len(values) for dim, values in coords.items() if dim not in self.by)
        values = self.sums.div(divisor).squeeze(
            [i for i, dim in enumerate(coords, start=2) if dim not in self.by]
        )
        rows, columns, frames = grid
        place: dict[str, int] = (
            {"frame": frames, "y": rows, "x": columns} if frames > 1 else {"y": rows, "x": columns}
        )
        kept = {dim: values for dim, values in coords.items() if dim in self.by}
        dims = ("prompt", "word", *kept, *place)
        shaped = values.reshape(*values.shape[:-1], *place.values()).cpu().numpy()
        return xr.DataArray(
            shaped,
            dims=dims,
            coords={"prompt": list(prompts), "word": list(words), **kept},
            name="attention",
        )


def grid_of(dit: Any, latent: Float[Tensor, "batch ..."]) -> tuple[int, int, int]:
    """Rows, columns and frames of the image positions of a denoiser's last call.

    Example:
        >>> grid_of(model.dit, model.noise())
        (8, 8, 1)
    """
    if (layout := getattr(dit, "layout", None)) is not None:
        return layout.grid
    rows, columns = (size // dit.cfg.patch_size for size in latent.shape[-2:])
    return rows, columns, 1


def columns_of_attention(
    q: Float[Tensor, "row query_pos head d_head"],
    k: Float[Tensor, "row key_pos head d_head"],
    bias: Float[Tensor, "#row #head _ key_pos"] | None,
    scale: float,
    log_sums: Float[Tensor, "row head query_pos"],
    keys: Float[Tensor, "row key_pos group"],
) -> Float[Tensor, "row head query_pos group"]:
    """Attention to groups of keys from the log-sum-exp of all scores, without a softmax.

    It is exp(score − log-sum-exp) of the groups' own keys.

    Example:
        >>> q = torch.randn(1, 3, 2, 4)
        >>> sums = torch.einsum("bqhd,bkhd->bhqk", q, q).logsumexp(-1)
        >>> columns_of_attention(q, q, None, 1.0, sums, torch.ones(1, 3, 1)).shape
        torch.Size([1, 2, 3, 1])
    """
    own = keys.any(dim=2).any(dim=0).nonzero().flatten()
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.transpose(1, 2).to(dtype) @ k[:, own].permute(0, 2, 3, 1).to(dtype)
    scores = scores * scale - log_sums[..., None]
    scores = scores if bias is None else scores + bias[..., own]
    return scores.exp() @ keys[:, own].to(dtype)[:, None]


@dataclass(repr=False, eq=False)  # TransformerLens calls repr of every hook
class _Reader:
    """Adds the maps of one attention in one call."""

    maps: _Maps
    attention: Any
    number: int
    call: Call
    joint: bool

    def read(
        self,
        q: Float[Tensor, "row query_pos head d_head"],
        k: Float[Tensor, "#row key_pos head d_head"],
        bias: Float[Tensor, "#row #head _ key_pos"] | None,
    ) -> Callable[[Tensor | None], None]:
        rows, places = cond_rows(self.call, len(q)), slice(self._n_image(q.shape[1]))
        q, k = q[rows, places], k.expand(len(q), -1, -1, -1)[rows]
        if bias is not None:
            bias = bias[rows] if len(bias) > 1 else bias
            bias = bias[:, :, places] if bias.shape[2] > 1 else bias

        def add(log_sums: Float[Tensor, "row head query_pos"] | None) -> None:
            keys, scale = self._keys(k.shape[1], k), self.attention.scale
            if log_sums is None:
                found = sums_of_attention(q, k, bias, scale, None, keys, "sum")
            else:
                found = columns_of_attention(q, k, bias, scale, log_sums[rows, :, places], keys)
            dtype = torch.promote_types(found.dtype, torch.float32)
            self.maps.add(self.number, self.call.step, found.to(dtype))

        return add

    def read_pattern(
        self, pattern: Float[Tensor, "row head query_pos key_pos"], hook: HookPoint
    ) -> None:
        pattern = pattern[cond_rows(self.call, len(pattern)), :, : self._n_image(pattern.shape[2])]
        pattern = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
        keys = self._keys(pattern.shape[-1], pattern)
        self.maps.add(self.number, self.call.step, pattern @ keys[:, None])

    def _n_image(self, n_queries: int) -> int:
        layout = getattr(self.maps.model.dit, "layout", None)
        return n_queries if layout is None else layout.n_image

    def _keys(self, n_keys: int, like: Tensor) -> Float[Tensor, "prompt key_pos word"]:
        """1 where a key is a token of a word."""
        masks = self.maps.masks
        keys = like.new_zeros(len(masks), n_keys, masks.shape[2])
        start = self._n_image(0) if self.joint else 0
        n = min(masks.shape[1], n_keys - start)
        keys[:, start : start + n] = masks[:, :n].to(like)
        return keys
