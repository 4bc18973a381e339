"""A task: scenes to draw from, their prompts and images, and a judge of images.

Training, evaluation, the synopsis and screening read a task through this protocol. `TwoObjects` and
`Trios` are tasks of this package; docs/extending/task.md builds another one outside of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import xarray as xr
from jaxtyping import Float
from torch import Tensor

from .judge import evaluate
from .rendering import render
from .sampling import ColorWords, Split, sample
from .scene import IMAGE_SIZE, WORDS, Scene, Trio, caption
from .sentences import all_captions, all_trio_captions
from .trios import sample_trios

METRICS = (
    "color",
    "shape",
    "unique_binding",
    "relation_strict",
    "relation_loose",
    "relation_given_both",
)
"""The verdicts on scenes and trios whose means are accuracies."""


@runtime_checkable
class Task(Protocol):
    """Members of a task. A scene is any object that the task's own methods understand.

    Example:
        >>> isinstance(TwoObjects(), Task)
        True
    """

    @property
    def name(self) -> str:
        """Kept with the settings of a training run, which resumes with the same task only."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels, a multiple of 16."""
        ...

    @property
    def words(self) -> Sequence[str]:
        """Every word of the prompts, for encoders with a vocabulary of their own."""
        ...

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the verdicts of `judge` whose means are accuracies."""
        ...

    @property
    def contrasts(self) -> Mapping[str, tuple[str, str]]:
        """Name → two opposite phrases of equal length, for `screening.phrase_contrasts`."""
        ...

    def sample(
        self, n: int, seed: int, *, start: int = 0, split: Split = "train", step: int | None = None
    ) -> list[Any]:
        """Scenes `start` … `start + n − 1` of the endless sequence of a seed.

        Args:
            n: number of scenes.
            seed: seed of the sequence.
            start: index of the first.
            split: "train", "held_out" (combinations that are never trained), or "all".
            step: training step, for a task with a curriculum; None for the whole distribution.
        """
        ...

    def prompt(self, scene: Any) -> str:
        """The prompt of a scene."""
        ...

    def prompts(self) -> list[str]:
        """Every prompt that a sampled scene can have: the text encoder reads each once."""
        ...

    def render(self, scenes: Sequence[Any]) -> Float[Tensor, "image 3 height width"]:
        """The images of scenes, in [0, 1]."""
        ...

    def judge(
        self, images: Float[Tensor, "image 3 height width"], scenes: Sequence[Any]
    ) -> xr.Dataset:
        """Verdicts over dim `image`, `metrics` among them; NaN where one does not apply."""
        ...

    def roles(self, scene: Any) -> Mapping[str, str]:
        """Role → words of the scene's prompt, for `dit_lens.prompts.role_groups`."""
        ...


CONTRASTS = {"vertical": ("below", "above"), "horizontal": ("to the right of", "to the left of")}


@dataclass(frozen=True)
class TwoObjects:
    """Two colored shapes in a relation: the task of the bundled models.

    Example:
        >>> task = TwoObjects()
        >>> scene = task.sample(1, seed=0)[0]
        >>> task.prompt(scene), task.roles(scene)["relation"]
        ('circle is diagonally down and left from square', 'diagonally down and left from')
        >>> bool(task.judge(task.render([scene]), [scene])["relation_loose"].all())
        True
    """

    name = "two-objects"
    image_size = IMAGE_SIZE
    words = WORDS
    metrics = METRICS
    contrasts = CONTRASTS

    def sample(
        self, n: int, seed: int, *, start: int = 0, split: Split = "train", step: int | None = None
    ) -> list[Any]:
        """As `scenes.sample`; held-out scenes name both colors."""
        words: ColorWords = "both" if split == "held_out" else "optional"
        return list(sample(n, seed, start=start, split=split, color_words=words))

    def prompt(self, scene: Scene | Trio) -> str:
        """As `scenes.caption`."""
        return caption(scene)

    def prompts(self) -> list[str]:
        """All 924."""
        return all_captions()

    def render(self, scenes: Sequence[Scene | Trio]) -> Float[Tensor, "image 3 height width"]:
        """As `scenes.render`."""
        return render(scenes)

    def judge(
        self, images: Float[Tensor, "image 3 height width"], scenes: Sequence[Scene | Trio]
    ) -> xr.Dataset:
        """As `scenes.evaluate`."""
        return evaluate(images, scenes)

    def roles(self, scene: Scene) -> dict[str, str]:
        """Both objects, as they are named, and the phrase between them."""
        first, second = caption(scene).split(f" is {scene.phrase} ")
        return {"object1": first, "relation": scene.phrase, "object2": second}


@dataclass(frozen=True)
class Trios(TwoObjects):
    """Three objects and two relations.

    Example:
        >>> task = Trios()
        >>> task.prompt(task.sample(1, seed=0)[0])
        'red triangle is right of blue circle and to the lower left of blue square'
    """

    name = "trios"

    def sample(
        self, n: int, seed: int, *, start: int = 0, split: Split = "train", step: int | None = None
    ) -> list[Any]:
        """As `scenes.sample_trios`."""
        return list(sample_trios(n, seed, start=start, split=split))

    def prompts(self) -> list[str]:
        """All 3,984."""
        return all_trio_captions()

    def roles(self, scene: Trio) -> dict[str, str]:  # type: ignore[override]
        """The three objects and both phrases."""
        first, second = scene.first, scene.second
        return {
            **TwoObjects.roles(self, first),
            "relation2": second.phrase,
            "object3": f"{second.color2} {second.shape2}",
        }
