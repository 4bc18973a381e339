"""Folders from anywhere: nothing is imported because one names it; damage is named."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from hooked_models import HookedTextToImage

from ..folders import edit_json, write_folder
from .opened import SHARDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "is a StableDiffusionPipeline, which has no transformer",
        ),
        ({"_class_name": "Pipeline4"}, "is a Pipeline4, which diffusers .* has not"),
        (
            {"transformer": ["diffusers", "SanaTransformer2DModel"]},
            "has a SanaTransformer2DModel for its transformer",
        ),
    ],
)
def test_a_pipeline_of_another_kind(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(copy / "model_index.json", **changes)
    with pytest.raises(ValueError, match=message):
        HookedTextToImage.from_pretrained(copy)


def test_an_unsupported_transformer_is_refused_before_its_weights_are_read(copy: Path) -> None:
    edit_json(
        copy / "model_index.json",
        _class_name="QwenImagePipeline",
        transformer=["diffusers", "QwenImage21Transformer2DModel"],
    )
    next((copy / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="QwenImage21Transformer2DModel is not supported: its att"):
        HookedTextToImage.from_pretrained(copy)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_truncated_and_missing_weights(copy: Path, component: str) -> None:
    file = next((copy / component).glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(
        OSError, match=rf"{component}/{file.name} is truncated or damaged .* download it again"
    ):
        HookedTextToImage.from_pretrained(copy)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(
        FileNotFoundError, match=rf"has no {component}/{file.name} \(there is: {file.stem}.bin\)"
    ):
        HookedTextToImage.from_pretrained(copy)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", saved=SHARDS)
    next((tmp_path / "model/transformer").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"lacks transformer/diffusion_pytorch_model-00002-of-\d+.safetensors",
    ):
        HookedTextToImage.from_pretrained(tmp_path / "model")


EVIL = "evil_component"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported and must not be."""
    (tmp_path / f"{EVIL}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return EVIL


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("component", ["text_encoder", "scheduler", "safety_checker"])
def test_no_library_is_imported_because_a_folder_names_it(copy, evil, weights, component):
    edit_json(copy / "model_index.json", **{component: [evil, "Thing"]})
    shutil.copy(copy.parent / f"{evil}.py", copy / f"{evil}.py")
    with pytest.raises(
        ValueError,
        match=rf"{component} from 'evil_component', but opening a folder imports diffusers",
    ):
        HookedTextToImage.from_pretrained(copy, weights=weights)
    assert evil not in sys.modules


@pytest.mark.parametrize(
    ("component", "named"),
    [
        ("tokenizer", ["transformers", "Trainer"]),
        ("vae", ["diffusers", "DiffusionPipeline"]),
        ("text_encoder", ["transformers", "pipeline"]),
        ("scheduler", ["diffusers", "NoSuchScheduler"]),
        ("text_encoder", ["hooked_models", "HookedTextToImage"]),
    ],
)
def test_a_component_is_what_its_place_needs(copy, component, named):
    edit_json(copy / "model_index.json", **{component: named})
    for weights in (True, False):
        with pytest.raises(ValueError, match=rf"{'.'.join(named)} as its {component}, which is no"):
            HookedTextToImage.from_pretrained(copy, weights=weights)


@pytest.mark.parametrize(
    "content", [b"", b"[", b"[]", b"3", b'{"_class_name": ["a", "b"]}', b"[" * 100_000]
)
def test_a_damaged_index_of_a_pipeline_is_a_sentence(copy, content):
    (copy / "model_index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model_index\.json is damaged|is a \["):
        HookedTextToImage.from_pretrained(copy)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b'{"a": '])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "scheduler", "tokenizer"])
def test_a_damaged_json_file_is_named(copy, part, content):
    for file in (copy / part).glob("*.json"):
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{part}/{file.name} is damaged: save or download"):
            HookedTextToImage.from_pretrained(copy)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda found: found["weight_map"].popitem(), OSError, "lacks 1 of its weights"),
        (lambda found: found.pop("weight_map"), ValueError, r"index\.json is damaged"),
        (lambda found: found.update(weight_map=3), ValueError, r"index\.json is damaged"),
        (lambda found: found["weight_map"].update(x=3), FileNotFoundError, "lacks transformer/3"),
        (
            lambda found: found["weight_map"].update(x="../x.safetensors"),
            ValueError,
            r"index\.json is damaged",
        ),
    ],
)
def test_an_index_of_shards_lists_every_weight(tmp_path, edit, error, message):
    copy = write_folder(tmp_path / "model", saved={"max_shard_size": 4000})
    index = next((copy / "transformer").glob("*.index.json"))
    found = json.loads(index.read_text())
    edit(found)
    index.write_text(json.dumps(found))
    with pytest.raises(error, match=message):
        HookedTextToImage.from_pretrained(copy)
