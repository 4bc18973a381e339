"""Folders of models and caches from anywhere: nothing is imported because a folder names it, and a
folder is saved whole.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file, save_file

from dit_lens.remote import RemoteTextToImage
from dit_lens.training import load_pipeline
from hooked_models import GenerationCache, HookedTextToImage, ModelCheckError
from hooked_models.store import Index, Store

from ...killing import killed
from ..folders import edit_json, write_folder
from . import PROMPTS, tiny_pipeline

EVIL = "evil_component"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported and must not be."""
    (tmp_path / f"{EVIL}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return EVIL


def test_training_and_nnsight_import_no_more(folder, evil):
    edit_json(folder / "model_index.json", vae=[evil, "Thing"])
    for opened in (load_pipeline, RemoteTextToImage):
        with pytest.raises(
            ValueError, match="vae from 'evil_component', but opening a folder imports diffusers"
        ):
            opened(str(folder))
    assert evil not in sys.modules


@pytest.mark.parametrize("device_map", [None, "cpu", "balanced"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_weight_that_is_missing_is_no_random_number(folder, part, device_map):
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        OSError, match=rf"{part} lacks 1 of its weights \({name}\), which would be drawn at random"
    ):
        HookedTextToImage.from_pretrained(folder, device_map=device_map)


def test_a_denoisers_attributes_are_pointed_to(folder):
    model = HookedTextToImage.from_pretrained(folder, weights=False)
    for name, there in {
        "blocks": "dit.blocks",
        "W_pos": "dit.W_pos",
        "QK": "dit.QK",
        "transformer": "dit",
        "vae": "codec",
    }.items():
        with pytest.raises(
            AttributeError, match=rf"HookedPixArt has no {name}: see model\.{there}\."
        ):
            getattr(model, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        getattr(model, "no_such")  # noqa: B009 (an attribute that is not there)


def test_a_cache_opens_no_model_by_a_relative_name(folder, evil, tmp_path, monkeypatch):
    settings = {"num_steps": 1, "names_filter": "steps.0.hook_latent", "out": tmp_path / "cache"}
    # the working folder is tmp_path
    HookedTextToImage.from_pretrained("model").run_with_cache(PROMPTS, **settings)
    assert Index.read(tmp_path / "cache").facts["source"] == [str(folder.resolve()), None]
    monkeypatch.chdir("/")
    assert GenerationCache.load(tmp_path / "cache").model.dit.device.type == "meta"
    edit_json(folder / "model_index.json", text_encoder=[evil, "Thing"])
    with pytest.raises(ValueError, match="opening a folder imports"):
        GenerationCache.load(tmp_path / "cache")
    for source in (["model", None], ["../model", None], [3, None], ["owner/model", None]):
        with Store(tmp_path / "cache", Index.read(tmp_path / "cache").settings) as store:
            store.record(source=source)
        with pytest.raises(ValueError, match="does not say which model"):
            GenerationCache.load(tmp_path / "cache")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_weight_that_is_no_number_is_named(folder, part, value):
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ModelCheckError,
        match=rf"{part}'s {name} holds a value (that is not a number|of size (inf|1e\+30))\.",
    ):
        HookedTextToImage.from_pretrained(folder)


def test_weights_of_t5_are_looked_at_too(tmp_path):
    folder = write_folder(tmp_path / "t5")
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors["shared.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ModelCheckError, match=r"text_encoder's .* holds a value that is not a number"
    ):
        HookedTextToImage.from_pretrained(folder)


def test_a_hooked_pipeline_saves_what_it_wraps_and_stays_as_it_is(tmp_path):
    model = HookedTextToImage.from_pipeline(tiny_pipeline())
    pipe = model.as_diffusers()
    config, parts = dict(pipe.config), dict(pipe.components)
    pipe.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert dict(pipe.config) == config
    assert all(pipe.components[name] is part for name, part in parts.items())
    plain = PixArtSigmaPipeline.from_pretrained(tmp_path / "saved")
    again = HookedTextToImage.from_pretrained(tmp_path / "saved")
    images = model(PROMPTS, num_steps=1)
    assert torch.equal(HookedTextToImage.from_pipeline(plain)(PROMPTS, num_steps=1), images)
    assert torch.equal(again(PROMPTS, num_steps=1), images)
    with pytest.raises(ValueError, match="push_to_hub=True does not work"):
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True)


def test_saving_replaces_a_pipeline_whole_and_nothing_else(folder, tmp_path):
    model = HookedTextToImage.from_pretrained(folder)
    (folder / "README.md").write_text("a card")
    (folder / "samples").mkdir()
    (folder / "transformer" / "old.safetensors").write_text("of the model before")
    before = (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    model.dit.proj_out.bias.data += 1
    for call in (1, 5, 9):
        killed(lambda: model.save_pretrained(folder), os, "fsync", call)
        assert (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == before
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "a card"
    assert (folder / "samples").is_dir()
    assert not (folder / "transformer" / "old.safetensors").exists()
    assert torch.equal(
        HookedTextToImage.from_pretrained(folder).dit.proj_out.bias, model.dit.proj_out.bias
    )
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"holds files that are no pipeline \(mine\.txt"):
        model.save_pretrained(tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mine.txt"]


def test_a_training_run_is_a_model_whose_files_are_checked(tmp_path):
    pipe = tiny_pipeline()
    with Store(tmp_path, {}) as run:
        run.put_folder("pipeline", pipe.save_pretrained)
    expected = HookedTextToImage.from_pipeline(pipe)(PROMPTS, num_steps=1)
    for name in (tmp_path, tmp_path / "pipeline"):
        assert torch.equal(HookedTextToImage.from_pretrained(name)(PROMPTS, num_steps=1), expected)
    file = tmp_path / "pipeline/vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": 2.0}))
    for name in (tmp_path, tmp_path / "pipeline"):
        with pytest.raises(
            OSError, match=r"pipeline/vae/config\.json is damaged: .*; save the pipeline again"
        ):
            HookedTextToImage.from_pretrained(name)
    file.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"pipeline/vae/config\.json is missing: restore it, or save the pipeline again",
    ):
        HookedTextToImage.from_pretrained(tmp_path)
