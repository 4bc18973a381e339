"""Short hashes, by which saved results know what they were made from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*parts: str | bytes | Tensor) -> str:
    """A short hash of text and tensors: equal for equal values, types and shapes."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            data = part.encode() if isinstance(part, str) else part
            found.update(f"{len(data)}:".encode() + data)
    return found.hexdigest()
