"""Helpers of the tests here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 2


Z = "steps.0.cond.blocks.0.cross_attn.hook_z"


PATTERN = "steps.1.cond.blocks.1.attn.hook_pattern"


def zero(tensor: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(tensor)
