"""PixArt's part of the code that runs inside an nnsight trace (`kernel` has the rules for it).

Only inputs and outputs of modules are touched. Tensors between them inside a diffusers block are
computed again here, and only if a hook needs them: the pattern (from q and k), the gate's output, a
norm's scale, and, below a replaced residual, its sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import torch
from torch import Tensor

from .kernel import Walk

MODULATION = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")


@no_type_check
class PixArtWalk(Walk):
    """The hooks of one call of PixArt's denoiser or text encoder, in its modules."""

    def norm(self, envoy: Any, name: str, eps: float, rms: bool = False) -> None:
        """A LayerNorm without affine map, or (`rms`) T5's.

        The weight of T5's comes after `hook_normalized`.
        """
        scale_name, normalized_name = f"{name}.hook_scale", f"{name}.hook_normalized"
        if not self.hooks(scale_name, normalized_name):
            return
        x = wide = envoy.input
        if rms:  # always from float32, as in transformers
            scale = 1 / torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(
                torch.promote_types(x.dtype, torch.float32)
            )
        else:
            wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            wide = wide - wide.mean(-1, keepdim=True)
            scale = (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        scaled = self.apply(scale_name, scale)
        normalized = (wide / (scale if scaled is None else scaled)).to(x.dtype)
        if not rms and scaled is None:
            normalized = envoy.output
        written = self.apply(normalized_name, normalized)
        if scaled is not None or written is not None:
            new = normalized if written is None else written
            envoy.output = envoy.weight * new if rms else new

    def attention(self, name: str, linears: Any, heads: int, scale: float, bias: Callable) -> None:
        """From q to z.

        `linears` are those of q, k, v and the output; `bias()` is added to the scores, unless it is
        None.
        """
        read = self.qkv(name, linears, heads)
        added = bias() if self.needs_pattern(name) else None
        pattern = self.edited_pattern(name, read, added, scale)
        self.add_up(name, read, pattern, added, scale)
        z = None if pattern is None else (pattern @ read["v"].transpose(1, 2)).transpose(1, 2)
        if z is not None or self.hooks(f"{name}.hook_z"):
            written = self.apply(
                f"{name}.hook_z", split(linears[3].input, heads) if z is None else z
            )
            z = z if written is None else written
            if z is not None:
                linears[3].input = z.flatten(2)

    def qkv(self, name: str, linears: Any, heads: int) -> dict:
        """q, k and v [batch pos head d_head] as hooks leave them.

        One that neither a hook nor the pattern needs is left out.
        """
        read: dict[str, Tensor] = {}
        for leaf, linear in zip(("q", "k", "v"), linears[:3], strict=True):
            if self.needs_pattern(name) or self.hooks(f"{name}.hook_{leaf}"):
                read[leaf] = split(linear.output, heads)
                written = self.apply(f"{name}.hook_{leaf}", read[leaf])
                if written is not None:
                    linear.output = written.flatten(2)
                    read[leaf] = written
        return read

    def modulation(self, block: Any, prefix: str) -> Tensor:
        """[row 6 d_model]: shift, scale and gate of the attention, then of the MLP."""
        table, t_mod = block.scale_shift_table, block.inputs[1]["timestep"]
        rows, changed = table[None] + t_mod.reshape(len(t_mod), 6, -1), False
        for index, name in enumerate(MODULATION):
            written = self.apply(f"{prefix}adaln.hook_{name}", rows[:, index : index + 1])
            if written is not None:
                rows, changed = rows.clone(), True
                rows[:, index : index + 1] = written
        if changed:
            args, kwargs = block.inputs
            block.inputs = (args, {**kwargs, "timestep": (rows - table).reshape(t_mod.shape)})
        return rows

    def block(self, block: Any, layer: int, cfg: dict) -> None:
        """One PixArt block.

        Its sublayers pass on the residual stream where hooks have changed it, else None.
        """
        p = f"blocks.{layer}."
        if not self.touches_prefix(p):
            return
        mod = self.modulation(block, p)
        x = block.input
        written = self.apply(p + "hook_resid_pre", x)
        if written is not None:
            block.input = x = written
        x = self.self_attention(block, p, cfg, mod, x)
        x = self.cross_attention(block, p, cfg, x)
        self.mlp(block, p, cfg, mod, x)
        self.output(block, p + "hook_resid_post")

    def self_attention(self, block: Any, p: str, cfg: dict, mod: Tensor, before: Tensor) -> Any:
        """From ln1 to hook_resid_mid; `before`: the residual stream."""
        attn, x = block.attn1, None
        linears = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        self.norm(block.norm1, p + "ln1", cfg["eps"])
        self.attention(p + "attn", linears, cfg["heads"], cfg["scale"], lambda: None)
        self.output(attn, p + "hook_attn_out_pre_gate")
        if self.hooks(p + "hook_attn_out"):
            written = self.apply(p + "hook_attn_out", mod[:, 2:3] * attn.output)
            x = None if written is None else before + written
        return self.residual(p + "hook_resid_mid", block.attn2, x)

    def cross_attention(self, block: Any, p: str, cfg: dict, x: Any) -> Any:
        """From the cross-attention's mask to hook_resid_mid_cross."""
        cross = block.attn2
        # read here, in order
        mask = (
            cross.inputs[1].get("attention_mask") if self.needs_pattern(p + "cross_attn") else None
        )
        bias = None if mask is None else mask[:, None]
        linears = (cross.to_q, cross.to_k, cross.to_v, cross.to_out[0])
        self.attention(p + "cross_attn", linears, cfg["heads"], cfg["scale"], lambda: bias)
        self.output(cross, p + "hook_cross_attn_out")
        return self.residual(
            p + "hook_resid_mid_cross", block.norm2, None if x is None else x + cross.output
        )

    def residual(self, name: str, reader: Any, x: Any) -> Any:
        """Pass the residual stream to its next reader, if hooks changed it here or before."""
        if self.hooks(name):
            written = self.apply(name, reader.input if x is None else x)
            x = x if written is None else written
        if x is not None:
            reader.input = x
        return x

    def mlp(self, block: Any, p: str, cfg: dict, mod: Tensor, x: Any) -> None:
        """From ln2 to the block's output."""
        moved, hooked = x is not None, self.hooks(p + "hook_mlp_out")
        if hooked and not moved:
            x = block.norm2.input
        self.norm(block.norm2, p + "ln2", cfg["eps"])
        self.output(block.ff.net[0].proj, p + "mlp.hook_pre")
        self.input(block.ff.net[2], p + "mlp.hook_post")
        self.output(block.ff, p + "hook_mlp_out_pre_gate")
        if moved or hooked:
            out = mod[:, 5:6] * block.ff.output
            written = self.apply(p + "hook_mlp_out", out)
            if moved or written is not None:
                block.output = x + (out if written is None else written)

    def denoiser(self, dit: Any, cfg: dict, a: float, b: float) -> None:
        """One denoiser call, and the pipeline's use of its output.

        A step's x0 is a · latent + b · out.
        """
        latent: Any = dit.input[self.rows["cond"]] if self.hooks("hook_latent", "hook_x0") else None
        self.apply("hook_latent", latent)
        self.embeddings(dit)
        self.output(dit.adaln_single.emb, "hook_t_emb")
        self.output(dit.adaln_single.linear, "hook_t_mod")
        self.input(dit.caption_projection, "hook_text")
        self.output(dit.caption_projection, "hook_caption")
        for layer in range(cfg["layers"]):
            self.block(dit.transformer_blocks[layer], layer, cfg)
        self.norm(dit.norm_out, "ln_final", cfg["eps"])

        if not self.hooks("hook_out_uncond", "hook_out_cond", "hook_out", "hook_x0"):
            return
        whole, changed = dit.output[0], False
        for name in ("hook_out_uncond", "hook_out_cond"):
            rows = self.rows[name.removeprefix("hook_out_")] if cfg["guided"] else slice(None)
            written = self.apply(name, whole[rows]) if self.hooks(name) else None
            if written is not None:
                whole, changed = whole.clone(), True
                whole[rows] = written
        written = self.guided_output(whole, cfg, latent, a, b)
        # both branches have the same output, so that guidance changes nothing
        if written is not None:
            whole, changed = whole.clone(), True
            whole[:, : cfg["channels"]] = (
                torch.cat([written, written]) if cfg["guided"] else written
            )
        if changed:
            dit.output = (whole,)

    def embeddings(self, dit: Any) -> None:
        """Patches and position codes."""
        if self.hooks("hook_embed", "hook_pos_embed"):
            grid = dit.pos_embed.proj.output
            patches = grid.flatten(2).transpose(1, 2)
            written = self.apply("hook_embed", patches)
            if written is not None:
                patches = written
                dit.pos_embed.proj.output = written.transpose(1, 2).reshape(grid.shape)
            if self.hooks("hook_pos_embed"):
                written = self.apply("hook_pos_embed", dit.pos_embed.output - patches)
                if written is not None:
                    dit.pos_embed.output = patches + written

    def guided_output(self, whole: Tensor, cfg: dict, latent: Any, a: float, b: float) -> Any:
        """The guided prediction as hook_out and hook_x0 leave it; None if they change nothing."""
        if not self.hooks("hook_out", "hook_x0"):
            return None
        out = whole
        if cfg["guided"]:
            uncond, cond = whole.chunk(2)
            out = uncond + cfg["guidance"] * (cond - uncond)
        out = out[:, : cfg["channels"]]
        written = self.apply("hook_out", out)
        now = out if written is None else written
        x0 = self.apply("hook_x0", a * latent + b * now) if self.hooks("hook_x0") else None
        return written if x0 is None else (x0 - a * latent) / b

    def t5(self, encoder: Any, cfg: dict) -> None:
        """One call of a T5 encoder."""
        self.output(encoder.embed_tokens, "hook_embed")
        for layer in range(cfg["layers"]):
            p, block = f"blocks.{layer}.", encoder.block[layer]
            if not (self.touches_prefix(p) or (layer == 0 and self.hooks("hook_rel_pos_bias"))):
                continue
            attn, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
            self.input(block, p + "hook_resid_pre")
            self.norm(block.layer[0].layer_norm, p + "ln1", cfg["eps"], rms=True)
            given = attn.inputs[1] if self.needs_pattern(p + "attn") else {}
            self.attention(
                p + "attn",
                (attn.q, attn.k, attn.v, attn.o),
                cfg["heads"],
                1.0,
                partial(self.t5_bias, attn, given),
            )
            self.output(attn.o, p + "hook_attn_out")
            if layer == 0 and self.hooks("hook_rel_pos_bias"):
                self.apply("hook_rel_pos_bias", attn.output[1].expand(cfg["batch"], -1, -1, -1))
            self.input(block.layer[1], p + "hook_resid_mid")
            self.norm(block.layer[1].layer_norm, p + "ln2", cfg["eps"], rms=True)
            self.output(mlp.wi_0 if cfg["gated"] else mlp.wi, p + "mlp.hook_pre")
            if cfg["gated"]:
                self.output(mlp.wi_1, p + "mlp.hook_pre_linear")
            self.input(mlp.wo, p + "mlp.hook_post")
            self.output(mlp, p + "hook_mlp_out")
            self.output(block.layer[1], p + "hook_resid_post")
        self.norm(encoder.final_layer_norm, "ln_final", cfg["eps"], rms=True)
        self.output(encoder.final_layer_norm, "hook_out")

    def t5_bias(self, attn: Any, given: dict) -> Tensor:
        """Bias of a T5 attention's scores.

        The first layer computes the position bias, the others are given it.
        """
        bias, mask = given.get("position_bias"), given.get("mask")
        if bias is None:
            bias = attn.relative_attention_bias.output.permute(2, 0, 1)[None]
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return bias + mask

    def tokens(self, encoder: Any) -> None:
        """One call of a random-token encoder."""
        self.output(encoder.embed_tokens, "hook_embed")
        if self.hooks("hook_pos_embed", "hook_out"):
            words, out = encoder.embed_tokens.output, encoder.output[0]
            code = self.apply("hook_pos_embed", out - words)
            out = out if code is None else words + code
            written = self.apply("hook_out", out)
            if code is not None or written is not None:
                encoder.output = (out if written is None else written,)


@no_type_check
def split(tensor: Tensor, heads: int) -> Tensor:
    """[batch pos d] as [batch pos head d_head]."""
    return tensor.reshape(*tensor.shape[:2], heads, -1)


@no_type_check
def run(model: Any, tracer: Any, plan: dict, clean: dict | None = None) -> dict:
    """Body of a trace of a generation.

    `plan` is `pixart_plan.make`'s, `clean` the tensors kept by an earlier run. Returns a dict: the
    images [batch 3 height width] as "images", kept tensors by full name as "kept", sums by key as
    "added".
    """
    cfg, kept, added = plan["cfg"], {}, {}
    n = cfg["batch"]
    rows = (
        {"uncond": slice(0, n), "cond": slice(n, 2 * n)} if cfg["guided"] else {"cond": slice(0, n)}
    )
    for call in tracer.iter[sorted(plan["calls"])]:  # the prompts', then the empty prompt's
        walk = PixArtWalk(plan["calls"][call], {}, kept, added, {}, plan["to_cpu"], clean)
        if plan["encoder"]["kind"] == "t5":
            walk.t5(model.text_encoder.encoder, plan["encoder"])
        else:
            walk.tokens(model.text_encoder)
    for step in tracer.iter[sorted(plan["steps"])]:
        actions, sums, a, b = plan["steps"][step]
        PixArtWalk(actions, sums, kept, added, rows, plan["to_cpu"], clean).denoiser(
            model.transformer, cfg, a, b
        )
    images = model.output[0]
    written = PixArtWalk(plan["images"], {}, kept, added, {}, plan["to_cpu"], clean).apply(
        "hook_image", images
    )
    images = images if written is None else written
    return {"images": images.detach().cpu(), "kept": kept, "added": added}
