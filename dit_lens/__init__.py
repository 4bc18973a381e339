"""Questions to ask of a hooked text-to-image model. See `hooked_models` for the models.

What is here stands in `__init__.pyi`, and is imported when it is first used: `dit-lens --help` need not wait for torch.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
