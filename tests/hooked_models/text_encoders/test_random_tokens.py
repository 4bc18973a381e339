"""The random-token encoder is the paper's table plus the standard position code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

from dit_lens import scenes
from hooked_models import (
    HookedTextToImage,
    HookedTokenEncoder,
    PatchCodec,
    RandomTokenEncoder,
    RandomTokenEncoderConfig,
    word_tokenizer,
)

from ..pipelines import CALL, PROMPTS, tiny_pipeline


@pytest.mark.parametrize("positions", [True, False])
def test_encoder_is_a_table_plus_the_standard_position_code(positions):
    encoder = RandomTokenEncoder(
        RandomTokenEncoderConfig(words=["a", "b"], d_model=32, positions=positions)
    )
    ids = torch.tensor([[3, 4, 3, 1]]).repeat(1, 10)  # 40 tokens: any length will do
    out = encoder(ids).last_hidden_state[0]
    # [sin | cos], base 10,000
    code = get_1d_sincos_pos_embed_from_grid(32, torch.arange(40), output_type="pt").numpy()
    interleaved = np.stack([code[:, :16], code[:, 16:]], axis=2).reshape(40, 32)
    scaled = interleaved * (32**0.5 / 16**0.5) if positions else 0 * interleaved
    expected = encoder.embed_tokens.weight[ids[0]].detach().numpy() + scaled
    assert np.abs(out.detach().numpy() - expected).max() < 1e-4


def test_table_and_code_have_the_same_norm_and_the_table_follows_from_the_seed():
    def table(**kwargs):
        return RandomTokenEncoder(
            RandomTokenEncoderConfig(words=scenes.WORDS, d_model=256, **kwargs)
        ).embed_tokens.weight

    assert torch.allclose(table().norm(dim=1), torch.tensor(16.0), atol=1e-4)
    encoder = RandomTokenEncoder(RandomTokenEncoderConfig(words=scenes.WORDS, d_model=256))
    assert torch.allclose(encoder.position_code(20).norm(dim=1), torch.tensor(16.0), atol=1e-4)
    assert torch.equal(table(), table())
    assert not torch.equal(table(), table(seed=1))
    assert table(norm=3.0).norm(dim=1).mean().item() == pytest.approx(3.0, rel=1e-5)
    assert not table().requires_grad


def test_unknown_words_are_an_error_that_lists_the_vocabulary():
    tokenizer = word_tokenizer(["red", "circle"])
    encoder = RandomTokenEncoder(RandomTokenEncoderConfig(words=["red", "circle"]))
    with pytest.raises(ValueError, match=r"a word of the prompt\. It knows: red, circle"):
        encoder(tokenizer("yellow circle", return_tensors="pt").input_ids)
    with pytest.raises(ValueError, match=r"no vector for 'yellow', ','\. It knows"):
        HookedTextToImage.from_pipeline(tiny_pipeline()).to_tokens(
            ["red circle", "Yellow circle, red"]
        )
    with pytest.raises(ValueError, match="It knows"):
        encoder(torch.tensor([[99]]))


def test_hooked_encoder_equals_the_wrapped_one_and_every_hook_counts():
    encoder = tiny_pipeline().text_encoder
    hooked = HookedTokenEncoder(encoder)
    ids = torch.tensor([[3, 5, 1], [4, 6, 1]])
    assert torch.equal(hooked(ids)[0], encoder(ids)[0])
    out, cache = hooked.run_with_cache(ids)
    assert torch.equal(cache["hook_embed"] + cache["hook_pos_embed"], out[0])
    assert torch.equal(cache["hook_out"], out[0])
    assert hooked.W_E.data_ptr() == encoder.embed_tokens.weight.data_ptr()
    for name in hooked.hook_dict:
        changed = hooked.run_with_hooks(ids, fwd_hooks=[(name, lambda tensor, hook: tensor + 1)])[0]
        assert (changed - out[0]).abs().min() > 0.5, name


def test_folder_opens_in_plain_diffusers(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    reloaded = PixArtSigmaPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert isinstance(reloaded.vae, PatchCodec)
    assert isinstance(reloaded.text_encoder, RandomTokenEncoder)
    for name, tensor in pipe.text_encoder.state_dict().items():
        assert torch.equal(tensor, reloaded.text_encoder.state_dict()[name])
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    a, b = (
        p(list(PROMPTS), latents=latents.clone(), num_inference_steps=3, **CALL).images
        for p in (pipe, reloaded)
    )
    assert torch.equal(a, b)
    text = (tmp_path / "model_index.json").read_text()
    # by package: a moved file breaks no checkpoint
    assert '"hooked_models",\n    "PatchCodec"' in text
