"""A text-to-image model behind nnsight, under the names of `HookedTextToImage`.

It runs on this machine or on another.

    model = RemoteTextToImage("black-forest-labs/FLUX.1-schnell", remote="http://gpu-box:8001")
    pattern = "blocks.2.attn.hook_pattern"
    hide = Intervention(pattern, heads="L2H2", tokens=prompts.word("cat"), action="knockout")
    images, cache = model.run_with_cache(texts, seed=0, names_filter=pattern, steps=0)
    images = model.run_with_hooks(texts, seed=0, fwd_hooks=hide.hooks(model, texts))

The weights stay where the server is; here the modules are empty, and serve for names, shapes and
configuration. Every call is one request, which runs all denoising steps: docs/remote.md says how to
host a server, and how it was tested. The two kinds of models are
`pixart.RemotePixArt` and, for any other pipeline, `pipeline.RemotePipeline`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from hooked_models import GenerationCache, HookedTextToImage
from hooked_models.generation.attached import AttachedHook
from hooked_models.generation.cache import KEEPS_BATCH
from hooked_models.generation.cache_estimate import check_memory, estimate_sites
from hooked_models.generation.capture import Heads, Patterns, Recorder
from hooked_models.generation.model import DEFAULT_STEPS, Prompts
from hooked_models.generation.names import Branch, Site
from hooked_models.generation.noise import Seeds
from hooked_models.hooks.module import NameFilter
from hooked_models.pipelines.folder import check_libraries
from hooked_models.pipelines.hub import resolve
from hooked_models.store import digest

from ..intervene.interventions import Intervention
from . import plan
from .kernel import arguments
from .patching import patched
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


class RemoteTextToImage(HookedTextToImage):
    """A diffusers pipeline opened by nnsight's `DiffusionModel`.

    Does everything that a `HookedTextToImage` does in one run. It has calls, `run_with_cache`,
    `run_with_hooks`, `hooks`, every `Intervention`, `synopsis.attention_synopsis`, `heatmap`,
    `sweep.run` on images (and so `ablation.ablation_effects` and `steering.dose_response`), and
    `patch`. Hook functions are sent along as source, with everything they refer to, and run where
    the model is: they get rows and `hook` as ever, but cannot write to variables here. A few
    tensors have limits, which an error explains.

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
        nnsight: the `DiffusionModel`; PixArt's modules are renamed as here
            (`model.nnsight.dit.blocks[0].cross_attn.output`).

    Raises:
        ImportError: nnsight is not installed.
        FileNotFoundError: there is no such model.
        TypeError: its loop cannot be followed; it has no transformer, for example.
        ValueError: it names a library that opening a model must not import, or its transformer is
            of no known family.

    Example:
        >>> model = RemoteTextToImage("rte-nano")  # in this process
        >>> model("red circle is above blue square", seed=0, num_steps=2).shape
        torch.Size([1, 3, 128, 128])
    """

    behind_nnsight = True
    renames: ClassVar[Mapping[str, str]] = {"transformer": "dit"}
    """Modules of diffusers → their names in nnsight."""
    kernel: ClassVar[Callable[..., Any]]
    """Function that is sent, and follows the plan there."""
    nnsight: Any
    server: Any

    def __new__(
        cls, repo_or_path: str | Path, *args: Any, revision: str | None = None, **named: Any
    ) -> RemoteTextToImage:
        """A model of the kind that opens this pipeline."""
        if cls is not RemoteTextToImage:
            return super().__new__(cls)
        kind = str(_index(resolve(repo_or_path), revision).get("_class_name"))
        chosen: Any = next(one for one in cls.__subclasses__() if one.opens(kind))
        return super().__new__(chosen)

    def __init__(
        self,
        repo_or_path: str | Path,
        remote: bool | str = False,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        api_key: str | None = None,
        timeout: int | float = 600.0,
    ) -> None:
        nnsight = import_nnsight()
        # the server has neither: the parts it needs travel as source
        nnsight.register("dit_lens")
        nnsight.register("hooked_models")
        source = resolve(repo_or_path)
        # A class of another library exists only as a whole, loaded: nnsight cannot build it empty.
        index = _index(source, revision)
        check_libraries(str(repo_or_path), index)
        own = any(isinstance(spec, list) and spec[0] == "hooked_models" for spec in index.values())
        opened = nnsight.DiffusionModel(
            source,
            rename=dict(self.renames),
            dispatch=own or not remote,
            revision=revision,
            dtype=dtype,
        )
        opened.pipeline.set_progress_bar_config(disable=True)
        host = remote if isinstance(remote, str) else None
        # before the parts, which have a scheduler
        self.__dict__.update(
            nnsight=opened, server=Server(host, api_key, timeout) if remote else None
        )
        self.open_parts(opened.pipeline)
        self.eval()
        key = json.dumps({"repo_id": source, "revision": revision})
        self.model_key = f"nnsight.modeling.diffusion.DiffusionModel:{key}"
        """Which model a server is asked for."""

    # Left to the kinds of models

    @classmethod
    def opens(cls, pipeline_class: str) -> bool:
        """True if this kind of model opens pipelines of a class."""
        raise NotImplementedError

    def open_parts(self, pipe: Any) -> None:
        """Initialise the hooked model of a pipeline's parts."""
        raise NotImplementedError

    def call_of(self, prompts: Prompts, draft: Any) -> dict[str, Any]:
        """Arguments of the pipeline's own call for a run, "prompt" and "generator" among them."""
        raise NotImplementedError

    def plan_of(self, draft: Any, request: plan.Request) -> dict[str, Any]:
        """The plan that the kernel follows in a run."""
        raise NotImplementedError

    # The model

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
        """The pipeline's; it can be exchanged in this process, while a server keeps its own."""
        return self.nnsight.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        if scheduler is self.scheduler:
            return
        if self.server is not None:
            raise ValueError(
                "A server draws with the scheduler of the folder that it opened: save one with "
                "another there."
            )
        self.nnsight.pipeline.register_modules(scheduler=scheduler)

    def check_wrapped(self) -> None:
        """Nothing: the model that runs is the pipeline itself, with whatever was changed in it."""

    # Unsupported

    def digest(self) -> str:
        """Hash of name and server address, for a model whose weights are elsewhere."""
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
        latents: Float[Tensor, "batch ..."] | None = None,
        **options: Any,
    ) -> Float[Tensor, "batch 3 height width"]:
        """As `HookedTextToImage.forward`, without gradients.

        Raises:
            ServerError: the server cannot be asked, or the run failed there.
            ValueError: a hook is attached where no trace reaches, or backwards.
        """
        draft = self.draft(prompts, seed, num_steps, guidance, latents, **options)
        return self.ask(prompts, draft)["images"]

    def run_with_cache(
        self,
        prompts: Prompts,
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch ..."] | None = None,
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
        if heads is not None or patterns != "whole" or out is not None:
            raise ValueError(
                "A run behind nnsight keeps whole tensors, in memory: leave heads=, patterns= and "
                "out= away, and narrow names_filter=, steps= and branch= instead."
            )
        if remove_batch_dim:
            raise TypeError(KEEPS_BATCH)
        draft = self.draft(prompts, seed, num_steps, guidance, latents, **options)
        solver, extent = draft.solver, draft.extent
        known = self.names.select(
            names_filter, steps, branch, len(solver), extent.guided, solver.forms_x0
        )
        sites = [site for site in known if extent.fires(site)]
        size = estimate_sites(
            Recorder(self, sites, device=device), lambda site: self.shape(draft, site)
        )
        there = self.device if device is None else torch.device(device)
        check_memory(size, max_bytes, there)
        found = self.ask(prompts, draft, keep=sites)
        kept = {site.name: found["kept"][site.name].to(there) for site in sites}
        return found["images"], GenerationCache(kept, self, solver.noise_levels)

    def patch(
        self,
        clean: Prompts,
        corrupt: Prompts,
        conditions: Mapping[str, Sequence[Intervention]],
        seed: Seeds = 0,
        num_steps: int = DEFAULT_STEPS,
        guidance: float | None = None,
        latents: Float[Tensor, "batch ..."] | None = None,
    ) -> dict[str, Float[Tensor, "batch 3 height width"]]:
        """Activation patching as one request.

        The clean run, the corrupt run, and the corrupt run under each condition.

            site = "blocks.2.cross_attn.hook_z"
            head = Intervention(site, heads=[2], steps=0, action=Replace(CLEAN))
            above, below = "red circle is above blue square", "red circle is below blue square"
            model.patch(above, below, {"L2H2": [head]})["L2H2"]

        Activations of the clean run at the sites of `Replace(CLEAN)` never leave the model's
        machine. Positions correspond by number, so `clean` and `corrupt` are as many prompts, with
        equally many tokens.

        Args:
            clean: prompts of the run whose activations are put in.
            corrupt: as many prompts, of the run that is changed.
            conditions: name → interventions, all at once; of the corrupt prompts.
            seed: seed of the noise, the same for all runs.
            num_steps: denoising steps of the generation.
            guidance: scale of classifier-free guidance; by default the model's own.
            latents: initial noise of all runs, instead of `seed`.

        Returns:
            Images by condition, and as "clean" and "corrupt".

        Raises:
            ValueError: the prompts do not correspond, a condition has a reserved name, or as
                `forward`.
        """
        run = (seed, num_steps, guidance, latents)
        return patched(self, clean, corrupt, conditions, *run)

    def ask(
        self,
        prompts: Prompts,
        draft: Any,
        keep: Sequence[Site] = (),
        sums: Sequence[plan.GroupSum] = (),
    ) -> dict[str, Any]:
        """Run once, with the attached hooks: "images", "kept" tensors and "added" sums by key."""
        todo = self.plan_of(draft, plan.Request(self.checked_hooks(draft), keep, sums))
        call = self.call_of(prompts, draft)
        model, run, nnsight, backend = self.nnsight, self.kernel, import_nnsight(), self.backend()

        def ask() -> Any:
            found = None  # on a server, where it has a value later
            with model.generate(backend=backend, **arguments(call)) as tracer:
                found = nnsight.save(run(model, tracer, todo))
            return found

        return self.answer(ask, backend)

    def checked_hooks(self, draft: Any) -> list[AttachedHook]:
        """The attached hooks, at every site of a run.

        Raises:
            ValueError: the run does not compute a tensor.
            NotImplementedError: a hook acts backwards.
        """
        self.check_hooks(draft.extent)
        if any(attached.direction == "bwd" for attached in self.attached):
            raise NotImplementedError(NO_GRADIENTS)
        return self.active_hooks_of_run(draft.extent)

    # The server

    def backend(self) -> Any:
        """Nnsight's backend of one request; None in this process."""
        return None if self.server is None else self.server.backend(self.model_key)

    def answer(self, ask: Callable[[], Any], backend: Any) -> Any:
        """The value saved as `found` in a trace: at once, or when the server has run it."""
        if self.server is None:
            return ask()
        ask()
        return self.server.wait(backend)["found"]


def _index(source: str, revision: str | None) -> dict[str, Any]:
    """A pipeline's component classes."""
    return dict(DiffusionPipeline.load_config(source, revision=revision))
