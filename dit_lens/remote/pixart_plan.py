"""The plan of one generation of PixArt, which `pixart_kernel.run` follows inside a trace."""

from __future__ import annotations

from typing import Any

from hooked_models import HookedT5Encoder, HookedTextToImage
from hooked_models.generation.names import IMAGE_HOOK, Site
from hooked_models.generation.sampling import Solver

from .kernel import Point
from .plan import Request, action_of, unreachable, x0_coefficients


def make(model: HookedTextToImage, draft: Any, request: Request) -> dict[str, Any]:
    """The plan of a run.

    Args:
        model: a remote PixArt, which has names and no weights.
        draft: its inputs, before their text is encoded (`trajectory.Inputs`).
        request: the hooks, sums and tensors that the client asked for.

    Raises:
        ValueError: a tensor that no trace reaches, or an edit made for other prompts.
    """
    cfg, encoder, solver, n = model.cfg, model.names.text_encoder, draft.solver, len(draft)
    actions: dict[tuple[str, int], dict[str, list[tuple[Point, Any]]]] = {}
    for site, action in request.actions:
        if (reason := _unreachable(model, site, solver, writes=action is not None)) is not None:
            raise unreachable(site, reason)
        sent = action_of(model, draft, site, action, request.patching)
        actions.setdefault(_call_of(site), {}).setdefault(site.inner, []).append(sent)
    added: dict[int, dict[str, list[Any]]] = {}
    for each in request.sums:
        there = added.setdefault(each.step, {})
        there.setdefault(each.attention, []).append(each.sent)

    steps = {}
    for step in {step for kind, step in actions if kind == "step"} | set(added):
        here = actions.get(("step", step), {})
        x0 = x0_coefficients(solver, step) if "hook_x0" in here else (0.0, 1.0)
        steps[step] = (here, added.get(step, {}), *x0)
    return {
        "cfg": {
            **{"batch": n, "guided": draft.guided, "guidance": draft.guidance},
            **{"eps": cfg.eps, "layers": cfg.n_layers},
            # the other half of the channels, where there is one, is a learned variance
            **{"heads": cfg.n_heads, "scale": cfg.d_head**-0.5, "channels": cfg.in_channels},
        },
        "encoder": {} if encoder is None else _encoder(encoder, n),
        "calls": {call: here for (kind, call), here in actions.items() if kind == "call"},
        "steps": steps,
        "images": actions.get(("image", 0), {}),
        "to_cpu": request.to_cpu,
    }


def _call_of(site: Site) -> tuple[str, int]:
    """Kind and number of the call that computes a site's tensor."""
    if site.inner == IMAGE_HOOK:
        return "image", 0
    encoders = {"text_encoder": ("call", 0), "null_text_encoder": ("call", 1)}
    return encoders.get(site.part, ("step", site.step or 0))


def _encoder(encoder: Any, batch: int) -> dict[str, Any]:
    cfg = encoder.cfg
    if not isinstance(encoder, HookedT5Encoder):
        return {"kind": "tokens"}
    return {
        **{
            "kind": "t5",
            "layers": cfg.n_layers,
            "heads": cfg.n_heads,
            "eps": cfg.eps,
            "gated": cfg.gated_mlp,
            "batch": batch,
        },
    }


def _unreachable(model: HookedTextToImage, site: Site, solver: Solver, writes: bool) -> str | None:
    """Why a tensor cannot be read, or written, through a trace of the diffusers pipeline."""
    leaf = site.inner.rpartition(".")[2]
    if site.row.flag is not None:
        return "no module of diffusers computes it; take hook_z, or a HookedTextToImage at hand."
    if site.inner == "hook_latent" and writes:
        return (
            "the pipeline's own variable goes on to the scheduler; give latents=…, or write "
            "hook_out, hook_x0 or hook_embed."
        )
    if site.inner == "hook_latent" and abs(solver.input_scales[site.step or 0] - 1) > 1e-6:
        return f"{solver.name} scales what the denoiser gets."
    if site.part.endswith("text_encoder") and leaf == "hook_rel_pos_bias" and writes:
        return "all prompts share one; write blocks.{l}.attn.hook_attn_scores or hook_pattern."
    if leaf in ("hook_text", "hook_caption") and model.dit.caption_projection is None:
        return (
            "this model has no caption projection, whose input and output they are; write "
            "text_encoder.hook_out."
        )
    return None
