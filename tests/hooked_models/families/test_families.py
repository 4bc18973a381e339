"""Every family of transformers through the same assertions; a new one is covered by being listed in
`families`.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from torch import Tensor, nn

from dit_lens.readout.group_attention import attention_in_call
from hooked_models import UnknownHookError, families
from hooked_models.families import check, class_dit
from hooked_models.families.adapter import FamilyModel

from ..pipelines import randomise
from ..tiny import tiny_inputs, tiny_transformer

SHARED = ("q", "k", "v", "attn_scores", "pattern", "z")
KINDS = ["PixArtTransformer2DModel", "DiTTransformer2DModel", *families.SUPPORTED]


def small(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A random transformer in which every parameter matters, and inputs."""
    torch.manual_seed(0)
    if kind == "PixArtTransformer2DModel":
        transformer = tiny_transformer(num_attention_heads=2, use_additional_conditions=False)
        return transformer, tiny_inputs(transformer, pads=1)
    if kind == "DiTTransformer2DModel":
        size = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "out_channels": 8,
            "sample_size": 8,
        }
        transformer = DiTTransformer2DModel(num_embeds_ada_norm=5, norm_eps=1e-3, **size)
        inputs = class_dit.inputs
    else:
        transformer, inputs = families.SUPPORTED[kind].small(), families.SUPPORTED[kind].inputs
    randomise(transformer.eval(), 0.2)
    return transformer, inputs(transformer)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    transformer, inputs = small(request.param)
    with torch.no_grad():
        return families.hook(transformer), inputs


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def predicted(output: Any) -> Tensor:
    """The prediction of a call; some families give a list of rows."""
    return check.first(output)


def sublayers(model: Any) -> list[str]:
    """Attention sublayers, by layer: "blocks.0.attn", …"""
    return [name.removesuffix(".hook_z") for name in model.hook_dict if name.endswith("hook_z")]


def test_the_output_is_the_originals_fused_and_explicit(case) -> None:
    model, inputs = case
    reference = predicted(model.wrapped(**inputs))
    assert reference.std() > 0.05
    unwatched = predicted(model(**inputs))
    assert (
        torch.equal(unwatched, reference)
        if isinstance(model, FamilyModel)
        else (unwatched - reference).abs().max() < 1e-5
    )
    output, _ = model.run_with_cache(**inputs)
    assert (predicted(output) - reference).abs().max() < 1e-4 * reference.abs().max().clamp(min=1)
    assert torch.equal(predicted(model.wrapped(**inputs)), reference)  # the original is as it was


def test_shared_names_fire_with_their_shapes(case) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(**inputs)
    assert set(cache) == set(model.names(None))
    heads, d_head = model.cfg.n_heads, model.cfg.d_head
    assert {name.split(".")[1] for name in sublayers(model)} == {
        str(layer) for layer in range(model.cfg.n_layers)
    }
    for name in sublayers(model):
        q, k, v, scores, pattern, z = (cache[f"{name}.hook_{x}"] for x in SHARED)
        assert q.shape == z.shape == (2, q.shape[1], heads, d_head)
        assert k.shape == v.shape == (2, k.shape[1], heads, d_head)
        assert scores.shape == pattern.shape == (2, heads, q.shape[1], k.shape[1])


def test_attention_is_what_its_hooks_say(case) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(**inputs)
    for name in sublayers(model):
        q, k, v, scores, pattern, z = (cache[f"{name}.hook_{x}"] for x in SHARED)
        products = torch.einsum("bqhd,bkhd->bhqk", q, k) * model.cfg.d_head**-0.5
        seen = scores > -1000
        assert torch.allclose(products[seen], scores[seen], atol=1e-4)
        # a padded query may look at no key
        assert torch.allclose(scores.softmax(-1).nan_to_num(0.0), pattern, atol=1e-6)
        assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5)


def test_every_hooks_return_value_is_used(case) -> None:
    model, inputs = case
    reference = predicted(model(**inputs))
    for name in model.names(lambda name: name.startswith(("blocks.0.", "blocks.1."))):
        if f"blocks.{model.cfg.n_layers - 1}.hook_text_mlp" in name:
            continue  # the last block's text is read by nobody

        def scramble(tensor: Tensor, hook: Any) -> Tensor:
            return tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))

        changed = predicted(model.run_with_hooks(fwd_hooks=[(name, scramble)], **inputs))
        assert (changed - reference).abs().max() > 1e-4, name


def test_writing_what_was_read_changes_nothing(case) -> None:
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    reference = predicted(model(**inputs))
    fused = model.names(lambda name: not name.endswith(("hook_pattern", "hook_attn_scores")))
    written = predicted(
        model.run_with_hooks(
            fwd_hooks=[(name, lambda x, hook: x.clone()) for name in fused], **inputs
        )
    )
    assert torch.equal(written, reference)
    patterns = model.names(lambda name: name.endswith("hook_pattern"))
    written = predicted(
        model.run_with_hooks(
            fwd_hooks=[(name, lambda x, hook: x.clone()) for name in patterns], **inputs
        )
    )
    assert (written - reference).abs().max() < 1e-4 * reference.abs().max().clamp(min=1)


def test_a_write_at_one_position_acts_on_that_position(case) -> None:
    """On z of one image token (and one text token): of what the attention returns, that position
    changes alone.
    """
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    layout = model.layout_of(**inputs)
    for sublayer in sublayers(model)[:2]:
        block, kind = sublayer.rsplit(".", 1)
        out = next(
            (n for n in model.hook_dict if n.startswith(f"{block}.hook_{kind}_") and "out" in n),
            None,
        )
        if out is None:
            continue
        z, clean = (
            model.run_with_cache(**inputs, names_filter=[f"{sublayer}.hook_z", out])[1][n]
            for n in (f"{sublayer}.hook_z", out)
        )
        for position in (2, layout.n_image + 1):
            if position >= min(z.shape[1], clean.shape[1]):
                continue

            def write(x: Tensor, hook: Any, position: int = position) -> None:
                x[:, position] += 1

            kept: list[Tensor] = []
            hooks = [
                (f"{sublayer}.hook_z", write),
                (out, lambda x, hook, kept=kept: kept.append(x.clone())),
            ]
            model.run_with_hooks(fwd_hooks=hooks, **inputs)
            assert (kept[0] != clean).any(dim=(0, 2)).nonzero().flatten().tolist() == [position], (
                sublayer,
                position,
            )


def test_hooks_see_what_independent_hooks_see(case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch hooks on blocks, and a stand-in for the kernel: the same vectors, in whatever
    order of positions.
    """
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    points = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_resid_post")
    _, cache = model.run_with_cache(**inputs, names_filter=lambda name: name.endswith(points))
    family, live = model.family, model.wrapped
    listed = [(block, where) for where in family.blocks for block in live.get_submodule(where.path)]
    kernel, seen, running = torch.nn.functional.scaled_dot_product_attention, defaultdict(list), []

    def look(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        z = kernel(query, key, value, *args, **kwargs)
        for name, x in (("q", query), ("k", key), ("v", value), ("z", z)):
            seen[f"{running[-1]}.hook_{name}" if running else "elsewhere"].append(
                x.transpose(1, 2).flatten(2)
            )
        return z

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    with contextlib.ExitStack() as stack:
        for layer, (block, where) in enumerate(listed):
            for ours, attention in where.attentions.items():
                if (module := check.submodule(block, attention.path)) is not None:
                    name = f"blocks.{layer}.{ours}"
                    stack.callback(
                        module.register_forward_pre_hook(
                            lambda m, i, name=name: running.append(name)
                        ).remove
                    )
                    stack.callback(
                        module.register_forward_hook(lambda m, i, o: running.clear()).remove
                    )

            def leaves(m: Any, i: Any, o: Any, layer: int = layer, where: Any = where) -> None:
                parts = [x for x in (o if isinstance(o, tuple) else (o,)) if x is not None]
                parts = [x.transpose(0, 1) if where.axes == "pos batch d" else x for x in parts]
                seen[f"blocks.{layer}.hook_resid_post"].append(torch.cat(parts, 1))

            stack.callback(block.register_forward_hook(leaves).remove)
        live(**inputs)
    for name in cache:
        assert len(seen[name]) == 1
        ours, theirs = cache[name], seen[name][0]
        ours = ours if name.endswith("resid_post") else ours.flatten(2)
        if theirs.shape != ours.shape:  # heads that share keys
            groups = ours.shape[2] // theirs.shape[2]
            theirs = (
                theirs.unflatten(2, (-1, model.cfg.d_head)).repeat_interleave(groups, 2).flatten(2)
            )
        distance = (ours[:, :, None] - theirs[:, None]).abs().amax(-1)
        assert not distance.amin(2).any(), name
        assert not distance.amin(1).any(), name


def test_what_blocks_add_is_gates_times_what_their_modules_give(case) -> None:
    """resid_post − resid_pre of each row and channel is a combination, the same at each position of
    a stream, of the parts.
    """
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    _, cache = model.run_with_cache(**inputs)
    n = model.layout_of(**inputs).n_image
    for layer in range(model.cfg.n_layers):
        parts = {
            name.split("hook_")[1]: cache[name]
            for name in cache
            if name.startswith(f"blocks.{layer}.hook_") and "out" in name
        }
        pre, post = cache["resid_pre", layer], cache["resid_post", layer]
        if (
            model.family.name == "HunyuanDiT"
            and pre.shape == post.shape
            and layer > model.cfg.n_layers // 2
        ):
            continue  # a long skip connection is added first
        for stream, positions in (("image", slice(0, n)), ("text", slice(n, None))):
            added = (post - pre[:, : post.shape[1]])[:, positions]
            if not added.shape[1]:
                continue
            mine = [x if name.startswith("text") else x[:, positions] for name, x in parts.items()]
            mine = [x for x in mine if x.shape[1] == added.shape[1]]
            for row in range(2):
                for channel in (0, 5):
                    basis = torch.stack([x[row, :, channel] for x in mine], dim=1).double()
                    target = added[row, :, channel].double()
                    left = target - basis @ torch.linalg.lstsq(basis, target).solution
                    assert left.abs().max() < 1e-4 * target.abs().max().clamp(min=1), (
                        model.family.name,
                        layer,
                        stream,
                    )


def test_a_head_that_is_silenced_is_a_head_without_output_weights(case) -> None:
    model, inputs = case
    for sublayer in (sublayers(model)[0], sublayers(model)[-1]):

        def silence(z: Tensor, hook: Any) -> None:
            z[:, :, 1] = 0

        ours = predicted(
            model.run_with_hooks(fwd_hooks=[(f"{sublayer}.hook_z", silence)], **inputs)
        )
        weights, kept = output_weights(model.get_submodule(sublayer)), []
        for weight in weights:
            kept.append(weight[1].clone())
            weight[1] = 0
        theirs = predicted(model.wrapped(**inputs))
        for weight, value in zip(weights, kept, strict=True):
            weight[1] = value
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - predicted(model(**inputs))).abs().max() > 1e-4


def output_weights(attention: Any) -> list[Tensor]:
    """W_O of each stream, [head d_head d_model]: views of the live weights."""
    weights = [attention.W_O]
    with contextlib.suppress(TypeError, AttributeError):
        weights.append(attention.W_O_text)
    return weights


def test_axes_are_those_of_the_tensors(case) -> None:
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    _, cache = model.run_with_cache(**inputs)
    layout, cfg = model.layout, model.cfg
    widths = {"batch": 2, "head": cfg.n_heads, "d_head": cfg.d_head, "d_model": cfg.d_model}
    for name, tensor in cache.items():
        axes = model.axes(name)
        assert len(axes) == tensor.ndim, name
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis in widths:
                assert size == widths[axis], (name, axis)
            # the text that enters is no stream yet: registers may join it, or latents
            elif name != "hook_text":
                stream = (
                    "joint" if axis.startswith("joint") else "text" if "text" in axis else "image"
                )
                assert size == layout.length(stream), (name, axis)


def test_gradients_through_writes_are_those_of_finite_differences(case) -> None:
    """Gradients of the output's sum, in what a hook scales: a stream that enters, queries, z, and what a
    module gives.
    """
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    sublayer = sublayers(model)[0]
    names = [
        "blocks.0.hook_resid_pre",
        f"{sublayer}.hook_q",
        f"{sublayer}.hook_z",
        "blocks.1.hook_resid_post",
    ]

    def scaled(name: str, by: Tensor) -> Tensor:
        hook = (
            name,
            lambda x, hook: (
                x * (1 + by * torch.linspace(-1, 1, x.shape[1]).reshape(1, -1, *[1] * (x.ndim - 2)))
            ),
        )
        weights = torch.linspace(-1, 1, reference.numel()).reshape(reference.shape)
        return (predicted(model.run_with_hooks(fwd_hooks=[hook], **inputs)) * weights).sum()

    reference = predicted(model(**inputs))
    for name in names:
        by = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            total = scaled(name, by)
        (slope,) = torch.autograd.grad(total, by)
        step = torch.tensor(2e-3)
        difference = (scaled(name, step) - scaled(name, -step)) / (2 * step)
        assert abs(slope - difference) < 0.03 * abs(difference) + 1e-3 * reference.abs().sum(), name


def test_weights_of_a_head_are_views_that_move_that_head(case) -> None:
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    for sublayer in (sublayers(model)[0], sublayers(model)[-1]):
        attention = model.get_submodule(sublayer)
        width = model.cfg.n_heads * model.cfg.d_head
        assert (
            attention.W_Q.shape[0]
            == attention.W_V.shape[0]
            == attention.W_O.shape[0]
            == model.cfg.n_heads
        )
        assert attention.W_Q.shape[2] == attention.W_O.shape[1] == model.cfg.d_head
        assert attention.W_O.flatten(0, 1).shape == (width, model.cfg.d_model)
        for which in "QKV":
            name, weight = f"{sublayer}.hook_{which.lower()}", getattr(attention, f"W_{which}")
            if torch.equal(weight[0], weight[1]):  # shared keys and values are repeated, not views
                assert which in "KV"
                continue
            before = model.run_with_cache(**inputs, names_filter=name)[1][name]
            kept = weight[1].clone()
            weight[1] += torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
            after = model.run_with_cache(**inputs, names_filter=name)[1][name]
            weight[1] = kept
            moved = (before != after).any(dim=3).any(dim=1).any(dim=0)
            assert bool(moved[1])
            assert which != "V" or moved.sum() == 1  # queries and keys may be normed across heads


def test_one_token_shows_at_its_own_position_alone(case) -> None:
    """In block 0, before anything mixes positions; where refiners do, in the image or in the text
    alone.
    """
    model, inputs = case
    if not isinstance(model, FamilyModel):
        return
    layout, heads = model.layout_of(**inputs), model.get_submodule(sublayers(model)[0])
    kind = sublayers(model)[0]
    for stream, nudge in (("image", check.nudged_image), ("text", check.nudged_text)):
        given, tokens = nudge(model, layout, inputs)
        for name, side in ((f"{kind}.hook_q", heads.queries), (f"{kind}.hook_k", heads.keys)):
            before, after = (
                model.run_with_cache(**x, names_filter=name)[1][name] for x in (inputs, given)
            )
            for row, token in enumerate(tokens):
                moved = (before[row] != after[row]).flatten(1).any(1).nonzero().flatten().tolist()
                if side not in (stream, "joint"):
                    assert moved == [] or model.family.mixers
                    continue
                start = layout.n_image if stream == "text" and side == "joint" else 0
                assert start + token in moved
                if side == "joint":
                    text = range(layout.n_image, layout.n_image + layout.n_text[row])
                    assert not {*moved} & {*(text if stream == "image" else range(layout.n_image))}


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_a_synopsis_is_the_patterns_group_sums_and_makes_no_pattern(case, reduce) -> None:
    model, inputs = case
    _, cache = model.run_with_cache(**inputs)
    for kind in dict.fromkeys(name.split(".")[2] for name in sublayers(model)):
        first = next(name for name in sublayers(model) if name.endswith(f".{kind}"))
        n_q, n_k = cache[f"{first}.hook_pattern"].shape[2:]
        generator = torch.Generator().manual_seed(0)
        queries, keys = (
            (torch.rand(2, n, 3, generator=generator) > 0.5).float() for n in (n_q, n_k)
        )
        # a padded query that looks at no key is in no group
        queries *= cache[f"{first}.hook_pattern"].any(-1).any(1)[..., None]
        with pytest.MonkeyPatch.context() as patch:
            # a smaller pattern is smaller than the queries
            if reduce == "sum" and n_k > model.cfg.d_head:
                softmax = Tensor.softmax

                def narrow(x: Tensor, *args: Any, softmax: Any = softmax, **kwargs: Any) -> Tensor:
                    return (
                        pytest.fail("a pattern was made")
                        if x.ndim == 4
                        else softmax(x, *args, **kwargs)
                    )

                patch.setattr(Tensor, "softmax", narrow)
            found = attention_in_call(model, inputs, queries, keys, kind, reduce)
        for layer in range(model.cfg.n_layers):
            values = (
                found.sel(layer=layer).values if "layer" in found.coords else found.values[:, layer]
            )
            if f"blocks.{layer}.{kind}" not in sublayers(model):
                assert torch.from_numpy(values).isnan().all()
                continue
            pattern = cache[f"blocks.{layer}.{kind}.hook_pattern"]
            pairs = queries[:, None, :, None, :, None] * keys[:, None, None, :, None, :]
            each = pattern[..., None, None] * pairs
            expected = each.sum(dim=(2, 3)) if reduce == "sum" else each.amax(dim=(2, 3))
            assert torch.allclose(torch.from_numpy(values), expected, atol=1e-4)


def test_an_error_inside_leaves_nothing_behind(case) -> None:
    model, inputs = case
    reference = predicted(model.wrapped(**inputs))

    def fail(tensor: Tensor, hook: Any) -> None:
        raise RuntimeError("from a hook")

    with pytest.raises(RuntimeError, match="from a hook"):
        model.run_with_hooks(fwd_hooks=[(f"{sublayers(model)[0]}.hook_z", fail)], **inputs)
    assert torch.equal(predicted(model.wrapped(**inputs)), reference)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.wrapped.modules()
    )


def test_weights_are_the_wrapped_ones_and_gradients_reach_them(case) -> None:
    model, inputs = case
    parameters = {id(parameter) for parameter in model.wrapped.parameters()}
    assert {id(parameter) for parameter in model.parameters()} == parameters
    with torch.enable_grad():
        output = model.run_with_hooks(
            fwd_hooks=[(f"{sublayers(model)[0]}.hook_pattern", lambda p, hook: p)], **inputs
        )
        predicted(output).sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert max(float(grad.abs().max()) for grad in grads) > 0
    model.zero_grad()


def test_it_stands_in_its_pipeline() -> None:
    transformer, _ = small("FluxTransformer2DModel")
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(1, 5, 12), "pooled_prompt_embeds": torch.randn(1, 6)}
    call = {
        "height": 8,
        "width": 8,
        "num_inference_steps": 2,
        "output_type": "latent",
        "latents": torch.randn(1, 16, 4),
        **text,
    }
    reference = pipe(**call).images
    pipe.transformer = model = families.hook(transformer)
    steps = []
    with model.hooks(
        [("blocks.2.attn.hook_pattern", lambda pattern, hook: steps.append(pattern.shape))]
    ):
        images = pipe(**call).images
    assert steps == [(1, 2, 21, 21)] * 2
    assert (images - reference).abs().max() < 1e-5


# What is refused


def test_sana_says_why_its_self_attention_has_no_pattern() -> None:
    transformer, _ = small("SanaTransformer2DModel")
    model = families.hook(transformer)
    with pytest.raises(
        UnknownHookError, match=r"SANA has no 'blocks.0.attn.hook_pattern': .* linear \(ReLU"
    ):
        model.canonical_name("blocks.0.attn.hook_pattern")
    assert not any(".attn." in name for name in model.hook_dict)


def test_unsupported_families_are_named_with_the_reason() -> None:
    for kind, reason in families.UNSUPPORTED.items():
        cls = getattr(diffusers, kind)
        with pytest.raises(
            ValueError,
            match=(
                f"{kind} is not supported: {re.escape(reason)}. Known are PixArtTransformer2DModel"
            ),
        ):
            families.hook(cls.__new__(cls))
    with pytest.raises(ValueError, match="StableAudioDiTModel is of no known family"):
        families.hook(diffusers.StableAudioDiTModel.__new__(diffusers.StableAudioDiTModel))
    assert not {*families.UNSUPPORTED} & {*families.SUPPORTED, *families.NATIVE}


def test_class_dit_refuses_what_it_has_not() -> None:
    transformer, inputs = small("DiTTransformer2DModel")
    model = families.hook(transformer)
    with pytest.raises(ValueError, match="pass timestep and class_labels"):
        model(inputs["hidden_states"])
    with pytest.raises(TypeError, match="not PixArtTransformer2DModel"):
        families.HookedClassDiT(tiny_transformer())
    model.train()
    with pytest.raises(ValueError, match=r"call .eval\(\)"):
        model(**inputs)


def test_class_dit_has_a_name_for_every_tensor_and_its_writes_add_up() -> None:
    transformer, inputs = small("DiTTransformer2DModel")
    model = families.hook(transformer)
    _, cache = model.run_with_cache(**inputs)
    x = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer in range(2):
        assert torch.allclose(cache["resid_pre", layer], x, atol=1e-6)
        x = x + cache["attn_out", layer] + cache["mlp_out", layer]
        assert torch.allclose(cache["resid_post", layer], x, atol=1e-5)
        for part in ("shift", "scale", "gate"):
            assert cache[f"blocks.{layer}.adaln.hook_{part}_mlp"].shape == (2, 1, 16)
    # TransformerLens' own, over both sublayers
    assert torch.allclose(cache.decompose_resid().sum(0), x, atol=1e-5)
