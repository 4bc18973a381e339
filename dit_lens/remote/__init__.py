"""Models behind nnsight, in this process or elsewhere: the same names, hooks and interventions."""

from __future__ import annotations

from .caches import RENAME, open_cache
from .model import RemoteTextToImage
from .pipeline import RemotePipeline
from .pixart import RemotePixArt
from .plan import CLEAN
from .server import ServerError

__all__ = [
    "CLEAN",
    "RENAME",
    "RemotePipeline",
    "RemotePixArt",
    "RemoteTextToImage",
    "ServerError",
    "open_cache",
]
