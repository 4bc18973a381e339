"""Any diffusers text-to-image pipeline with a transformer as a hooked model.

It runs through the pipeline's own loop.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from diffusers import ModularPipeline
from jaxtyping import Float
from torch import Tensor, nn

from .. import families
from ..arguments import integer, number
from ..hooks.layout import Layout
from ..hooks.table import Axes
from ..hooks.texts import joined_text
from ..hooks.wrapping import stamp
from ..pipelines.weightless import has_weights_on, weightless
from ..store import digest
from ..text_encoders.words import EncodedText, padded
from .attached import SamplerHooks
from .model import DEFAULT_STEPS, HookedTextToImage
from .names import IMAGE_HOOK, Branch, GenerationNames, Site
from .noise import Seeds, seed_of_each
from .pipeline_inputs import Bound, PipelineInputs
from .pipeline_loop import PipelineLoop
from .sampling import Solver
from .text_positions import encoded_at_positions, text_arguments
from .trajectory import Run

REMEMBERED = 4
"""Drafts that are kept for the next run of the same prompts."""
DRAWN = 4096
"""Rows of which the arguments are kept that were drawn from their seeds."""
GUIDANCE = ("true_cfg_scale", "guidance_scale")
"""Arguments of pipelines' calls that guide.

Where both exist, a model distilled with guidance takes the second.
"""


PIXART_ALONE = ("noise", "encode", "decode", "image_size", "size_conditions", "prompt_texts")


class HookedPipeline(HookedTextToImage):
    """A diffusers pipeline whose denoiser is of a known family.

    Made by `HookedTextToImage.from_pipeline`. Latents have the pipeline's own layout. Text encoders
    run as they are, without hooks.

    Example:
        >>> HookedTextToImage.from_pipeline(object())  # pipelines of FLUX, SD3, Qwen-Image, … work
        Traceback (most recent call last):
        TypeError: object has no transformer: ...
    """

    own_names = ("guidance_scale",)
    """Names of diffusers that stand for no argument here: a pipeline may have two kinds of
    guidance.
    """
    pipe: Any
    drafted: Any
    """Pipeline that drafts go through: `pipe`, or without weights one that computes no text."""
    options: dict[str, Any]
    """Arguments of the pipeline's call that every run takes by default, such as `height`, `width`
    and `negative_prompt`.
    """

    def __init__(self, pipe: Any) -> None:
        family = families.SUPPORTED.get(type(getattr(pipe, "transformer", None)).__name__)
        if isinstance(pipe, ModularPipeline) and family is not None and family.modular is not None:
            pipe = family.modular(pipe)
        for needed in ("transformer", "scheduler", "encode_prompt"):
            if getattr(pipe, needed, None) is None:
                raise TypeError(
                    f"{type(pipe).__name__} has no {needed}: HookedTextToImage takes PixArt and "
                    "others that draw by one."
                )
        super().__init__()
        self.__dict__["pipe"] = pipe
        live = has_weights_on(pipe.transformer)
        self.dit = families.hook(pipe.transformer, check=live)
        if family is not None and family.second:
            second = getattr(pipe, family.second)
            self.dit.second = families.hook(second, check=live, first=self.dit)
        self.__dict__["drafted"] = pipe if live else weightless(pipe, self.dit.family.layerwise)
        self.text_encoder, self.codec = None, getattr(pipe, "vae", None)
        self.options = {}
        self.sampler_hooks = SamplerHooks()
        self.names = GenerationNames(self.dit, self.sampler_hooks, None, lambda: DEFAULT_STEPS)
        self.loop = PipelineLoop()
        self._drafts: OrderedDict[Any, tuple[Any, PipelineInputs]] = OrderedDict()
        self._draws: OrderedDict[Any, dict[str, Tensor]] = OrderedDict()
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @classmethod
    def from_pipeline(cls, pipe: Any) -> HookedPipeline:
        """Around a live pipeline.

        Its modules are used, not copied, and no longer require gradients.

        Raises:
            ValueError: its transformer is of no known family, and the message names those that
                are.
            TypeError: it has no transformer, or no loop of denoiser calls that can be followed.
        """
        return cls(pipe)

    def __getattr__(self, name: str) -> Any:
        if name in PIXART_ALONE:
            raise AttributeError(
                f"{name} is PixArt's: {type(self.pipe).__name__} encodes text and draws noise in "
                "its own way."
            )
        return super().__getattr__(name)

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.pipe.scheduler

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipe._execution_device)

    def digest(self) -> str:
        """Hash of everything that decides a generation.

        The configuration and weights of every component, and `options`.
        """
        parts: list[str | Tensor] = [
            type(self.pipe).__name__,
            str(sorted(self.options.items(), key=str)),
        ]
        for name, part in sorted(self.pipe.components.items()):
            config: Any = getattr(part, "config", None) or {}
            settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            parts.append(
                f"{name} {type(part).__name__} "
                f"{sorted((k, str(v)) for k, v in settings.items() if k[:1] != '_')}"
            )
            parts += part.state_dict().values() if isinstance(part, nn.Module) else ()
        return digest(*parts)

    def as_diffusers(self) -> Any:
        """The pipeline itself."""
        return getattr(self.pipe, "modular", self.pipe)

    # Guidance and steps

    @property
    def default_guidance(self) -> float:  # type: ignore[override]
        """The default of the pipeline's own argument, or of its family; 1 if neither has one."""
        name = self.guide
        default = (
            None
            if name is None
            else inspect.signature(type(self.pipe).__call__).parameters[name].default
        )
        own = self.dit.family.guidance
        return own if default in (None, inspect.Parameter.empty) else float(default)

    @property
    def guide(self) -> str | None:
        """The pipeline's argument that `guidance` stands for."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        distilled = bool(getattr(self.dit.config, "guidance_embeds", False))
        return next(
            (name for name in (GUIDANCE[::-1] if distilled else GUIDANCE) if name in known), None
        )

    def solver(self, num_steps: SupportsIndex) -> Solver:
        """The scheduler as the pipeline prepares it for runs of `num_steps`."""
        return self._example(integer("num_steps", num_steps, 1)).solver

    def _example(self, num_steps: int = DEFAULT_STEPS) -> PipelineInputs:
        """A draft of as many prompts as `options` are about."""
        several = [len(value) for value in self.options.values() if isinstance(value, list)]
        return self.draft(["a photo"] * (several[0] if several else 1), 0, num_steps)

    # Inputs of a run

    def draft(
        self,
        prompts: Any,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Tensor | None = None,
        **options: Any,
    ) -> PipelineInputs:
        """As in HookedTextToImage, text encoded.

        The pipeline's loop is gone through once, without its transformer.
        """
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{type(self.pipe).__name__} takes prompts as text: give a string, or several."
            )
        options = self._call_options(options, guidance, num_steps)
        seeds = tuple(seed_of_each(seed, len(texts)))
        key = *self._draft_key(texts, options, latents), options["num_inference_steps"]
        if key not in self._drafts:
            used = float(options.get(self.guide or "") or self.default_guidance)
            same_text = (
                one.encoded for known, (_, one) in self._drafts.items() if known[:-1] == key[:-1]
            )
            inputs = PipelineInputs(
                *(self.drafted, self.dit, texts, options, seeds, latents),
                encoded=next(same_text, ()),
                guidance=used,
            )
            inputs = replace(inputs, drawn=self._drawn(inputs, [None] * len(texts)))
            # values in the key's ids are kept, so that no other object takes their place
            self._drafts[key] = (options, latents, self.pipe.scheduler), self.loop.prepare(inputs)
            while len(self._drafts) > REMEMBERED:
                self._drafts.popitem(last=False)
        return replace(self._drafts[key][1], seeds=seeds, weights=stamp(self.dit))

    def _call_options(
        self, options: Mapping[str, Any], guidance: float | None, num_steps: int
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call. Raises TypeError for one that it lacks."""
        known, options = (
            inspect.signature(type(self.pipe).__call__).parameters,
            {**self.options, **options},
        )
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"{type(self.pipe).__name__} has no argument {unknown[0]!r}.")
        guidance = None if guidance is None else number("guidance", guidance)
        if guidance is not None and self.guide is not None:
            options[self.guide] = guidance
        options |= {"num_inference_steps": integer("num_steps", num_steps, 1)}
        return self.dit.family.completed(options)

    def _draft_key(
        self, texts: tuple[str, ...], options: Mapping[str, Any], latents: Any
    ) -> tuple[Any, ...]:
        """Everything that a draft depends on but the number of steps.

        Arguments, text encoders and scheduler.
        """
        values = [
            (name, _key(value))
            for name, value in sorted(options.items())
            if name != "num_inference_steps"
        ]
        scheduler = self.pipe.scheduler
        return (
            *(texts, *values, _key(latents), self._stamps()),
            *(id(scheduler), str(scheduler.config)),
        )

    def _stamps(self) -> tuple[Any, ...]:
        """Stamps of the weights and hooks of the models that read text."""
        parts = [part for name, part in self.pipe.components.items() if "encoder" in name]
        return tuple(
            (stamp(part), _attached_to(part)) for part in parts if isinstance(part, nn.Module)
        )

    def encoded(self, inputs: PipelineInputs) -> PipelineInputs:
        """As in HookedTextToImage: a draft's text is encoded.

        Arguments that the pipeline draws from its seeds are drawn here.
        """
        return replace(inputs, drawn=self._drawn(inputs, inputs.seeds)) if inputs.drawn else inputs

    def _drawn(self, inputs: PipelineInputs, seeds: Sequence[int | None]) -> dict[str, Tensor]:
        """Arguments of the pipeline's call that it draws for each row.

        Those that the call has are left out; without a seed, any of their shape.
        """
        if self.dit.family.drawn is None:
            return {}
        rows = [
            self._drawn_row(inputs.options, prompt, seed)
            for prompt, seed in zip(inputs.prompts, seeds, strict=True)
        ]
        names = [name for name in rows[0] if inputs.options.get(name) is None]
        return {name: torch.cat([row[name] for row in rows]) for name in names}

    def _drawn_row(self, options: Any, prompt: str, seed: int | None) -> dict[str, Tensor]:
        draw, cached = self.dit.family.drawn, self._draws
        if seed is None:
            return draw(self.pipe, options, prompt, seed)
        sizes = options.get("height"), options.get("width")
        key = prompt, seed, *sizes, self._stamps()
        if key not in cached:
            cached[key] = draw(self.pipe, options, prompt, seed)
            while len(cached) > DRAWN:
                cached.popitem(last=False)
        return cached[key]

    def reseeded(self, inputs: PipelineInputs, seeds: Sequence[int]) -> PipelineInputs:
        """As in HookedTextToImage; noise that was given as `latents` goes."""
        return self.encoded(replace(inputs, seeds=tuple(seeds), latents=None))

    def between(
        self, inputs: PipelineInputs, others: PipelineInputs, alpha: float
    ) -> PipelineInputs:
        """As in HookedTextToImage: every tensor of the encoded text."""
        return replace(inputs, encoded=_lerp(inputs.encoded, others.encoded, alpha))

    def same_length(
        self, inputs: PipelineInputs, others: PipelineInputs
    ) -> tuple[PipelineInputs, PipelineInputs]:
        """As in HookedTextToImage."""
        for branch, layout in inputs.layouts.items():
            one, other = (
                each.labels.get("joint", each.text_mask)
                for each in (layout, others.layouts[branch])
            )
            if one.shape[-1] != other.shape[-1]:
                lengths = " and ".join(
                    str(each.text_mask.shape[1]) for each in (layout, others.layouts[branch])
                )
                raise ValueError(
                    f"The texts have {lengths} positions in this pipeline, so that activations do "
                    "not correspond: pair prompts of equally many tokens."
                )
        return inputs, others

    def opened(self, text: Bound) -> Bound:
        """As in HookedTextToImage."""
        return text.opened(self.dit.family.text)

    # Positions

    def layout(self, prompts: Any, branch: Branch = "cond") -> Layout:
        """As in HookedTextToImage."""
        inputs = prompts if isinstance(prompts, PipelineInputs) else self.draft(prompts)
        if branch not in inputs.layouts:
            raise ValueError(
                f"There is no {branch}itional branch in runs of {type(self.pipe).__name__} with "
                "these options."
            )
        return inputs.layouts[branch]

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: a pipeline may have several text encoders, each with its own tokens."""
        raise TypeError(
            f"{type(self.pipe).__name__} takes prompts as text and tokenises them in its own way: "
            "model.encoded_texts(prompts) has the tokens at its denoiser's text positions, and "
            "prompts.word('…') finds words among them."
        )

    def texts_read(self, prompts: Sequence[str], branch: Branch = "cond") -> list[str]:
        """As in HookedTextToImage."""
        negative = self.options.get("negative_prompt") or ""
        if branch == "cond":
            return list(prompts)
        return list(negative) if isinstance(negative, list) else [negative] * len(prompts)

    def encoded_texts(
        self, prompts: str | Sequence[str], length: int | None = None, **options: Any
    ) -> list[EncodedText]:
        """As in HookedTextToImage: the characters of a prompt at each text position.

        Args:
            prompts: one prompt or several.
            length: in text positions, at least that of the longest prompt; the pipeline decides
                where tokens stand.
            options: of the run's call, such as `max_sequence_length`.

        Raises:
            ValueError: the pipeline changes a prompt's words before it encodes them.
        """
        found = encoded_at_positions(self.draft(prompts, 0, 1, **options), self.dit.family)
        longest = max(length or 0, *(len(one.ids) for one in found))
        return [padded(one, longest) for one in found]

    @torch.no_grad()
    def text_entering(
        self, prompts: str | Sequence[str], **options: Any
    ) -> Float[Tensor, "prompt text_pos d_text"]:
        """The text that enters the denoiser, one encoder's positions after the other's.

        The tensor at `hook_text`, without a run.
        """
        inputs = self.draft(prompts, 0, 1, **options)
        return joined_text(text_arguments(inputs), self.dit.family.text, len(inputs))

    def axes(self, site: Site) -> Axes:
        """As in HookedTextToImage; tensors between calls have the pipeline's own axes."""
        if site.part != "sampler" or site.inner == IMAGE_HOOK:
            return super().axes(site)
        return (
            "batch",
            *(f"latent_{axis}" for axis in range(1, len(self.shape(self._example(), site)))),
        )

    def shape(self, inputs: PipelineInputs, site: Site) -> tuple[int, ...]:
        """As in HookedTextToImage."""
        if site.part == "sampler":
            return inputs.shapes[site.inner if site.inner in inputs.shapes else "hook_latent"]
        if site.inner == "hook_text":
            return inputs.shapes[f"{site.branch}.hook_text"]
        layout, cfg = inputs.layouts[site.branch or "cond"], self.dit.cfg
        sizes = {
            "batch": len(inputs),
            "one": 1,
            "head": cfg.n_heads,
            "d_head": cfg.d_head,
            "d_model": cfg.d_model,
        }
        for kind, stream in (("", "image"), ("text_", "text"), ("joint_", "joint")):
            if stream in layout.labels:
                length = layout.length(stream)
                sizes |= {
                    f"{kind}pos": length,
                    _side("query", kind): length,
                    _side("key", kind): length,
                }
        return tuple(sizes[axis] for axis in self.dit.axes(site.inner))

    # Running

    def denoise(self, latents: Tensor, timestep: Any, text: Bound) -> Tensor:
        """One call of the denoiser, with the other arguments that the pipeline gave it.

        Raises:
            ValueError: the model was opened without weights.
        """
        if self.drafted is not self.pipe:
            raise ValueError(
                "This model was opened without weights: it has names, shapes and estimates, and "
                "draws nothing."
            )
        return text.call(self.dit, latents)

    def pixels(self, run: Run) -> Float[Tensor, "batch 3 height width"]:
        """As in HookedTextToImage."""
        inputs: Any = run.inputs
        return self.loop.decode(inputs, run.record, run.latent)


def _attached_to(module: nn.Module) -> tuple[int, ...]:
    """Numbers of torch's own hooks on a module and those inside, which no two hooks share."""
    return tuple(
        number
        for part in module.modules()
        for number in (*part._forward_pre_hooks, *part._forward_hooks)
    )


def _side(side: str, kind: str) -> str:
    """Name of a positions axis among queries or keys: "key_text_pos", "joint_key_pos"."""
    return f"joint_{side}_pos" if kind == "joint_" else f"{side}_{kind}pos"


def _key(value: Any) -> Any:
    """A value as a part of a key: tensors by identity and version."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, Mapping):
        return tuple((name, _key(one)) for name, one in value.items())
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def _lerp(one: Any, other: Any, alpha: float) -> Any:
    if isinstance(one, Tensor) and one.is_floating_point() and isinstance(other, Tensor):
        return torch.lerp(one, other, alpha)
    if isinstance(one, (list, tuple)):
        return type(one)(_lerp(a, b, alpha) for a, b in zip(one, other, strict=True))
    return one
