"""`python -m dit_lens.cli`, for launchers such as `accelerate launch -m dit_lens.cli train`."""

from __future__ import annotations

from . import main

main()
