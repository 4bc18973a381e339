"""Readouts of weights alone on every family: exact where scores are linear in the residual stream,
refused with the reason elsewhere; and the reason is true.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_lens import circuits, screening
from hooked_models import families
from hooked_models.families.circuits import NORM_BEFORE, OWN_NORMS
from hooked_models.families.kernel_tap import KernelTap

from .family_cases import UNABLE, Case, close

WORDS = ("above", "below", "left", "right")
LAYER = 1


@pytest.fixture(autouse=True)
def _float64() -> None:
    """In place of the folder's own fixture: these tests run in float32, as users do."""


def test_screening_and_circuits_of_weights(case: Case) -> None:
    """Maps and gains against scores of the model itself, fed with the code of positions; a refusal
    against what its attention receives.
    """
    torch.manual_seed(0)
    reason = UNABLE.get((case.name, "screening, circuits of weights"))
    dit = case.model.dit
    into, queries = bends(case)
    assert (into > 1e-3, queries > 1e-3) == (reason == NORM_BEFORE, reason is not None)
    vectors = dict(zip(WORDS, torch.randn(4, 16), strict=True))
    tools = {
        "heads": lambda: screening.screen_heads(dit, vectors, null_draws=19),
        "axes": lambda: screening.screen_axes(dit, contrasts(dit, vectors)),
        "maps": lambda: circuits.position_word_maps(dit, torch.stack(list(vectors.values()))),
        "map": lambda: circuits.position_word_map(dit, "L1H1", vectors["above"]),
        "written": lambda: circuits.ov_outputs(dit, "L1H1", vectors),
        "composition": lambda: circuits.composition_scores(dit),
    }
    if reason is not None:
        for tool in tools.values():
            with pytest.raises(TypeError, match=reason):
                tool()
        return
    found = {name: tool() for name, tool in tools.items()}
    scores = scores_of_positions(dit, torch.stack(list(vectors.values())))
    maps = found["maps"][LAYER] * dit.blocks[LAYER].cross_attn.scale
    assert close(maps - maps[:, :1], scores - scores[:, :1])  # a key bias is left out
    ramp = F.normalize(screening.ramp((0, 1), 8), dim=0).float()
    gains = (scores[:, 1] - scores[:, 0]) @ ramp / 2
    table = found["axes"].query(f"axis == 'vertical' and layer == {LAYER}").sort_values("head")
    assert close(torch.tensor(table["gain"].to_numpy()).float(), gains)
    ramps = [F.normalize(screening.ramp(screening.WORD_DIRECTIONS[w], 8), dim=0) for w in WORDS]
    sized = torch.einsum("wp,hwp->h", torch.stack(ramps).float(), found["maps"][LAYER]) / 4
    table = found["heads"].query(f"layer == {LAYER}").sort_values("head")
    assert close(torch.tensor(table["projection"].to_numpy()).float(), sized)
    assert found["composition"].notnull().sum() == dit.cfg.n_heads**2  # of two layers
    written = written_by(dit, head=1, words=torch.stack(list(vectors.values())))
    ours = torch.from_numpy(found["written"].values).float()
    assert close(ours - ours[:1], written - written[:1])  # biases are left out


def contrasts(dit: Any, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half the difference of the words at the ends of each axis, as keys are made of it."""
    return screening.half_differences(
        {word: dit.project_caption(vector[None])[0] for word, vector in vectors.items()}
    )


def bends(case: Case) -> tuple[float, float]:
    """Curvature along a line in the stream, relative to the change, of an attention's input and of
    its queries: zero where they are linear in the stream.
    """
    dit, name = case.model.dit, f"blocks.{case.layer}.{case.attention}"
    given, enters = dit.family.inputs(dit.wrapped), f"blocks.{case.layer}.hook_resid_pre"
    tap = next(
        tap
        for tap in dit.blocks[case.layer].taps
        if isinstance(tap, KernelTap) and tap.heads.place == name
    )
    _, cache = dit.run_with_cache(**given, names_filter=enters)
    start = cache[enters]
    line = torch.randn(start.shape)
    first = [
        (f"blocks.{case.layer}.hook_{leaf}", lambda x, hook: 0 * x)
        for leaf in ("attn_out", "attn_out_pre_gate")
        if case.attention == "cross_attn" and f"blocks.{case.layer}.hook_{leaf}" in dit.hook_dict
    ]
    inputs: list[Tensor] = []
    queries: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        values = [*args, *kwargs.values()]
        inputs.append(next(x for x in values if isinstance(x, Tensor) and x.ndim == 3).clone())

    handle = tap.module.register_forward_pre_hook(keep, with_kwargs=True)
    for t in (0.0, 1.0, 2.0):
        moved: Any = lambda x, hook, t=t: start + t * line  # noqa: E731
        seen: Any = lambda q, hook: queries.append(q.clone())  # noqa: E731
        hooks = [(enters, moved), *first, (f"{name}.hook_q", seen)]
        dit.run_with_hooks(**given, fwd_hooks=hooks)
    handle.remove()
    a, b = (
        float((x[2] - 2 * x[1] + x[0]).norm() / (x[2] - x[0]).norm()) for x in (inputs, queries)
    )
    return a, b


def scores_of_positions(dit: Any, words: Tensor) -> Tensor:
    """Scores [head word pos] of a model's own attention whose stream is the code of positions."""
    code, name = dit.W_pos, f"blocks.{LAYER}"
    hooks = [
        (f"{name}.hook_resid_pre", lambda x, hook: code.expand_as(x)),
        (f"{name}.hook_attn_out_pre_gate", lambda x, hook: 0 * x),
    ]
    kept: list[Tensor] = []
    seen: Any = lambda scores, hook: kept.append(scores[0].mT.clone())  # noqa: E731
    dit.run_with_hooks(
        **one_call(dit, words), fwd_hooks=[*hooks, (f"{name}.cross_attn.hook_attn_scores", seen)]
    )
    return kept[0]


def written_by(dit: Any, head: int, words: Tensor) -> Tensor:
    """Contribution of one head to the stream [word d_model], when each query attends to one word."""
    name, n = f"blocks.{LAYER}", len(words)

    def alone(pattern: Tensor, hook: Any) -> Tensor:
        pattern = torch.zeros_like(pattern)
        for word in range(n):
            pattern[:, head, word, word] = 1
        return pattern

    kept: list[Tensor] = []
    hooks = [
        (f"{name}.cross_attn.hook_pattern", alone),
        (f"{name}.hook_cross_attn_out", lambda x, hook: kept.append(x[0, :n].clone())),
    ]
    dit.run_with_hooks(**one_call(dit, words), fwd_hooks=hooks)
    return kept[0]


def one_call(dit: Any, words: Tensor) -> dict[str, Any]:
    """Arguments of a call whose text is the words' vectors."""
    side = dit.config.sample_size
    return {
        "hidden_states": torch.randn(1, dit.config.in_channels, side, side),
        "encoder_hidden_states": words[None],
        "timestep": torch.tensor([500.0]),
    }


def test_sana_without_a_code_of_positions_or_with_norms_says_so() -> None:
    family = families.SUPPORTED["SanaTransformer2DModel"]
    dit = families.hook(family.small().eval())
    with torch.no_grad():
        assert circuits.composition_scores(dit).shape == (2, 2, 2, 2)
    with pytest.raises(TypeError, match="adds no code of positions"):
        circuits.position_word_maps(dit, torch.zeros(1, 12))
    with pytest.raises(TypeError, match="which can be folded into PixArt's weights alone"):
        circuits.composition_scores(dit, receiver="attn")
    dit.wrapped.register_to_config(qk_norm="rms_norm_across_heads")
    with pytest.raises(TypeError, match=OWN_NORMS):
        circuits.composition_scores(dit)
