"""A run that goes on from a bundled model takes its place, and its card tells of every run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hooked_models.pipelines.hub import ZOO
from recipes import bundle_model, zoo_cards


def test_earlier_runs_are_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_model, "ZOO", tmp_path / "zoo")
    facts = tmp_path / "zoo" / "m" / "training.json"
    facts.parent.mkdir(parents=True)
    facts.write_text(json.dumps({"samples": 1}))
    for number, expected in ((2, [1]), (3, [1, 2])):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        config = bundle_model.Config(run, "m")
        for _ in range(2):  # a bundling that was stopped after it had written the file is repeated
            earlier = bundle_model.earlier_runs(config)
            assert [phase["samples"] for phase in earlier] == expected
            assert not any("earlier" in phase for phase in earlier)
            facts.write_text(json.dumps({"samples": number, "earlier": earlier}))


def test_a_run_that_has_not_ended_is_not_bundled(tmp_path):
    save_file(
        {"a": torch.zeros(1)},
        tmp_path / "checkpoint.safetensors",
        {"step": "3", "facts": json.dumps({"steps": 6})},
    )
    with pytest.raises(SystemExit, match="step 3 of 6"):
        bundle_model.training_facts(bundle_model.Config(tmp_path, "m"))


def test_a_card_tells_of_every_run():
    first = zoo_cards.training(ZOO / "rte-nano")
    alone = zoo_cards.how_trained(first)
    assert "### Run" not in alone
    later = first | {
        "samples": 1_000,
        "steps": 10,
        "precision": "no",
        "biased_steps": 0,
        "anchored_steps": 0,
        "spreading_steps": 0,
    }
    later |= {
        "seed": 5,
        "muon_lr": 0.25,
        "history": [],
        "init_from": "rte-nano",
        "decay_from": 0.2,
        "earlier": [first],
    }
    text = zoo_cards.how_trained(later)
    assert f"{first['samples'] + 1_000:,} samples in 2 runs" in text
    runs = text.split("### Run ")[1:]
    assert f"{first['samples']:,} samples in {first['steps']:,} steps" in runs[0]
    assert f"precision {first['precision']}, seed {first['seed']}" in runs[0]
    assert "1,000 samples in 10 steps; Muon 0.25" in runs[1]
    assert "precision float32, seed 5" in runs[1]
    assert "falling linearly from 20% of the run" in runs[1]
    assert "Curriculum" not in runs[1]
    assert text.count("Architecture") == text.count("Data: ") == 1
    assert "](../rte-nano/README.md)" not in text  # the model does not come from itself
    from_another = later | {"earlier": [first | {"init_from": "rte-micro"}]}
    assert zoo_cards.how_trained(from_another).count("](../rte-micro/README.md)") == 1
    assert "run 1" in zoo_cards.about_the_course(later)
    assert "run 1" not in zoo_cards.about_the_course(first)


def test_a_card_says_which_noises_a_course_has():
    old = zoo_cards.training(ZOO / "rte-nano")
    assert "the level is that of one noise" in zoo_cards.about_the_course(old)
    new = zoo_cards.about_the_course(old | {"noises": "one a scene"})
    assert "scene i from noise i" in new
    assert "one noise" not in new
