"""Long measurements in a folder, batch by batch, so that one which was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.digest import digest

from .remote.model import RemoteTextToImage

__all__ = ["Shards", "digest", "digest_model"]


def digest_model(model: HookedTextToImage) -> str:
    """Of what decides a generation, wherever the model was loaded from; of weights on another machine, their name and address."""
    if isinstance(model, RemoteTextToImage) and model.server is not None:
        return digest(model.model_key, model.server.host)
    parts: list[str | Tensor] = [type(model.scheduler).__name__]
    for config in (model.dit.config, model.scheduler.config, model.codec.config):
        parts.append(f"{sorted((name, str(value)) for name, value in config.items() if not name.startswith('_'))}")
    for module in (model.dit, model.text_encoder, model.codec):
        parts += module.state_dict().values()
    return digest(*parts)


class Shards:
    """A folder of arrays, one a batch, and `settings.json`, which says of what.

    Raises:
        ValueError: the folder holds something made with other settings; the message names them.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "settings.json"
        if not record.exists():
            _write(record, json.dumps(settings, indent=1).encode())
            return
        found = json.loads(record.read_text())
        if different := [name for name in {**found, **settings} if found.get(name) != settings.get(name)]:
            raise ValueError(
                f"{folder} holds results that were made with other {', '.join(different)}: choose another folder, or delete it."
            )

    def load_or(self, start: int, make: Callable[[int], Shaped[np.ndarray, "..."]]) -> Shaped[np.ndarray, "..."]:
        """The batch that begins at `start`: from its file, else made and then written to it."""
        path = self.folder / f"{start:08d}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        values = make(start)
        with open(part := path.with_suffix(".part"), "wb") as file:
            np.save(file, values)
        os.replace(part, path)  # a killed run leaves a whole file or none
        return values


def _write(path: Path, data: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)
