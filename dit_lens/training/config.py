"""Every choice of a training run, in one place.

The command line is made from it, so nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "no", "bf16"]
Relation = Literal[
    "above", "below", "left", "right", "upper_left", "upper_right", "lower_left", "lower_right"
]


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    The same configuration in the same `out` folder resumes where it was stopped.
    """

    out: Path
    """Folder for the checkpoint, metrics.jsonl and the trained pipeline, such as runs/mine."""
    size: Literal["nano", "micro", "mini", "B"] = "micro"
    """Depth, width and heads; see `pipelines.PRESETS`."""
    encoder: str = "rte"
    """"rte", "rte-nopos", "fused", "t5-scenes", or a folder or hub id of a T5 encoder."""
    moved_share: float = 1.0
    """With "fused": share of the relation words' vectors that is found in the second shape word
    instead of in their place.
    """
    heads: int | None = None
    """Attention heads of a block, such as 6, of the same width together; by default the size's own.
    """
    objective: Literal["x0", "epsilon"] = "x0"
    """"x0": the clean image on the straight path (learns twice as fast); "epsilon"."""

    steps: int = 16_000
    """Steps of the whole run."""
    batch_size: int = 64
    """Scenes a step and process."""
    muon_lr: float = 2e-3
    """Muon's learning rate for the blocks' matrices (scaled to AdamW's RMS)."""
    adam_lr: float = 1e-3
    """AdamW's learning rate, for everything else."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the blocks' matrices."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    decay_from: float = 0.0
    """Fraction of the run after which the learning rate falls linearly to 2 %."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty prompt's encoding: the very one that guidance uses at
    sampling time.
    """
    ema_decay: float = 0.9999
    """Largest decay of the averaged weights."""
    ema_power: float = 0.75
    """EMA decay at step s is min(ema_decay, 1 − (1 + s)^−ema_power)."""

    biased_steps: int = 0
    """Curriculum: red is named first with probability 0.9, falling linearly to one half over this
    many steps. Which object the relation speaks of is an exclusive-or of word order and relation,
    which is learnt from a biased sample first.
    """
    anchored_steps: int = 0
    """Curriculum: scenes keep to eight fixed layouts, and captions name both colours, for this many
    steps …
    """
    spreading_steps: int = 0
    """… then spread linearly to the whole distribution over this many."""
    hold_out: Relation | None = None
    """A relation, such as upper_left, that is left out of training with all its phrases, beside the
    ten combinations that always are.
    """
    trios: float = 0.0
    """Share of scenes with three objects (`scenes.Trio`); no curriculum acts on them."""

    seed: int = 0
    """Seed of weights, scenes and noise."""
    precision: Precision = "auto"
    """"auto": bf16 where the machine multiplies in bfloat16, else "no", which is float32; see
    `precision.resolve_precision`.
    """
    compile: bool = False
    """Compile the network; worth it in runs of more than a few minutes."""
    init_from: str | None = None
    """Bundled model, such as rte-nano, or pipeline folder whose weights to start from, with a fresh
    optimiser.
    """

    checkpoint_every: int = 250
    """Steps between checkpoints, from which a stopped run goes on."""
    evaluate_every: int = 1000
    """Steps between accuracies on held-out scenes."""
    evaluation_scenes: int = 96
    """Held-out scenes of an evaluation."""
    dynamics_points: int = 24
    """How often, log-spaced over the run, accuracies and the screening of every head go into
    dynamics.parquet.
    """

    def spread(self, step: int) -> float:
        """Distance of a step's scenes from the eight fixed layouts, in [0, 1] (`scenes.sample`)."""
        if step < self.anchored_steps:
            return 0.0
        return min(1.0, (step - self.anchored_steps + 1) / max(self.spreading_steps, 1))

    def red_first(self, step: int) -> float:
        """How often red is named first at a step (`scenes.sample`)."""
        return (
            0.5 + 0.4 * max(0.0, 1 - step / max(self.biased_steps, 1)) if self.biased_steps else 0.5
        )

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, constant, then linear decay to 2 %."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        decayed = (step / self.steps - self.decay_from) / max(1 - self.decay_from, 1e-9)
        return warm * (1 - 0.98 * min(max(decayed, 0.0), 1.0))


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run.

    The same configuration in the same `out` folder resumes where it was stopped.
    """

    out: Path
    """Folder for checkpoint, metrics.jsonl and the finished encoder and tokenizer, such as
    runs/encoder.
    """
    steps: int = 1000
    """Steps of the whole run."""
    batch_size: int = 64
    """Texts a step."""
    muon_lr: float = 3e-3
    """Muon's learning rate for the matrices of the blocks (update scaled to AdamW's root mean
    square; W_Q: see `text_encoder.build_optimizers`).
    """
    adam_lr: float = 4e-3
    """AdamW's learning rate, for embeddings, position biases and norms."""
    causal: bool = False
    """No token attends to a later one, so a word's vector knows what stands before it only, as in
    CLIP's text encoder.
    """
    t5_xxl_norms: bool = False
    """Draw the vectors' norms to those of T5-XXL, 2.5 for function words and 7 for other tokens, by
    a second loss.
    """
    warmup_steps: int = 30
    """Linear warm-up; then the learning rate falls linearly to 2 %."""
    seed: int = 0
    """Seed of weights and texts."""
    precision: Precision = "auto"
    """As in `TrainConfig`."""
    checkpoint_every: int = 100
    """Steps between checkpoints, from which a stopped run goes on."""
    evaluate_every: int = 50
    """Steps between losses on held-out texts."""

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to 2 %."""
        decay = max(0.0, (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1))
        return min((step + 1) / max(self.warmup_steps, 1), 1 - 0.98 * decay)
