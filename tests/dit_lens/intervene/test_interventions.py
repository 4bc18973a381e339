"""Every action at every kind of site against a hook written by hand, in float64; the rest stays as
it was, exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_lens.intervene.interventions import Add, Intervention, Replace, Scale
from dit_lens.text.prompts import word

from .by_hand import PROMPTS, RUN, read, words

# the first two have equally many tokens of every role, but in other places


@pytest.fixture(scope="module")
def one_step(model) -> Tensor:
    with torch.no_grad():
        return model(PROMPTS, seed=0, num_steps=1)


def by_hand(change: Callable[[Tensor], None]) -> Callable[[Tensor, object], Tensor]:
    def function(tensor: Tensor, hook) -> Tensor:
        edited = tensor.clone()
        change(edited)
        return edited

    return function


# What each action makes of a selected part [row …]: written out, one prompt at a time.
ACTIONS = {
    "zero": ("zero", lambda parts: [torch.zeros_like(part) for part in parts]),
    "mean": ("mean", lambda parts: [sum(parts) / len(parts)] * len(parts)),
    "scale": (Scale(-1.5), lambda parts: [-1.5 * part for part in parts]),
    "add": (
        Add(torch.tensor(0.7, dtype=torch.float64)),
        lambda parts: [part + 0.7 for part in parts],
    ),
    "replace": (
        Replace(torch.tensor(0.2, dtype=torch.float64)),
        lambda parts: [torch.full_like(part, 0.2) for part in parts],
    ),
}


# Site → its heads and tokens, and where they are in one row of the tensor.
SITES = {
    "blocks.1.cross_attn.hook_z": ([1], None, (slice(None), 1)),
    "blocks.1.attn.hook_v": ([0], [1, 3], ([1, 3], 0)),
    "blocks.0.attn.hook_pattern": ([1], [2], (1, slice(None), 2)),
    "blocks.1.hook_mlp_out": (None, [0, 2], ([0, 2],)),
    "blocks.0.adaln.hook_gate_mlp": (None, None, ...),
    "hook_t_emb": (None, None, ...),
    "blocks.0.hook_resid_mid2": (None, None, ...),
}


@pytest.mark.parametrize("branch", ["cond", "uncond", "both"])
@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("site", SITES)
def test_actions_in_the_denoiser(model, run, site, kind, branch):
    heads, tokens, part = SITES[site]
    action, expected = ACTIONS[kind]
    intervention = Intervention(
        site, heads=heads, tokens=tokens, steps=1, branch=branch, action=action
    )

    def change(tensor: Tensor) -> None:
        for row, new in zip(tensor, expected([row[part].clone() for row in tensor]), strict=True):
            row[part] = new

    branches = ["cond", "uncond"] if branch == "both" else [branch]
    found = intervention.hooks(model, PROMPTS, num_steps=2)
    canonical = site.replace("hook_resid_mid2", "hook_resid_mid_cross")
    assert [name for name, _ in found] == [f"steps.1.{b}.{canonical}" for b in branches]
    names = [f"steps.1.{b}.{canonical}" for b in ("cond", "uncond")]
    ours = read(run, found, names)
    hand = read(run, [(f"steps.1.{b}.{site}", by_hand(change)) for b in branches], names)
    for name in ours:
        torch.testing.assert_close(ours[name], hand[name], rtol=0, atol=1e-14)

    plain = read(run, [], names)
    selected = torch.zeros_like(plain[names[0]], dtype=torch.bool)
    for row in selected:
        row[part] = True
    for name in names:  # the other branch, and what is not selected
        assert torch.equal(ours[name], plain[name]) == (name not in dict(found))
        assert torch.equal(ours[name][~selected], plain[name][~selected])
    assert not torch.equal(ours["images"], plain["images"])


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize(
    "site", ["hook_latent", "hook_out", "hook_x0", "hook_out_uncond", "hook_image"]
)
def test_actions_between_denoiser_calls(model, run, site, kind):
    action, expected = ACTIONS[kind]

    def change(tensor: Tensor) -> None:
        tensor[:] = torch.stack(expected(list(tensor.clone())))

    intervention = Intervention(site, steps=None if site == "hook_image" else 1, action=action)
    found = intervention.hooks(model, PROMPTS, num_steps=2)
    if site == "hook_image":  # comes after the fork
        plain = run.images
        change(expected_image := plain.clone())
        torch.testing.assert_close(
            model.run_with_hooks(PROMPTS, **RUN, fwd_hooks=found),
            expected_image,
            rtol=0,
            atol=1e-14,
        )
        return
    ours = read(run, found, [f"steps.1.{site}"])
    hand = read(run, [(f"steps.1.{site}", by_hand(change))], [f"steps.1.{site}"])
    assert len(ours) == 2
    for key in ours:
        torch.testing.assert_close(ours[key], hand[key], rtol=0, atol=1e-14)
    assert not torch.equal(ours["images"], run.images)


TEXT_SITES = {
    "hook_text": ("steps.0.cond.hook_text", None, lambda row, k: (row, k)),
    "hook_caption": ("steps.0.cond.hook_caption", None, lambda row, k: (row, k)),
    "blocks.1.cross_attn.hook_v": (
        "steps.0.cond.blocks.1.cross_attn.hook_v",
        [1],
        lambda row, k: (row, k, 1),
    ),
    "blocks.0.hook_cross_pattern": (
        "steps.0.cond.blocks.0.cross_attn.hook_pattern",
        [0],
        lambda row, k: (row, 0, slice(None), k),
    ),
    "text_encoder.blocks.1.hook_resid_post": (
        "text_encoder.blocks.1.hook_resid_post",
        None,
        lambda row, k: (row, k),
    ),
    "text_encoder.blocks.0.attn.hook_pattern": (
        "text_encoder.blocks.0.attn.hook_pattern",
        [2],
        lambda row, k: (row, 2, slice(None), k),
    ),
}


@pytest.mark.parametrize("kind", [*ACTIONS, "resample"])
@pytest.mark.parametrize("site", TEXT_SITES)
def test_actions_on_the_words_of_a_role(model, one_step, site, kind):
    """Tokens of a role are found in each prompt, and are averaged and exchanged with those of the
    same role.
    """
    name, heads, entry = TEXT_SITES[site]
    action, expected = ACTIONS.get(kind, ("resample", None))
    # in the third, no counterpart of the second's colour order
    prompts = PROMPTS[:2] if kind == "resample" else PROMPTS
    role = ["shape1", "color2"]
    places = [
        sorted(a + b) for a, b in zip(words(model, role[0]), words(model, role[1]), strict=True)
    ][: len(prompts)]

    def change(tensor: Tensor) -> None:
        old = tensor.clone()
        cells = [(row, k) for row, ks in enumerate(places) for k in ks]
        if kind == "resample":
            sources = [(1 - row, places[1 - row][places[row].index(k)]) for row, k in cells]
            new = [old[entry(*source)] for source in sources]
        else:
            new = expected([old[entry(*cell)] for cell in cells])
        for cell, value in zip(cells, new, strict=True):
            tensor[entry(*cell)] = value

    steps = None if site.startswith("text_encoder") else 0
    intervention = Intervention(site, heads=heads, tokens=role, steps=steps, action=action)
    found = intervention.hooks(model, prompts, num_steps=1)
    with torch.no_grad():
        ours = model.run_with_hooks(prompts, seed=0, num_steps=1, fwd_hooks=found)
        hand = model.run_with_hooks(
            prompts, seed=0, num_steps=1, fwd_hooks=[(name, by_hand(change))]
        )
    assert [full for full, _ in found] == [name]
    torch.testing.assert_close(ours, hand, rtol=0, atol=1e-13)
    assert (ours - one_step[: len(prompts)]).abs().max() > 1e-9


def test_replace_by_a_cache_is_activation_patching(model):
    """At all steps and both branches: each site gets its own tensor of the other run, rows in
    order.
    """
    others = [
        "blue circle is left of square",
        "red square is left of circle",
        "red circle is above red circle",
    ]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            others, **RUN, names_filter="blocks.1.cross_attn.hook_z", branch="both"
        )
        intervention = Intervention(
            "blocks.1.cross_attn.hook_z", heads=[0], branch="both", action=Replace(cache)
        )
        found = intervention.hooks(model, PROMPTS, num_steps=2)

        def patch(tensor: Tensor, hook) -> Tensor:
            return torch.cat([cache[hook.name][:, :, :1], tensor[:, :, 1:]], dim=2)

        oracle = model.run_with_hooks(PROMPTS, **RUN, fwd_hooks=[(name, patch) for name in cache])
        assert len(found) == 4
        assert torch.equal(model.run_with_hooks(PROMPTS, **RUN, fwd_hooks=found), oracle)

        reference = {
            "blocks.1.cross_attn.hook_z": torch.stack([*cache.cache_dict.values()]).mean((0, 1))
        }
        mean = Intervention("blocks.1.cross_attn.hook_z", steps=0, action=Replace(reference)).hooks(
            model, PROMPTS, num_steps=2
        )
        name = mean[0][0]
        with model.hooks(mean):
            _, kept = model.run_with_cache(PROMPTS, **RUN, names_filter=name)
        assert torch.equal(
            kept[name], reference["blocks.1.cross_attn.hook_z"].expand_as(kept[name])
        )


def test_a_view_of_one_step(model):
    intervention = Intervention(
        "blocks.*.cross_attn.hook_pattern",
        tokens="relation",
        steps=slice(1, None),
        action="knockout",
    )
    with torch.no_grad():
        view, tokens = model.at(step=1, prompts=PROMPTS, **RUN)
        ours = view.run_with_hooks(tokens, fwd_hooks=intervention.hooks(view, PROMPTS))
        assert torch.equal(
            ours,
            model.run_with_hooks(
                PROMPTS, **RUN, fwd_hooks=intervention.hooks(model, PROMPTS, num_steps=2)
            ),
        )
        first, _ = model.at(step=0, prompts=PROMPTS, **RUN)
        with pytest.raises(ValueError, match="step 0"):
            intervention.hooks(first, PROMPTS)


def test_it_is_data():
    one = Intervention(
        "blocks.2.cross_attn.hook_z", "L2H8", steps=[0, 1], tokens=torch.tensor([[True, False]])
    )
    assert one == Intervention(
        "blocks.2.cross_attn.hook_z", [8], steps=(0, 1), tokens=[[True, False]]
    )
    assert hash(one) == hash(dataclasses.replace(one))
    for steps in (None, 2, [0, 2], slice(4)):
        assert {Intervention("hook_latent", steps=steps): "found"}[
            Intervention("hook_latent", steps=steps)
        ] == "found"
    assert one != dataclasses.replace(one, heads=(7,))


def test_numpys_numbers_and_steps_from_the_end_are_numbers(model):
    ours = Intervention(
        "blocks.0.attn.hook_z", heads=np.arange(2), steps=np.int64(-1), tokens=np.array([0, 2])
    )
    assert ours == Intervention("blocks.0.attn.hook_z", heads=[0, 1], steps=-1, tokens=[0, 2])
    (edit,) = ours.resolve(model, PROMPTS, num_steps=5)
    assert (edit.site.step, edit.num_steps) == (4, 5)
    masks = [[[1, 0, 1, 0]], np.array([[True, False, True, False]]), torch.tensor([[1, 0, 1, 0]])]
    for mask in masks:
        assert Intervention("blocks.0.attn.hook_z", tokens=mask).tokens == (
            (True, False, True, False),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "blocks.1.attn.hook_z", "heads": "L0H1"}, "blocks.0."),
        ({"site": "hook_latent", "heads": "L0H1"}, "no head"),
        ({"site": "hook_text", "tokens": "verb"}, r"choose color1.*prompts\.word\('verb'\)"),
        ({"site": "hook_text", "tokens": ["relation", 1]}, "mixes positions and words"),
        ({"site": "hook_text", "tokens": [[0, 2]] * 3}, "holds 2: give booleans"),
        ({"site": "hook_text", "tokens": word("cat")}, "has no 'cat'"),
        ({"site": "hook_text", "tokens": word("blue", nth=2)}, "has no 'blue' number 2"),
        (
            {"site": "hook_text", "tokens": [[True] * 7, [False] * 7, [True] * 7]},
            "row 1, of 'red circle",
        ),
        ({"site": "hook_t_emb", "heads": []}, "heads is empty"),
        ({"site": "hook_t_emb", "steps": [True]}, "steps=True: give an integer"),
        ({"site": "hook_text", "tokens": [True, False]}, "one row for each prompt"),
        ({"site": "hook_text", "tokens": []}, "nothing is selected"),
        ({"site": "blocks.0.attn.hook_z", "heads": [2]}, "heads 0 to 1"),
        ({"site": "blocks.0.hook_resid_post", "heads": [0]}, "hook_z"),
        ({"site": "blocks.0.attn.hook_z", "tokens": "relation"}, "give positions"),
        ({"site": "blocks.0.attn.hook_z", "tokens": [4]}, "positions 0 to 3"),
        ({"site": "hook_text", "tokens": [[True] * 3] * 3}, r"\[3, 7\]"),
        ({"site": "hook_t_emb", "tokens": [0]}, "leave tokens out"),
        ({"site": "hook_latent", "tokens": [0]}, "leave tokens out"),
        ({"site": "hook_latent", "branch": "both"}, "leave branch out"),
        ({"site": "hook_image", "steps": 1}, "leave steps out"),
        ({"site": "text_encoder.hook_out", "steps": 1}, "leave steps out"),
        ({"site": "hook_latent", "steps": [0, 14]}, "0 to 13"),
        ({"site": "hook_latent", "steps": slice(20, 30)}, "0 to 13"),
        ({"site": "steps.0.cond.hook_text"}, "say steps"),
        ({"site": "null_text_encoder.hook_out"}, "branch="),
        ({"site": "blocks.0.attn.hook_result"}, "set_use_attn_result"),
        ({"site": "blocks.0.attn.hook_z", "action": "knockout"}, "hook_pattern"),
        ({"site": "blocks.0.cross_attn.hook_pattern", "action": "knockout"}, "nothing is left"),
        (
            {
                "site": "blocks.0.cross_attn.hook_pattern",
                "tokens": list(range(7)),
                "action": "knockout",
            },
            "nothing is left",
        ),
        (
            {
                "site": "blocks.0.cross_attn.hook_pattern",
                "tokens": "eos",
                "branch": "uncond",
                "action": "knockout",
            },
            "nothing is left",
        ),
        ({"site": "blocks.0.attn.hook_attn_scores"}, "knockout"),
        ({"site": "blocks.0.ln1.hook_scale"}, "switches nothing off"),
        ({"site": "hook_text", "action": "mean"}, "different numbers of tokens"),
        ({"site": "hook_text", "action": "resample"}, "larger batch"),
        ({"site": "hook_t_emb", "action": Replace(torch.zeros(2, 16))}, "a row for each prompt"),
        ({"site": "hook_t_emb", "action": Replace({"hook_text": torch.zeros(3)})}, "cache it"),
    ],
)
def test_what_has_no_meaning_says_what_has(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        Intervention(**arguments).hooks(model, ["blue square is above", *PROMPTS[:2]])


def test_hooks_of_other_prompts_are_refused(model):
    zero = Intervention("blocks.0.attn.hook_z", steps=0)
    with pytest.raises(ValueError, match="in the order and number"), torch.no_grad():
        model.run_with_hooks(
            PROMPTS[:2], num_steps=1, fwd_hooks=zero.hooks(model, PROMPTS, num_steps=1)
        )
    wide = dataclasses.replace(zero, action=Add(torch.zeros(5, dtype=torch.float64))).hooks(
        model, PROMPTS, num_steps=1
    )
    with pytest.raises(ValueError, match="does not broadcast"), torch.no_grad():
        model.run_with_hooks(PROMPTS, num_steps=1, fwd_hooks=wide)
    with pytest.raises(ValueError, match="run several"):
        dataclasses.replace(zero, action="mean").hooks(model, PROMPTS[0])
