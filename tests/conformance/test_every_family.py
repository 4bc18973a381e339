"""Every tool on every family: the same assertions, on tiny random pipelines of each kind.

A tool that a family cannot have raises one sentence on purpose; `UNABLE` and `NOWHERE` list them,
and `families` writes docs/families.md from them and from these tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import patching as tl_patching

from dit_lens import (
    Add,
    Intervention,
    Replace,
    Scale,
    attribution,
    patching,
    prompts,
    sweep,
    synopsis,
)
from hooked_models import GenerationCache, UnknownHookError, families
from hooked_models.families.adapter import submodule
from hooked_models.generation.cache_estimate import CacheTooLargeError, estimate

from ..hooked_models.pipelines import PROMPTS
from ..hooked_models.tiny_pipelines import PIPELINES, tiny_pipeline
from .family_cases import LAST, SEEDS, STEPS, UNABLE, Case, case_of, close

NOWHERE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hooks and interventions in text encoders": (
        "text encoders are transformers' own modules, of many kinds, without names here; torch's "
        "own hooks on their layers (`readout.text_layers.blocks_of(pipe.text_encoder)`, with "
        "`prepend=True`) act in every run, for the text is encoded again when they change, and what "
        "encoders give is read and written at `hook_text`",
        lambda case: case.act("text_encoder.blocks.0.hook_resid_post"),
    ),
    "token ids in place of prompts": (
        "a pipeline may have several text encoders, each with its own tokens",
        lambda case: case.model.to_tokens(PROMPTS),
    ),
}
"""Tool → why no other family than PixArt has it, and a call that says so."""


@pytest.fixture(autouse=True)
def _float64() -> None:
    """In place of the folder's own fixture: these tests run in float32, as users do."""


# Whole generations


def test_images_are_bitwise_the_pipelines_with_hooks_that_look(case: Case) -> None:
    reference = case.plain()
    assert torch.equal(case.images(), reference)
    seen: set[str] = set()

    def look(tensor: Tensor, hook: Any) -> None:
        seen.add(hook.name)

    chosen = (
        "hook_resid_post",
        "hook_latent",
        "hook_x0",
        "hook_out",
        "hook_z",
        "hook_k",
        "hook_image",
    )
    assert torch.equal(case.images([(lambda name: name.endswith(chosen), look)]), reference)
    assert {f"steps.{step}.hook_out" for step in range(STEPS)} | {"hook_image"} <= seen
    assert torch.equal(case.plain(), reference)


def test_images_in_bfloat16_are_bitwise_the_pipelines(case: Case) -> None:
    """Schedulers return the predictions' or the latents' dtype, as pipelines let them."""
    half = case_of.__wrapped__(case.name)
    half.pipe.to(torch.bfloat16)
    if (case.name, "bfloat16") in UNABLE:
        with pytest.raises(RuntimeError, match="same dtype"):
            half.plain()
        return
    assert torch.equal(half.images().float(), half.plain().float())


def test_both_branches_make_up_the_guided_output(case: Case) -> None:
    """Which rows or calls are which branch's: out = uncond + scale · (cond − uncond), for one
    number at all places.
    """
    assert ((case.name, "branches") in UNABLE) == (len(case.branches) == 1)
    if len(case.branches) == 1:
        return
    cache = case.cached(
        [f"steps.0.hook_{name}" for name in ("out", "out_cond", "out_uncond")], branch="both"
    )
    out, cond, uncond = (
        cache[f"steps.0.hook_{name}"].double() for name in ("out", "out_cond", "out_uncond")
    )
    cond, uncond = (x.reshape(len(x), -1)[:, : out[0].numel()] for x in (cond, uncond))
    signs = (1, -1)  # some pipelines turn the prediction's sign for their scheduler
    assert any(
        fits(sign * out.flatten(1), cond, uncond) or rescaled(case, sign * out, cond, uncond)
        for sign in signs
    )


def fits(out: Tensor, cond: Tensor, uncond: Tensor) -> bool:
    """True for out = uncond + s · (cond − uncond) with s > 1."""
    change, total = cond - uncond, out - uncond
    scale = (change * total).sum() / change.square().sum()
    return bool(scale > 1.0) and bool((total - scale * change).abs().max() < 1e-4 * out.abs().max())


def rescaled(case: Case, out: Tensor, cond: Tensor, uncond: Tensor) -> bool:
    """True if the guided output has been given other lengths along its last axis, as Qwen-Image and
    Lumina 2 do.
    """
    guided = (uncond + case.guidance * (cond - uncond)).reshape(out.shape)
    return close(
        torch.nn.functional.normalize(out, dim=-1),
        torch.nn.functional.normalize(guided, dim=-1),
        1e-4,
    )


def test_a_block_scaled_by_a_torch_hook(case: Case) -> None:
    """The residual stream that leaves block 0, halved in one branch of the last step: ours against
    a forward hook.
    """
    where = case.model.dit.family.blocks[0]
    for branch in case.branches:
        block = case.transformer(branch).get_submodule(where.path)[0]
        ours = case.images(
            case.act("blocks.0.hook_resid_post", steps=LAST, branch=branch, action=Scale(0.5))
        )
        with halved(
            case,
            [(block, False)],
            branch,
            partial(half_of, axis=where.axes.split().index("batch")),
        ):
            theirs = case.plain()
        assert close(ours, theirs), branch
        assert not close(ours, case.clean.images)


def half_of(tensor: Tensor, rows: Tensor, axis: int) -> Tensor:
    return tensor.index_copy(axis, rows, tensor.index_select(axis, rows) / 2)


def test_a_head_switched_off_by_a_torch_hook(case: Case) -> None:
    """Head 1 of the first block that reads the text: `hook_z` against the input of the output projections."""
    name, n_heads = case.attention, case.model.cfg.n_heads
    where = next(one for one in case.model.dit.family.blocks if name in one.attentions)
    attention = submodule(
        case.pipe.transformer.get_submodule(where.path)[0], where.attentions[name].path
    )
    outs = [
        getattr(attention, path, None) for path in ("to_out", "to_add_out", "out_layer", "to_out_t")
    ]
    outs = [
        out[0] if isinstance(out, torch.nn.ModuleList) else out for out in outs if out is not None
    ]

    def without(tensor: Tensor, rows: Tensor) -> Tensor:
        heads = tensor.unflatten(-1, (n_heads, -1)).clone()
        heads[rows, ..., 1, :] = 0
        return heads.flatten(-2)

    ours = case.images(case.act(f"blocks.{case.layer}.{name}.hook_z", heads=[1], steps=LAST))
    with halved(case, [(out, True) for out in outs], "cond", without):
        theirs = case.plain()
    assert close(ours, theirs)
    assert not torch.equal(ours, case.clean.images)


@contextmanager
def halved(
    case: Case,
    modules: list[tuple[Any, bool]],
    branch: str,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """`change` what enters or leaves modules, in one branch's rows of the last step; calls are
    counted here.
    """
    draft, n = case.model.draft(PROMPTS, SEEDS, STEPS, case.guidance), len(PROMPTS)
    together = case.together
    one_call = together or len(case.branches) == 1 or case.model.dit.second is not None

    def edit(counts: dict[str, int], value: Any) -> Any:
        count = counts["calls"] = counts.get("calls", 0) + 1
        first = next(
            x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor)
        )
        step, place = divmod(count - 1, 1 if one_call else 2)
        here = draft.branches if together else (draft.branches[place],)
        if case.model.dit.second is not None:
            here = (branch,)
        if step != LAST or branch not in here:
            return None
        start = draft.branches.index(branch) * n if together else 0
        rows = (
            torch.arange(start, start + n) if len(first) >= start + n else torch.arange(len(first))
        )
        if isinstance(value, tuple):
            return tuple(change(x, rows) if isinstance(x, Tensor) else x for x in value)
        return change(value, rows)

    with ExitStack() as stack:
        for module, enters in modules:
            counts: dict[str, int] = {}
            if enters:
                handle = module.register_forward_pre_hook(
                    lambda m, args, counts=counts: edit(counts, args)
                )
            else:
                handle = module.register_forward_hook(
                    lambda m, args, out, counts=counts: edit(counts, out)
                )
            stack.callback(handle.remove)
        yield


# Forks, steps, branches


def test_a_fork_is_bitwise_a_full_run(case: Case) -> None:
    run = case.clean
    hooks = case.act("blocks.1.hook_resid_pre", steps=1, action=Scale(0.5))
    full = case.model
    assert torch.equal(run.fork(2).images, run.images)
    for step in (0, 1):
        assert torch.equal(run.fork(step, hooks).images, case.images(hooks))
    with full.hooks(hooks):
        edited = case.run()
    # nothing before its step
    assert all(torch.equal(a, b) for a, b in zip(edited.latents[:2], run.latents[:2], strict=True))
    assert not torch.equal(edited.latents[2], run.latents[2])
    alone = run.take(torch.tensor([1])).fork(1).images
    assert close(alone[0], run.images[1], 1e-4)
    with pytest.raises(ValueError, match="does not fire"):
        run.fork(2, hooks)


def test_a_cache_has_what_the_transformer_returns(case: Case) -> None:
    names = [f"steps.{step}.hook_out_{branch}" for step in range(STEPS) for branch in case.branches]
    cache = case.cached([*names, "blocks.0.hook_resid_post"], branch="both")
    recorded: list[Tensor] = []

    def keep(module: Any, args: Any, given: Any, output: Any) -> None:
        start = case.model.dit.family.before(given)
        recorded.append(output[0][:, start:] if start else output[0])

    live = {case.transformer(branch) for branch in case.branches}
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in live]
    case.plain()
    for handle in handles:
        handle.remove()
    order = case.model.draft(PROMPTS, SEEDS, STEPS, case.guidance).branches
    said = [
        torch.cat([cache[f"steps.{step}.hook_out_{branch}"] for branch in order])
        for step in range(STEPS)
    ]
    flat = [one if isinstance(one, Tensor) else torch.stack(list(one)) for one in recorded]
    together = case.together or len(order) == 1
    rows = flat if together else [torch.cat(flat[i : i + 2]) for i in range(0, len(flat), 2)]
    assert len(said) == len(rows)
    assert all(torch.equal(ours, output) for ours, output in zip(said, rows, strict=True))
    assert cache.steps == list(range(STEPS))


def test_an_edit_stays_in_its_branch(case: Case) -> None:
    if len(case.branches) == 1:
        with pytest.raises(ValueError, match="no unconditional branch"):
            case.images([("steps.0.uncond.blocks.0.hook_resid_post", lambda tensor, hook: tensor)])
        return
    names = [f"steps.{LAST}.hook_out_{branch}" for branch in case.branches]
    clean = case.cached(names, branch="both")
    for branch, other in (("cond", "uncond"), ("uncond", "cond")):
        with case.model.hooks(
            case.act("blocks.0.hook_resid_post", steps=LAST, branch=branch, action=Scale(0.5))
        ):
            edited = case.cached(names, branch="both")
        assert torch.equal(
            edited[f"steps.{LAST}.hook_out_{other}"], clean[f"steps.{LAST}.hook_out_{other}"]
        )
        assert not close(
            edited[f"steps.{LAST}.hook_out_{branch}"], clean[f"steps.{LAST}.hook_out_{branch}"]
        )


# Interventions


def test_identity_edits_change_nothing(case: Case) -> None:
    reference, site = case.clean.images, f"blocks.{case.layer}.{case.attention}.hook_z"
    kept = case.cached(site)
    for action in (Scale(1.0), Replace(kept), Add(torch.zeros(1))):
        assert torch.equal(case.images(case.act(site, action=action)), reference), action
    pattern = site.replace("hook_z", "hook_pattern")
    explicit = case.images(
        [(lambda name: name.endswith(pattern) and ".cond." in name, lambda tensor, hook: None)]
    )
    assert torch.equal(case.images(case.act(pattern, action=Scale(1.0))), explicit)
    assert close(explicit, reference, 1e-4)


def test_every_action(case: Case) -> None:
    """Each action against a function written here."""
    site = f"blocks.{case.layer}.{case.attention}.hook_z"
    full, shift = f"steps.{LAST}.cond.{site}", torch.linspace(-1, 1, case.model.cfg.d_head)
    by_hand: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        ("zero", torch.zeros_like),
        ("mean", lambda z: z.mean(0, keepdim=True).expand_as(z)),
        ("resample", lambda z: z.flip(0)),
        (Scale(-0.5), lambda z: -0.5 * z),
        (Add(shift), lambda z: z + shift),
        (Replace(shift), lambda z: shift.expand_as(z)),
    ]
    lengths = set(case.model.layout(PROMPTS).text_mask.sum(1).tolist())
    # else queries are the image's
    alike = "joint_pos" not in case.model.dit.axes(site) or len(lengths) == 1
    reference = case.clean.images
    for action, change in by_hand:
        if action in ("mean", "resample") and not alike:
            with pytest.raises(ValueError, match=r"different numbers of tokens|no other one"):
                case.act(site, steps=LAST, action=action)
            continue
        ours = case.images(case.act(site, steps=LAST, action=action))
        assert torch.equal(ours, case.images([(full, lambda z, hook, change=change: change(z))])), (
            action
        )
        assert not torch.equal(ours, reference), action


def test_a_word_knocked_out(case: Case) -> None:
    """Its keys get no attention, and the others share it in their old proportions."""
    hide = Intervention(
        f"blocks.{case.layer}.{case.attention}.hook_pattern",
        heads=[0],
        tokens=prompts.word("circle"),
        steps=0,
        action="knockout",
    )
    words = prompts.token_mask(case.model, PROMPTS, prompts.word("circle"))
    read = [
        [one.text[a:b] for (a, b), chosen in zip(one.spans, row, strict=True) if chosen]
        for one, row in texts_of(case, words)
    ]
    # one in the tokens of each text encoder
    assert [set(row) for row in read] == [{"circle"}, {"circle"}]
    name = f"steps.0.cond.blocks.{case.layer}.{case.attention}.hook_pattern"
    clean = case.cached(name)[name]
    with case.model.hooks(hide.hooks(case.model, list(PROMPTS), num_steps=STEPS)):
        masked = case.cached(name)[name]
    layout = case.model.layout(PROMPTS)
    image = 0 if case.attention == "cross_attn" else layout.n_image
    keys = torch.zeros(len(PROMPTS), clean.shape[-1], dtype=torch.bool)
    # some models cut the text to the longest of the batch
    words = words[:, : clean.shape[-1] - image]
    keys[:, image : image + words.shape[1]] = words
    gone = keys[:, None, :].expand(-1, clean.shape[2], -1)
    assert float(masked[:, 0][gone].abs().max()) == 0.0
    left = clean[:, 0].masked_fill(gone, 0.0)
    assert close(masked[:, 0], left / left.sum(-1, keepdim=True).clamp(min=1e-30), 1e-4)
    assert torch.equal(masked[:, 1], clean[:, 1])


def texts_of(case: Case, words: Tensor) -> Iterator[tuple[Any, list[bool]]]:
    yield from zip(case.model.encoded_texts(PROMPTS), words.tolist(), strict=True)


# Sweeps


def test_a_sweeps_cell_is_a_run_of_its_own(case: Case) -> None:
    site = f"blocks.{case.layer}.{case.attention}.hook_z"
    cells = {
        "head": Intervention(site, heads=[1], steps=1),
        "late": Intervention("blocks.1.hook_resid_post", steps=LAST, action=Scale(0.5)),
        "latent": Intervention("hook_latent", steps=1, action=Scale(1.1)),
        "twice": Intervention(
            site, heads=[0], steps=[0, LAST], branch="both" if len(case.branches) == 2 else "cond"
        ),
    }
    metric = sweep.Metric(
        lambda images: {"mean": images.flatten(1).mean(1), "first": images.flatten(1)[:, 7]}
    )
    one_step = sweep.Metric(lambda out: out.flatten(1).norm(dim=1), on="out")
    plan = sweep.plan(
        case.model,
        PROMPTS,
        SEEDS,
        cells,
        {"m": metric, "o": one_step},
        num_steps=STEPS,
        guidance=case.guidance,
        batch=5,
    )
    found = plan.run()
    assert (found["error"] == "").all()
    for number, seed in enumerate(SEEDS):
        for label, one in cells.items():
            hooks = one.hooks(case.model, list(PROMPTS), num_steps=STEPS)
            images = case.model.run_with_hooks(PROMPTS, seed, STEPS, case.guidance, fwd_hooks=hooks)
            exact = images.flatten(1).mean(1).double().numpy()
            cell = found["m_mean"].sel(intervention=label).isel(seed=number).values
            assert np.abs(cell - exact).max() < 2e-5 * max(1.0, np.abs(exact).max()), label
    assert float(np.abs(found["m_mean"] - found["m_mean_baseline"]).max()) > 1e-4


# Caches


def test_an_estimate_is_the_size_of_the_cache(case: Case) -> None:
    def wanted(name: str) -> bool:
        return name.endswith(
            (
                "hook_q",
                "hook_k",
                "hook_z",
                "resid_post",
                "hook_pattern",
                "hook_latent",
                "hook_out",
                "hook_image",
            )
        )

    _, cache = case.model.run_with_cache(
        PROMPTS, SEEDS, STEPS, case.guidance, names_filter=wanted, branch="both"
    )
    size = estimate(
        case.model, list(PROMPTS), STEPS, case.guidance, names_filter=wanted, branch="both"
    )
    assert size.sizes == {name: tensor.nbytes for name, tensor in cache.items()}
    with pytest.raises(CacheTooLargeError, match="Narrow it"):
        case.cached(wanted, max_bytes=100)


def test_chosen_heads_and_summaries_are_those_of_the_whole_cache(case: Case) -> None:
    stem = f"blocks.{case.layer}.{case.attention}."
    names = [f"{stem}hook_z", f"{stem}hook_pattern"]
    whole, head = case.cached(names, steps=0), case.cached(names, steps=0, heads=f"L{case.layer}H1")
    z, pattern = (f"steps.0.cond.{name}" for name in names)
    assert close(head[z], whole[z][:, :, [1]])
    assert close(head[pattern], whole[pattern][:, [1]])
    assert close(
        case.cached(names[1:], steps=0, patterns="received")[pattern], whole[pattern].sum(2), 1e-4
    )
    if len(case.branches) == 2:
        both = case.cached(names[1:], steps=0, branch="both")
        for branch in case.branches:
            chosen = case.cached(names[1:], steps=0, branch=branch, heads=f"L{case.layer}H1")[
                f"steps.0.{branch}.{names[1]}"
            ]
            assert close(chosen, both[f"steps.0.{branch}.{names[1]}"][:, [1]])


def test_a_cache_on_disk_is_the_one_in_memory(case: Case, tmp_path: Any) -> None:
    names = [
        "blocks.0.hook_resid_post",
        "hook_image",
        *(f"steps.{step}.hook_latent" for step in range(STEPS)),
    ]
    arguments = (PROMPTS, SEEDS, STEPS, case.guidance)
    images, memory = case.model.run_with_cache(*arguments, names_filter=names)
    again, disk = case.model.run_with_cache(*arguments, names_filter=names, out=tmp_path / "cache")
    assert torch.equal(images, again)
    loaded = GenerationCache.load(tmp_path / "cache", case.model)
    assert set(memory) == set(disk) == set(loaded)
    assert all(torch.equal(memory[name], loaded[name]) for name in memory)
    with pytest.raises(ValueError, match="seeds"):
        case.model.run_with_cache(
            PROMPTS, 9, STEPS, case.guidance, names_filter=names, out=tmp_path / "cache"
        )


# Views of one step, gradients, attribution


def test_transformer_lens_patches_a_view_of_one_step(case: Case) -> None:
    """Its activation patching, position by position, against a run with the same edit by hand."""
    name = "blocks.1.hook_resid_pre"
    joint = "joint_pos" in case.model.dit.axes("blocks.0.hook_resid_pre")  # of every block
    how = {"num_steps": STEPS, "guidance": case.guidance, "returns": "out"}
    view, tokens = case.model.at(1, PROMPTS, SEEDS, pos="joint" if joint else "image", **how)
    layout = case.model.layout(PROMPTS)
    assert tokens.shape == (2, layout.length("joint") if joint else layout.n_image)
    first = tokens[:1].repeat(1, 1)
    _, cache = view.run_with_cache(
        first, names_filter=lambda known: known.endswith("hook_resid_pre")
    )
    place = 3

    def patch(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[:, place] = cache[name][:, place]
        return tensor

    def double_at(at: int) -> Callable[..., Tensor]:
        def hook(tensor: Tensor, hook: Any) -> Tensor:
            return tensor * (1 + (torch.arange(tensor.shape[1]) == at)[:, None])

        return hook

    def double(at: int) -> Tensor:
        """View of both streams with one position twice as long."""
        return view.run_with_hooks(tokens[1:], [(name, double_at(at))])

    found = view.run_with_hooks(tokens[1:], [(name, patch)])
    if case.name == "FLUX.1":
        table = tl_patching.get_act_patch_resid_pre(
            view, tokens[1:], cache, lambda out: out.flatten()[7]
        )
        assert close(table[1, place], found.flatten()[7])
    ours = case.clean.take(torch.tensor([1])).fork(1, [(f"steps.1.cond.{name}", patch)], until=2)
    assert close(found, ours.record.outs[1])
    if not joint:
        with pytest.raises(ValueError, match="positions in this model"):
            case.model.at(1, PROMPTS, SEEDS, pos="joint", **how)
        return
    of_text, words = case.model.at(1, PROMPTS, SEEDS, pos="text", **how)
    assert words.shape[1] in (layout.text_mask.shape[1], tokens.shape[1] - layout.n_image)
    _, seen = of_text.run_with_cache(words[:1], names_filter=[name])
    n = layout.n_image
    assert torch.equal(seen[name], cache[name][:, n : n + words.shape[1]])
    assert close(of_text.run_with_hooks(words[1:], [(name, double_at(0))]), double(n))


def test_gradients_are_autograds(case: Case) -> None:
    """Directional derivative by central differences of a run, against a gradient through all later
    steps.
    """
    name = f"steps.1.cond.blocks.{case.layer}.{case.attention}.hook_z"
    run = case.clean
    seen: dict[str, Tensor] = {}

    def open_(tensor: Tensor, hook: Any) -> Tensor:
        seen["z"] = tensor.detach().requires_grad_()
        return seen["z"]

    with torch.enable_grad():
        total = run.fork(1, [(name, open_)]).latent.double().sum()
        (gradient,) = torch.autograd.grad(total, seen["z"])
    direction = gradient / gradient.norm()
    sides = [
        run.fork(1, [(name, lambda z, hook, e=e: z + e * direction)]).latent.double().sum()
        for e in (1e-3, -1e-3)
    ]
    slope = float(sides[0] - sides[1]) / 2e-3
    assert slope == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_attribution_is_first_order_patching(case: Case) -> None:
    """Scores against autograd by hand, and their exact verification against a run with the
    patch.
    """
    original, source = case.counterfactuals
    pair = attribution.pair(original, source, steps=[1])
    kinds = [case.attention, "resid_post"]
    with torch.enable_grad():
        found = attribution.nodes(pair, lambda images: images.flatten(1).mean(1), kinds)
    site = f"steps.1.cond.blocks.{case.layer}.{case.attention}.hook_z"
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept["source"] = tensor.clone()

    def open_(tensor: Tensor, hook: Any) -> Tensor:
        kept["z"] = tensor.detach().requires_grad_()
        return kept["z"]

    source.fork(1, [(site, keep)], until=2)
    with torch.enable_grad():
        total = original.fork(1, [(site, open_)]).images.flatten(1).mean(1).sum()
        (gradient,) = torch.autograd.grad(total, kept["z"])
    by_hand = ((kept["source"] - kept["z"].detach()) * gradient).sum((0, 1, 3))
    ours = torch.from_numpy(
        found.scores[case.attention].sel(step=1, layer=case.layer).squeeze().values
    )
    assert close(ours, by_hand.to(ours), 1e-4)
    checked = found.verify(k=1, sample=2)
    assert np.isfinite(checked.table["exact"]).all()


def test_a_path_patch_is_the_patch_by_hand(case: Case) -> None:
    """All paths from one head: its value of the source run, in the original run."""
    original, source = case.counterfactuals
    site, kept = f"steps.1.cond.blocks.{case.layer}.{case.attention}.hook_z", []
    source.fork(1, [(site, lambda z, hook: kept.append(z.clone()))], until=2)

    def patch(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = kept[0][:, :, 1]
        return z

    def metric(tensor: Tensor) -> Tensor:
        return tensor.flatten(1).mean(1)

    by_hand = metric(original.fork(1, [(site, patch)]).images)
    senders = patching.Nodes(f"{case.attention}.L{case.layer}H1", steps=1)
    exact = patching.path_patch(original, source, senders, "image", metric, "exact")
    assert close(torch.from_numpy(exact["patched"].values), by_hand.double())
    queries = patching.Nodes(f"{case.attention}.L{case.layer + 1}H0.q", steps=1)
    assert np.isfinite(
        patching.path_patch(original, source, senders, queries, metric)["patched"].values
    ).all()
    receivers = patching.Nodes("output", steps=1)
    direct = patching.path_patch(
        original, source, senders, receivers, metric, metric_on="steps.1.hook_out"
    )
    change, size = (
        float(x.squeeze()) for x in (direct["patched"] - direct["original"], direct["original"])
    )
    assert (abs(change) <= 2e-6 * abs(size)) == ((case.name, "path patching") in UNABLE)


def test_a_synopsis_is_the_patterns_sums(case: Case) -> None:
    layout = case.model.layout(case.model.draft(PROMPTS, SEEDS, STEPS, case.guidance))
    upper = torch.arange(layout.n_image) < layout.n_image // 2
    groups = {"upper": upper, "lower": ~upper}
    text = {"circle": prompts.word("circle")}
    found = synopsis.attention_synopsis(
        case.model,
        PROMPTS,
        SEEDS,
        image_groups=groups,
        text_groups=text,
        num_steps=STEPS,
        guidance=case.guidance,
    )
    name = f"blocks.{case.layer}.{case.attention}.hook_pattern"
    pattern = case.cached(name, steps=1)[f"steps.1.cond.{name}"]
    words = prompts.token_mask(case.model, PROMPTS, prompts.word("circle"))
    image = 0 if case.attention == "cross_attn" else layout.n_image
    words = words[:, : pattern.shape[-1] - image]
    keys = pattern[..., image : image + words.shape[1]] * words[:, None, None]
    by_hand = keys[:, :, : layout.n_image][:, :, upper].sum((2, 3))
    ours = torch.from_numpy(
        found.sel(
            layer=case.layer, step=1, branch="cond", image_group="upper", text_group="circle"
        ).values
    )
    assert close(ours, by_hand.to(ours), 1e-4)


# Tools that no other family than PixArt has


@pytest.mark.parametrize("tool", NOWHERE)
def test_a_tool_that_no_family_has_says_so(tool: str) -> None:
    case = case_of("SD3")
    with torch.no_grad(), pytest.raises((ValueError, TypeError, UnknownHookError)) as error:
        NOWHERE[tool][1](case)
    assert len(str(error.value)) > 20


@pytest.mark.slow
def test_every_family_generates() -> None:
    drawn = {type(tiny_pipeline(name)[0].transformer).__name__ for name in PIPELINES}
    assert set(families.SUPPORTED) == drawn


def test_the_page_is_up_to_date() -> None:
    from . import families as pages  # which reads this module

    modules = (globals(), *map(vars, (pages.experiments, pages.paths, pages.calls, pages.weights)))
    written = {name for module in modules for name in module if name.startswith("test_")}
    assert {test.__name__ for test in pages.TOOLS.values()} == written - set(PAGE_TESTS)
    assert {tool for _, tool in UNABLE} <= set(pages.TOOLS)
    assert pages.PAGE.read_text() == pages.page(), "run `python -m tests.conformance.families`"


PAGE_TESTS = (
    "test_every_family_generates",
    "test_a_sweep_on_ray_is_the_local_one",
    "test_sana_without_a_code_of_positions_or_with_norms_says_so",
    "test_guidance_that_ends_early_says_so",
    "test_a_tool_that_no_family_has_says_so",
    "test_the_page_is_up_to_date",
)
