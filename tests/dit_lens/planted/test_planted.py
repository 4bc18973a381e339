"""Planted circuits: do they draw, and is their ground truth what interventions find?"""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import get_args

import pytest
import torch
import xarray as xr
from diffusers import PixArtSigmaPipeline

from dit_lens import planted, scenes
from dit_lens.graph.nodes import Node
from dit_lens.planted import Kind, PlantedHead, PlantedTruth
from dit_lens.planted.build import D_HEAD
from dit_lens.text.prompts import token_roles
from hooked_models import (
    FusedTokenEncoder,
    FusedTokenEncoderConfig,
    HookedTextToImage,
    RandomTokenEncoder,
)

KINDS: tuple[Kind, ...] = get_args(Kind)
DRAWING: tuple[Kind, ...] = ("two-stage", "fused", "rotated")

circuit = cache(planted.planted_circuit)


POOL = scenes.sample(200, seed=0, color_words="both", split="all")
SCENES = [
    next(s for s in POOL if s.relation == relation)
    for relation in ("upper_left", "below", "right", "lower_left")
]
PROMPTS = [scenes.caption(scene) for scene in SCENES]


def zero(heads: tuple[PlantedHead, ...], steps: tuple[int, ...]) -> list:
    """Hooks that zero the z of `heads` at `steps`, in both branches."""
    by_site: dict[str, list[int]] = {}
    for head in heads:
        by_site.setdefault(f"blocks.{head.layer}.{head.sublayer}.hook_z", []).append(head.head)
    return [
        (
            f"steps.{s}.{branch}.{site}",
            lambda z, hook, at=at: z.index_fill(2, torch.tensor(at), 0.0),
        )
        for site, at in by_site.items()
        for s in steps
        for branch in ("cond", "uncond")
    ]


@torch.no_grad()
def draw(model: HookedTextToImage, n: int = len(SCENES), hooks: list | None = None) -> torch.Tensor:
    return model.run_with_hooks(PROMPTS[:n], seed=list(range(n)), fwd_hooks=hooks or [])


@cache
def undisturbed(kind: Kind) -> torch.Tensor:
    return draw(circuit(kind, 0)[0])


def judge(images: torch.Tensor) -> xr.Dataset:
    return scenes.evaluate(images, SCENES[: len(images)]).mean()


@pytest.mark.parametrize("kind", DRAWING)
def test_it_draws_the_task(kind: Kind) -> None:
    verdict = judge(undisturbed(kind))
    assert verdict.unique_binding >= 0.95
    assert verdict.relation_strict >= 0.95


def test_the_negative_control_binds_but_relates_at_chance() -> None:
    verdict = judge(undisturbed("no-relation"))
    assert verdict.unique_binding >= 0.95
    # a layout without a relation has one by chance, left or right
    assert verdict.relation_strict <= 1 / 4
    assert circuit("no-relation", 0)[1].relation_heads == ()


def head_norms(model: HookedTextToImage) -> torch.Tensor:
    blocks = [part for block in model.dit.blocks for part in (block.attn, block.cross_attn)]
    return torch.stack(
        [
            torch.stack([w.flatten(1).norm(dim=1) for w in (a.W_Q, a.W_K, a.W_V, a.W_O)])
            for a in blocks
        ]
    )


def test_no_norm_tells_the_control_from_the_positive() -> None:
    control, positive = (circuit(kind, 0) for kind in ("no-relation", "two-stage"))
    torch.testing.assert_close(
        head_norms(control[0]), head_norms(positive[0]), rtol=1e-4, atol=1e-4
    )
    place = {str(h) for h in positive[1].relation_heads}
    assert place == {str(h) for h in control[1].idle_heads[:4]}
    for block, (a, b) in enumerate(zip(control[0].dit.blocks, positive[0].dit.blocks, strict=True)):
        differ = {
            f"cross_attn.L{block}H{i}"
            for i in range(8)
            if not torch.equal(a.cross_attn.W_Q[i], b.cross_attn.W_Q[i])
        }
        assert differ == (place if block == 1 else set())


@pytest.mark.parametrize("kind", DRAWING)
def test_relation_heads_are_needed_at_their_steps(kind: Kind) -> None:
    model, truth = circuit(kind, 0)
    verdict = judge(draw(model, hooks=zero(truth.relation_heads, truth.relation_heads[0].steps)))
    assert verdict.relation_strict <= 1 / 4
    assert verdict.unique_binding >= 0.95


def other_steps(head: PlantedHead) -> tuple[int, ...]:
    return tuple(s for s in range(14) if s not in head.steps)


@pytest.mark.parametrize("role", ["relation_heads", "object_heads"])
def test_outside_their_steps_heads_do_nothing(role: str) -> None:
    model, truth = circuit("two-stage", 0)
    heads = getattr(truth, role)
    assert 0 < len(heads[0].steps) < 14
    images = draw(model, 2, zero(heads, other_steps(heads[0])))
    torch.testing.assert_close(images, undisturbed("two-stage")[:2], rtol=0, atol=0.02)


@pytest.mark.parametrize("role", ["object_heads", "helper_heads"])
def test_without_the_other_heads_nothing_is_drawn(role: str) -> None:
    model, truth = circuit("two-stage", 0)
    heads = tuple(h for h in getattr(truth, role) if h.role in ("object", "locator"))
    assert judge(draw(model, 2, list(chain(*(zero((h,), h.steps) for h in heads))))).n_objects == 0


@pytest.mark.parametrize("kind", ["two-stage", "rotated"])
def test_distractors_do_nothing(kind: Kind) -> None:
    model, truth = circuit(kind, 0)
    images = draw(model, 2, zero(truth.decoy_heads + truth.idle_heads, tuple(range(14))))
    before, after = judge(undisturbed(kind)[:2]), judge(images)
    assert float(after.relation_strict) == float(before.relation_strict) == 1
    assert float(after.n_objects) == 2


def test_the_noise_shifts_the_layout() -> None:
    model, _ = circuit("two-stage", 0)
    with torch.no_grad():
        images = model([PROMPTS[0]] * 4, seed=list(range(4)))
    verdict = scenes.evaluate(images, SCENES[:1] * 4)
    assert bool(verdict.relation_strict.all())
    assert len(set(zip(verdict.x1.values, verdict.y1.values, strict=True))) > 2


@pytest.mark.parametrize("kind", ["two-stage", "fused"])
def test_relation_heads_read_what_the_truth_says(kind: Kind) -> None:
    model, truth = circuit(kind, 0)
    prompt = "red circle is to the upper left of blue square"
    roles = token_roles(model, prompt)
    with torch.no_grad():
        _, run = model.run_with_cache(
            prompt,
            seed=0,
            steps=[0],
            names_filter=lambda name: name.endswith("1.cross_attn.hook_pattern"),
        )
    pattern = run["pattern", 1, "cross_attn", 0][0]
    for head in truth.relation_heads:
        read = pattern[head.head][:, [role in head.reads for role in roles]].sum(dim=1)
        assert set(read.round().tolist()) == {0, 1}  # some places attend to the word, some do not
        sink = pattern[head.head][:, [role == "eos" for role in roles]].sum(dim=1)
        torch.testing.assert_close(read + sink, torch.ones(64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_truth_lists_every_head_once_and_edges_are_nodes(kind: Kind) -> None:
    _, truth = circuit(kind, 0)
    assert isinstance(truth, PlantedTruth)
    names = [str(h) for h in truth.heads]
    assert len(names) == len(set(names)) == 2 * 6 * 8
    in_circuit = {str(h) for h in truth.relation_heads + truth.object_heads + truth.helper_heads}
    ends = {str(Node.parse(end)) for edge in truth.edges for end in (edge.sender, edge.receiver)}
    assert {end.rstrip("qkv").rstrip(".") for end in ends if "H" in end} == in_circuit
    assert {f"text[{'shape2' if kind == 'fused' else 'relation'}]"} <= ends or kind == "no-relation"


@pytest.mark.parametrize("kind", ["rotated", "fused"])
def test_save_and_load(kind: Kind, tmp_path) -> None:
    model, _ = circuit(kind, 0)
    model.save_pretrained(tmp_path)
    loaded = HookedTextToImage.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded, 1), draw(model, 1))


def test_the_plain_pipeline_draws_the_same() -> None:
    model, _ = circuit("fused", 0)
    pipe = PixArtSigmaPipeline(
        model.tokenizer, model.text_encoder, model.codec, model.dit.wrapped, model.scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 192, 16, 16, generator=torch.Generator().manual_seed(0))
    image = pipe(
        PROMPTS[0],
        num_inference_steps=14,
        latents=noise,
        use_resolution_binning=False,
        max_sequence_length=20,
        clean_caption=False,
        output_type="pt",
    ).images
    torch.testing.assert_close(image, undisturbed("fused")[:1], rtol=0, atol=1e-3)


def test_fused_encoder_moves_words_into_the_last_one() -> None:
    config = FusedTokenEncoderConfig(
        ["red", "circle", "above", "square"], moved=["above"], d_model=16
    )
    encoder, plain = FusedTokenEncoder(config).eval(), RandomTokenEncoder(config).eval()
    ids = torch.tensor([[3, 4, 5, 6, 1, 0], [3, 5, 4, 5, 6, 1]])
    expected = plain(ids).last_hidden_state.clone()
    above = plain.embed_tokens.weight[5]
    expected[0, 2] -= above
    expected[0, 3] += above
    expected[1, [1, 3]] -= above
    expected[1, 4] += 2 * above
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="choose one of two-stage"):
        planted.planted_circuit("one-stage")  # type: ignore[arg-type]


def test_the_model_is_small_and_seeds_differ() -> None:
    (a, truth_a), (b, truth_b) = circuit("two-stage", 0), circuit("two-stage", 1)
    assert a.cfg.d_head == D_HEAD
    assert not torch.equal(
        a.dit.W_pos @ a.dit.blocks[1].cross_attn.W_Q[0],
        b.dit.W_pos @ b.dit.blocks[1].cross_attn.W_Q[0],
    )
    assert [str(h) for h in truth_a.relation_heads] != [str(h) for h in truth_b.relation_heads]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", DRAWING)
def test_all_combinations_and_phrases(kind: Kind, seed: int) -> None:
    model, truth = planted.planted_circuit(kind, seed)
    phrased = [
        scenes.Scene(
            c.shape1,
            c.color1,
            0,
            0,
            c.shape2,
            scenes.scene.other_color(c.color1),
            0,
            0,
            c.relation,
            truth_phrase(c.relation, i),
        )
        for i, c in enumerate(scenes.COMBINATIONS)
    ]
    assert {scene.phrase for scene in phrased} == set(truth.phrases)
    with torch.no_grad():
        images = model([scenes.caption(scene) for scene in phrased], seed=list(range(len(phrased))))
    verdict = scenes.evaluate(images, phrased).mean()
    assert verdict.unique_binding >= 0.95
    assert verdict.relation_strict >= 0.95


def truth_phrase(relation: scenes.scene.Relation, i: int) -> str:
    phrases = scenes.PHRASES[relation]
    return phrases[(i // len(scenes.RELATIONS)) % len(phrases)]
