"""The tiny pipelines that every tool is tested on, and how each is called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from dit_lens import Intervention
from hooked_models import HookedTextToImage
from hooked_models.families.circuits import NORM_BEFORE, OWN_NORMS

from ..hooked_models.pipelines import PROMPTS
from ..hooked_models.tiny_pipelines import PIPELINES, tiny_pipeline

STEPS, SEEDS = 3, [3, 4]
LAST = STEPS - 1
TEXTS = ("blue circle is above red square", "red circle is above blue square")
"""A prompt and its counterfactual."""
FIRST = ("FLUX.1", "FLUX.1 true CFG", "SD3", "SANA DPM++", "Qwen-Image")
LEFT_OUT = ("SANA",)
"""Pipelines of a family that another one stands for."""
ADD_NOT_UP = ("AuraFlow", "HunyuanDiT", "Krea 2")
"""A norm over stream and attention together, skips that pass a norm, and gates inside attention
that follow the stream: contributions do not add up there.
"""
ONE_BRANCH = (
    "it is distilled with guidance, and every step is one call: there is no unconditional branch"
)
NOT_ADDED = (
    "its stream passes a norm or a long skip, or gates inside its attention follow the stream also "
    "where z is held, so that contributions do not add up"
)
ONE_PROMPT = (
    "its loop guides one prompt at a time: batches run without guidance, with no unconditional "
    "branch"
)
SEES_PADS = (
    "its attention sees the pads of a shorter prompt, which a run of that prompt alone lacks"
)
UNABLE: dict[tuple[str, str], str] = {
    **{
        (name, tool): ONE_BRANCH
        for name in ("FLUX.1", "HunyuanVideo")
        for tool in ("branches", "one branch alone")
    },
    **{("PRX", tool): ONE_PROMPT for tool in ("branches", "one branch alone")},
    **{(name, "sums of paths"): NOT_ADDED for name in ADD_NOT_UP},
    **{
        (name, "screening, circuits of weights"): OWN_NORMS if name == "LTX-Video" else NORM_BEFORE
        for name in PIPELINES
        if not name.startswith("SANA")
    },
    ("Kandinsky 5", "bfloat16"): "the model itself multiplies float32 times by bfloat16 weights",
    **{(name, "unequal prompts"): SEES_PADS for name in ("Kandinsky 5", "GLM-Image")},
    ("Krea 2", "direct paths"): NOT_ADDED,
    ("HunyuanDiT", "edges"): "long skips carry streams past the blocks between",
    ("FLUX.3", "edges"): "the image's own blocks come first, and the text joins the stream after",
    ("HiDream", "edges"): "each block reads a text of its own, which enters between blocks",
    (
        "AuraFlow",
        "path patching",
    ): "attention reaches the residual stream through the MLP alone, so no direct path does; others do",
}
"""(pipeline, tool of `families.TOOLS`) → why it has none."""
OTHERS = tuple(name for name in PIPELINES if name not in (*FIRST, *LEFT_OUT))


@dataclass
class Case:
    """One tiny pipeline, and how it is called."""

    name: str
    pipe: Any
    model: Any
    guidance: float | None
    call: dict[str, Any]

    def plain(self, **more: Any) -> Tensor:
        """Images of the pipeline itself."""
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        options = {**self.call, **self.clean.inputs.drawn, **more}
        found = self.pipe(prompt=list(PROMPTS), generator=generators, **options)
        return next(iter(found.values()))

    def images(self, hooks: Any = ()) -> Tensor:
        return self.model.run_with_hooks(
            PROMPTS, SEEDS, STEPS, self.guidance, fwd_hooks=list(hooks)
        )

    def run(self, texts: Any = PROMPTS, seed: Any = SEEDS) -> Any:
        return self.model.trajectory(texts, seed, STEPS, self.guidance)

    @cached_property
    def clean(self) -> Any:
        """The run without hooks, made once, as the others here."""
        return self.run()

    @cached_property
    def alone(self) -> dict[int, Any]:
        """Seed → the run of all prompts from it."""
        return {seed: self.run(seed=seed) for seed in SEEDS}

    @cached_property
    def counterfactuals(self) -> tuple[Any, Any]:
        """The runs of `TEXTS`, from one noise."""
        original, source = (self.run(text, 3) for text in TEXTS)
        return original, source

    def cached(self, names: Any, **how: Any) -> Any:
        return self.model.run_with_cache(
            PROMPTS, SEEDS, STEPS, self.guidance, names_filter=names, **how
        )[1]

    def act(self, site: str, **how: Any) -> list[Any]:
        return Intervention(site, **how).hooks(self.model, list(PROMPTS), num_steps=STEPS)

    @cached_property
    def layer(self) -> int:
        """The first that reads the text."""
        dit = self.model.dit
        names = (f"blocks.{layer}.{self.attention}.hook_z" for layer in range(dit.cfg.n_layers))
        return next(layer for layer, name in enumerate(names) if name in dit.hook_dict)

    @property
    def attention(self) -> str:
        """Sublayer that reads the text."""
        return "cross_attn" if "blocks.0.cross_attn.hook_z" in self.model.dit.hook_dict else "attn"

    @property
    def together(self) -> bool:
        """True if both branches are one call."""
        return len(self.clean.record.predictions) == STEPS and len(self.branches) == 2

    def transformer(self, branch: str) -> Any:
        """The module that computes a branch."""
        second = self.model.dit.family.second
        return getattr(self.pipe, second if second and branch == "uncond" else "transformer")

    @cached_property
    def branches(self) -> tuple[str, ...]:
        return (
            ("cond", "uncond")
            if self.model.draft(PROMPTS, SEEDS, STEPS, self.guidance).guided
            else ("cond",)
        )


@cache
def case_of(name: str) -> Case:
    """Each is built once; its model has no hooks but in blocks."""
    pipe, call = tiny_pipeline(name)
    model: Any = HookedTextToImage.from_pipeline(pipe)
    call = {**call, "num_inference_steps": STEPS}
    options = {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }
    guide = next(
        (
            key
            for key in ("true_cfg_scale", "guidance_scale")
            if key in options and (key == model.guide)
        ),
        None,
    )
    guidance = options.pop(guide) if guide else None
    model.options = options
    return Case(name, pipe, model, guidance, call)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))
