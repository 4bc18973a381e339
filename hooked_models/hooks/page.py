"""Writes docs/hooks.md, "every hook and its shape", from the table of hooks.

python -m hooked_models.hooks.page > docs/hooks.md
"""

from __future__ import annotations

from ..generation.model import HookedTextToImage
from .table import HOOKS, Hook, axis_sizes

EXAMPLE = "t5-micro"
INTRODUCTION = f"""# Every hook and its shape

Written from the table `HOOKS` (`python -m hooked_models.hooks.page > docs/hooks.md`); a test
compares it with runs.

Names are full names, as `model.hook_dict`, caches, `run_with_hooks` and `names_filter` use them:
`{{s}}` is a denoising step from 0, `{{branch}}` is `cond` or `uncond`, `{{l}}` a layer. Within a
denoiser (`model.dit`, `cache.at(step=…)`) and as the site of an `Intervention` they are used
without `steps.{{s}}.{{branch}}.`. The unconditional prompt's encoder is `null_text_encoder.…`.

Axis 0 is the prompts, one row each, whatever the guidance. `pos` are image positions, row by row;
`text_pos` are tokens. In models with joint attention (FLUX, SD3, …) `pos`, `query_pos` and
`key_pos` hold image positions and then tokens. `model.dit.axes("blocks.0.attn.hook_q")` gives a
hook's axes in code, and calls such positions `joint_pos`.

Every hook may be read and written. One with a flag fires after `model.dit.set_FLAG(True)`, for the
text encoder after `model.text_encoder.set_FLAG(True)`. A model has those of these names that its
architecture computes: `model.hook_dict` lists them. `steps.{{s}}.eps`, the noise that a prediction
implies, stands in caches only. Sizes are those of `{EXAMPLE}` for 2 prompts of 9 tokens.
"""
HEADINGS = {
    "text_encoder": "Text encoder (T5, random tokens)",
    "dit": "Denoiser",
    "sampler": "Between denoiser calls",
}
FIRES = {"once": "once a run", "step": "each step", "call": "each step and branch"}


def page() -> str:
    """The page as Markdown.

    Example:
        >>> print(page().splitlines()[0])
        # Every hook and its shape
    """
    model = HookedTextToImage.from_pretrained(EXAMPLE, weights=False)
    side = model.cfg.sample_size
    grid, image = (side, side), (side * model.codec.config.patch_size,) * 2
    sizes = {part: axis_sizes(model.cfg, 2, 9, grid, image) for part in ("dit", "sampler")}
    sizes["text_encoder"] = axis_sizes(model.text_encoder.cfg, 2, 9)
    lines = [INTRODUCTION]
    for part, heading in HEADINGS.items():
        hooks = [hook for hook in HOOKS.values() if hook.part == part]
        lines += [
            f"## {heading}",
            "",
            "| hook | axes | size | fires | flag |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(hook, sizes[part]) for hook in hooks] + [""]
    return "\n".join(lines)


def _row(hook: Hook, sizes: dict[str, int]) -> str:
    size = " × ".join(str(sizes.get(axis, "–")) for axis in hook.axes)
    flag = "" if hook.flag is None else f"`{hook.flag}`"
    return f"| `{hook.full_name}` | {' '.join(hook.axes)} | {size} | {FIRES[hook.fires]} | {flag} |"


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
