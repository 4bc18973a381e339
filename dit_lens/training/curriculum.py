"""The scenes of a training run of this project's own task, step by step."""

from __future__ import annotations

from dataclasses import dataclass

from ..task import Scene, Split, Trio, sample, sample_trios
from ..task.protocol import TwoObjects
from ..task.sentences import all_captions, all_trio_captions
from .config import TrainConfig


@dataclass(frozen=True)
class Curriculum(TwoObjects):
    """The two-object task, easier at the start of a run, with a share of trios.

    Example:
        >>> from pathlib import Path
        >>> task = Curriculum(TrainConfig(Path("run"), anchored_steps=10, trios=0.5))
        >>> [type(scene).__name__ for scene in task.sample(2, seed=0, step=0)]
        ['Trio', 'Scene']
    """

    config: TrainConfig

    def sample(
        self, n: int, seed: int, *, start: int = 0, split: Split = "train", step: int | None = None
    ) -> list[Scene | Trio]:
        """Scenes of a step, `n` a step; without a step, those of the whole task."""
        config = self.config
        if step is None:
            return super().sample(n, seed, start=start, split=split)
        trios = round(n * config.trios)
        batch = start // n
        scenes = sample(
            n - trios,
            seed,
            start=batch * (n - trios),
            split=split,
            color_words="both" if step < config.anchored_steps else "optional",
            spread=config.spread(step),
            red_first=config.red_first(step),
            without=config.hold_out,
        )
        return [*sample_trios(trios, seed, start=batch * trios, split=split), *scenes]

    def prompts(self) -> list[str]:
        """All of scenes, and of trios if there are any."""
        return [*all_captions(), *(all_trio_captions() if self.config.trios else ())]
