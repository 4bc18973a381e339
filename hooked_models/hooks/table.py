"""HOOKS: one row for each hook name, with axes, flag and when it fires.

Axes are those of its tensor, the flag is the one that it needs. Shapes, head and position axes,
token selection, memory estimates and the page docs/hooks.md are read from this table. The axes of a
hook of a given model are `model.dit.axes(name)`: models with joint attention name their positions
"joint_pos".

Axis names: `batch` rows (prompts); `pos`, `query_pos`, `key_pos` image positions, row by row;
`text_pos`, `query_text_pos`, `key_text_pos` tokens of the prompt; `joint_pos`, `joint_query_pos`,
`joint_key_pos` both, image first; `one` an axis of size 1; `d_…` widths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

HookPart = Literal["dit", "sampler", "text_encoder"]
Axes = tuple[str, ...]

IMAGE_POSITIONS = ("pos", "query_pos", "key_pos")
TEXT_POSITIONS = ("text_pos", "query_text_pos", "key_text_pos")
JOINT_POSITIONS = ("joint_pos", "joint_query_pos", "joint_key_pos")
POSITIONS = {"image": (*IMAGE_POSITIONS, *JOINT_POSITIONS), "text": TEXT_POSITIONS}
"""Kind of position → names of the axes that hold it. Joint axes begin with the image."""


@dataclass(frozen=True)
class Hook:
    """One row of the table.

    Args:
        name: within its part, `{l}` for the layer.
        axes: of the tensor; axis 0 is the batch.
        part: the denoiser, the sampler between its calls ("sampler"), or the text encoder.
        flag: of `cfg`, without which the hook does not fire; None for a hook that always fires.
    """

    name: str
    axes: Axes
    part: HookPart = "dit"
    flag: str | None = None

    @property
    def fires(self) -> Literal["once", "step", "call"]:
        """Once a run, at every denoising step, or at every denoiser call.

        Each step, in each guidance branch.
        """
        if self.part == "text_encoder" or self.name == "hook_image":
            return "once"
        return "call" if self.part == "dit" else "step"

    @property
    def full_name(self) -> str:
        """The name in a whole generation, with `{s}` for the step and `{branch}`.

        As runs and caches use it; the branch is cond or uncond.
        """
        if self.part == "text_encoder":
            return f"text_encoder.{self.name}"
        prefix = {"once": "", "step": "steps.{s}.", "call": "steps.{s}.{branch}."}[self.fires]
        return prefix + self.name


STREAM, HEADS, INPUT = (
    ("batch", "pos", "d_model"),
    ("batch", "pos", "head", "d_head"),
    ("batch", "pos", "head", "d_model"),
)
SPLIT, RESULT, FORK, MLP_IN = (
    "use_split_qkv_input",
    "use_attn_result",
    "use_attn_in",
    "use_hook_mlp_in",
)


def _attention(name: str, keys: str, d_in: str) -> Iterator[Hook]:
    """The hooks of one attention.

    `keys`: "" for keys of the image, "text_" for keys of the prompt.
    """
    at, key_pos = f"blocks.{{l}}.{name}.hook_", f"{keys}pos"
    pattern = ("batch", "head", "query_pos", f"key_{keys}pos")
    yield Hook(at + "q_input", INPUT, flag=SPLIT)
    yield Hook(at + "k_input", ("batch", key_pos, "head", d_in), flag=SPLIT)
    yield Hook(at + "v_input", ("batch", key_pos, "head", d_in), flag=SPLIT)
    yield Hook(at + "q", HEADS)
    yield Hook(at + "k", ("batch", key_pos, "head", "d_head"))
    yield Hook(at + "v", ("batch", key_pos, "head", "d_head"))
    yield Hook(at + "attn_scores", pattern)
    yield Hook(at + "pattern", pattern)
    yield Hook(at + "z", HEADS)
    yield Hook(at + "result", INPUT, flag=RESULT)


def _norm(name: str) -> Iterator[Hook]:
    yield Hook(f"{name}.hook_scale", ("batch", "pos", "one"))
    yield Hook(f"{name}.hook_normalized", STREAM)


def _block() -> Iterator[Hook]:
    """Rows of every denoiser; each family has some of them."""
    at, modulation = "blocks.{l}.", ("batch", "one", "d_model")
    for vector in ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"):
        yield Hook(f"{at}adaln.hook_{vector}", modulation)
    yield Hook(at + "adaln.hook_cond", ("batch", "d_model"))
    yield Hook(at + "hook_resid_pre", STREAM)
    yield Hook(at + "hook_attn_in", INPUT, flag=FORK)
    yield from _norm(at + "ln1")
    yield from _attention("attn", "", "d_model")
    yield Hook(at + "hook_attn_out_pre_gate", STREAM)
    yield Hook(at + "hook_attn_out", STREAM)
    yield Hook(at + "hook_resid_mid", STREAM)
    yield Hook(at + "hook_cross_attn_in", INPUT, flag=FORK)
    yield from _attention("cross_attn", "text_", "d_caption")
    yield Hook(at + "hook_cross_attn_out_pre_gate", STREAM)
    yield Hook(at + "hook_cross_attn_out", STREAM)
    yield Hook(at + "hook_resid_mid_cross", STREAM)
    yield from _attention("image_attn", "", "d_model")
    yield Hook(at + "hook_image_attn_out_pre_gate", STREAM)
    yield Hook(at + "hook_mlp_in", STREAM, flag=MLP_IN)
    yield from _norm(at + "ln2")
    yield Hook(at + "mlp.hook_pre", ("batch", "pos", "d_mlp"))
    yield Hook(at + "mlp.hook_post", ("batch", "pos", "d_mlp"))
    yield Hook(at + "hook_mlp_out_pre_gate", STREAM)
    yield Hook(at + "hook_text_mlp_out_pre_gate", ("batch", "text_pos", "d_model"))
    yield Hook(at + "hook_attn_mlp_out_pre_gate", STREAM)
    yield Hook(at + "hook_mlp_out", STREAM)
    yield Hook(at + "hook_resid_post", STREAM)


def _denoiser() -> Iterator[Hook]:
    yield Hook("hook_embed", STREAM)
    yield Hook("hook_pos_embed", STREAM)
    yield Hook("hook_t_emb", ("batch", "d_model"))
    yield Hook("hook_t_mod", ("batch", "six_d_model"))
    yield Hook("hook_text", ("batch", "text_pos", "d_text"))
    yield Hook("hook_caption", ("batch", "text_pos", "d_caption"))
    yield from _block()
    yield from _norm("ln_final")
    yield Hook("hook_final_cond", ("batch", "d_model"))


def _sampler() -> Iterator[Hook]:
    latent, prediction = (
        ("batch", "channel", "rows", "columns"),
        ("batch", "out_channel", "rows", "columns"),
    )
    yield Hook("hook_latent", latent, "sampler")
    yield Hook("hook_out_uncond", prediction, "sampler")
    yield Hook("hook_out_cond", prediction, "sampler")
    yield Hook("hook_out", latent, "sampler")
    yield Hook("hook_x0", latent, "sampler")
    yield Hook("hook_image", ("batch", "color", "height", "width"), "sampler")


def _text_encoder() -> Iterator[Hook]:
    """T5's names are those of the denoiser's self-attention and MLP, on positions of the prompt."""
    own = ("hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized")
    stream = ("batch", "text_pos", "d_model")
    lacks = ("adaln.", "cross", "image_attn", "pre_gate")
    of_text = {"pos": "text_pos", "query_pos": "query_text_pos", "key_pos": "key_text_pos"}
    for hook in _denoiser():
        if hook.name in own or (
            hook.name.startswith("blocks.") and not any(part in hook.name for part in lacks)
        ):
            axes = tuple(of_text.get(axis, axis) for axis in hook.axes)
            yield Hook(hook.name, axes, "text_encoder", hook.flag)
    yield Hook(
        "hook_rel_pos_bias", ("batch", "head", "query_text_pos", "key_text_pos"), "text_encoder"
    )
    yield Hook("blocks.{l}.mlp.hook_pre_linear", ("batch", "text_pos", "d_mlp"), "text_encoder")
    yield Hook("hook_out", stream, "text_encoder")


HOOKS: Mapping[tuple[HookPart, str], Hook] = {
    (hook.part, hook.name): hook for part in (_text_encoder, _denoiser, _sampler) for hook in part()
}
"""(part, name with {l} for the layer) → its row."""


def layer_of(name: str) -> int | None:
    """The layer in a hook's name, or None for a hook outside the blocks.

    Example:
        >>> layer_of("steps.0.cond.blocks.2.attn.hook_z"), layer_of("hook_text")
        (2, None)
    """
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return None if found is None else int(found[1])


def hook_row(name: str, part: str = "dit") -> Hook:
    """The table's row for a hook's canonical name within its part.

    "null_text_encoder" is the text encoder's.

    Raises:
        KeyError: the table has no such name.

    Example:
        >>> hook_row("blocks.3.cross_attn.hook_pattern").axes
        ('batch', 'head', 'query_pos', 'key_text_pos')
    """
    key: Any = part.removeprefix("null_"), re.sub(r"^blocks\.\d+\.", "blocks.{l}.", name)
    if key not in HOOKS:
        raise KeyError(
            f"{name!r} of the {part} stands in no row of hooked_models' table of hooks: add it "
            "there, with its axes."
        )
    return HOOKS[key]


def axis_of(axes: Axes, names: tuple[str, ...]) -> int | None:
    """The first of `axes` that is called one of `names`, counted from 0."""
    return next((i for i, axis in enumerate(axes) if axis in names), None)


def axis_sizes(
    cfg: Any,
    batch: int,
    text_pos: int,
    grid: tuple[int, int] = (0, 0),
    image: tuple[int, int] = (0, 0),
) -> dict[str, int]:
    """The size of every axis that the configuration of a denoiser (or text encoder) determines.

    Args:
        cfg: its `HookedConfig`.
        batch: rows of one call.
        text_pos: tokens of the longest prompt.
        grid: rows and columns of the latents.
        image: height and width in pixels.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
        >>> axis_sizes(model.cfg, batch=2, text_pos=9, grid=(32, 32))["pos"]
        256
    """
    rows, columns = grid
    pos = rows * columns // getattr(cfg, "patch_size", 1) ** 2
    sizes = {
        "batch": batch,
        "one": 1,
        "rows": rows,
        "columns": columns,
        "color": 3,
        "height": image[0],
        "width": image[1],
    }
    sizes |= dict.fromkeys(IMAGE_POSITIONS, pos) | dict.fromkeys(TEXT_POSITIONS, text_pos)
    sizes |= dict.fromkeys(JOINT_POSITIONS, pos + text_pos)
    fields = {"head": "n_heads", "channel": "in_channels", "out_channel": "out_channels"}
    fields |= {width: width for width in ("d_model", "d_head", "d_mlp", "d_text", "d_caption")}
    sizes |= {
        axis: size
        for axis, field in fields.items()
        if (size := getattr(cfg, field, None)) is not None
    }
    return sizes | {"six_d_model": 6 * sizes["d_model"]}
