"""Training multiplies in bfloat16 only where the machine can, Muon's orthogonalisation included."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import Tensor, nn

from dit_lens.training import PRESETS, TrainConfig, train
from dit_lens.training.pipelines import Size
from dit_lens.training.precision import Float32Muon, muon, resolve_precision


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),
        ({"avx2": True, "amx_bf16": False}, "no"),
        ({}, "no"),
    ],
)
def test_a_cpu_that_would_emulate_bfloat16_trains_in_float32(monkeypatch, has, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert resolve_precision("auto", torch.device("cpu")) == chosen


def test_what_was_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert resolve_precision("no", torch.device("cpu")) == "no"


def test_a_torch_that_cannot_tell_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert resolve_precision("auto", torch.device("cpu")) == "no"


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_for_more_than_emulation(monkeypatch, supported):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation: supported and not including_emulation,
    )
    assert resolve_precision("auto", torch.device("cuda")) == ("bf16" if supported else "no")


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Muon's polynomial, applied to the singular values (Jordan et al. 2024)."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = coefficients
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (8, 8)])
def test_muon_orthogonalises_in_float32(shape):
    torch.manual_seed(0)
    start, gradient = torch.randn(shape), torch.randn(shape)
    steps = {}
    for precision in ("no", "bf16"):
        weight = nn.Parameter(start.clone())
        optimizer = muon([weight], 0.1, precision)
        assert isinstance(optimizer, Float32Muon) == (precision == "no")
        weight.grad = gradient.clone()
        optimizer.step()
        steps[precision] = (start - weight.detach()).double()
    group = optimizer.param_groups[0]
    # the first momentum buffer is a multiple of the gradient, and the scale of what is
    # orthogonalised does not matter
    wanted = (
        orthogonalised(gradient, group["ns_coefficients"], group["ns_steps"])
        * 0.1
        * 0.2
        * max(shape) ** 0.5
    )
    error = {
        precision: float((step - wanted).norm() / wanted.norm())
        for precision, step in steps.items()
    }
    assert error["no"] < 1e-5 < 1e-3 < error["bf16"]
    assert torch.ones(1).bfloat16().dtype == torch.bfloat16  # outside of a step, casts cast


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps one precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield AcceleratorState._reset_state
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_goes_on_in_another_precision(tmp_path, monkeypatch, fresh_accelerator):
    monkeypatch.setitem(PRESETS, "nano", Size(layers=1, width=32, heads=2))
    monkeypatch.setattr("dit_lens.training.pipelines.CODEC_SCENES", 100)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    config = TrainConfig(
        tmp_path,
        size="nano",
        steps=1,
        batch_size=2,
        evaluate_every=100,
        evaluation_scenes=2,
        dynamics_points=0,
    )
    train(config)
    assert precision_of(tmp_path) == "no"
    fresh_accelerator(reset_partial_state=True)
    train(replace(config, steps=2, precision="bf16"))
    assert precision_of(tmp_path) == "bf16"


def precision_of(folder) -> str:
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["facts"])["precision"]
