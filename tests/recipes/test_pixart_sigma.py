"""The PixArt-Σ recipe, whole, on a small folder of the real classes; and boxes, from a real
detector's code and from a file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
from PIL import Image
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.pipelines import small_vae
from dit_lens import detection
from dit_lens.store import Store
from recipes import pixart_sigma
from recipes.pixart_sigma import NONE, OBJECTS, Config, asked, located
from tests.hooked_models.tiny import tiny_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """T5, AutoencoderKL, a transformer with PixArt-Σ's settings at small size, its scheduler."""
    path = tmp_path_factory.mktemp("sigma")
    words = [
        "A",
        "a",
        "is",
        "on",
        "the",
        "left",
        "right",
        "of",
        *(word for pair in OBJECTS[:2] for word in pair),
    ]
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        (".", -3.0),
        *(("▁" + word, -2.0) for word in words),
    ]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=300)
    torch.manual_seed(0)
    sizes = {
        "d_model": 12,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": 3,
        "feed_forward_proj": "gated-gelu",
    }
    PixArtSigmaPipeline(
        tokenizer,
        T5EncoderModel(T5Config(vocab_size=len(pieces), **sizes)).eval(),
        small_vae(4, sample_size=64),
        tiny_transformer(caption_channels=12, num_layers=3),
        DPMSolverMultistepScheduler(),
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """OWLv2, tiny and random."""
    path = tmp_path_factory.mktemp("owl")
    letters = [chr(code) for code in range(97, 123)]
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1}
    config = Owlv2Config(
        text_config={"vocab_size": len(pieces), "max_position_embeddings": 16, **small, **ends},
        vision_config={"image_size": 64, "patch_size": 16, **small},
        projection_dim=16,
    )
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(path)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    Owlv2Processor(
        Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer
    ).save_pretrained(path)
    return path


def test_it_runs_from_end_to_end_and_goes_on(folder, detector, tmp_path, capsys):
    config = Config(str(folder), device="cpu", detector=str(detector), smoke=True, out=tmp_path)
    pixart_sigma.main(config)
    told = " ".join(capsys.readouterr().out.split())
    assert "8 prompts × 1 seeds × 4 conditions = 32 images of 64 px, at most" in told
    first = json.loads((tmp_path / "claims.json").read_text())
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").glob("[!.]*.png")}
    assert len(pictures) == 8 * 4
    next(iter(pictures)).unlink()
    pixart_sigma.main(config)
    assert json.loads((tmp_path / "claims.json").read_text()) == first
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").glob("[!.]*.png")}
    assert sum(again[path] != when for path, when in pictures.items()) == 1
    shares = {claim["claim"]: claim["mean"] for claim in first["claims"] if "R²" in claim["claim"]}
    assert len(shares) == 6
    assert (tmp_path / "screening.png").exists()


def test_the_sides_are_read_from_boxes_of_the_users_own(tmp_path):
    """Two prompts, one picture each: the first drawn as said, the second the other way round; a
    third lacks an object.
    """
    wanted = asked(1)[:3]
    names = {f"none-{i:03d}-000.png": (i, 0) for i in range(3)}
    rows = []
    for i, (name, prompt) in enumerate(zip(names, wanted, strict=True)):
        first, second = (10, 50) if (prompt.side == "left") == (i == 0) else (50, 10)
        rows.append((name, prompt.first, 0.9, first, 0, first + 10, 10))
        # less sure: does not count
        rows.append((name, prompt.first, 0.3, 60 - first, 0, 70 - first, 10))
        if i < 2:
            rows.append((name, prompt.second, 0.8, second, 0, second + 10, 10))
    path = tmp_path / "boxes.csv"
    pd.DataFrame(rows, columns=list(detection.COLUMNS)).to_csv(path, index=False)
    with Store(tmp_path, {}) as pictures:
        found = located(Config(boxes=path), wanted, {NONE: names}, pictures)
    assert found["both"].tolist() == [1, 1, 0]
    assert found["right"].tolist()[:2] == [1, 0]
    assert np.isnan(found["right"].iloc[2])


def test_boxes_without_a_column_are_refused(tmp_path):
    pd.DataFrame({"image": ["a.png"], "label": ["cat"]}).to_parquet(
        path := tmp_path / "boxes.parquet"
    )
    with pytest.raises(ValueError, match="no column score, xmin"):
        detection.read_boxes(path)


def test_a_detectors_boxes_are_its_own(detector, tmp_path):
    """Against the model called by hand."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    image.save(path := tmp_path / "a.png")
    boxes = detection.detect([path], {"a.png": ["cat", "dog"]}, str(detector), threshold=0.0)
    processor, model = (
        Owlv2Processor.from_pretrained(detector),
        Owlv2ForObjectDetection.from_pretrained(detector).eval(),
    )
    with torch.no_grad():
        out = model(**processor(text=[["cat"]], images=image, return_tensors="pt"))
    expected = out.logits[0, :, 0].sigmoid()
    of_cat = boxes[boxes["label"] == "cat"]["score"].to_numpy()
    np.testing.assert_allclose(np.sort(of_cat), np.sort(expected.numpy()), atol=1e-5)
    assert set(boxes["label"]) == {"cat", "dog"}


def test_pictures_of_another_model_are_not_taken(folder, tmp_path):
    """Files of the right names that were drawn with other steps, or that nobody listed, count as
    not there or are refused.
    """
    model = pixart_sigma.HookedTextToImage.from_pretrained(folder)
    config, wanted = Config(str(folder), num_steps=1, seeds=1, out=tmp_path), asked(1)[:1]
    (tmp_path / "none-000-000.png").write_bytes(b"a picture of something else")
    with Store(tmp_path, {"num_steps": 1}) as pictures:
        names = pixart_sigma.draw(model, config, wanted, NONE, [], pictures)
        with pixart_sigma.Image.open(tmp_path / next(iter(names))) as picture:
            assert picture.size == (64, 64)
        whole = (tmp_path / "none-000-000.png").read_bytes()
    with pytest.raises(ValueError, match=r"other num_steps \(1, now 2\)"):
        Store(tmp_path, {"num_steps": 2})
    (tmp_path / "none-000-000.png").write_bytes(whole[:-1])
    with (
        Store(tmp_path, {"num_steps": 1}) as pictures,
        pytest.raises(OSError, match=r"none-000-000\.png is damaged"),
    ):
        pixart_sigma.draw(model, config, wanted, NONE, [], pictures)
