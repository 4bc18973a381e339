"""Tasks: the two of this package and one from outside of it keep the same promises; training takes
any of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_lens import scenes
from dit_lens.task import Task, Trios, TwoObjects
from dit_lens.training import TrainConfig, build_pipeline, train
from dit_lens.training.curriculum import Curriculum
from dit_lens.training.data import encode_captions
from dit_lens.training.pipelines import PRESETS
from examples.inside import HELD_OUT, KINDS, Inside
from hooked_models import HookedTextToImage

TASKS = [TwoObjects(), Trios(), Inside()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_keeps_its_promises(task: Any) -> None:
    assert isinstance(task, Task)
    for split in ("train", "held_out", "all"):
        drawn = task.sample(150, seed=3, split=split)
        assert drawn[100:] == task.sample(50, seed=3, start=100, split=split)
        prompts = [task.prompt(scene) for scene in drawn]
        assert set(prompts) <= set(task.prompts())
        assert {word for prompt in prompts for word in prompt.split()} <= set(task.words)
        for scene, prompt in zip(drawn, prompts, strict=True):
            assert all(words in prompt for words in task.roles(scene).values())
        images = task.render(drawn)
        assert images.shape == (150, 3, task.image_size, task.image_size)
        assert images.min() >= 0
        assert images.max() <= 1
        verdict = task.judge(images, drawn)
        for metric in task.metrics:
            assert verdict[metric].values.all(), metric
        wrong = task.judge(images.roll(1, 0), drawn)[task.metrics[-1]]
        # other images are refused
        assert np.nanmean(wrong.values.astype(float)) < 0.7 or wrong.isnull().mean() > 0.5


def test_the_example_judges_each_part() -> None:
    task = Inside()
    drawn = task.sample(200, seed=0, split="all")
    images = task.render(drawn)
    other_shape = {"disc": "box", "box": "diamond", "diamond": "disc"}
    other_relation = {"inside": "bigger", "bigger": "inside"}
    other_color = {"red": "green", "green": "blue", "blue": "yellow", "yellow": "red"}

    def means(changed: list[Any]) -> list[float]:
        verdict = task.judge(images, changed)
        return [float(verdict[name].mean()) for name in task.metrics]

    assert means([replace(s, first=(other_shape[s.first[0]], s.first[1])) for s in drawn]) == [
        1,
        0,
        1,
    ]
    assert means([replace(s, relation=other_relation[s.relation]) for s in drawn]) == [1, 1, 0]
    turned = [replace(s, first=s.second, second=s.first) for s in drawn]
    assert means(turned)[2] == 0
    absent = [replace(s, first=(s.first[0], other_color[s.first[1]])) for s in drawn]
    gone = [
        i
        for i, (scene, new) in enumerate(zip(drawn, absent, strict=True))
        if new.first[1] != scene.second[1]
    ]
    assert not task.judge(images[gone], [absent[i] for i in gone])["color"].any()


def test_held_out_kinds_of_the_example_have_all_parts_elsewhere() -> None:
    for part in range(3):
        assert {kind[part] for kind in HELD_OUT} <= {
            kind[part] for kind in KINDS if kind not in HELD_OUT
        }
    seen = {(s.first, s.second, s.relation) for s in Inside().sample(400, seed=0)}
    assert not seen & HELD_OUT


def test_a_curriculum_draws_each_step_as_its_settings_say() -> None:
    config = TrainConfig(
        Path("run"),
        trios=0.25,
        anchored_steps=2,
        spreading_steps=4,
        biased_steps=9,
        hold_out="above",
    )
    for step in (0, 3, 8):
        drawn = Curriculum(config).sample(8, seed=5, start=8 * 7, step=step)
        pairs = scenes.sample(
            6,
            seed=5,
            start=6 * 7,
            color_words="both" if step < 2 else "optional",
            spread=config.spread(step),
            red_first=config.red_first(step),
            without="above",
        )
        assert drawn == [*scenes.sample_trios(2, seed=5, start=2 * 7), *pairs]
    whole = Curriculum(config).sample(8, seed=5, split="held_out")
    assert whole == scenes.sample(8, seed=5, split="held_out", color_words="both")


def test_a_pipeline_for_other_images_and_words() -> None:
    """The codec has the images' size, and the vocabulary the task's words."""
    task = Inside()
    pipe = build_pipeline(PRESETS["nano"], task=task)
    drawn = task.render(task.sample(16, seed=1))
    latents = pipe.vae.encode(drawn * 2 - 1).latent_dist.mode()
    assert latents.shape == (16, 24, 16, 16)
    decoded = (pipe.vae.decode(latents).sample + 1) / 2
    assert (decoded - drawn).abs().mean() < 0.03
    assert task.judge(decoded, task.sample(16, seed=1))["relation"].all()
    encode_captions(pipe, task.prompts())
    with pytest.raises(ValueError, match="does not know every word of 'red circle"):
        encode_captions(pipe, ["", "red circle"])
    with pytest.raises(ValueError, match="the two-object task only"):
        build_pipeline(PRESETS["nano"], "fused", task=task)


def test_a_run_is_of_one_task(tmp_path: Path) -> None:
    """Trained on the example, its model draws 64 pixels; another task is refused in its folder, as
    is what is no task.
    """
    config = TrainConfig(
        tmp_path / "run",
        "nano",
        steps=2,
        batch_size=4,
        precision="no",
        evaluation_scenes=2,
        dynamics_points=1,
    )
    with pytest.raises(
        TypeError, match=r"str is no Task: it lacks name, image_size, words|parameter 'task'"
    ):
        train(config, "inside")  # type: ignore[arg-type]
    folder = train(config, Inside())
    with torch.no_grad():
        assert HookedTextToImage.from_pretrained(folder)(
            "red disc is inside blue box", num_steps=1
        ).shape == (1, 3, 64, 64)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"relation"' in lines
    assert "dipole" not in lines
    with pytest.raises(ValueError, match="task"):
        train(replace(config, steps=3))
