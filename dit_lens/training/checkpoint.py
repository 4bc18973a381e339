"""The whole state of a training run in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..store import check_settings
from .history import History


def flatten_optimizer(optimizer: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    """An optimiser's state as tensors `name.{parameter index}.{key}`.

    Learning rates are not state: they follow from the step.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{name}.{i}.{key}": torch.as_tensor(value)
        for i, entry in state.items()
        for key, value in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], name: str
) -> None:
    """The inverse of `flatten_optimizer`, into an optimiser over the same parameters."""
    whole = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith(f"{name}."):
            _, index, entry = key.split(".", 2)
            whole["state"].setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict(whole)


def save_checkpoint(
    path: Path,
    step: int,
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    facts: Mapping[str, object],
    history: History,
) -> None:
    """Write the state after `step` steps.

    Args:
        path: the file, which `Store.put` gives.
        step: finished steps.
        model: its parameters and buffers are saved.
        ema: averaged parameters by name.
        optimizers: by name, whose parameters are the model's.
        facts: settings that must not change when the run is resumed (`load_checkpoint` compares
            them).
        history: measurements so far.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {
        f"ema.{k}": v for k, v in ema.items()
    }
    for name, optimizer in optimizers.items():
        tensors |= flatten_optimizer(optimizer, name)
    measured, metadata = history.packed()
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()} | measured
    save_file(
        tensors, path, metadata={"step": str(step), "facts": json.dumps(dict(facts)), **metadata}
    )


def load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    facts: Mapping[str, object],
    may_change: Sequence[str] = (),
) -> int:
    """Restore everything in place and return the number of finished steps.

    Raises:
        ValueError: the run in this folder was started with other settings (those not in
            `may_change`).
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (a safe_open handle is no dict)
    check_settings(
        path.parent, json.loads(metadata["facts"]), json.loads(json.dumps(dict(facts))), may_change
    )
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for key, value in ema.items():
        value.copy_(tensors[f"ema.{key}"])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, tensors, name)
    return int(metadata["step"])
