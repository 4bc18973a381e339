"""Where things are in a block, and the kinds of blocks that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..hooks.streams import Axes


@dataclass(frozen=True)
class Attention:
    """Where an attention of a block is."""

    path: str
    """Module within the block; dots lead further in."""
    queries: str = "joint"
    """Stream of its queries: "image", "text", or "joint" for both."""
    keys: str = "joint"
    weights: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    """Projections that are not the attention's own `to_q` … `to_out`: "Q", "K", "V", "O" → weight
    [d_out d_in] of a block.
    """


@dataclass(frozen=True)
class Write:
    """Output of a block's module that is added to the residual stream."""

    path: str
    streams: tuple[str, ...]
    """Stream of each tensor that it returns."""
    call: int = 0
    """Which call of the module, where a block calls it once for each stream."""
    axes: Axes = "batch pos d"


@dataclass(frozen=True)
class Blocks:
    """A list of blocks of one kind."""

    path: str
    attentions: Mapping[str, Attention]
    """Our name → where. attn: image ↔ image, or both streams; cross_attn: image ← text; image_attn:
    image ↔ image in a model whose attn joins both. A name has the same positions in every block.
    """
    enters: Mapping[str, str]
    """Argument of the block's forward → the stream that it carries."""
    leaves: tuple[str, ...]
    """Streams that the block returns, in order."""
    writes: Mapping[str, Write] = field(default_factory=dict)
    """Last part of a hook's name, without "hook_" → where."""
    axes: Axes = "batch pos d"
    """Axes of the residual stream."""
    text_if: str = ""
    """Module without which a block returns no text: its last one, whose text nobody reads."""


def two_streams(
    path: str,
    attn: str = "attn",
    mlp: str = "ff",
    text_mlp: str = "ff_context",
    leaves: tuple[str, ...] = ("text", "image"),
    image_attn: str | None = None,
    weights: Mapping[str, Callable[[Any], Tensor]] | None = None,
) -> Blocks:
    """Blocks with a stream for the image and one for the text, joined in one attention (MM-DiT)."""
    attentions = {"attn": Attention(attn, weights=weights or {})}
    writes = {
        "attn_out_pre_gate": Write(attn, ("image", "text")),
        "mlp_out_pre_gate": Write(mlp, ("image",)),
        # one MLP, called for each
        "text_mlp_out_pre_gate": Write(text_mlp, ("text",), call=int(text_mlp == mlp)),
    }
    if image_attn is not None:
        attentions["image_attn"] = Attention(image_attn, "image", "image")
        writes["image_attn_out_pre_gate"] = Write(image_attn, ("image",))
    return Blocks(
        path,
        attentions,
        {"hidden_states": "image", "encoder_hidden_states": "text"},
        leaves,
        writes,
        text_if=text_mlp,
    )


def joint_streams(path: str, attn: str) -> Blocks:
    """Blocks with a stream for the image and one for the text, joined in attention and MLP."""
    streams = two_streams(path, attn, leaves=("image", "text"))
    writes = {
        "attn_out_pre_gate": streams.writes["attn_out_pre_gate"],
        "mlp_out_pre_gate": Write("ff", ("joint",)),
    }
    return replace(streams, writes=writes, text_if="")


def one_stream(
    path: str,
    attn: str = "attn",
    attn_out: str | None = None,
    mlp_out: str = "ff",
    enters: str = "hidden_states",
) -> Blocks:
    """Blocks with one stream of image and text, and attention and MLP one after the other.

    `attn_out`: module whose output is gated and added, where that is not the attention's own (a
    norm after it).
    """
    writes = {
        "attn_out_pre_gate": Write(attn_out or attn, ("joint",)),
        "mlp_out_pre_gate": Write(mlp_out, ("joint",)),
    }
    return Blocks(
        path,
        {"attn": Attention(attn)},
        {enters: "joint"},
        ("joint",),
        writes,
    )


def weight(path: str, part: int = 0, parts: int = 1) -> Callable[[Any], Tensor]:
    """Weight of a Linear in a block, or one of equal parts of its outputs."""
    return lambda block: block.get_submodule(path).weight.chunk(parts)[part]


def of_heads(path: str) -> Callable[[Any], Tensor]:
    """Attention's columns of a Linear that reads heads and MLP at once."""
    return lambda block: block.get_submodule(path).weight[:, : block.attn.inner_dim]


def parallel_streams(
    path: str, joined: bool = False, leaves: tuple[str, ...] = ("text", "image")
) -> Blocks:
    """FLUX's single blocks: attention and MLP side by side, one projection for both.

    `joined`: the streams enter and leave as one tensor.
    """
    return Blocks(
        path,
        {"attn": Attention("attn", weights={"O": of_heads("proj_out")})},
        {"hidden_states": "joint"}
        if joined
        else {"hidden_states": "image", "encoder_hidden_states": "text"},
        ("joint",) if joined else leaves,
        {"attn_mlp_out_pre_gate": Write("proj_out", ("joint",))},
    )


def width_sizes(heads: str, width: str) -> Callable[[Any], tuple[int, int, int]]:
    """n_heads, d_head and d_model of a config that names the number of heads and the width."""

    def sizes(live: Any) -> tuple[int, int, int]:
        n_heads, d_model = live.config[heads], live.config[width]
        return n_heads, d_model // n_heads, d_model

    return sizes


def cross_attending(
    path: str,
    attn: str | None = "attn1",
    mlp: str = "ff",
    gated: tuple[str, ...] = ("attn", "mlp"),
) -> Blocks:
    """Blocks with the image's stream alone, which reads the text by cross-attention.

    `gated`: which of "attn", "cross_attn" and "mlp" pass a gate before they are added.
    """
    attentions = {"cross_attn": Attention("attn2", "image", "text")}
    if attn is not None:
        attentions = {"attn": Attention(attn, "image", "image")} | attentions
    modules = {name: found.path for name, found in attentions.items()} | (
        {"mlp": mlp} if mlp else {}
    )
    writes = {
        f"{name}_out" + ("_pre_gate" if name in gated else ""): Write(path_, ("image",))
        for name, path_ in modules.items()
    }
    return Blocks(path, attentions, {"hidden_states": "image"}, ("image",), writes)
