"""Images, text and noise of each training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import PixArtSigmaPipeline
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models.text_encoders.random_tokens import UNKNOWN_ID

from ..task.protocol import Task
from .config import TrainConfig
from .curriculum import Curriculum

BATCH = 128
"""Captions that are encoded at once."""


class StepData:
    """Clean latents, captions and the random generator of one step, for this process.

    A function of the step alone.
    """

    def __init__(
        self,
        pipe: PixArtSigmaPipeline,
        config: TrainConfig,
        accelerator: Accelerator,
        task: Task | None = None,
    ) -> None:
        self.codec = pipe.vae
        self.config = config
        self.task = task or Curriculum(config)
        self.device = accelerator.device
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        captions = ["", *self.task.prompts()]
        self.row = {text: i for i, text in enumerate(captions)}
        self.text, self.mask = encode_captions(pipe, captions)

    @torch.no_grad()
    def __call__(
        self, step: int
    ) -> tuple[
        Float[Tensor, "batch channel rows columns"],
        Float[Tensor, "batch text_pos d_text"],
        Int[Tensor, "batch text_pos"],
        torch.Generator,
    ]:
        """Draw the step's scenes; dropped captions become the empty prompt's encoding."""
        config = self.config
        size = config.batch_size
        batch = self.task.sample(
            size, config.seed, start=(step * self.processes + self.process) * size, step=step
        )
        state = np.random.SeedSequence((config.seed, step, self.process)).generate_state(
            1, np.uint64
        )[0]
        generator = torch.Generator(self.device).manual_seed(int(state >> np.uint64(1)))
        images = self.task.render(batch).to(self.device)
        clean = (
            self.codec.encode(images * 2 - 1).latent_dist.mode() * self.codec.config.scaling_factor
        )
        dropped = torch.rand(size, generator=generator, device=self.device) < config.caption_dropout
        rows = torch.tensor(
            [self.row[self.task.prompt(scene)] for scene in batch], device=self.device
        ).masked_fill(dropped, 0)
        return clean, self.text[rows], self.mask[rows], generator


@torch.no_grad()
def encode_captions(
    pipe: PixArtSigmaPipeline, captions: Sequence[str]
) -> tuple[Float[Tensor, "caption text_pos d_text"], Int[Tensor, "caption text_pos"]]:
    """Text features and masks, cut to the longest caption.

    Pads carry exactly no attention, so nothing is lost.
    """
    tokens = pipe.tokenizer(list(captions), padding="longest", return_tensors="pt").to(pipe.device)
    unknown = (tokens.input_ids == getattr(pipe.tokenizer, "unk_token_id", UNKNOWN_ID)).any(dim=1)
    if unknown.any():
        raise ValueError(
            "The text encoder does not know every word of "
            f"{captions[int(unknown.nonzero()[0, 0])]!r}."
        )
    ids, masks = tokens.input_ids.split(BATCH), tokens.attention_mask.split(BATCH)
    features = [
        pipe.text_encoder(i, attention_mask=m)[0].float() for i, m in zip(ids, masks, strict=True)
    ]
    return torch.cat(features), tokens.attention_mask
