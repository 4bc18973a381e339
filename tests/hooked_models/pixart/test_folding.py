"""A model with one timestep folded into its weights: the same function, and weights that say what
the heads do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from hooked_models import HookedDiT, NotFoldedError
from hooked_models.pixart.config import DiTConfig
from hooked_models.pixart.dit import FoldedDiT

from ..tiny import tiny_inputs, tiny_transformer

TIMESTEP = 437.0
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no attention biases": {"attention_bias": False},
    "size conditions": {"use_additional_conditions": True, "sample_size": 128},
    "one layer, no learned variance": {"num_layers": 1, "out_channels": 4},
}


def pair(**config: Any) -> tuple[HookedDiT, FoldedDiT, dict[str, Any]]:
    """A float64 model, the same folded, and inputs at the folded timestep (one text mask,
    non-square latents).
    """
    transformer = tiny_transformer(**config).double()
    inputs = tiny_inputs(transformer, height=6, width=8, pads=1)
    inputs["timestep"] = torch.full((2,), TIMESTEP, dtype=torch.float64)
    if transformer.use_additional_conditions:
        inputs["added_cond_kwargs"] = {
            k: v[:1].expand_as(v) for k, v in inputs["added_cond_kwargs"].items()
        }
    dit = HookedDiT(transformer)
    sizes = {k: None if v is None else v[:1] for k, v in inputs["added_cond_kwargs"].items()}
    return dit, dit.fold_timestep(TIMESTEP, sizes), inputs


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_model_is_the_same_function_and_the_original_is_untouched(variant: str) -> None:
    dit, folded, inputs = pair(**VARIANTS[variant])
    before = {name: parameter.clone() for name, parameter in dit.wrapped.named_parameters()}
    expected = dit.wrapped(**inputs).sample
    torch.testing.assert_close(folded(**inputs).sample, expected, rtol=0, atol=1e-12)
    # plain diffusers agrees
    torch.testing.assert_close(folded.wrapped(**inputs).sample, expected, rtol=0, atol=1e-12)
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in dit.wrapped.named_parameters()
    )
    assert (
        dit.wrapped(**{**inputs, "timestep": inputs["timestep"] + 99}).sample - expected
    ).abs().max() > 1e-3


@torch.no_grad()
def test_folded_heads_and_neurons_write_what_their_weights_say() -> None:
    dit, folded, inputs = pair()
    _, cache = folded.run_with_cache(**inputs)
    _, original = dit.run_with_cache(**inputs)
    for layer, block in enumerate(folded.blocks):
        for kind in ("attn", "cross_attn"):
            attn = getattr(block, kind)
            written = (
                torch.einsum("bphd,hdm->bpm", cache[f"blocks.{layer}.{kind}.hook_z"], attn.W_O)
                + attn.b_O
            )
            torch.testing.assert_close(
                written, original[f"blocks.{layer}.hook_{kind}_out"], rtol=0, atol=1e-12
            )
        neurons = cache[f"blocks.{layer}.mlp.hook_post"] @ block.mlp.W_out + block.mlp.b_out
        torch.testing.assert_close(
            neurons, original[f"blocks.{layer}.hook_mlp_out"], rtol=0, atol=1e-12
        )
        assert bool((cache[f"blocks.{layer}.adaln.hook_gate_msa"] == 1).all())
    # vacuous unless the gate matters: on the original the same product is not what is added
    ungated = (
        torch.einsum("bphd,hdm->bpm", original["blocks.0.attn.hook_z"], dit.blocks[0].attn.W_O)
        + dit.blocks[0].attn.b_O
    )
    assert (ungated - original["blocks.0.hook_attn_out"]).abs().max() > 0.1


@torch.no_grad()
def test_folded_unembedding_gives_the_output_patch_by_patch() -> None:
    _, folded, inputs = pair()
    out, cache = folded.run_with_cache(**inputs)
    patches = folded.unembed(cache["ln_final.hook_normalized"])
    torch.testing.assert_close(patches, cache["ln_final.hook_normalized"] @ folded.W_U + folded.b_U)
    channel = (1 * 2 + 0) * 8 + 5  # row 1, column 0 of a patch, channel 5
    torch.testing.assert_close(patches[:, :, channel].view(2, 3, 4), out.sample[:, 5, 1::2, 0::2])
    torch.testing.assert_close(
        folded.tokens_to_residual_directions(channel), folded.W_U[:, channel]
    )
    assert folded.cfg.d_vocab == folded.W_U.shape[1]
    with pytest.raises(TypeError, match="output channels are numbers"):
        folded.tokens_to_residual_directions("red")


@torch.no_grad()
def test_biases_add_up() -> None:
    _, folded, inputs = pair()
    _, cache = folded.run_with_cache(**inputs)
    for layer, mlp_input, target in (
        (1, False, "blocks.1.hook_resid_pre"),
        (1, True, "blocks.1.hook_resid_mid_cross"),
    ):
        written = cache["hook_embed"] + cache["hook_pos_embed"]
        for index, block in enumerate(folded.blocks[: layer + mlp_input]):
            for kind in ("attn", "cross_attn"):
                z, w_o = cache[f"blocks.{index}.{kind}.hook_z"], getattr(block, kind).W_O
                written = written + torch.einsum("bphd,hdm->bpm", z, w_o)
            if index < layer:
                written = written + cache[f"blocks.{index}.mlp.hook_post"] @ block.mlp.W_out
        torch.testing.assert_close(
            written + folded.accumulated_bias(layer, mlp_input), cache[target], rtol=0, atol=1e-12
        )


def test_a_folded_model_refuses_other_timesteps() -> None:
    _, folded, inputs = pair()
    with pytest.raises(ValueError, match="folded at timestep 437"):
        folded(**{**inputs, "timestep": inputs["timestep"] + 1})


@pytest.mark.parametrize(
    "name",
    ["unembed", "W_U", "b_U", "accumulated_bias", "tl_parameters", "tokens_to_residual_directions"],
)
def test_an_unfolded_model_refuses_what_would_ignore_the_gate(name: str) -> None:
    dit = HookedDiT(tiny_transformer())
    with pytest.raises(NotFoldedError, match="fold_timestep"):
        getattr(dit, name)
    with pytest.raises(AttributeError):
        dit.no_such_thing  # noqa: B018


@torch.no_grad()
def test_a_folded_model_saves_and_loads_as_a_plain_transformer(tmp_path: Any) -> None:
    _, folded, inputs = pair(attention_bias=False)
    folded.wrapped.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    torch.testing.assert_close(loaded(**inputs).sample, folded(**inputs).sample, rtol=0, atol=1e-12)
    assert DiTConfig.from_transformer(loaded).n_layers == 2


@torch.no_grad()
def test_circuits_are_products_of_the_live_weights() -> None:
    dit, _, _ = pair()
    attn = dit.blocks[1].cross_attn
    torch.testing.assert_close(dit.cross_QK.AB[1, 2], attn.W_Q[2] @ attn.W_K[2].T)
    torch.testing.assert_close(dit.cross_OV.AB[1, 0], attn.W_V[0] @ attn.W_O[0])
    torch.testing.assert_close(
        dit.QK.AB[0, 1], dit.blocks[0].attn.W_Q[1] @ dit.blocks[0].attn.W_K[1].T
    )
    torch.testing.assert_close(
        dit.OV.AB[0, 1], dit.blocks[0].attn.W_V[1] @ dit.blocks[0].attn.W_O[1]
    )
