"""A page on which heads are masked, exchanged or scaled by clicks, and the image is drawn anew:
`dit-lens lab`.
"""

from __future__ import annotations

from .server import Lab, serve
from .state import State

__all__ = ["Lab", "State", "serve"]
