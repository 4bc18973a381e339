"""Path patching against the definition (paths followed one by one through the block's maths,
without a hook), against edge interventions by plain hooks, across steps against diffusers' own
solver, and against identities.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from einops import rearrange
from torch import Tensor
from transformer_lens.patching import get_act_patch_direct_path

from dit_lens.graph.path_patching import (
    VARIANTS,
    Nodes,
    head_matrix,
    path_patch,
    path_patch_matrix,
)
from hooked_models import HookedDiT, HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline
from ...hooked_models.tiny import tiny_inputs, tiny_transformer

HEADS, D_HEAD, LAYERS = 2, 4, 3


def weighted(tensor: Tensor) -> Tensor:
    """A linear metric to which every entry matters."""
    weights = torch.randn(
        tensor[0].numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    return tensor.flatten(1).double() @ weights


def agree(result, hand: Tensor, atol: float = 1e-11) -> None:
    """`patched` is the hand-made value, which itself is no trivial one."""
    assert np.abs(hand.numpy() - result.original.values).min() > 1e-7
    np.testing.assert_allclose(result.patched.values, hand.numpy(), rtol=0, atol=atol)
    total = result.source.values - result.original.values
    np.testing.assert_allclose(
        result.effect.values, (hand.numpy() - result.original.values) / total, atol=1e-7
    )


# One denoiser call


@pytest.fixture(scope="module")
def transformer():
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": D_HEAD, "num_layers": LAYERS}
    return tiny_transformer(**sizes, sample_size=4).double()


@pytest.fixture(scope="module")
def dit(transformer) -> HookedDiT:
    return HookedDiT(transformer)


@pytest.fixture(scope="module")
def calls(transformer):
    """Two calls that differ in text and latents; the second row has a masked token."""
    pair = [
        tiny_inputs(transformer, height=4, width=4, text_len=4, pads=1, seed=seed)
        for seed in (1, 2)
    ]
    for call in pair:
        call["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return pair


def view(dit: HookedDiT, call):
    return dit.bind(
        call["hidden_states"],
        call["timestep"],
        call["encoder_hidden_states"],
        call["encoder_attention_mask"],
    )[0]


@pytest.fixture(scope="module")
def pair(dit, calls):
    return [view(dit, call) for call in calls]


class Paths:
    """The definition.

    `write(component, counts)` is what a component adds to the residual stream along those paths to
    the output of which the remainder, from this component on, reaches a receiver by components that
    are not frozen (`counts`), or along the others. Only the first kind sees the senders' source
    values.
    """

    def __init__(
        self, transformer, call, senders=(), receivers=(), frozen=(), source: Paths | None = None
    ) -> None:
        self.model, self.call, self.source = transformer, call, source
        self.senders, self.receivers, self.frozen = senders, receivers, frozen
        six, self.t_emb = transformer.adaln_single(
            call["timestep"], {}, batch_size=None, hidden_dtype=torch.float64
        )
        self.six = six.view(len(six), 6, -1)
        self.groups = [["embed"]]
        for layer in range(LAYERS):
            for kind in ("attn", "cross_attn"):
                self.groups.append(
                    [f"{kind}.L{layer}H{h}" for h in range(HEADS)] + [f"{kind}.L{layer}.bias"]
                )
            self.groups.append([f"mlp.L{layer}"])
        self.write = cache(self._write)

    @staticmethod
    def among(name: str, chosen: Iterable[str]) -> bool:
        return any(name == c or name.startswith((c + "H", c + ".")) for c in chosen)

    def counted(self, port: str, counts: bool) -> bool:
        return self.among(port, self.receivers) or (
            counts and port.split(".")[0] not in self.frozen
        )

    def stream(self, group: int, counts: bool) -> Tensor:
        return sum(self.write(name, counts) for names in self.groups[:group] for name in names)

    def text(self, counts: bool) -> Tensor:
        text = self.call["encoder_hidden_states"].clone()
        for sender in self.senders if counts else ():
            if sender.startswith("text"):
                rows = [int(i) for i in sender[5:-1].split(",")] if "[" in sender else slice(None)
                text[:, rows] = self.source.call["encoder_hidden_states"][:, rows]
        return self.model.caption_projection(text)

    def _write(self, name: str, counts: bool) -> Tensor:
        if counts and self.among(name, self.senders):
            return self.source.write(name, False)
        if name == "embed":
            return self.model.pos_embed(self.call["hidden_states"])
        kind, layer = name.split(".")[0], int(name.split(".")[1][1])
        block, group = (
            self.model.transformer_blocks[layer],
            1 + 3 * layer + ("attn", "cross_attn", "mlp").index(kind),
        )
        mod = block.scale_shift_table + self.six
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            row[:, None] for row in mod.unbind(1)
        )
        if kind == "mlp":
            x = self.stream(group, self.counted(name, counts))
            return gate_mlp * block.ff(
                F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_mlp) + shift_mlp
            )
        attention, gate = (
            (block.attn1, gate_msa) if kind == "attn" else (block.attn2, torch.ones_like(gate_msa))
        )
        if name.endswith("bias"):
            return gate * attention.to_out[0].bias
        head = int(name[-1])
        part = slice(head * D_HEAD, (head + 1) * D_HEAD)

        def read(port: str) -> Tensor:
            seen = self.counted(f"{name}.{port}", counts)
            if kind == "cross_attn":
                return self.text(seen) if port in "kv" else self.stream(group, seen)
            x = self.stream(group, seen)
            return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_msa) + shift_msa

        q, k, v = (getattr(attention, f"to_{port}")(read(port))[..., part] for port in "qkv")
        scores = q @ k.mT / D_HEAD**0.5
        if kind == "cross_attn":
            scores = scores - 10000.0 * (1 - self.call["encoder_attention_mask"].double())[:, None]
        return gate * (scores.softmax(-1) @ v @ attention.to_out[0].weight[:, part].T)

    def output(self) -> Tensor:
        x = self.stream(len(self.groups), self.among("output", self.receivers))
        shift, scale = (self.model.scale_shift_table + self.t_emb[:, None]).chunk(2, dim=1)
        patches = self.model.proj_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=2, p=2, q=2)


EVERY_VARIANT: list[str | Collection[str]] = [*VARIANTS, ("attn",), ("cross_attn", "mlp")]
EDGES = [
    ("cross_attn.L0H1", "attn.L1H0.q", EVERY_VARIANT),
    ("cross_attn.L0H1", "attn.L2H1.k", EVERY_VARIANT),
    ("attn.L0H0", "attn.L1H0.v", EVERY_VARIANT),
    ("attn.L0H0", "cross_attn.L0H1.q", ["direct", "exact"]),
    ("cross_attn.L0", "cross_attn.L2H1.q", EVERY_VARIANT),
    ("mlp.L0", "attn.L2", EVERY_VARIANT),
    ("mlp.L0", "mlp.L2", EVERY_VARIANT),
    ("embed", "mlp.L0", EVERY_VARIANT),
    ("text[1,2]", "cross_attn.L1H0.k", ["direct", "exact"]),
    ("text", "cross_attn.L2H1.v", ["direct", "exact"]),
    ("text", "cross_attn.L1H0", ["direct", "exact"]),  # its q too, by the first layer's heads
    ("text[0]", "mlp.L1", ["exact", ("mlp",)]),
    ("text[0]", "output", ["exact", ("mlp",)]),
    ("cross_attn.L1H0", "output", EVERY_VARIANT),
    # receivers that paths join, so that writing recorded inputs over the original ones would give
    # something else
    (["attn.L0H0", "embed"], ["cross_attn.L1H0.q", "mlp.L1", "attn.L2H1.v"], EVERY_VARIANT),
    (
        ["text[1]", "mlp.L0"],
        ["cross_attn.L0H1.k", "attn.L1H1", "cross_attn.L2H0.v", "output"],
        EVERY_VARIANT,
    ),
    # one of them sends and receives
    (["mlp.L0", "mlp.L1"], ["mlp.L1", "mlp.L2", "attn.L1"], EVERY_VARIANT),
]


@pytest.mark.parametrize(
    ("senders", "receivers", "variants"), EDGES, ids=lambda value: str(value)[:40]
)
@torch.no_grad()
def test_every_edge_and_variant_follows_the_definition(
    transformer, calls, pair, senders, receivers, variants
):
    ends = [[end] if isinstance(end, str) else end for end in (senders, receivers)]
    source = Paths(transformer, calls[1])
    for variant in variants:
        frozen = VARIANTS[variant] if isinstance(variant, str) else variant
        hand = Paths(transformer, calls[0], *ends, frozen, source).output()
        agree(path_patch(*pair, senders, receivers, weighted, variant), weighted(hand))


@torch.no_grad()
def test_the_definition_without_senders_is_the_model(transformer, calls):
    for call in calls:
        torch.testing.assert_close(
            Paths(transformer, call).output(), transformer(**call).sample, atol=1e-12, rtol=0
        )


@pytest.fixture
def flags(dit):
    """Every hook that an edge intervention by hand needs."""
    names = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for name in names:
        getattr(dit, f"set_{name}")(True)
    yield
    for name in names:
        getattr(dit, f"set_{name}")(False)


def set_head(value: Tensor, head: int):
    def hook_fn(tensor: Tensor, hook) -> None:
        tensor[:, :, head] = value

    return hook_fn


RESULT = "blocks.0.cross_attn.hook_result"


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize(
    ("receiver", "name", "head"),
    [
        ("attn.L1H0.q", "blocks.1.attn.hook_q_input", 0),
        ("attn.L2H1.k", "blocks.2.attn.hook_k_input", 1),
        ("attn.L1H1.v", "blocks.1.attn.hook_v_input", 1),
        ("cross_attn.L1H0.q", "blocks.1.cross_attn.hook_q_input", 0),
        ("mlp.L1", "blocks.1.hook_mlp_in", None),
        ("output", f"blocks.{LAYERS - 1}.hook_resid_post", None),
    ],
)
@torch.no_grad()
def test_a_direct_edge_adds_the_difference_of_the_results_to_one_input(
    dit, calls, pair, receiver, name, head
):
    results = [dit.run_with_cache(**call)[1][RESULT][:, :, 1] for call in calls]

    def add(tensor: Tensor, hook) -> None:
        (tensor if head is None else tensor[:, :, head]).add_(results[1] - results[0])

    hand = dit.run_with_hooks(**calls[0], fwd_hooks=[(name, add)]).sample
    agree(path_patch(*pair, "cross_attn.L0H1", receiver, weighted), weighted(hand))


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("variant", ["through_mlps", "exact"])
@torch.no_grad()
def test_wang_et_al_record_the_input_in_one_run_and_write_it_in_another(dit, calls, pair, variant):
    original, source = (dit.run_with_cache(**call)[1] for call in calls)
    hooks = [(RESULT, set_head(source[RESULT][:, :, 1], 1))]
    if variant == "through_mlps":
        frozen = [name for name in dit.hook_dict if name.endswith("attn.hook_result")]
        hooks = [
            (name, lambda tensor, hook: original[hook.name].clone()) for name in frozen
        ] + hooks
    recorded = {}
    port = "blocks.2.attn.hook_q_input"
    keep = [(port, lambda tensor, hook: recorded.update(q=tensor[:, :, 0].clone()))]
    dit.run_with_hooks(**calls[0], fwd_hooks=hooks + keep)
    hand = dit.run_with_hooks(**calls[0], fwd_hooks=[(port, set_head(recorded["q"], 0))]).sample
    agree(path_patch(*pair, "cross_attn.L0H1", "attn.L2H0.q", weighted, variant), weighted(hand))


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("part", ["k", "v"])
@torch.no_grad()
def test_a_direct_edge_from_a_token_replaces_its_row_of_one_heads_caption(dit, calls, pair, part):
    caption = dit.project_caption(calls[1]["encoder_hidden_states"])

    def write(tensor: Tensor, hook) -> None:
        tensor[:, 2, 1] = caption[:, 2]

    hand = dit.run_with_hooks(
        **calls[0], fwd_hooks=[(f"blocks.1.cross_attn.hook_{part}_input", write)]
    ).sample
    agree(path_patch(*pair, "text[2]", f"cross_attn.L1H1.{part}", weighted), weighted(hand))


@pytest.mark.parametrize("part", ["q", "v"])
@torch.no_grad()
def test_between_two_heads_direct_is_what_transformer_lens_calls_direct_path(dit, calls, part):
    """TransformerLens reads results off W_O, so it needs the timestep folded into the weights; path
    patching does not.
    """
    same_time = [view(dit, {**call, "timestep": torch.tensor([500, 500])}) for call in calls]
    ours = head_matrix(*same_time, weighted, senders="attn", receivers="attn", part=part).sel(
        layer=0, head=1
    )
    folded = dit.fold_timestep(500.0)
    (original, tokens), (source, _) = (
        folded.bind(
            call["hidden_states"],
            500.0,
            call["encoder_hidden_states"],
            call["encoder_attention_mask"],
        )
        for call in calls
    )
    caches = [folded_view.run_with_cache(tokens)[1] for folded_view in (source, original)]
    theirs: list[Tensor] = []  # what it returns is rounded to float32

    def metric(out: Tensor) -> Tensor:
        theirs.append(weighted(out))
        return theirs[-1].sum()

    get_act_patch_direct_path(original, tokens, *caches, metric, 0, 1, part, verbose=False)
    found = ours.patched[1:]  # no path leads to layer 0
    close(found, torch.stack(theirs).reshape(found.shape))
    assert np.abs(found - ours.original).min() > 1e-7


WRITERS = [
    "embed",
    *(f"{kind}.L{layer}" for kind in ("attn", "cross_attn", "mlp") for layer in range(LAYERS)),
]
FINAL_RESIDUAL = f"blocks.{LAYERS - 1}.hook_resid_post"


def close(one, other, atol: float = 1e-11) -> None:
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=atol)


def test_all_paths_from_all_beginnings_give_the_source_run(pair):
    everything = path_patch(*pair, ["embed", "text"], "output", weighted, "exact")
    close(everything.patched, everything.source)
    close(everything.effect, [1, 1])
    assert np.abs(everything.source - everything.original).min() > 0.1
    written = path_patch(*pair, WRITERS, "output", weighted, "direct")
    close(written.patched, written.source)


def test_direct_effects_on_the_residual_stream_add_up(pair):
    each = path_patch_matrix(*pair, WRITERS, ["output"], weighted, metric_on=FINAL_RESIDUAL)
    close((each.patched - each.original).sum("sender")[0], each.source - each.original)
    close(each.effect.sum("sender")[0], [1, 1])


@torch.no_grad()
def test_direct_paths_to_all_readers_are_a_plain_patch(dit, calls, pair):
    readers = ["attn.L1", "cross_attn.L1", "mlp.L1", "attn.L2", "cross_attn.L2", "mlp.L2", "output"]
    z = dit.run_with_cache(**calls[1])[1]["blocks.0.cross_attn.hook_z"][:, :, 1]
    hand = dit.run_with_hooks(
        **calls[0], fwd_hooks=[("blocks.0.cross_attn.hook_z", set_head(z, 1))]
    ).sample
    for variant in EVERY_VARIANT:
        agree(
            path_patch(*pair, "cross_attn.L0H1", ["mlp.L0", *readers], weighted, variant),
            weighted(hand),
        )


def test_a_run_patched_from_itself_is_unchanged(pair):
    for variant in VARIANTS:
        result = path_patch(
            pair[0], pair[0], WRITERS[:4], ["attn.L1H0", "mlp.L2", "output"], weighted, variant
        )
        close(result.patched, result.original, atol=1e-13)
        assert result.effect.isnull().all()  # no difference to normalise by


def test_a_matrix_holds_the_single_results_and_nan_without_a_path(pair):
    senders = ["mlp.L1", ["attn.L0H0", "cross_attn.L1H1"], "text[1]"]
    receivers = ["attn.L2H1.q", "mlp.L0", ["mlp.L1", "attn.L2"], "output", "cross_attn.L0H0.v"]
    for variant in VARIANTS:
        table = path_patch_matrix(*pair, senders, receivers, weighted, variant, receivers_per_run=2)
        assert table.patched.dims == ("sender", "receiver", "prompt")
        assert list(table.sender) == ["mlp.L1", "attn.L0H0+cross_attn.L1H1", "text[1]"]
        paths = 0
        for i, sender in enumerate(senders):
            for j, receiver in enumerate(receivers):
                cell = table.effect[i, j]
                if cell.isnull().all():
                    with pytest.raises(ValueError, match=r"No path|reads the text alone"):
                        path_patch(*pair, sender, receiver, weighted, variant)
                else:
                    paths += 1
                    close(cell, path_patch(*pair, sender, receiver, weighted, variant).effect)
        assert paths == {"direct": 6, "through_mlps": 6, "exact": 10}[variant]


def test_the_matrix_of_heads_has_heads_as_dims(pair):
    table = head_matrix(*pair, weighted, senders="cross_attn", receivers="attn", part="v")
    assert table.effect.dims == ("layer", "head", "receiver_layer", "receiver_head", "prompt")
    cell = table.effect.sel(layer=0, head=1, receiver_layer=2, receiver_head=0)
    close(cell, path_patch(*pair, "cross_attn.L0H1", "attn.L2H0.v", weighted).effect)
    later = table.receiver_layer > table.layer
    assert (table.effect.notnull() == later).all()


# Across steps


STEPS = 5
ORIGINAL = ["red circle is above blue square", "blue square is left of red circle"]
SOURCE = ["blue circle is left red square", "blue circle is above of blue square"]
HOW = {"seed": [3, 4], "num_steps": STEPS, "guidance": 3.0}


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    # It predicts noise, so that the latents themselves, too, are carried to the end.
    pipe = tiny_pipeline(
        dtype=torch.float64, learned_sigma=True, scheduler=DPMSolverMultistepScheduler()
    )
    model = HookedTextToImage.from_pipeline(pipe)
    model.dit.set_use_split_qkv_input(True)
    return model


@pytest.fixture(scope="module")
def runs(model):
    with torch.no_grad():
        return [model.trajectory(prompts, **HOW) for prompts in (ORIGINAL, SOURCE)]


def READ(name: str) -> bool:
    return name.endswith(
        (
            "hook_latent",
            "hook_out",
            "0.attn.hook_z",
            "0.cross_attn.hook_z",
            "0.adaln.hook_gate_msa",
            "k_input",
            "hook_text",
        )
    )


@pytest.fixture(scope="module")
def caches(model):
    with torch.no_grad():
        return [
            model.run_with_cache(prompts, **HOW, branch="both", names_filter=READ)[1]
            for prompts in (ORIGINAL, SOURCE)
        ]


@torch.no_grad()
def record(model, names: list[str], hooks=()) -> list[Tensor]:
    """Tensors of a run of the original prompts with plain hooks, all of it run anew."""
    found = {}
    keep = [
        (name, lambda tensor, hook: found.update({hook.name: tensor.clone()}))
        for name in names
        if name != "hook_image"
    ]
    found["hook_image"] = model.run_with_hooks(ORIGINAL, **HOW, fwd_hooks=[*hooks, *keep])
    return [found[name] for name in names]


def replace_by(value: Tensor):
    return lambda tensor, hook: value.clone()


def solve(model, caches, outs: dict[int, Tensor]) -> list[Tensor]:
    """The latents before every step and after the last, by a new diffusers solver; network outputs
    original unless given.
    """
    solver = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    solver.set_timesteps(STEPS)
    latents = [caches[0]["steps.0.hook_latent"]]
    for step, time in enumerate(solver.timesteps):
        out = outs.get(step, caches[0][f"steps.{step}.hook_out"])
        latents.append(solver.step(out, time, latents[-1], return_dict=False)[0])
    return latents


def z_from_source(caches, step: int):
    name = f"steps.{step}.cond.blocks.0.cross_attn.hook_z"
    return name, set_head(caches[1][name][:, :, 1], 1)


def direct_out(model, caches, step: int, branch: str = "cond", kind: str = "cross_attn") -> Tensor:
    """The network output when the difference of L0H1 reaches the final residual and nothing
    else.
    """
    prefix = f"steps.{step}.{branch}.blocks"
    z = [cache[f"{prefix}.0.{kind}.hook_z"][:, :, 1] for cache in caches]
    gate = caches[0][f"{prefix}.0.adaln.hook_gate_msa"] if kind == "attn" else 1
    add = gate * ((z[1] - z[0]) @ getattr(model.dit.blocks[0], kind).W_O[1].detach())
    return record(
        model,
        [f"steps.{step}.hook_out"],
        [(f"{prefix}.1.hook_resid_post", lambda tensor, hook: tensor + add)],
    )[0]


def k_input(step: int) -> str:
    return f"steps.{step}.cond.blocks.1.attn.hook_k_input"


def test_exact_paths_into_a_later_step_are_two_runs(model, runs, caches):
    (recorded,) = record(model, [k_input(3)], [z_from_source(caches, 1)])
    images, out = record(
        model, ["hook_image", "steps.4.hook_out"], [(k_input(3), set_head(recorded[:, :, 0], 0))]
    )
    ends = Nodes("cross_attn.L0H1", steps=1), Nodes("attn.L1H0.k", steps=3)
    agree(path_patch(*runs, *ends, weighted, "exact"), weighted(images))
    agree(path_patch(*runs, *ends, weighted, "exact", metric_on="steps.4.hook_out"), weighted(out))


# (The empty prompt is one token, so that no cross-attention there depends on anything.)
@pytest.mark.parametrize(("branch", "kind"), [("cond", "cross_attn"), ("uncond", "attn")])
def test_direct_paths_into_a_later_step_are_what_the_solver_carries(
    model, runs, caches, branch, kind
):
    latents = solve(model, caches, {1: direct_out(model, caches, 1, branch, kind)})
    proj = model.dit.patch_embed.proj
    with torch.no_grad():
        # the embedding is affine
        change = (proj(latents[3]) - proj(caches[0]["steps.3.hook_latent"])).flatten(2).mT
    patched = caches[0][k_input(3)][:, :, 0] + change
    (x0,) = record(model, ["steps.3.hook_x0"], [(k_input(3), set_head(patched, 0))])
    ends = Nodes(f"{kind}.L0H1", steps=1, branch=branch), Nodes("attn.L1H0.k", steps=3)
    agree(path_patch(*runs, *ends, weighted, "direct", metric_on="steps.3.hook_x0"), weighted(x0))


def test_receivers_at_every_step_are_reached_from_the_senders_step_on(runs):
    sender = Nodes("cross_attn.L0H1", steps=2)
    every, later = (
        path_patch(*runs, sender, Nodes("attn.L1H0.k", steps), weighted)
        for steps in (None, [2, 3, 4])
    )
    assert float(abs(later["patched"] - later["original"]).max()) > 1e-6
    agree(every, torch.tensor(later["patched"].values))


def test_freezing_the_steps_alone_leaves_the_paths_within_them(model, runs, caches):
    (out,) = record(model, ["steps.1.hook_out"], [z_from_source(caches, 1)])
    latent = solve(model, caches, {1: out})[3]
    (recorded,) = record(model, [k_input(3)], [("steps.3.hook_latent", replace_by(latent))])
    (images,) = record(model, ["hook_image"], [(k_input(3), set_head(recorded[:, :, 0], 0))])
    ends = Nodes("cross_attn.L0H1", steps=1), Nodes("attn.L1H0.k", steps=3)
    agree(path_patch(*runs, *ends, weighted, ["steps"]), weighted(images))


def test_senders_of_several_steps_do_not_reach_through_one_another(model, runs, caches):
    outs = {step: direct_out(model, caches, step) for step in (0, 2)}
    latents = solve(model, caches, outs)
    images = model.decode(latents[-1]).detach()
    agree(
        path_patch(*runs, Nodes("cross_attn.L0H1", steps=[0, 2]), "image", weighted),
        weighted(images),
    )
    embed = [("steps.3.hook_latent", replace_by(latents[3]))]
    recorded = record(
        model, [f"steps.3.{branch}.hook_embed" for branch in ("cond", "uncond")], embed
    )
    hooks = [
        (f"steps.3.{branch}.hook_embed", replace_by(rows))
        for branch, rows in zip(("cond", "uncond"), recorded, strict=True)
    ]
    (out,) = record(model, ["steps.4.hook_out"], hooks)
    ends = Nodes("cross_attn.L0H1", steps=[0, 2]), Nodes("embed", steps=3, branch="both")
    agree(path_patch(*runs, *ends, weighted, metric_on="steps.4.hook_out"), weighted(out))


def test_what_a_receiver_does_reaches_later_receivers_though_steps_are_frozen(model, runs, caches):
    (out0,) = record(model, ["steps.0.hook_out"], [z_from_source(caches, 0)])
    latent1 = solve(model, caches, {0: out0})[1]
    (first,) = record(model, [k_input(1)], [("steps.1.hook_latent", replace_by(latent1))])
    receive = [(k_input(1), set_head(first[:, :, 0], 0))]
    outs = record(model, ["steps.1.hook_out", "steps.2.hook_out"], receive)
    latent3 = solve(model, caches, {0: out0, 1: outs[0], 2: outs[1]})[3]
    (second,) = record(model, [k_input(3)], [("steps.3.hook_latent", replace_by(latent3))])
    (images,) = record(
        model, ["hook_image"], [*receive, (k_input(3), set_head(second[:, :, 0], 0))]
    )
    ends = Nodes("cross_attn.L0H1", steps=0), Nodes("attn.L1H0.k", steps=[1, 3])
    agree(path_patch(*runs, *ends, weighted, ["steps"]), weighted(images))


def test_the_image_receives_what_the_solver_carries(model, runs, caches):
    images = model.decode(solve(model, caches, {1: direct_out(model, caches, 1)})[-1]).detach()
    agree(path_patch(*runs, Nodes("cross_attn.L0H1", steps=1), "image", weighted), weighted(images))


def test_a_word_is_found_by_its_role(model, runs, caches):
    """The relation word is token 3 in both prompts; by hand, its key alone is replaced at one
    step.
    """
    name = "steps.2.cond.blocks.1.cross_attn.hook_k_input"
    word = model.dit.project_caption(caches[1]["steps.2.cond.hook_text"][:, 3])

    def write(tensor: Tensor, hook) -> None:
        tensor[:, 3, 1] = word

    (out,) = record(model, ["steps.2.hook_out"], [(name, write)])
    for sender in ("text[relation]", "text[3]"):
        ends = Nodes(sender, steps=2), Nodes("cross_attn.L1H1.k", steps=2)
        agree(path_patch(*runs, *ends, weighted, metric_on="steps.2.hook_out"), weighted(out))


def test_the_text_by_all_paths_gives_the_source_images(runs):
    result = path_patch(*runs, "text", Nodes("output", branch="both"), weighted, "exact")
    close(result.patched, result.source)
    assert np.abs(result.source - result.original).min() > 1e-3
    same = path_patch(runs[0], runs[0], "text", "mlp.L1", weighted, "exact")
    close(same.patched, same.original, atol=1e-12)


def test_direct_paths_to_all_readers_of_all_steps_are_a_plain_patch(model, runs, caches):
    (images,) = record(model, ["hook_image"], [z_from_source(caches, 1)])
    readers = ["mlp.L0", "attn.L1", "cross_attn.L1", "mlp.L1", "output"]
    for variant in ("direct", "exact"):
        agree(
            path_patch(
                *runs, Nodes("cross_attn.L0H1", steps=1), Nodes(readers, steps=1), weighted, variant
            ),
            weighted(images),
        )


def test_a_matrix_across_steps_holds_the_single_results(runs):
    senders = [Nodes("cross_attn.L0H1", steps=1)]
    receivers = [
        Nodes(*r)
        for r in (("attn.L1H0.k", 1), ("mlp.L1", [1, 2]), ("attn.L0H0.q", 1), ("embed", 2))
    ]
    for variant in ("direct", "exact"):
        table = path_patch_matrix(
            *runs, senders, receivers, weighted, variant, metric_on="steps.3.hook_out"
        )
        assert list(table.receiver) == ["attn.L1H0.k@1", "mlp.L1@1,2", "attn.L0H0.q@1", "embed@2"]
        assert list(table.effect.isnull().all("prompt")[0]) == [False, False, True, False]
        for j in (0, 1, 3):
            single = path_patch(
                *runs, senders[0], receivers[j], weighted, variant, metric_on="steps.3.hook_out"
            )
            close(table.patched[0, j], single.patched)
            assert np.abs(single.patched - single.original).min() > 1e-9


# What is refused


@pytest.mark.parametrize(
    ("senders", "receivers", "message"),
    [
        (
            "mlp.L1",
            "attn.L1H0.q",
            "No path leads from mlp.L1 to attn.L1H0.q: within a denoiser call",
        ),
        ("mlp.L1", "mlp.L1", "No path leads"),
        ("mlp.L1", "embed", "No path leads"),
        (["mlp.L0", "mlp.L2"], ["attn.L1", "cross_attn.L1.q"], "No path leads from mlp.L2"),
        ("mlp.L0", ["attn.L1", "attn.L0"], "No path leads from mlp.L0 to attn.L0"),
        ("text", "mlp.L2", "acts through cross-attention, which is frozen"),
        ("mlp.L0", "cross_attn.L1H0.k", "cross_attn.L1H0.k reads the text alone"),
        ("attn.L3H0", "output", "There is no attn.L3H0: the model has 3 layers of 2 heads"),
        ("attn.L0H2", "output", "There is no attn.L0H2"),
        ("text[4]", "cross_attn.L1H0.k", "There is no position 4 in the text"),
        ("text[relation]", "cross_attn.L1H0.k", "give token positions"),
        ("text[verb]", "cross_attn.L1H0.k", "'verb' is no role of a token: choose"),
        ("cross_atn.L2H1", "output", r"'cross_atn.L2H1' is no node: write 'cross_attn.L2H1'"),
        ("L2H1", "output", "is no node"),
        ("attn.L0H1.q", "output", "write 'attn.L0H1'"),
        ("attn.L0H1", "text", "text can only send"),
        ("attn.L0H1", "image", "image receives after the last step"),
        ("image", "output", "image can only receive"),
        (Nodes("mlp.L0", steps=1), "output", "step 1 is not among the steps 0 to 0"),
        (Nodes("mlp.L0", branch="uncond"), "output", "no uncond branch"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_sentence(pair, senders, receivers, message):
    with pytest.raises(ValueError, match=message):
        path_patch(*pair, senders, receivers, weighted)


def test_runs_that_do_not_fit_together_are_refused(dit, calls, pair, model, runs):
    other_time = view(dit, {**calls[1], "timestep": torch.tensor([901, 18])})
    with pytest.raises(ValueError, match="differ in timestep"):
        path_patch(pair[0], other_time, "embed", "output", weighted)
    with pytest.raises(ValueError, match="of one model"):
        path_patch(pair[0], runs[0], "embed", "output", weighted)
    masked = view(
        dit, {**calls[1], "encoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    )
    with pytest.raises(ValueError, match="Token 2 of row 1 is masked"):
        path_patch(pair[0], masked, "text", "cross_attn.L1H0.k", weighted)
    with pytest.raises(ValueError, match="one number for each row"):
        path_patch(*pair, "embed", "output", lambda tensor: weighted(tensor).sum())
    for variant in ("total", ["heads"]):
        with pytest.raises(ValueError, match="is unknown: choose direct, through_mlps, exact"):
            path_patch(*pair, "embed", "output", weighted, variant)
    with torch.no_grad():
        single = model.trajectory(ORIGINAL[:1], **{**HOW, "seed": 3})
        unguided = model.trajectory(ORIGINAL, **{**HOW, "guidance": 1.0})
    with pytest.raises(ValueError, match="2 rows and source 1"):
        path_patch(runs[0], single, "embed", "output", weighted)
    with pytest.raises(ValueError, match="differ in guided"):
        path_patch(runs[0], unguided, "embed", "output", weighted)
    with pytest.raises(ValueError, match="step 3 comes before step 4"):
        path_patch(*runs, Nodes("mlp.L0", steps=4), Nodes("mlp.L1", steps=3), weighted)
    with pytest.raises(ValueError, match="cond and uncond do not meet"):
        path_patch(
            *runs, Nodes("mlp.L0", steps=4), Nodes("mlp.L1", steps=4, branch="uncond"), weighted
        )
    with pytest.raises(ValueError, match="step 4 is not among the steps 0 to 2"):
        path_patch(*runs, "mlp.L0", Nodes("mlp.L1", steps=4), weighted, metric_on="steps.2.hook_x0")
    colourless = model.trajectory(["circle is above square"], seed=0, num_steps=2)
    with pytest.raises(ValueError, match="has no color1 token"):
        path_patch(
            colourless,
            colourless,
            Nodes("text[color1]", steps=0),
            Nodes("cross_attn.L1H0.k", steps=0),
            weighted,
        )
