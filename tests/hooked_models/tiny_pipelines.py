"""Tiny random text-to-image pipelines of many families, with text encoders and tokenizers of their
own kinds.

    pipe, call = tiny_pipeline("FLUX.1")
    images = pipe(prompt=list(PROMPTS), **call).images

Every parameter is random, 1-D ones included. Tokens are words, letters and "," whatever the
family's own tokenizer is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as D
import torch
import transformers as T
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from benchmarks.pipelines import small_vae
from hooked_models.families.flux3_pipeline import Flux3Pipeline

from .pipelines import WORDS, randomise

PIECES = (
    "<|im_start|>",
    "<|im_end|>",
    "▁",
    *",:\n",
    *"abcdefghijklmnopqrstuvwxyz",
    *("▁" + word for word in (*WORDS, "below", "triangle")),
)
CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor "
    "%}<|im_start|> assistant"
)
SIZE = {"num_attention_heads": 2, "num_hidden_layers": 2}
D_TEXT = 16


def tokenizer(max_length: int = 12, padding_side: str = "right") -> Any:
    """Words of the prompts, other words by letters; signs of chat templates."""
    scores = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -10.0 if len(piece) == 1 else -2.0) for piece in PIECES),
    ]
    found = T.T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=max_length)
    found.chat_template, found.padding_side = CHAT, padding_side
    return found


N_WORDS = len(tokenizer())


def t5(kind: Any = T.T5EncoderModel, config: Any = T.T5Config, d_model: int = D_TEXT) -> Any:
    sizes = {
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    return kind(config(vocab_size=N_WORDS, d_model=d_model, **sizes))


def clip(projected: bool = False, length: int = 12) -> Any:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "projection_dim": 8,
        "max_position_embeddings": length,
        "eos_token_id": 1,
        **SIZE,
    }
    return (T.CLIPTextModelWithProjection if projected else T.CLIPTextModel)(
        T.CLIPTextConfig(vocab_size=N_WORDS, **sizes)
    )


def decoder(kind: Any, config: Any, layers: int = 2, **more: Any) -> Any:
    """A tiny decoder-only language model."""
    sizes = {
        "hidden_size": D_TEXT,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_attention_heads": 2,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return kind(config(vocab_size=N_WORDS, num_hidden_layers=layers, **sizes, **special, **more))


def qwen_text() -> dict[str, Any]:
    return {
        "vocab_size": N_WORDS,
        "hidden_size": D_TEXT,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def qwen_vl() -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": D_TEXT,
    }
    return T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(text_config=qwen_text(), vision_config=vision)
    )


def vae(channels: int, blocks: int = 2, **more: Any) -> Any:
    return small_vae(
        blocks,
        latent_channels=channels,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **more,
    )


def deep_compression_vae() -> Any:
    types, shape = (
        ("ResBlock", "EfficientViTBlock"),
        {"attention_head_dim": 2, "latent_channels": 4, "in_channels": 3},
    )
    return D.AutoencoderDC(
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
        **shape,
    )


def flow() -> Any:
    return D.FlowMatchEulerDiscreteScheduler(shift=3.0)


def flux() -> Any:
    sizes = {
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 4, 8),
    }
    model = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        joint_attention_dim=D_TEXT,
        pooled_projection_dim=8,
        guidance_embeds=True,
        **sizes,
    )
    return D.FluxPipeline(flow(), vae(4), clip(), tokenizer(), t5(), tokenizer(), model)


def flux2() -> Any:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4,) * 4,
    }
    model = D.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        joint_attention_dim=3 * D_TEXT,
        timestep_guidance_channels=16,
        guidance_embeds=False,
        **sizes,
    )
    encoder = decoder(T.Qwen3ForCausalLM, T.Qwen3Config, layers=28)
    return D.Flux2KleinPipeline(flow(), flux2_vae(), encoder, tokenizer(), model)


def sd3() -> Any:
    sizes = {
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "sample_size": 16,
        "pos_embed_max_size": 16,
    }
    text = {
        "joint_attention_dim": D_TEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
    }
    model = D.SD3Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **sizes,
        **text,
    )
    return D.StableDiffusion3Pipeline(
        model, flow(), vae(4), clip(True), tokenizer(), clip(True), tokenizer(), t5(), tokenizer()
    )


def qwen_image() -> Any:
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
    }
    model = D.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=D_TEXT, **sizes
    )
    return D.QwenImagePipeline(flow(), qwen_image_vae(), qwen_vl(), tokenizer(), model)


def qwen_image_vae() -> Any:
    shape = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return D.AutoencoderKLQwenImage(latents_mean=[0.1] * 4, latents_std=[1.5] * 4, **shape)


def sana(scheduler: Any = None) -> Any:
    sizes = {
        "num_attention_heads": 4,
        "attention_head_dim": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
    }
    model = D.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=D_TEXT,
        sample_size=8,
        patch_size=1,
        interpolation_scale=1,
        **sizes,
    )
    return D.SanaPipeline(
        tokenizer(),
        decoder(T.Gemma2Model, T.Gemma2Config),
        deep_compression_vae(),
        model,
        scheduler or flow(),
    )


def sana_dpm() -> Any:
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return sana(D.DPMSolverMultistepScheduler(**options))


def z_image() -> Any:
    model = D.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=D_TEXT,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    return D.ZImagePipeline(
        flow(), vae(4), decoder(T.Qwen3Model, T.Qwen3Config), tokenizer(), model
    )


def aura_flow() -> Any:
    sizes = {
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "sample_size": 16,
    }
    model = D.AuraFlowTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=D_TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=64,
        **sizes,
    )
    return D.AuraFlowPipeline(
        tokenizer(), t5(T.UMT5EncoderModel, T.UMT5Config), vae(4), model, flow()
    )


def lumina2() -> Any:
    heads = {
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (300, 32, 32),
    }
    sizes = {
        "sample_size": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "multiple_of": 8,
        "cap_feat_dim": D_TEXT,
    }
    model = D.Lumina2Transformer2DModel(patch_size=2, in_channels=4, **heads, **sizes)
    return D.Lumina2Pipeline(
        model, flow(), vae(4, blocks=4), decoder(T.Gemma2Model, T.Gemma2Config), tokenizer()
    )


def cogview4() -> Any:
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    }
    model = D.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        text_embed_dim=D_TEXT,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(8, 8),
        **sizes,
    )
    return D.CogView4Pipeline(
        tokenizer(padding_side="left"), decoder(T.GlmModel, T.GlmConfig), vae(4), model, flow()
    )


def cogview3() -> Any:
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    }
    model = D.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        text_embed_dim=D_TEXT,
        time_embed_dim=16,
        condition_dim=4,
        **sizes,
    )
    return D.CogView3PlusPipeline(tokenizer(), t5(), vae(4), model, D.CogVideoXDDIMScheduler())


def hunyuan_dit() -> Any:
    model = D.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=D_TEXT,
        cross_attention_dim_t5=8,
        pooled_projection_dim=6,
        text_len=77,
        text_len_t5=256,
    )
    bert = T.BertModel(
        T.BertConfig(
            vocab_size=N_WORDS,
            hidden_size=D_TEXT,
            intermediate_size=32,
            max_position_embeddings=80,
            **SIZE,
        )
    )
    t5_encoder = t5(d_model=8)
    return D.HunyuanDiTPipeline(
        vae(4),
        bert,
        tokenizer(),
        model,
        D.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder,
        tokenizer_2=tokenizer(),
    )


def chroma() -> Any:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 4, 8),
    }
    approximator = {
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    model = D.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, joint_attention_dim=D_TEXT, **sizes, **approximator
    )
    return D.ChromaPipeline(flow(), vae(4), t5(), tokenizer(), model)


def wan() -> Any:
    model = D.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=D_TEXT,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    shape = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    codec = D.AutoencoderKLWan(latents_mean=[0.1] * 4, latents_std=[1.5] * 4, **shape)
    return D.WanPipeline(tokenizer(), t5(T.UMT5EncoderModel, T.UMT5Config), codec, flow(), model)


def ltx() -> Any:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
    }
    model = D.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        caption_channels=D_TEXT,
        **sizes,
    )
    codec = D.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    return D.LTXPipeline(flow(), codec, t5(), tokenizer(), model)


def cogvideox() -> Any:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "sample_width": 2,
        "sample_height": 2,
    }
    text = {
        "time_embed_dim": 4,
        "text_embed_dim": D_TEXT,
        "max_text_seq_length": 12,
        "sample_frames": 9,
    }
    model = D.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=2, **size, **text
    )
    codec = D.AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return D.CogVideoXPipeline(tokenizer(), t5(), codec, model, D.CogVideoXDDIMScheduler())


def hunyuan_video() -> Any:
    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
    }
    model = D.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=D_TEXT,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        **size,
    )
    codec = D.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    language = decoder(T.LlamaModel, T.LlamaConfig, layers=4)
    return D.HunyuanVideoPipeline(
        language, tokenizer(), model, codec, flow(), clip(length=77), tokenizer()
    )


def longcat_image() -> Any:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": [4, 6, 6],
    }
    text = {"joint_attention_dim": D_TEXT, "pooled_projection_dim": D_TEXT}
    model = D.LongCatImageTransformer2DModel(patch_size=1, in_channels=64, **text, **sizes)
    return D.LongCatImagePipeline(flow(), vae(16), qwen_vl(), tokenizer(), None, model)


def ovis_image() -> Any:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
    }
    model = D.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, joint_attention_dim=D_TEXT, **sizes
    )
    return D.OvisImagePipeline(
        flow(), vae(4), decoder(T.Qwen3Model, T.Qwen3Config), tokenizer(), model
    )


def bria() -> Any:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": [4, 6, 6],
    }
    model = D.BriaTransformer2DModel(
        patch_size=1, in_channels=16, joint_attention_dim=D_TEXT, **sizes
    )
    return D.BriaPipeline(model, flow(), vae(4), t5(), tokenizer())


def prx() -> Any:
    sizes = {"hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    model = D.PRXTransformer2DModel(in_channels=4, patch_size=2, context_in_dim=D_TEXT, **sizes)
    text = {
        "vocab_size": N_WORDS,
        "hidden_size": D_TEXT,
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "head_dim": 8,
        **SIZE,
    }
    encoder = T5GemmaEncoder(
        T.T5GemmaConfig(encoder=text, decoder=text, vocab_size=N_WORDS).encoder
    )
    pipe = D.PRXPipeline(model, flow(), encoder, tokenizer(), vae(4))
    pipe.text_preprocessor.basic_clean = str.strip  # its own needs ftfy
    return pipe


def krea2() -> Any:
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "axes_dims_rope": (4, 6, 6),
    }
    text = {
        "text_hidden_dim": D_TEXT,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
    }
    model = D.Krea2Transformer2DModel(
        in_channels=16,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        **sizes,
        **text,
    )
    return D.Krea2Pipeline(
        *(flow(), qwen_image_vae(), qwen3_vl(), tokenizer(), model),
        text_encoder_select_layers=(1, 2),
    )


def qwen3_vl(layers: int = 2, kind: Any = T.Qwen3VLModel) -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": D_TEXT,
    }
    text = {**qwen_text(), "head_dim": 8, "num_hidden_layers": layers}
    return kind(T.Qwen3VLConfig(text_config=text, vision_config=vision))


def flux2_vae() -> Any:
    blocks = {
        "block_out_channels": (4, 4),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 1,
    }
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return D.AutoencoderKLFlux2(**blocks, **types)


def ernie_image() -> Any:
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 32,
        "rope_axes_dim": (4, 6, 6),
    }
    model = D.ErnieImageTransformer2DModel(
        in_channels=16, out_channels=16, patch_size=1, text_in_dim=D_TEXT, **sizes
    )
    encoder = decoder(T.Qwen3Model, T.Qwen3Config)
    return D.ErnieImagePipeline(model, flux2_vae(), encoder, tokenizer(), flow())


class Processor(T.T5Tokenizer):
    """A tokenizer that takes images, and none are given."""

    def __call__(self, text: Any = None, images: Any = None, videos: Any = None, **how: Any) -> Any:
        return super().__call__(text, **how)


def kandinsky5() -> Any:
    size = {
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "time_dim": 16,
    }
    model = D.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=D_TEXT, in_text_dim2=8, **size
    )
    words = tokenizer()
    words.__class__ = Processor
    pipe = D.Kandinsky5T2IPipeline(
        model, vae(4, blocks=4), qwen_vl(), words, clip(length=77), tokenizer(), flow()
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{}", 0
    pipe.resolutions = [(32, 32)]
    return pipe


def hidream() -> Any:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
    }
    model = D.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        caption_channels=[D_TEXT, D_TEXT],
        text_emb_dim=16,
        llama_layers=(0, 1, 1),
        **sizes,
    )
    llama = decoder(T.LlamaForCausalLM, T.LlamaConfig, attn_implementation="eager")
    clips = [each for _ in range(2) for each in (clip(True), tokenizer())]
    words = tokenizer()
    pipe = D.HiDreamImagePipeline(flow(), vae(4), *clips, t5(), tokenizer(), llama, words, model)
    pipe.default_sample_size = 8
    return pipe


class ChatProcessor:
    """A processor of chats, with the tokenizer that it is made of."""

    def __init__(self, words: Any) -> None:
        self.tokenizer = words

    def apply_chat_template(self, *args: Any, **how: Any) -> Any:
        return self.tokenizer.apply_chat_template(*args, **how)


def flux3() -> Any:
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks

    sizes = {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "timestep_channels": 16,
    }
    model = D.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        joint_attention_dim=2 * D_TEXT,
        axes_dims_rope=(4, 4, 4, 4),
        **sizes,
    )
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    blocks.sub_blocks["text_encoder"].pad_multiple = 48
    pipe = D.Flux3ModularPipeline(blocks)
    language = qwen3_vl(kind=T.Qwen3VLForConditionalGeneration)
    words = ChatProcessor(tokenizer(max_length=48))
    pipe.update_components(
        text_encoder=language, tokenizer=words, vae=flux2_vae(), transformer=model, scheduler=flow()
    )
    return Flux3Pipeline(pipe)


class GridProcessor(T.T5Tokenizer):
    """A tokenizer of chats that adds the grids of the image tokens to draw, as GLM-Image's
    processor does: the image's own, and a small one of one token.
    """

    def apply_chat_template(self, messages: Any, target_h: int, target_w: int, **how: Any) -> Any:
        texts = [message[0]["content"][-1]["text"] for message in messages]
        found = self(texts, padding=how["padding"], return_tensors="pt", padding_side="left")
        grids = [[1, target_h // 32, target_w // 32], [1, 1, 1]] * len(texts)
        return found | {
            "image_grid_thw": torch.tensor(grids),
            "images_per_sample": torch.tensor([2] * len(texts)),
        }


def every_word(prompt: Any) -> list[list[str]]:
    """Takes whole prompts as if they stood in quotation marks."""
    return [[one] for one in ([prompt] if isinstance(prompt, str) else prompt)]


def glm_image() -> Any:
    size = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "time_embed_dim": 8,
        "condition_dim": 4,
    }
    model = D.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        text_embed_dim=D_TEXT,
        prior_vq_quantizer_codebook_size=16,
        **size,
    )
    text = {
        "vocab_size": N_WORDS,
        "vision_vocab_size": 16,
        "hidden_size": D_TEXT,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    codes = {"embed_dim": 4, "num_embeddings": 16, "latent_channels": 16}
    language = T.GlmImageForConditionalGeneration(
        T.GlmImageConfig(
            text_config=text,
            vision_config=vision,
            vq_config=codes,
            image_token_id=2,
            image_start_token_id=3,
            image_end_token_id=4,
        )
    )
    processor = tokenizer()
    processor.__class__ = GridProcessor
    codec = vae(4, blocks=4, latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    pipe = D.GlmImagePipeline(tokenizer(), processor, t5(), language, codec, model, flow())
    pipe.get_glyph_texts = every_word
    return pipe


def ideogram4() -> Any:
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 8,
        "mrope_section": (4, 2, 2),
    }
    models = [
        D.Ideogram4Transformer2DModel(in_channels=16, llm_features_dim=13 * D_TEXT, **sizes)
        for _ in range(2)
    ]
    words = tokenizer(max_length=48)
    words.chat_template = CHAT.replace("m['content']", "m['content'][0]['text']")
    return D.Ideogram4Pipeline(flow(), flux2_vae(), qwen3_vl(layers=36), words, *models)


SQUARE = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "pt"}
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "FLUX.1": (flux, {**SQUARE, "guidance_scale": 3.5, "max_sequence_length": 12}),
    "FLUX.1 true CFG": (
        flux,
        {
            **SQUARE,
            "true_cfg_scale": 3.0,
            "negative_prompt": "blue square",
            "max_sequence_length": 12,
        },
    ),
    "FLUX.2": (flux2, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 20}),
    "SD3": (sd3, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 12}),
    "Qwen-Image": (qwen_image, {**SQUARE, "true_cfg_scale": 4.0, "negative_prompt": " "}),
    "SANA": (
        sana,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "guidance_scale": 4.0,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    "SANA DPM++": (
        sana_dpm,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "guidance_scale": 4.0,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    "Z-Image": (z_image, {**SQUARE, "guidance_scale": 4.0}),
    "AuraFlow": (aura_flow, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 12}),
    "Lumina 2": (
        lumina2,
        {**SQUARE, "height": 32, "width": 32, "guidance_scale": 4.0, "max_sequence_length": 240},
    ),
    "CogView4": (cogview4, {**SQUARE, "guidance_scale": 4.0}),
    "CogView3-Plus": (cogview3, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 12}),
    "HunyuanDiT": (hunyuan_dit, {**SQUARE, "guidance_scale": 4.0, "use_resolution_binning": False}),
    "Chroma": (chroma, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 12}),
    "Wan": (
        wan,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 4.0,
            "max_sequence_length": 12,
        },
    ),
    "LTX-Video": (
        ltx,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 3.0,
            "max_sequence_length": 12,
        },
    ),
    "CogVideoX": (
        cogvideox,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "num_frames": 9,
            "guidance_scale": 6.0,
            "max_sequence_length": 12,
        },
    ),
    "HunyuanVideo": (
        hunyuan_video,
        {
            **SQUARE,
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 4.5,
            "max_sequence_length": 12,
            "prompt_template": {"template": "is {}", "crop_start": 0},
        },
    ),
    "LongCat-Image": (
        longcat_image,
        {**SQUARE, "guidance_scale": 4.0, "enable_prompt_rewrite": False},
    ),
    "Ovis-Image": (ovis_image, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 200}),
    "Bria": (bria, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 12}),
    "PRX": (
        prx,
        {
            **SQUARE,
            "skip_text_cleaning": True,
            "guidance_scale": 1.0,
            "use_resolution_binning": False,
        },
    ),
    "Krea 2": (krea2, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 200}),
    "ERNIE-Image": (ernie_image, {**SQUARE, "guidance_scale": 4.0}),
    "Kandinsky 5": (kandinsky5, {**SQUARE, "height": 32, "width": 32, "guidance_scale": 4.0}),
    "GLM-Image": (glm_image, {**SQUARE, "height": 64, "width": 64, "guidance_scale": 4.0}),
    "Ideogram 4": (
        ideogram4,
        {
            **SQUARE,
            "guidance_scale": 4.0,
            "guidance_schedule": None,
            "max_sequence_length": 48,
        },
    ),
    "FLUX.3": (
        flux3,
        {
            **SQUARE,
            "guidance_scale": 4.0,
            "max_sequence_length": 48,
            "text_encoder_out_layers": (1, 2),
        },
    ),
    "HiDream": (hidream, {**SQUARE, "guidance_scale": 4.0, "max_sequence_length": 12}),
}
"""Name → how the pipeline is built, and the arguments of its call.

PRX's own loop guides one prompt at a time.
"""
NO_FOLDER = {
    "PRX": "its text cleaning needs ftfy",
    "LongCat-Image": "its folder must hold a processor of images",
    "Kandinsky 5": "its folder must hold a processor of images",
    "FLUX.3": "its modular pipeline has a folder of another kind",
    "GLM-Image": "its folder must hold a processor of images",
    "HiDream": "images take its default number of pixels, which no folder records",
}
"""Pipelines that cannot be opened again after they were saved, and why."""


def tiny_pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, the same at each call, and the arguments with which to call it beside the
    prompts.
    """
    build, call = PIPELINES[name]
    torch.manual_seed(0)
    pipe = build()
    for place, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            randomise(part.eval(), 0.2 if place.endswith("transformer") else 0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(call)
