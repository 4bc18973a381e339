"""Checks of a hooked model against the module that it wraps, made when a model is loaded.

A model from elsewhere may have an option, a layout or a library version that nobody has tried.
Rather than be subtly wrong, it is refused, with the model and the versions named. Checks, on a
small random input: the output is that of the wrapped module, fused and explicit; every name fires
once; pattern rows sum to one; and editing the patterns changes the output. Source of the idea:
nnterp (arXiv 2511.14465), which checks every model that it renames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ..hooks.module import HookedModule
from ..lazy_imports import renamed
from ..pixart.dit import HookedDiT
from ..text_encoders.t5 import HookedT5Encoder

if TYPE_CHECKING:
    from .pipeline_model import PipelineModel

__getattr__ = renamed(__name__, {"refuse": "hooked_models.pipelines.checks:raise_failures"})

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Allowed difference to the wrapped module, as a share of its output's largest value.

Sharp attention, such as a planted circuit's, magnifies rounding: fused and explicit attention then
differ by a few parts in 10,000 in float32.
"""
LARGEST = 1e12
"""Size of a weight above which it is taken for damage or overflow."""
LIBRARIES = ("diffusers", "transformers", "transformer_lens", "torch")


class ModelCheckError(RuntimeError):
    """A hooked model differs from the module it wraps, or its hooks do not match their names.

    Example:
        >>> raise_failures("my-model", ["output differs from the original's"])
        Traceback (most recent call last):
        hooked_models.pipelines.checks.ModelCheckError: my-model failed its checks with ...
    """


@torch.no_grad()
def check_model(model: PipelineModel, name: str = "this model") -> None:
    """Check a PixArt's denoiser and, if it is a T5, the text encoder.

    `families.hook` checks other denoisers.

    Raises:
        ModelCheckError: names the faults, the model and the versions of the libraries.
    """
    failures = check_denoiser(model.dit) if isinstance(model.dit, HookedDiT) else []
    if isinstance(model.text_encoder, HookedT5Encoder):
        failures += check_text_encoder(model.text_encoder)
    raise_failures(name, failures)


def raise_failures(name: str, failures: Sequence[str]) -> None:
    """Raise ModelCheckError if there are failures."""
    if not failures:
        return
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    raise ModelCheckError(
        f"{name} failed its checks with {versions}: {'; '.join(failures)}. Its hooks cannot be "
        "trusted. Try the versions that pyproject.toml names; check=False opens it all the same."
    )


def check_weights(pipe: Any, name: str = "this model") -> None:
    """Check that every weight of a pipeline is finite and of a size that training leads to.

    All parts of the pipeline are checked.

    Raises:
        ModelCheckError: with the first tensor that holds another.
    """
    for part, module in pipe.components.items():
        for key, tensor in module.state_dict().items() if isinstance(module, nn.Module) else ():
            if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
                continue
            low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
            worst = float(torch.maximum(-low, high))
            if not worst <= LARGEST:
                found = (
                    "a value that is not a number"
                    if worst != worst
                    else f"a value of size {worst:.3g}"
                )
                raise ModelCheckError(
                    f"{name} is damaged: {part}'s {key} holds {found}. Download or save it again; "
                    "check=False opens it all the same."
                )


def check_denoiser(dit: HookedDiT) -> list[str]:
    """List the faults of a hooked PixArt, one sentence each."""
    cfg, p = dit.cfg, dit.cfg.patch_size
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if cfg.use_additional_conditions:
        sizes = {
            "resolution": torch.tensor([[512.0, 768.0]]).repeat(2, 1),
            "aspect_ratio": torch.tensor([[0.66]]).repeat(2, 1),
        }
        sizes = {
            key: size.to(dit.device, dit.dtype) for key, size in sizes.items() if size is not None
        }
    inputs = {
        "hidden_states": random_like(dit, 2, cfg.in_channels, 2 * p, 3 * p),
        "encoder_hidden_states": random_like(dit, 2, 5, cfg.d_text),
        "encoder_attention_mask": torch.tensor(
            [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=dit.device
        ),
        "timestep": torch.tensor([901, 17], device=dit.device),
        "added_cond_kwargs": sizes,
    }
    return [
        "the denoiser's " + failure
        for failure in failures_of(dit, dit.wrapped, inputs, ("attn", "cross_attn"))
    ]


def check_text_encoder(encoder: HookedT5Encoder) -> list[str]:
    """List the faults of a hooked T5, one sentence each."""
    ids: Int[Tensor, "2 6"] = (
        torch.arange(12, device=encoder.device).reshape(2, 6) % encoder.cfg.d_vocab
    )
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return [
        "the text encoder's " + failure
        for failure in failures_of(encoder, encoder.wrapped, inputs, ("attn",))
    ]


def random_like(module: Any, *shape: int) -> Float[Tensor, "..."]:
    """Normal numbers, the same on every machine, where and as the module's weights are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        module.device, module.dtype
    )


@torch.no_grad()
def failures_of(
    hooked: HookedModule, original: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[str]
) -> list[str]:
    """Compare a hooked module with the wrapped one, on one input.

    Args:
        hooked: the hooked module.
        original: the module that it wraps.
        inputs: keyword arguments that both are called with.
        sublayers: the attentions of a block that have a pattern.
    """
    reference = original(**inputs)[0]
    if not bool(reference.isfinite().all()):
        return ["output is not finite even without hooks (a model in float16 may need bfloat16)"]
    tolerance = TOLERANCE[reference.dtype] * float(reference.abs().max())
    failures = []

    def compare(what: str, output: Tensor) -> None:
        difference = float((output - reference).abs().max())
        if not difference <= tolerance:
            failures.append(
                f"{what} differs from the original's by {difference:.3g} (allowed: {tolerance:.3g})"
            )

    compare("output", hooked(**inputs)[0])
    seen: dict[str, Tensor] = {}
    fired: Counter[str] = Counter()

    def look(tensor: Tensor, hook: HookPoint) -> None:
        fired[str(hook.name)] += 1
        if str(hook.name).endswith("hook_pattern"):
            seen[str(hook.name)] = tensor.clone()

    compare(
        "output with hooks",
        hooked.run_with_hooks(fwd_hooks=[(lambda name: True, look)], **inputs)[0],
    )
    if wrong := [
        f"{name} ({fired[name]} times)" for name in hooked.names(None) if fired[name] != 1
    ]:
        failures.append(f"names do not fire once each: {', '.join(wrong[:5])}")
    for sublayer in sublayers:
        failures += _check_patterns(hooked, inputs, sublayer, seen)
    return failures


def _check_patterns(
    hooked: HookedModule, inputs: Mapping[str, Any], sublayer: str, patterns: Mapping[str, Tensor]
) -> list[str]:
    patterns = {
        name: pattern
        for name, pattern in patterns.items()
        if name.endswith(f".{sublayer}.hook_pattern")
    }
    if not patterns:
        return [f"{sublayer} shows no pattern"]
    if wrong := [name for name, pattern in patterns.items() if not rows_sum_to_one(pattern)]:
        return [f"{wrong[0]} has rows that do not sum to one"]
    # both runs have the same hooks, so that differences come from the edit alone
    clean, clean_z = _run_with_patterns(
        hooked, inputs, patterns, lambda tensor, hook: tensor.clone()
    )
    edited, edited_z = _run_with_patterns(hooked, inputs, patterns, random_pattern)
    changed = any(not torch.equal(clean_z[name], edited_z[name]) for name in clean_z)
    if not changed and any(bool(z.any()) for z in clean_z.values()):
        return [f"{sublayer}.hook_z does not change when its pattern is edited"]
    # an untrained output layer may be all zeros
    if changed and bool(clean.any()) and torch.equal(clean, edited):
        return [f"output does not change when the patterns of {sublayer} are edited"]
    return []


def rows_sum_to_one(pattern: Float[Tensor, "... key_pos"], or_zero: bool = False) -> bool:
    """True if no entry is negative and rows sum to 1 (or, with `or_zero`, to 0), up to rounding."""
    slack = 0.02 if pattern.dtype in (torch.float16, torch.bfloat16) else 1e-4
    sums = pattern.sum(-1)
    right = (sums - 1).abs() < slack
    return not bool((pattern < 0).any()) and bool((right | (sums == 0) if or_zero else right).all())


def random_pattern(
    pattern: Float[Tensor, "*batch key_pos"], hook: HookPoint
) -> Float[Tensor, "*batch key_pos"]:
    """Hook that replaces a pattern by a random one, the same at every call."""
    scores = torch.randn(pattern.shape, generator=torch.Generator().manual_seed(1))
    return (3 * scores).softmax(-1).to(pattern)


def _run_with_patterns(
    hooked: HookedModule,
    inputs: Mapping[str, Any],
    names: Iterable[str],
    edit: Callable[..., Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output under edited patterns, and z in each layer."""
    z: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: HookPoint) -> None:
        z[str(hook.name)] = tensor.clone()

    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for name in names:
        hooks += [(name, edit), (name.replace("hook_pattern", "hook_z"), keep)]
    return hooked.run_with_hooks(fwd_hooks=hooks, **inputs)[0], z
