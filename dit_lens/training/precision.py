"""bfloat16 where the machine multiplies in it.

A CPU that has to emulate it takes fifty times as long as in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import Precision


def resolve_precision(asked: Precision, device: torch.device) -> Literal["no", "bf16"]:
    """`asked`, or, for "auto", "bf16" where GPU or CPU (AMX, AVX-512 BF16) has it, else "no"."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        # an older torch cannot tell
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if has.get("amx_bf16") or has.get("avx512_bf16") else "no"
    return "no"


def muon(
    parameters: Sequence[Tensor] | Sequence[dict[str, Any]],
    lr: float,
    precision: Precision,
    weight_decay: float = 0.0,
    iterations: int = 5,
) -> torch.optim.Muon:
    """Muon of torch with decoupled weight decay, its update scaled to AdamW's root mean square.

    `iterations`: of Newton and Schulz, which orthogonalise the update.
    """
    kind = torch.optim.Muon if precision == "bf16" else Float32Muon
    return kind(
        parameters,
        lr=lr,
        weight_decay=weight_decay,
        ns_steps=iterations,
        adjust_lr_fn="match_rms_adamw",
    )


class Float32Muon(torch.optim.Muon):
    """Muon that orthogonalises in float32; torch's casts to bfloat16 whatever the weights are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As `torch.optim.Muon.step`."""
        with _NoBfloat16():
            return super().step(closure)


class _NoBfloat16(TorchFunctionMode):
    """`tensor.bfloat16()` copies, and casts to nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))
