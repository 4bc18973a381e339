"""The side of a hooked model that is a diffusers pipeline.

Opened from a folder or the hub, written back, put on devices.
"""

from __future__ import annotations

import inspect
import shutil
from functools import cache, cached_property, partial, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

import diffusers
import torch
from torch import Tensor, nn

from ..store import digest, replace_folder
from .checks import check_model, check_weights
from .folder import PIXART
from .hub import Source, fetch
from .loading import empty_pipeline, open_pipeline

Model = TypeVar("Model", bound="PipelineModel")


def save_pipeline(
    pipe: Any, save_directory: str | Path, push_to_hub: bool = False, **options: Any
) -> None:
    """Write a live pipeline's modules, or those that its hooked modules wrap.

    A whole folder or none.

    Args:
        pipe: stays as it is.
        save_directory: the folder; files in it that are none of the pipeline's are kept.
        push_to_hub: not supported.
        options: as of diffusers' `save_pretrained` (variant, max_shard_size, safe_serialization).

    Raises:
        FileExistsError: the folder holds something else than a pipeline.
        OSError: the disk is full, or the folder cannot be written to.
    """
    if push_to_hub:
        raise ValueError(
            "push_to_hub=True does not work with hooked modules: save the pipeline, and push its "
            "folder."
        )
    folder = Path(save_directory)
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    if there and folder / "model_index.json" not in there:
        raise FileExistsError(
            f"{folder} holds files that are no pipeline ({there[0].name}, …): choose another "
            "folder."
        )
    plain = type(pipe)(
        **{name: getattr(part, "wrapped", part) for name, part in pipe.components.items()}
    )

    def write(part: Path) -> None:
        plain.save_pretrained(part, **options)
        for other in there:
            if other.is_dir() and not (part / other.name).exists():
                shutil.copytree(other, part / other.name)
            elif not (part / other.name).exists():
                shutil.copy2(other, part / other.name)

    replace_folder(folder, write)


@cache
def _trained_length(pipeline_class: Any) -> int:
    """Default of the pipeline's own call; cached, for reading a signature takes long."""
    return int(inspect.signature(pipeline_class.__call__).parameters["max_sequence_length"].default)


def refusing(pipeline_class: Any, model: Any) -> Any:
    """A pipeline class whose calls raise ValueError while hooks are attached.

    They are hooks of whole generations, which it does not fire.
    """

    @wraps(pipeline_class.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if model.attached:
            raise ValueError(
                "Hooks of a whole generation do not fire in a diffusers pipeline's own call: use "
                "model.run_with_hooks(…), or attach them to model.dit."
            )
        return pipeline_class.__call__(self, *args, **kwargs)

    return type(
        pipeline_class.__name__,
        (pipeline_class,),
        {"__call__": call, "__module__": pipeline_class.__module__},
    )


class PipelineModel(nn.Module):
    """The methods of `HookedTextToImage` that concern its pipeline."""

    dit: Any
    text_encoder: Any
    tokenizer: Any
    codec: Any
    scheduler: Any
    source: Source | None = None
    """Where `from_pretrained` found it."""
    clean_caption: bool = False
    _offload: torch.device | None = None
    _resident: Literal["text_encoder", "dit", "codec"] | None = None
    """The part that is on the device that parts are moved to."""

    @cached_property
    def pipeline_class(self) -> Any:
        """The pipeline's class that the model came in; PixArt-Σ's of a model of its parts."""
        return diffusers.PixArtSigmaPipeline

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        weights: bool = True,
        check: bool = True,
        clean_caption: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **components: Any,
    ) -> Model:
        """Open a bundled model by name, a pipeline folder, or a hub id.

        `model.source` records which, and at which commit.

        Args:
            name: any pipeline of diffusers with a `transformer`; one that is no PixArt is drawn by
                its own loop.
            revision: a hub model's commit, tag or branch.
            variant: "fp16" for a repository's `*.fp16.safetensors`.
            dtype: of the weights; in float16, T5 is loaded in bfloat16, which it was trained in.
            device_map: a device such as "cuda", or "balanced" for whole parts on several; see also
                `enable_cpu_offload`.
            weights: False reads configurations alone: all names and sizes, on the meta device,
                without a weight file.
            check: test for weights that are not finite, and compare the hooked model with the
                wrapped one (`pipelines.checks`).
            clean_caption: clean prompts as diffusers does where beautifulsoup4 and ftfy are
                installed; see `to_tokens`.
            token: access token of the hub, as in diffusers.
            cache_dir: folder of hub downloads, as in diffusers.
            local_files_only: True never connects to the hub.
            components: used in place of the folder's (`text_encoder=…`); `transformer` may be a
                folder or hub id.

        Raises:
            TypeError: there is no such component, or `dtype` is no torch dtype.
            FileNotFoundError: no such model, revision, component or weight file; or the hub cannot
                be reached.
            PermissionError: the model is gated.
            ValueError: diffusers knows no such pipeline, it has no transformer, or a JSON file is
                damaged.
            OSError: a weight file is truncated, or lacks a weight.
            ModelCheckError: a check failed; the message has the model and the versions.
        """
        if not isinstance(dtype, torch.dtype):  # which diffusers would load as float32
            raise TypeError(f"dtype={dtype!r}: give one of torch's, such as torch.bfloat16.")
        source = fetch(
            name,
            revision,
            variant,
            weights,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if weights:
            pipe = open_pipeline(
                source, variant=variant, dtype=dtype, device_map=device_map, **components
            )
        else:
            pipe = empty_pipeline(source, dtype)
        if clean_caption and type(pipe).__name__ not in PIXART:
            raise ValueError(
                f"clean_caption is for PixArt, and {source.name} is a {type(pipe).__name__}: clean "
                "its prompts."
            )
        if weights and check:
            check_weights(pipe, source.name)
        model = cls.from_pipeline(pipe)
        model.source, model.clean_caption = source, clean_caption
        if weights and check:
            check_model(model, source.name)
        return model

    @classmethod
    def from_pipeline(cls: type[Model], pipe: Any) -> Model:
        """Around a live pipeline; its modules are used, not copied."""
        raise NotImplementedError

    def as_diffusers(self) -> Any:
        """A new pipeline of the kind the model came in, with the hooked modules inside.

        Their hooks fire in its calls. Its `save_pretrained` writes the modules that the hooked ones
        wrap.
        """
        pipe = refusing(self.pipeline_class, self)(
            self.tokenizer, self.text_encoder, self.codec, self.dit, self.scheduler
        )
        pipe.save_pretrained = partial(save_pipeline, pipe)
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a pipeline folder of the wrapped modules.

        `from_pretrained` and plain diffusers open it. The folder is written whole or not at all; of
        a pipeline that is there, other files are kept.

        Raises:
            FileExistsError: the folder holds something else than a pipeline.
            OSError: the disk is full, or the folder cannot be written to.
        """
        save_pipeline(self.as_diffusers(), folder)

    def digest(self) -> str:
        """Hash of everything that decides a generation: weights, settings, scheduler.

        Wherever the model was loaded from.

        Example:
            >>> len(HookedTextToImage.from_pretrained("rte-nano").digest())
            16
        """
        parts: list[str | Tensor] = [type(self.scheduler).__name__]
        for config in (self.dit.config, self.scheduler.config, self.codec.config):
            settings = sorted(
                (name, str(value)) for name, value in config.items() if not name.startswith("_")
            )
            parts.append(str(settings))
        for module in (self.dit, self.text_encoder, self.codec):
            parts += module.state_dict().values()
        return digest(*parts)

    # Where it runs

    def enable_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the parts on the CPU, and each on `device` only while it works.

        Text encoder, then denoiser, then codec. For a T5 that does not fit beside the denoiser.
        (diffusers' own offloading acts on modules that are not called here.)
        """
        self.to("cpu")
        self._offload, self._resident = torch.device(device), None

    def _use(self, part: Literal["text_encoder", "dit", "codec"]) -> None:
        """Move a part to where it runs; with offloading, the part before it to the CPU first."""
        if self._offload is None or self._resident == part:
            return
        if self._resident is not None:
            getattr(self, self._resident).to("cpu")
        getattr(self, part).to(self._offload)
        self._resident = part

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self.dit.device if self._offload is None else self._offload

    @property
    def max_sequence_length(self) -> int:
        """Tokens that a prompt may have.

        300 for PixArt-Σ and 120 for PixArt-α, or fewer where the tokenizer says so.
        """
        trained = _trained_length(self.pipeline_class)
        return min(trained, getattr(self.tokenizer, "model_max_length", trained))
