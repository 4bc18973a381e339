"""A page on which clicks mask, exchange or scale heads: `dit-lens lab`.

The image is drawn anew after each.
"""

from __future__ import annotations

from .server import Lab, serve
from .state import State

__all__ = ["Lab", "State", "serve"]
