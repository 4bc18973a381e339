"""Train a text-to-image DiT on scenes: the paper's ε-prediction, or a faster default. `dit-lens train --help`."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
