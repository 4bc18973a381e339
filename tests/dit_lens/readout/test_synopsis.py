"""The synopsis against whole patterns, cached and summed up by hand, in float64; groups, folders
and the ranking.
"""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
import xarray as xr
from transformers import T5Tokenizer

from dit_lens import prompts as words
from dit_lens import scenes, synopsis
from dit_lens.intervene.interventions import Add, Intervention

from .groups import GROUPS, POSITIONS, PROMPTS, ROLES, RUN, by_hand, masks, planted

SHARES = {
    "some": torch.rand(3, POSITIONS, generator=torch.Generator().manual_seed(2)),
    "left": GROUPS["left"],
}


@pytest.mark.parametrize("reduce", ["sum", "mass", "mean", "max"])
def test_cross_attention_equals_whole_patterns(model, cache, reduce):
    # batches of 2: their prompts are padded to other lengths than all three together
    seen = synopsis.attention_synopsis(
        model, PROMPTS, **RUN, image_groups=GROUPS, reduce=reduce, batch_size=2
    )
    assert seen.dims == ("prompt", "layer", "head", "step", "branch", "image_group", "text_group")
    assert sorted(seen["text_group"].values) == sorted(ROLES)
    for branch, texts in {"cond": PROMPTS, "uncond": [""] * 3}.items():
        for role, keys in masks(model, texts).items():
            for name, image in GROUPS.items():
                expected = by_hand(
                    model, cache, "cross_attn", branch, image.expand(3, -1), keys, reduce
                )
                found = seen.sel(branch=branch, image_group=name, text_group=role)
                np.testing.assert_allclose(
                    found.values, expected, atol=1e-12, err_msg=f"{branch} {role} {name}"
                )
    # a colour that the prompt does not name
    assert seen.sel(branch="cond", text_group="color1")[1].isnull().all()
    assert (
        seen.sel(branch="uncond")
        .notnull()
        .any(["layer", "head", "step", "image_group"])
        .sum("text_group")
        == 2
    ).all()


@pytest.mark.parametrize(
    ("reduce", "groups"), [("sum", SHARES), ("mass", SHARES), ("mean", SHARES), ("max", GROUPS)]
)
def test_self_attention_equals_whole_patterns(model, cache, reduce, groups):
    seen = synopsis.attention_synopsis(
        model, PROMPTS, **RUN, sublayer="attn", image_groups=groups, reduce=reduce
    )
    assert seen.dims[-2:] == ("image_group", "key_group")
    for branch in ("cond", "uncond"):
        for name, image in groups.items():
            for key, keys in groups.items():
                expected = by_hand(
                    model, cache, "attn", branch, image.expand(3, -1), keys.expand(3, -1), reduce
                )
                found = seen.sel(branch=branch, image_group=name, key_group=key)
                np.testing.assert_allclose(found.values, expected, atol=1e-12)


def test_a_trajectory_gives_what_its_prompts_give(model):
    with torch.no_grad():
        run = model.trajectory(PROMPTS, **RUN)
    alone = synopsis.trajectory_synopsis(run, image_groups=GROUPS, reduce="mean")
    together = synopsis.attention_synopsis(
        model, PROMPTS, **RUN, image_groups=GROUPS, reduce="mean"
    )
    xr.testing.assert_allclose(alone, together.drop_vars("seed"), atol=1e-12)
    halves = {"own": GROUPS["own"][1:2]}
    part = synopsis.trajectory_synopsis(run.take(torch.tensor([1])), "attn", halves)
    whole = synopsis.attention_synopsis(
        model, PROMPTS, **RUN, sublayer="attn", image_groups={"own": GROUPS["own"]}
    )
    np.testing.assert_allclose(part.values[0], whole.values[1], atol=1e-12)


def test_a_killed_run_goes_on_and_gives_the_same(model, tmp_path, monkeypatch):
    arguments = {**RUN, "image_groups": GROUPS, "batch_size": 1}
    straight = synopsis.attention_synopsis(model, PROMPTS, **arguments)
    encoded, started = model.encoded, []

    def dies_at_the_second(inputs):
        started.append(model.tokenizer.batch_decode(inputs.tokens, skip_special_tokens=True))
        if len(started) == 2:
            raise KeyboardInterrupt
        return encoded(inputs)

    monkeypatch.setattr(model, "encoded", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        synopsis.attention_synopsis(model, PROMPTS, **arguments, out=tmp_path)
    resumed = synopsis.attention_synopsis(model, PROMPTS, **arguments, out=tmp_path)
    # the first batch was not run again
    assert started == [PROMPTS[:1], PROMPTS[1:2], PROMPTS[1:2], PROMPTS[2:]]
    xr.testing.assert_identical(resumed, straight)


def test_a_folder_knows_what_it_holds(model, tmp_path):
    mute = Intervention("blocks.0.cross_attn.hook_z", action="zero")
    synopsis.attention_synopsis(model, PROMPTS, **RUN, out=tmp_path, interventions=[mute])
    added = [
        Intervention("hook_latent", steps=0, action=Add(torch.full((4, 1, 1), x)))
        for x in (1.0, 1.0, 2.0)
    ]
    for number, folder in ((0, "added"), (1, "added")):  # another tensor object of equal values
        synopsis.attention_synopsis(
            model, PROMPTS, **RUN, out=tmp_path / folder, interventions=added[number : number + 1]
        )
    with pytest.raises(ValueError, match="other interventions: choose"):
        synopsis.attention_synopsis(
            model, PROMPTS, **RUN, out=tmp_path / "added", interventions=added[2:]
        )

    def again(expected: str, prompts=PROMPTS, **changed) -> None:
        with pytest.raises(ValueError, match=f"other {expected}: choose another folder"):
            synopsis.attention_synopsis(
                model, prompts, **{**RUN, "out": tmp_path, "interventions": [mute], **changed}
            )

    again("prompts, groups", [*PROMPTS[:2], "circle is above circle"])
    again("seeds", seed=0)
    again(r"num_steps \(2, now 3\)", num_steps=3)
    again("groups", image_groups=GROUPS)
    again(r"reduce \('sum', now 'max'\)", reduce="max")
    again("interventions", interventions=[])
    bias = model.dit.blocks[1].cross_attn.to_q.bias.data
    bias[0] += 1e-9
    again("model")
    bias[0] -= 1e-9
    with (
        model.hooks([("steps.0.cond.blocks.0.cross_attn.hook_z", lambda z, hook: None)]),
        pytest.raises(ValueError, match="attached"),
    ):
        synopsis.attention_synopsis(model, PROMPTS, **RUN, out=tmp_path, interventions=[mute])


def test_phrases_of_several_words_and_tokens(model, monkeypatch):
    pieces = ["▁tri", "angle", "▁is", "▁to", "▁the", "▁left", "▁of", "▁a", "▁circle", "▁le"]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -1.0) for piece in pieces),
    ]
    monkeypatch.setattr(model, "tokenizer", T5Tokenizer(vocab=vocabulary, extra_ids=0))
    texts = ["triangle is left of a triangle", "a Triangle is to the left of a circle"]

    def spelt(phrase: str) -> list[list[str]]:
        mask = words.phrase_mask(model, texts, phrase)
        assert mask.shape == model.to_tokens(texts).shape
        return [
            [model.to_str_tokens(text)[i] for i in row.nonzero().flatten()]
            for text, row in zip(texts, mask, strict=True)
        ]

    assert spelt("triangle") == [["▁tri", "angle", "▁tri", "angle"], ["▁tri", "angle"]]
    assert spelt("left of") == [["▁left", "▁of"]] * 2
    assert spelt("a triangle") == [["▁a", "▁tri", "angle"]] * 2
    with pytest.raises(ValueError, match=r"has no 'circle'\. Its words are triangle"):
        spelt("circle")


def test_image_groups_are_where_the_objects_are():
    wanted = scenes.sample(40, seed=0)
    images = scenes.render(wanted)
    groups = synopsis.image_groups_from_images(images, wanted)
    assert torch.allclose(sum(groups.values()), torch.ones(40, 64))
    assert (groups["background"] >= 0).all()
    x = torch.arange(64) % 8 * 16 + 7.5
    y = torch.arange(64) // 8 * 16 + 7.5
    for i in (1, 2):
        share = groups[f"object{i}"]
        for row, scene in zip(share, wanted, strict=True):
            centre = torch.stack([(row * x).sum(), (row * y).sum()]) / row.sum()
            # a triangle's centre of mass lies below that of its box; patches blur by less than half
            # of one
            assert (
                centre - torch.tensor([getattr(scene, f"x{i}"), getattr(scene, f"y{i}")])
            ).abs().max() < 8
        colored = torch.stack(
            [
                images[n, 0 if getattr(s, f"color{i}") == "red" else 2] == 1
                for n, s in enumerate(wanted)
            ]
        )
        assert torch.allclose(share.sum(dim=1) * 256, colored.sum(dim=(1, 2)).float())
    again = synopsis.image_groups_from_scenes(wanted)
    assert all(torch.equal(again[name], groups[name]) for name in groups)
    by_color = synopsis.image_groups_from_images(images)
    assert all(
        torch.equal(by_color[s.color1][n], groups["object1"][n]) for n, s in enumerate(wanted)
    )
    covered = synopsis.image_groups_from_images(images, wanted, threshold=0.25)
    assert torch.equal(covered["object2"], groups["object2"] >= 0.25)
    assert torch.equal(covered["background"], ~(covered["object1"] | covered["object2"]))


def test_an_object_that_is_not_there_has_an_empty_group():
    images = scenes.render(wanted := scenes.sample(2, seed=0))
    red = (images[0, 0] == 1) & (images[0, 1] == 0)
    images[0, :, red] = 0.5
    images[0, 0, :9, :10] = 1  # 90 red pixels: a speck
    groups = synopsis.image_groups_from_images(images, wanted)
    red_one = "object1" if wanted[0].color1 == "red" else "object2"
    assert groups[red_one][0].sum() == 0
    assert groups[red_one][1].sum() > 0


def test_bad_input_is_refused_with_what_to_do(model, monkeypatch):
    def refused(match: str, prompts=PROMPTS, **arguments) -> None:
        with pytest.raises(ValueError, match=match):
            synopsis.attention_synopsis(model, prompts, **{**RUN, **arguments})

    refused("2 seeds for 3 prompts", seed=[1, 2])
    # the tests' own type checks would be quicker to refuse
    with monkeypatch.context() as as_users_run_it:
        as_users_run_it.setattr(jaxtyping.config, "jaxtyping_disable", True)
        refused("'median': choose 'sum' or", reduce="median")
        refused("'mlp': choose", sublayer="mlp")
    refused(r"'a' has shape \(9,\)", image_groups={"a": torch.ones(9, dtype=torch.bool)})
    refused("needs groups that hold a position or not", image_groups=SHARES, reduce="max")
    refused("no text group", text_groups={})
    with pytest.raises(ValueError, match="There is no text_group 'verb' here: choose color1"):
        synopsis.rank_heads(planted(), "object1", "verb")
    with pytest.raises(ValueError, match="No prompt has both"):
        synopsis.rank_heads(planted().where(False), "object1", "relation")
    with pytest.raises(ValueError, match="3 scenes for 2 images"):
        synopsis.image_groups_from_images(torch.zeros(2, 3, 128, 128), scenes.sample(3, seed=0))
    with pytest.raises(ValueError, match=r"say grid="):
        synopsis.image_groups_from_images(torch.zeros(2, 3, 128, 128), grid=(7, 7))
