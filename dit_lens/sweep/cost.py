"""What a sweep will take: counted, and timed on a few denoiser calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan


def batch_size(plan: Plan) -> int:
    return 64


@dataclass
class Cost:
    pass


def cost_of(plan: Plan) -> Cost:
    return Cost()
