"""The synopsis against whole patterns, cached and summed up by hand, in float64; groups, folders
and the ranking.
"""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binom
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Tokenizer

from dit_lens import prompts as words
from dit_lens import scenes, synopsis
from dit_lens.intervene.interventions import Add, Intervention
from hooked_models import HookedTextToImage

from ...hooked_models.pipelines import tiny_pipeline

PROMPTS = [
    "red circle is above blue square",
    "circle is left of square",
    "blue square is above red circle",
]
RUN = {"seed": [3, 4, 5], "num_steps": 2}
ROLES = ["color1", "shape1", "relation", "color2", "shape2", "filler", "eos", "pad"]
POSITIONS = 16
GROUPS = {
    "left": torch.arange(POSITIONS) % 4 < 2,
    "own": torch.rand(3, POSITIONS, generator=torch.Generator().manual_seed(1)) < 0.5,
    "all": torch.ones(POSITIONS, dtype=torch.bool),
}
SHARES = {
    "some": torch.rand(3, POSITIONS, generator=torch.Generator().manual_seed(2)),
    "left": GROUPS["left"],
}


@pytest.fixture(scope="module")
def model() -> HookedTextToImage:
    return HookedTextToImage.from_pipeline(tiny_pipeline("t5", grid=8).to(torch.float64))


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(
            PROMPTS, **RUN, names_filter=lambda name: name.endswith("hook_pattern"), branch="both"
        )[1]


def by_hand(
    model, cache, sublayer: str, branch: str, image: Tensor, keys: Tensor, reduce: str
) -> np.ndarray:
    """Of [prompt pos] masks or shares: [prompt layer head step], entry by entry of the whole
    pattern.
    """
    pattern = torch.stack(
        [cache.stack("pattern", layer, sublayer, branch) for layer in range(model.cfg.n_layers)]
    )
    found = np.full((len(image), model.cfg.n_layers, model.cfg.n_heads, pattern.shape[1]), np.nan)
    for b, (rows, columns) in enumerate(zip(image.double(), keys.double(), strict=True)):
        if rows.sum() == 0 or columns.sum() == 0:
            continue
        entries = pattern[:, :, b] * rows[:, None] * columns  # [layer step head query key]
        total = entries.amax(dim=(-2, -1)) if reduce == "max" else entries.sum(dim=(-2, -1))
        divisor = {"mass": rows.sum(), "mean": rows.sum() * columns.sum()}.get(reduce, 1)
        found[b] = (total / divisor).transpose(1, 2)
    return found


def masks(model, texts, length=None) -> dict[str, Tensor]:
    length = length or model.to_tokens(PROMPTS).shape[1]
    roles = [words.token_roles(model, text, length) for text in texts]
    return {
        role: torch.tensor([[found == role for found in row] for row in roles]) for role in ROLES
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


def test_more_groups_than_a_head_is_wide(model, cache):
    text = {f"token {i}": torch.arange(7) == i for i in range(7)} | {
        f"not {i}": torch.arange(7) != i for i in range(7)
    }
    assert len(text) > model.cfg.d_head
    seen = synopsis.attention_synopsis(model, PROMPTS, **RUN, text_groups=text)
    for name, keys in text.items():
        everywhere = torch.ones(3, POSITIONS)
        expected = by_hand(
            model, cache, "cross_attn", "cond", everywhere, keys.expand(3, -1), "sum"
        )
        np.testing.assert_allclose(
            seen.sel(branch="cond", text_group=name).values[..., 0], expected, atol=1e-12
        )
    assert seen.sel(branch="uncond").isnull().all()


def test_attention_is_shared_out_in_single_precision_too():
    single = HookedTextToImage.from_pipeline(tiny_pipeline(grid=8))
    seen = synopsis.attention_synopsis(single, PROMPTS, **RUN, reduce="mass")
    assert float(abs(seen.sum("text_group") - 1).max()) < 1e-6
    halves = {"left": GROUPS["left"], "right": ~GROUPS["left"]}
    seen = synopsis.attention_synopsis(
        single, PROMPTS, **RUN, sublayer="attn", image_groups=halves, reduce="mass"
    )
    assert float(abs(seen.sum("key_group") - 1).max()) < 1e-6
    unguided = synopsis.attention_synopsis(single, PROMPTS, **RUN, guidance=1.0)
    assert list(unguided["branch"].values) == ["cond"]


class PatternsMade(TorchDispatchMode):
    """Counts results of the size of a whole pattern."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes, self.made = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.made += (
                isinstance(tensor, Tensor)
                and tuple(tensor.shape[-2:]) in self.shapes
                and tensor.ndim >= 3
            )
        return result


@pytest.mark.parametrize("sublayer", ["cross_attn", "attn"])
def test_no_pattern_is_ever_made(sublayer):
    """Of more keys than a head has channels (8): a smaller one is smaller than the queries."""
    # 36 positions, which nothing else is
    model = HookedTextToImage.from_pipeline(tiny_pipeline(grid=12))
    prompts = ["red circle is above left of above left of blue square"] * 3
    pattern = (36, 36) if sublayer == "attn" else (36, model.to_tokens(prompts).shape[1])
    shapes = (pattern, pattern[::-1])
    groups = {"some": torch.arange(36) % 3 == 0, "rest": torch.arange(36) % 3 > 0}
    with PatternsMade(*shapes) as fused:
        synopsis.attention_synopsis(model, prompts, **RUN, sublayer=sublayer, image_groups=groups)
    with PatternsMade(*shapes) as whole, torch.no_grad():
        model.run_with_cache(
            prompts, **RUN, names_filter=lambda name: name.endswith(f".{sublayer}.hook_pattern")
        )
    with PatternsMade(*shapes) as rows:
        synopsis.attention_synopsis(
            model, prompts, **RUN, sublayer="attn", image_groups=groups, reduce="max"
        )
    assert whole.made > 0
    assert fused.made == 0
    # chunks of rows, no larger than the queries: 16 wide heads, 36 keys
    assert sublayer == "cross_attn" or rows.made == 0


def test_attention_is_read_as_interventions_leave_it(model):
    hide = Intervention(
        "blocks.0.cross_attn.hook_pattern", heads=[1], tokens="shape1", steps=1, action="knockout"
    )
    swap = Intervention("text_encoder.blocks.0.hook_attn_out", action="zero")
    look = {"names_filter": lambda name: name.endswith("cross_attn.hook_pattern"), "branch": "both"}
    with (
        torch.no_grad(),
        model.hooks(
            [*hide.hooks(model, PROMPTS, num_steps=2), *swap.hooks(model, PROMPTS, num_steps=2)]
        ),
    ):
        edited = model.run_with_cache(PROMPTS, **RUN, **look)[1]
    for reduce in ("sum", "max"):
        seen = synopsis.attention_synopsis(
            model, PROMPTS, **RUN, reduce=reduce, interventions=[hide, swap]
        )
        assert (
            float(abs(seen.sel(layer=0, head=1, step=1, branch="cond", text_group="shape1")).max())
            == 0
        )
        for role, keys in masks(model, PROMPTS).items():
            expected = by_hand(
                model, edited, "cross_attn", "cond", torch.ones(3, POSITIONS), keys, reduce
            )
            np.testing.assert_allclose(
                seen.sel(branch="cond", text_group=role).values[..., 0], expected, atol=1e-12
            )


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


# Folders


def test_a_killed_run_goes_on_and_gives_the_same(model, tmp_path, monkeypatch):
    arguments = {**RUN, "image_groups": GROUPS, "batch_size": 1}
    straight = synopsis.attention_synopsis(model, PROMPTS, **arguments)
    run, started = model.trajectory, []

    def dies_at_the_second(prompts, *args, **kwargs):
        started.append(prompts)
        if len(started) == 2:
            raise KeyboardInterrupt
        return run(prompts, *args, **kwargs)

    monkeypatch.setattr(model, "trajectory", dies_at_the_second)
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


# Groups


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


# Ranking


def planted(n: int = 12, seeds: int = 2) -> xr.DataArray:
    """Mean attention of 2 × 2 heads to 4 words and a pad: L1H0 reads "relation", L0H1 reads the
    first word of each prompt.
    """
    rng = np.random.default_rng(0)
    values = rng.uniform(0.1, 0.2, (n * seeds, 2, 2, 3, 2, 1, 5))
    values[:, 1, 0, :, 0, 0, 2] += 0.5
    values[:, 0, 1, 1, 0, 0, 0] += 0.5
    values[..., 4] = 0  # pads
    values[0, ..., 1] = np.nan
    values[-1, ..., :] = np.nan
    coords = {
        "prompt": [f"prompt {i}" for i in np.repeat(np.arange(n), seeds)],
        "layer": [0, 1],
        "head": [0, 1],
        "step": [0, 1, 2],
        "branch": ["cond", "uncond"],
        "image_group": ["object1"],
        "text_group": ["color1", "shape1", "relation", "eos", "pad"],
    }
    return xr.DataArray(values, dims=tuple(coords), coords=coords)


def test_the_planted_head_is_ranked_first_with_interval_and_control():
    seen = planted()
    table = synopsis.rank_heads(seen, "object1", "relation", step=1)
    assert list(table.columns) == ["layer", "head", "mean", "low", "high", "control", "p"]
    assert (table.loc[0, "layer"], table.loc[0, "head"]) == (1, 0)
    assert table.loc[0, "p"] == 1 / 1000
    assert (table.loc[1:, "p"] > 0.01).all()
    one = seen.sel(layer=1, head=0, step=1, branch="cond", image_group="object1")
    by_prompt = one.groupby("prompt").mean()
    assert table.loc[0, "mean"] == pytest.approx(float(by_prompt.sel(text_group="relation").mean()))
    assert table.loc[0, "low"] < table.loc[0, "mean"] < table.loc[0, "high"]
    # over random labels, a prompt's expected value is the mean of its groups, pads left out
    expected = float(
        by_prompt.sel(text_group=["color1", "shape1", "relation", "eos"]).mean("text_group").mean()
    )
    assert table.loc[0, "control"] == pytest.approx(expected, abs=0.01)
    later = synopsis.rank_heads(seen, "object1", "color1", step="max")
    assert (later.loc[0, "layer"], later.loc[0, "head"]) == (0, 1)
    assert (
        later.loc[0, "mean"]
        > synopsis.rank_heads(seen, "object1", "color1", step="mean").loc[0, "mean"]
    )


def test_p_is_the_chance_that_random_labels_do_as_well():
    seen = planted(4, 1).isel(prompt=slice(1, 3), step=[0], text_group=slice(0, 4))
    seen[:] = 0.0
    seen.loc[{"text_group": "relation"}] = 1.0
    table = synopsis.rank_heads(seen, "object1", "relation", step=0, shuffles=4000)
    exact = (1 / 4) ** 2  # both prompts must draw that label
    low, high = binom.interval(0.9999, 4000, exact)
    assert ((low <= table["p"] * 4001 - 1) & (table["p"] * 4001 - 1 <= high)).all()
    assert (table["mean"] == 1).all()


# Errors


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
