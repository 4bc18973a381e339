"""Roles of tokens agree with the scenes that captions describe."""

from __future__ import annotations

import pytest
from transformers import T5Tokenizer

from dit_lens import prompts, scenes
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline(grid=16))


def test_roles_of_every_caption_agree_with_the_scene(monkeypatch):
    from dit_lens.training import PRESETS, build_pipeline, pipelines

    monkeypatch.setattr(pipelines, "CODEC_SCENES", 50)
    model = HookedTextToImage.from_pipeline(build_pipeline(PRESETS["nano"]))
    for scene in scenes.sample(200, seed=0, split="all"):
        caption = scenes.caption(scene)
        found = prompts.token_roles(model, caption, length=20)
        words = caption.split()
        assert len(found) == 20
        assert found[len(words)] == "eos"
        assert set(found[len(words) + 1 :]) == {"pad"}
        by_role = {
            role: [w for w, r in zip(words, found, strict=False) if r == role] for role in found
        }
        assert by_role["shape1"] == [scene.shape1]
        assert by_role["shape2"] == [scene.shape2]
        assert by_role.get("color1", []) == ([scene.color1] if scene.names_color1 else [])
        assert by_role.get("color2", []) == ([scene.color2] if scene.names_color2 else [])
        axes = {
            "above": "y",
            "upper": "y",
            "up": "y",
            "higher": "y",
            "below": "y",
            "lower": "y",
            "down": "y",
            "left": "x",
            "right": "x",
        }
        assert [axes[w] for w in by_role["relation"]] == ["y"] * (
            scene.relation not in ("left", "right")
        ) + ["x"] * (scene.relation not in ("above", "below"))


def test_a_word_of_several_tokens_gives_each_its_role(model, monkeypatch):
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((p, -1.0) for p in ("▁tri", "angle", "▁is", "▁ab", "ove", "▁circle")),
    ]
    monkeypatch.setattr(model, "tokenizer", T5Tokenizer(vocab=pieces, extra_ids=0))
    found = prompts.token_roles(model, "triangle is above circle")
    assert found == ["shape1", "shape1", "filler", "relation", "relation", "shape2", "eos"]


def test_role_masks_are_padded_like_the_tokens(model):
    texts = ["red circle is above blue square", "circle is left of square"]
    mask = prompts.role_mask(model, texts, "relation")
    assert mask.shape == model.to_tokens(texts).shape
    assert [
        [model.to_str_tokens(t)[i] for i in row.nonzero().flatten()]
        for t, row in zip(texts, mask, strict=True)
    ] == [
        ["▁above"],
        ["▁left"],
    ]
