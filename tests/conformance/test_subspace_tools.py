"""Interchange interventions, DAS, probes and subspaces: `transformer_lens.tools.analysis`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens.tools import analysis as tl

from hooked_models import HookedDiT

from .oracles import ROWS, TIMESTEP, Bound, equal, tool

SITE = "blocks.1.hook_resid_pre"
AT = torch.tensor([0, 3, 1, 2, 2, 0])
"""One position for each pair."""


@tool("interchange.collect_activations", "bind fold", check="the cache")
def test_collected_activations(bound: Bound, folded: Bound) -> None:
    for model in (bound, folded):
        found = tl.collect_activations(
            model.view, SITE, model.clean, model.view, positions=AT, batch_size=4
        )
        equal(found, model.clean_cache[SITE][torch.arange(ROWS), AT])


@tool(
    "interchange.run_with_intervention, intervened_logits, SubspaceInterchange",
    "bind",
    check="a plain hook",
)
@tool(
    "interchange.NormMatchedPlacebo, random_basis, mean_difference_basis, probe_basis",
    "bind",
    check="a plain hook; by definition",
)
def test_interchange_at_a_position(bound: Bound) -> None:
    source = tl.collect_activations(bound.view, SITE, bound.clean, bound.view, positions=AT)
    activations = torch.cat([source, bound.corrupted_cache[SITE][torch.arange(ROWS), AT]])
    labels = ["clean"] * ROWS + ["corrupted"] * ROWS
    direction = source.mean(0) - activations[ROWS:].mean(0)
    difference = tl.mean_difference_basis(activations, labels)
    # TransformerLens computes it in float32
    equal((difference.double()[:, 0] @ direction).abs(), direction.norm(), 1e-5)
    equal(
        (tl.probe_basis(direction[None]).double()[:, 0] @ direction).abs(), direction.norm(), 1e-5
    )
    basis = tl.random_basis(16, 3, seed=1)
    exchange = tl.SubspaceInterchange(basis, strength=0.7)
    for step in (exchange, tl.NormMatchedPlacebo(exchange, tl.random_basis(16, 3, seed=2))):
        moved = 0.7 * basis @ basis.T @ (source - activations[ROWS:]).T  # [d_model batch]
        if isinstance(step, tl.NormMatchedPlacebo):
            other = step.basis @ step.basis.T @ (source - activations[ROWS:]).T
            moved = other * moved.norm(dim=0) / other.norm(dim=0)

        def hook(tensor: Tensor, hook: Any, moved: Tensor = moved) -> Tensor:
            changed = tensor.clone()
            changed[torch.arange(ROWS), AT] += moved.T
            return changed

        expected = bound.plain(hooks=[(SITE, hook)])
        run = (bound.view, SITE, step, bound.corrupted, source, bound.view)
        equal(tl.run_with_intervention(*run, positions=AT), expected)
        equal(tl.intervened_logits(*run, positions=AT, batch_size=4), expected)
        assert (expected - bound.plain()).abs().max() > 1e-2


@tool(
    "interchange.neuron_basis, random_neuron_basis",
    "bind",
    check="a plain hook that sets the neurons",
)
def test_interchange_of_neurons(bound: Bound) -> None:
    site, neurons, d_mlp = "blocks.0.mlp.hook_post", [5, 40], bound.dit.cfg.d_mlp
    source = tl.collect_activations(bound.view, site, bound.clean, bound.view, positions=AT)
    step = tl.SubspaceInterchange(tl.neuron_basis(d_mlp, neurons))

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        changed = tensor.clone()
        for row, position in enumerate(AT):
            changed[row, position, neurons] = source[row, neurons]
        return changed

    found = tl.run_with_intervention(
        bound.view, site, step, bound.corrupted, source, bound.view, positions=AT
    )
    equal(found, bound.plain(hooks=[(site, hook)]))
    placebo = tl.random_neuron_basis(d_mlp, 2, seed=0, exclude=neurons)
    assert placebo.sum() == 2
    assert placebo[neurons].sum() == 0


LAST, POSITION = "blocks.1.hook_resid_post", 2


@pytest.fixture(scope="module")
def planted(dit: HookedDiT) -> dict[str, Any]:
    """A task with a known answer: in which of five ranges does the last residual lie along one
    direction?
    """
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(240, 4, 4, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(240, 3, dit.cfg.d_text, generator=generator, dtype=torch.float64)
    direction = F.normalize(torch.randn(16, generator=generator, dtype=torch.float64), dim=0)
    view, tokens = dit.bind(latents, TIMESTEP, text)
    with torch.no_grad():
        along = view.run_with_cache(tokens, LAST)[1][LAST][:, POSITION] @ direction
    centres = along.quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))

    def task(tokens: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def read(tensor: Tensor, hook: Any) -> None:
            seen.append(tensor[:, POSITION] @ direction)

        # attached after an intervention there, so it reads what that has left
        with view.hooks([(LAST, read)]):
            view(tokens)
        return -10 * (seen[0][:, None] - centres) ** 2

    with torch.no_grad():
        classes = task(tokens).argmax(1)
    return {
        "view": view,
        "tokens": tokens,
        "task": task,
        "classes": classes,
        "direction": direction,
    }


@tool(
    "interchange.fit_das, arbitrary_targets",
    "bind",
    "recovers it",
    check="a planted direction, cosine > 0.99; held-out pairs; the arbitrary-label control",
)
def test_das_finds_a_planted_direction(dit: HookedDiT, planted: dict[str, Any]) -> None:
    view, tokens, task, classes = (planted[name] for name in ("view", "tokens", "task", "classes"))
    bases, sources = slice(0, 100), slice(100, 200)
    places = torch.full((100,), POSITION)
    where = {
        "base_positions": places,
        "source_positions": places,
        "rank": 1,
        "lr": 0.03,
        "batch_size": 25,
    }
    flags = [p.requires_grad for p in dit.parameters()]
    found = tl.fit_das(
        view, LAST, tokens[bases], tokens[sources], classes[sources], task, epochs=25, **where
    )
    assert abs(float(found.basis[:, 0].double() @ planted["direction"])) > 0.99
    assert found.losses[-1] < found.losses[0]
    assert [p.requires_grad for p in dit.parameters()] == flags
    assert all(p.grad is None for p in dit.parameters())  # the model was frozen, through the view

    def accuracy(basis: Tensor) -> float:
        """On pairs that were not trained on."""
        base, source, at = tokens[200:220], tokens[220:], torch.full((20,), POSITION)
        activations = tl.collect_activations(view, LAST, source, task, positions=at)
        logits = tl.intervened_logits(
            view, LAST, tl.SubspaceInterchange(basis), base, activations, task, positions=at
        )
        return float((logits.argmax(1) == classes[220:]).float().mean())

    assert accuracy(planted["direction"][:, None]) == 1
    assert accuracy(found.basis) > 0.9
    assert accuracy(tl.random_basis(16, 1, seed=0)) < 0.6
    labels = tl.arbitrary_targets([f"row {row}" for row in range(100, 200)], 5, seed=0)
    control = tl.fit_das(
        view, LAST, tokens[bases], tokens[sources], labels, task, epochs=5, **where
    )
    assert accuracy(control.basis) < 0.6
    assert all(p.grad is None for p in dit.parameters())


@tool(
    "interchange.reinitialized",
    "model",
    check="every parameter is new, the trained model unchanged",
)
@tool(
    "interchange.reinitialized",
    "bind fold",
    "refuses",
    check="the error",
    note="a view owns no weights: bind `reinitialized(dit)`",
)
def test_random_initialisation_as_a_control(bound: Bound, folded: Bound) -> None:
    before = {name: parameter.clone() for name, parameter in bound.dit.named_parameters()}
    fresh: Any = tl.reinitialized(bound.dit, seed=0)
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert torch.equal(bound.dit.get_parameter(name), before[name]), name
    view, tokens = fresh.bind(
        *(bound.call[x] for x in ("hidden_states", "timestep", "encoder_hidden_states"))
    )
    out = view(tokens[:2])
    equal(
        out,
        fresh.wrapped(
            **{k: v[:2] for k, v in bound.call.items() if k != "encoder_attention_mask"},
            return_dict=False,
        )[0],
    )
    assert (out - bound.view(bound.tokens[:2])).abs().max() > 1e-2
    again: Any = tl.reinitialized(bound.dit, seed=0)
    assert torch.equal(again.proj_out.weight, fresh.proj_out.weight)
    with pytest.raises(ValueError, match="would keep their trained values"):
        tl.reinitialized(bound.view, seed=0)
    with pytest.raises(ValueError, match="fold it again"):
        tl.reinitialized(folded.dit, seed=0)


@tool(
    "sparse_probing.fit_sparse_probe, sweep_sparse_probe",
    "bind",
    "recovers it",
    check="a planted neuron",
    note="takes activations, of any hook",
)
def test_sparse_probes_find_a_planted_neuron(planted: dict[str, Any]) -> None:
    with torch.no_grad():
        _, cache = planted["view"].run_with_cache(planted["tokens"], "blocks.1.mlp.hook_post")
    features = cache["post", 1][:, POSITION]
    spread = features / features.std(0)
    labels = spread[:, 17] > spread[:, 17].median()
    probe = tl.fit_sparse_probe(spread, labels, k=1)
    assert probe.selected_features.tolist() == [17]
    sweep = tl.sweep_sparse_probe(spread, labels, ks=(1, 2))
    assert 17 in sweep.results[0].selected_features.tolist()


@tool(
    "projection_kernel.attention_head_subspace_affinity",
    "fold",
    check="projectors by hand",
    note="self-attention; for cross-attention `projection_kernel` on its weights",
)
@tool(
    "projection_kernel.attention_head_subspace_affinity",
    "bind at",
    "refuses",
    check="the error",
    note="self-attention; for cross-attention `projection_kernel` on its weights",
)
@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_affinity_of_heads_subspaces(bound: Bound, folded: Bound, role: str) -> None:
    result = tl.attention_head_subspace_affinity(folded.view, target_role=role, rank=4)
    dit = folded.dit

    def projector(weight: Tensor) -> Tensor:
        """Onto the four strongest directions that a head writes to, or reads."""
        u = torch.linalg.svd(weight.detach())[0][:, :4]
        return u @ u.T

    for source in range(2):
        for target in range(2):
            written = projector(dit.blocks[0].attn.W_O[source].T)
            read = projector(getattr(dit.blocks[1].attn, f"W_{role}")[target])
            equal(result.scores[0, source, 1, target], (written * read).sum(), 1e-10)
            assert 0.1 < result.scores[0, source, 1, target] < 3.9
    equal(result.scores[1], torch.zeros(2, 2, 2))  # only earlier → later
    for model in (bound.view, bound.dit):
        with pytest.raises(ValueError, match=r"fold_timestep\(t\)"):
            tl.attention_head_subspace_affinity(model, target_role=role, rank=4)


@tool(
    "projection_kernel.orthonormal_subspace, projection_kernel",
    "model",
    check="projectors by hand",
    note="any weights, e.g. cross-attention's",
)
def test_overlap_of_two_cross_attention_heads(dit: HookedDiT) -> None:
    written = tl.orthonormal_subspace(dit.blocks[0].cross_attn.W_O[1].T.detach(), rank=4)
    read = tl.orthonormal_subspace(dit.blocks[1].cross_attn.W_Q[0].detach(), rank=4)
    found = tl.projection_kernel(written, read)
    overlap = (written.basis @ written.basis.T * (read.basis @ read.basis.T)).sum()
    equal(found.score, overlap, 1e-10)
