"""For the whole suite."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; threads of their own would only wait for one another
    torch.set_num_threads(1)
