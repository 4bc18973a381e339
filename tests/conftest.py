"""For the whole suite."""

from __future__ import annotations

import hypothesis
import torch

# Workers share the cores, and threads of their own would only wait for one another; and a child that is forked has only one.
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
