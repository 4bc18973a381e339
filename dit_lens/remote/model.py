"""A text-to-image model behind nnsight, on this machine or another, under the names of
`HookedTextToImage`.

    model = RemoteTextToImage("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", remote="http://gpu-box:8001")
    pattern = "blocks.2.cross_attn.hook_pattern"
    hide = Intervention(pattern, heads="L2H2", tokens="relation", action="knockout")
    images, cache = model.run_with_cache(prompts, seed=0, names_filter=pattern, steps=0)
    images = model.run_with_hooks(prompts, seed=0, fwd_hooks=hide.hooks(model, prompts))

The weights stay where the server is; here the modules are empty, and serve for names, shapes and
configuration. Every call is one request, which runs all denoising steps: docs/remote.md says how to
host a server, and how it was tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from hooked_models import GenerationCache
from hooked_models.generation.cache import estimate_recorded, refuse_if_too_large
from hooked_models.generation.capture import Heads, Patterns, Recorder
from hooked_models.generation.hooks import Attached, Extent
from hooked_models.generation.model import DEFAULT_GUIDANCE, DEFAULT_STEPS, Prompts
from hooked_models.generation.names import Branch, Site
from hooked_models.generation.pixart import HookedPixArt, refuse_options
from hooked_models.generation.sampling import Seeds
from hooked_models.hooks.module import NameFilter
from hooked_models.pipelines.folder import check_libraries
from hooked_models.pipelines.hub import resolve
from hooked_models.store import digest

from ..intervene.interventions import Intervention
from . import kernel, plan
from .caches import RENAME
from .server import Server, import_nnsight

NO_RESUMING = (
    "Through nnsight a generation always runs whole, from prompt and noise to image: it cannot be "
    "resumed at a step, and no part of it runs by itself. Use run_with_hooks, Intervention(…, "
    "steps=…) and patch, or HookedTextToImage.from_pretrained where the weights are at hand."
)
NO_GRADIENTS = (
    "No gradients come back through nnsight: the pipeline runs under no_grad, and a server's "
    "sandbox copies activations. "
    "Use patch, or HookedTextToImage.from_pretrained where the weights are at hand."
)


class RemoteTextToImage(HookedPixArt):
    """A PixArt pipeline opened by nnsight's `DiffusionModel`, for everything that a
    `HookedTextToImage` does in one run.

    That is: calls, `run_with_cache`, `run_with_hooks`, `hooks`, every `Intervention`,
    `synopsis.attention_synopsis`, `ablation.ablation_effects`, and `patch`. Hook functions are sent
    along as source, with everything they refer to, and run where the model is: they get rows and
    `hook` as ever, but cannot write to variables here. Tensors between two steps and a few others
    have limits, which an error explains.

    Args:
        repo_or_path: a hub id, a pipeline folder or a bundled name. A server opens it under the
            same name or path.
        remote: False for a model in this process, True for nnsight's own setting of the server
            (`NDIF_HOST`), or its address.
        revision: of a hub id.
        dtype: of the weights, if they are loaded here.
        api_key: if the server asks for one; None for nnsight's own setting (`NDIF_API_KEY`). It is
            never shown.
        timeout: seconds to wait for one request.

    Attributes:
        nnsight: the `DiffusionModel`, with modules renamed as here
            (`model.nnsight.dit.blocks[0].cross_attn.output`).

    Raises:
        ImportError: nnsight is not installed.
        FileNotFoundError: there is no such model.
        TypeError: it is no PixArt pipeline.
        ValueError: it names a library that opening a model must not import.

    Example:
        >>> model = RemoteTextToImage("rte-nano")  # in this process
        >>> model("red circle is above blue square", seed=0, num_steps=2).shape
        torch.Size([1, 3, 128, 128])
    """

    def __init__(
        self,
        repo_or_path: str | Path,
        remote: bool | str = False,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        nnsight = import_nnsight()
        # the server has no dit_lens: the parts it needs travel as source
        nnsight.register("dit_lens")
        source = resolve(repo_or_path)
        # A class of another library exists only as a whole, loaded: nnsight cannot build it empty.
        index = _index(source, revision)
        check_libraries(str(repo_or_path), index)
        own = any(isinstance(spec, list) and spec[0] == "hooked_models" for spec in index.values())
        opened = nnsight.DiffusionModel(
            source, rename=RENAME, dispatch=own or not remote, revision=revision, dtype=dtype
        )
        pipe: Any = opened.pipeline
        pipe.set_progress_bar_config(disable=True)
        if not type(pipe).__name__.startswith("PixArt"):
            raise TypeError(
                "RemoteTextToImage needs a PixArtAlphaPipeline or PixArtSigmaPipeline, not "
                f"{type(pipe).__name__}."
            )
        super().__init__(
            pipe.transformer, pipe.text_encoder, pipe.tokenizer, pipe.vae, pipe.scheduler
        )
        self.eval()
        self.nnsight = opened
        self.server = (
            Server(remote if isinstance(remote, str) else None, api_key, timeout)
            if remote
            else None
        )
        key = json.dumps({"repo_id": source, "revision": revision})
        self.model_key = f"nnsight.modeling.diffusion.DiffusionModel:{key}"
        """Which model a server is asked for."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> RemoteTextToImage:
        """The same as the class itself."""
        return cls(name, **kwargs)

    @classmethod
    def from_pipeline(cls, pipe: Any) -> NoReturn:
        """Raises TypeError: nnsight opens pipelines by name."""
        raise TypeError(
            "nnsight opens pipelines by name: RemoteTextToImage(folder or hub id), or "
            "HookedTextToImage for a live one."
        )

    @property
    def device(self) -> torch.device:
        """Where tensors of this side are: those of a remote model come and go by the CPU."""
        return torch.device("cpu") if self.dit.device.type == "meta" else self.dit.device

    def __repr__(self) -> str:
        return (
            f"RemoteTextToImage({self.model_key.partition(':')[2]}, "
            f"{self.server or 'in this process'})"
        )

    @property
    def scheduler(self) -> Any:
        """The pipeline's.

        Another one can be set where the pipeline is in this process; a server keeps its own.
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        if getattr(self, "server", None) is not None:
            raise ValueError(
                "A server draws with the scheduler of the folder that it opened: save one with "
                "another there."
            )
        self._scheduler = scheduler
        if (opened := getattr(self, "nnsight", None)) is not None:
            opened.pipeline.register_modules(scheduler=scheduler)

    def check_wrapped(self) -> None:
        """Nothing: the model that runs is the pipeline itself, with whatever was changed in it."""

    def draw(self, inputs: Any) -> Float[Tensor, "batch 3 height width"]:
        """As in HookedTextToImage, through nnsight."""
        return self(inputs.tokens, list(inputs.seeds), inputs.num_steps, inputs.guidance)

    # Unsupported

    def digest(self) -> str:
        """Hash of the model's name and the server's address, if its weights are on another
        machine.
        """
        return super().digest() if self.server is None else digest(self.model_key, self.server.host)

    def trajectory(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: no run can be resumed at a step."""
        raise NotImplementedError(NO_RESUMING)

    def at(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: no run can be resumed at a step."""
        raise NotImplementedError(NO_RESUMING)

    def decode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: no part of a run can be had by itself."""
        raise NotImplementedError(NO_RESUMING)

    encode = denoise = run = prepare = decode

    # Running

    def forward(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch 3 height width"]:
        """As `HookedTextToImage.forward`, without gradients.

        Raises:
            ServerError: the server cannot be asked, or the run failed there.
            ValueError: a hook is attached where no trace reaches, or backwards.
        """
        refuse_options(options)
        return self._run_once(
            prompts, seed, num_steps, DEFAULT_GUIDANCE if guidance is None else guidance, latents
        )["images"]

    def run_with_cache(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
        *,
        names_filter: NameFilter = None,
        steps: int | Sequence[int] | slice | None = None,
        branch: Branch | Literal["both"] = "cond",
        heads: Heads | None = None,
        patterns: Patterns = "whole",
        out: str | Path | None = None,
        device: str | torch.device | None = None,
        max_bytes: int | None = None,
        remove_batch_dim: bool = False,
        **options: Any,
    ) -> tuple[Float[Tensor, "batch 3 height width"], GenerationCache]:
        """As `HookedTextToImage.run_with_cache`; everything that is selected travels, so select.

        `max_bytes` is checked before anything is sent. Raises as there, and as `forward`.

        Raises:
            ValueError: heads, patterns or out are given: a run behind nnsight keeps whole tensors,
                and in memory.
        """
        refuse_options(options)
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        if heads is not None or patterns != "whole" or out is not None:
            raise ValueError(
                "A run behind nnsight keeps whole tensors, in memory: leave heads=, patterns= and "
                "out= away, and narrow names_filter=, steps= and branch= instead."
            )
        if remove_batch_dim:
            raise TypeError(
                "A whole generation's cache keeps its batch axis: use "
                "cache.at(step=s).remove_batch_dim()."
            )
        tokens = prompts if isinstance(prompts, Tensor) else self.to_tokens(prompts)
        solver = self.solver(num_steps)
        sites = self.names.select(
            names_filter, steps, branch, len(solver), guidance > 1, solver.forms_x0
        )
        recorder = Recorder(self, sites, device=device)
        size = estimate_recorded(
            recorder, len(tokens), tokens.shape[1], None if latents is None else latents.shape[-2:]
        )
        refuse_if_too_large(
            size, max_bytes, self.device if device is None else torch.device(device)
        )
        found = self._run_once(prompts, seed, num_steps, guidance, latents, keep=sites)
        kept = {site.name: found["kept"][site.name].to(device or self.device) for site in sites}
        return found["images"], GenerationCache(kept, self, solver.noise_levels)

    def patch(
        self,
        clean: Prompts,
        corrupt: Prompts,
        conditions: Mapping[str, Sequence[Intervention]],
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        latents: Float[Tensor, "batch channel rows columns"] | None = None,
    ) -> dict[str, Float[Tensor, "batch 3 height width"]]:
        """Activation patching as one request: the clean run, the corrupt run, and the corrupt run
        under each condition.

            site = "blocks.2.cross_attn.hook_z"
            head = Intervention(site, heads=[2], steps=0, action=Replace(CLEAN))
            above, below = "red circle is above blue square", "red circle is below blue square"
            model.patch(above, below, {"L2H2": [head]})["L2H2"]

        Activations of the clean run at the sites of `Replace(CLEAN)` never leave the model's
        machine. Positions correspond by number, so `clean` and `corrupt` are as many prompts, with
        equally many tokens.

        Args:
            conditions: name → interventions, all at once; of the corrupt prompts.
            seed, latents: the same noise for all runs.

        Returns:
            Images by condition, and as "clean" and "corrupt".

        Raises:
            ValueError: the prompts do not correspond, a condition has a reserved name, or as
                `forward`.
        """
        if reserved := {"clean", "corrupt"} & set(conditions):
            raise ValueError(
                f"A condition cannot be called {reserved.pop()!r}: that is what a run without any "
                "is called."
            )
        texts, length = self._texts(clean)
        others, length_2 = self._texts(corrupt)
        if (len(texts), length) != (len(others), length_2):
            raise ValueError(
                f"clean is {len(texts)} prompts of {length} tokens, corrupt {len(others)} of "
                f"{length_2}: make them equally many, "
                "and equally long, so that equal positions correspond."
            )
        edits = {
            name: [
                edit
                for each in condition
                for edit in each.resolve(self, others, num_steps=num_steps)
            ]
            for name, condition in conditions.items()
        }
        wanted: dict[str, Site] = {
            e.site.name: e.site
            for every in edits.values()
            for e in every
            if e.values is plan.UNKNOWN
        }
        call, shape = self._call(len(texts), length, seed, num_steps, guidance, latents)
        attached = self._checked_hooks(num_steps, guidance)
        first = plan.make(self, attached, shape, keep=list(wanted.values()), home=False)
        plans = {"corrupt": plan.make(self, attached, shape)}
        for name, every in edits.items():
            hooks = [(edit.site.name, edit) for edit in every]
            with self.hooks(hooks):
                attached = self._checked_hooks(num_steps, guidance)
            plans[name] = plan.make(self, attached, shape, patching=True)

        model, run, nnsight, backend = self.nnsight, kernel.run, import_nnsight(), self._backend()

        def ask() -> Any:
            found = None  # on a server, where it has a value later
            with model.session(backend=backend):
                found = nnsight.save({})
                with model.generate(texts, **call) as tracer:
                    source = run(model, tracer, first)
                found["clean"] = source["images"]
                for name in plans:
                    with model.generate(others, **call) as tracer:
                        result = run(model, tracer, plans[name], source["kept"])
                    found[name] = result["images"]
            return found

        return self._answer(ask, backend)

    def attention_between(
        self,
        prompts: Prompts,
        seed: Seeds,
        sublayer: Literal["attn", "cross_attn"],
        groups: plan.Groups,
        *,
        num_steps: int,
        guidance: float,
    ) -> Float[Tensor, "batch layer head step branch group key_group"]:
        """As `group_attention.attention_between`, of one run: added up where the model is, so that
        only these sums travel.
        """
        dtype = torch.promote_types(self.dit.dtype, torch.float32)
        # beyond are pads, which get no attention
        length = self._texts(prompts)[1] if sublayer == "cross_attn" else None
        queries = groups.queries.to(dtype)
        keys = {branch: weights[:, :length].to(dtype) for branch, weights in groups.keys.items()}
        layers, steps = range(self.cfg.n_layers), range(self.count_steps(num_steps))
        sums = [
            plan.Sum(layer, step, branch, sublayer, queries, weights, groups.reduce)
            for layer in layers
            for step in steps
            for branch, weights in keys.items()
        ]
        found = self._run_once(prompts, seed, num_steps, guidance, None, sums=sums)["added"]
        stacked = [
            [[found[layer, step, branch] for branch in keys] for step in steps] for layer in layers
        ]
        by_layer = [
            torch.stack([torch.stack(of_step, dim=2) for of_step in of_layer], dim=2)
            for of_layer in stacked
        ]
        return torch.stack(by_layer, dim=1)

    def _run_once(
        self,
        prompts: Prompts,
        seed: Seeds,
        num_steps: int,
        guidance: float,
        latents: Tensor | None,
        *,
        keep: Sequence[Site] = (),
        sums: Sequence[plan.Sum] = (),
    ) -> dict[str, Any]:
        texts, length = self._texts(prompts)
        call, shape = self._call(len(texts), length, seed, num_steps, guidance, latents)
        todo = plan.make(
            self, self._checked_hooks(num_steps, guidance), shape, keep=keep, sums=sums
        )
        model, run, nnsight, backend = self.nnsight, kernel.run, import_nnsight(), self._backend()

        def ask() -> Any:
            found = None  # on a server, where it has a value later
            with model.generate(texts, backend=backend, **call) as tracer:
                found = nnsight.save(run(model, tracer, todo))
            return found

        return self._answer(ask, backend)

    def _call(
        self,
        batch: int,
        length: int,
        seed: Seeds,
        num_steps: int,
        guidance: float,
        latents: Tensor | None,
    ) -> tuple[dict[str, Any], plan.RunShape]:
        """Arguments of the pipeline, and the size of the run."""
        if self.solver(num_steps).draws:
            raise ValueError(
                f"{type(self.scheduler).__name__} draws noise at every step, from generators that "
                "do not travel through nnsight: "
                "take a deterministic scheduler, such as DPMSolverMultistepScheduler."
            )
        noise = self.noise(seed, batch) if latents is None else latents.to(self.device)
        height, width = self.image_size(noise.shape[-2:])
        call = {
            **{
                "num_inference_steps": num_steps,
                "guidance_scale": guidance,
                "latents": noise.to(self.dit.dtype),
            },
            **{
                "height": height,
                "width": width,
                "max_sequence_length": length,
                "output_type": "pt",
                "return_dict": False,
            },
            **{"clean_caption": False, "use_resolution_binning": False},
        }
        grid = (noise.shape[-2], noise.shape[-1])
        return call, plan.RunShape(batch, length, num_steps, guidance, grid)

    def _texts(self, prompts: Prompts) -> tuple[list[str], int]:
        """Prompts as the pipeline takes them, and the number of text positions.

        Raises ValueError for tokens of no text.
        """
        if not isinstance(prompts, Tensor):
            return [prompts] if isinstance(prompts, str) else list(prompts), self.to_tokens(
                prompts
            ).shape[1]
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        if not torch.equal(self.to_tokens(texts, length=prompts.shape[1]), prompts.to(self.device)):
            raise ValueError(
                "These tokens are not those of a text, and nnsight's pipeline takes text: give "
                "prompts."
            )
        return texts, prompts.shape[1]

    def _checked_hooks(self, num_steps: int, guidance: float) -> list[Attached]:
        extent = Extent.of(self.solver(num_steps), guidance > 1)
        self.check_hooks(extent)
        if any(attached.direction == "bwd" for attached in self.attached):
            raise NotImplementedError(NO_GRADIENTS)
        return self.firing_in_run(extent)

    # The server

    def _backend(self) -> Any:
        return None if self.server is None else self.server.backend(self.model_key)

    def _answer(self, ask: Callable[[], Any], backend: Any) -> Any:
        """The value saved as `found` in a trace: at once, or when the server has run it."""
        if self.server is None:
            return ask()
        ask()
        return self.server.wait(backend)["found"]


def _index(source: str, revision: str | None) -> dict[str, Any]:
    """A pipeline's component classes."""
    return dict(DiffusionPipeline.load_config(source, revision=revision))
