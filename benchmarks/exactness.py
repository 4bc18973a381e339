"""Measure which results are bitwise equal: the figures of docs/exactness.md.

python -m benchmarks.exactness [model]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from hooked_models import HookedTextToImage

CALL: dict[str, Any] = {"seed": 0, "num_steps": 8}
PROMPTS = [
    f"red circle is {word} blue square"
    for word in ("above", "below", "to the left of", "to the right of")
]
Z, PATTERN = (
    "steps.3.cond.blocks.1.cross_attn.hook_z",
    "steps.3.cond.blocks.1.cross_attn.hook_pattern",
)


def look(tensor: Tensor, hook: Any) -> None:
    """An inert hook."""


@torch.no_grad()
def main(name: str = "rte-nano") -> None:
    """Print the largest difference of a pixel in [0, 1] for each comparison and dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        model = HookedTextToImage.from_pretrained(name, dtype=dtype)
        images = model(PROMPTS, **CALL)
        run = model.trajectory(PROMPTS, **CALL)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        other_threads = model(PROMPTS, **CALL)
        torch.set_num_threads(threads)
        compared = {
            "the same run again": model(PROMPTS, **CALL),
            "a fork without hooks, at step 4": run.fork(4).images,
            "an inert hook between calls (hook_x0)": model.run_with_hooks(
                PROMPTS, **CALL, fwd_hooks=[("steps.3.hook_x0", look)]
            ),
            "an inert hook at hook_resid_post": model.run_with_hooks(
                PROMPTS, **CALL, fwd_hooks=[("steps.3.cond.blocks.1.hook_resid_post", look)]
            ),
            "an inert hook at cross_attn.hook_z": model.run_with_hooks(
                PROMPTS, **CALL, fwd_hooks=[(Z, look)]
            ),
            "an inert hook at cross_attn.hook_pattern": model.run_with_hooks(
                PROMPTS, **CALL, fwd_hooks=[(PATTERN, look)]
            ),
            "each prompt alone against four at once": torch.cat(
                [model(prompt, **CALL) for prompt in PROMPTS]
            ),
            f"{torch.get_num_threads()} threads against {1 if threads > 1 else 2}": other_threads,
        }
        for what, other in compared.items():
            difference = float((other.float() - images.float()).abs().max())
            print(
                f"{dtype!s:15} {what:45} "
                f"{'bitwise' if torch.equal(other, images) else f'{difference:.1e}'}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
