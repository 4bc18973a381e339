"""Cross-attention of empty prompts, computed once instead of at every position.

Softmax over one key is 1, so rows whose prompt is empty (the unconditional branch) write v₀ W_O +
b_O at every position, whatever their queries are. Benchmark: `benchmarks/generation.py`, row "empty
prompts off".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..block import Block, BlockText
from ..dit import HookedDiT

MIN_GEMM_ROWS = 4
"""A product of fewer rows with a matrix takes another kernel on CPUs, which rounds differently."""


def skip(dit: HookedDiT) -> None:
    """Skip queries, scores and pattern of rows with empty prompts.

    In every block where no hook needs them.

    Example:
        >>> model = HookedTextToImage.from_pretrained("rte-nano")  # whose dit skips them
        >>> with compute_all(model.dit):
        ...     images = model("red circle above blue square", seed=0, num_steps=2)
        >>> bool(
        ...     (model("red circle above blue square", seed=0, num_steps=2) - images).abs().max()
        ...     < 1e-5
        ... )
        True
    """
    for block in dit.blocks:
        block.cross_attention = partial(cross_attention, block)


def do_not_skip(dit: HookedDiT) -> None:
    """Compute every row again."""
    for block in dit.blocks:
        vars(block).pop("cross_attention", None)


@contextmanager
def compute_all(dit: HookedDiT) -> Iterator[None]:
    """Compute every row while inside, then skip empty prompts again if they were skipped before."""
    skipped = "cross_attention" in vars(dit.blocks[0])
    do_not_skip(dit)
    try:
        yield
    finally:
        if skipped:
            skip(dit)


def cross_attention(
    block: Block, x: Float[Tensor, "batch pos d_model"], text: BlockText
) -> Float[Tensor, "batch pos d_model"]:
    """`Block.cross_attention` with the first `text.n_empty_prompts` rows at one position."""
    attn, n = block.cross_attn, text.n_empty_prompts
    if not n or text.keys_values is None or attn.is_hooked:
        return Block.cross_attention(block, x, text)
    keys, values = text.keys_values
    bias = None if text.bias is None else text.bias[n:]
    with_text = Block.cross_attention(
        block, x[n:], BlockText(text.caption[n:], (keys[n:], values[n:]), bias)
    )
    z = values[:n, :1].expand(-1, min(x.shape[1], MIN_GEMM_ROWS), -1, -1)
    return torch.cat([attn.output(z)[:, :1].expand(-1, x.shape[1], -1), with_text])
