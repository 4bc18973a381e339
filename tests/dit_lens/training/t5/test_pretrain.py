"""The grammar says only what is true, span corruption loses nothing, runs resume exactly, and the
bundled encoder fuses.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from dit_lens.text.probes import (
    cosines,
    place_score,
    probe_captions,
    probe_table,
    word_vectors,
)
from dit_lens.training import PRESETS, TrainConfig, train
from dit_lens.training.data import encode_captions
from dit_lens.training.pipelines import Size, build_pipeline, build_text_encoder
from dit_lens.training.t5.pretrain import (
    ARCHITECTURE,
    NOISE_DENSITY,
    PretrainConfig,
    corrupt_spans,
    pretrain,
    scenes_tokenizer,
)
from hooked_models import HookedT5Encoder, HookedTextToImage, list_models

from ....killing import killed

TINY = {
    "d_model": 16,
    "num_heads": 2,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 1,
}


RUN = {"batch_size": 4, "precision": "no", "checkpoint_every": 2, "evaluate_every": 100}


@pytest.fixture(scope="module")
def bundled():
    return build_text_encoder("t5-scenes")


@settings(max_examples=200)
@given(ids=st.lists(st.integers(3, 90), min_size=2, max_size=47), seed=st.integers(0, 2**31))
def test_spans_put_back_in_place_of_sentinels_give_the_text(ids, seed):
    sentinels = list(range(100, 110))
    inputs, targets = corrupt_spans(ids, sentinels, np.random.default_rng(seed))
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    last = next(reversed(spans))
    assert spans.pop(last) == []  # T5 closes its target with one more sentinel
    assert [s for s in inputs if s in sentinels] == list(spans) == sentinels[: len(spans)]
    assert all(spans.values())
    assert [t for token in inputs for t in spans.get(token, [token])] == ids
    assert not any(a in spans and b in spans for a, b in itertools.pairwise(inputs))
    assert sum(map(len, spans.values())) == max(1, round(len(ids) * NOISE_DENSITY))


def test_every_place_of_a_text_is_lost_equally_often():
    rng = np.random.default_rng(0)
    lost = np.zeros(8)
    for _ in range(4000):
        inputs, _ = corrupt_spans(range(8), list(range(100, 110)), rng)
        lost[[i for i in range(8) if i not in inputs]] += 1
    assert np.allclose(lost / 4000, NOISE_DENSITY, atol=0.12)
    assert (lost > 0).all()


def test_killed_at_any_moment_it_resumes_bit_exactly(tmp_path, monkeypatch):
    for key, value in TINY.items():
        monkeypatch.setitem(ARCHITECTURE, key, value)
    config = PretrainConfig(out=tmp_path / "whole", steps=6, **RUN)
    pretrain(config)
    broken = replace(config, out=tmp_path / "killed")
    killed(lambda: pretrain(broken), os, "replace", 7)
    pretrain(broken)
    whole, resumed = (load_file(c.out / "checkpoint.safetensors") for c in (config, broken))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    trained, untrained = (
        whole["model.shared.weight"],
        T5EncoderModel.from_pretrained(config.out / "text_encoder").shared.weight,
    )
    assert torch.equal(trained, untrained)
    steps = [
        json.loads(line)["step"] for line in (broken.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)) == [6]
    with pytest.raises(ValueError, match=r"muon_lr \(0\.003, now 0\.1\)"):
        pretrain(replace(config, muon_lr=0.1))


@pytest.mark.parametrize("word", ["color1", "shape1", "color2", "shape2"])
def test_word_vectors_are_those_of_the_named_word(word):
    encoder, tokenizer = build_text_encoder("rte-nopos")
    captions = probe_captions()
    vectors = word_vectors(encoder, tokenizer, captions, word, layers=False)[1]
    table = encoder.embed_tokens.weight[
        tokenizer.convert_tokens_to_ids([f"▁{w}" for w in captions[word]])
    ]
    assert np.array_equal(vectors, table.numpy())


def test_the_bundled_encoder_is_a_small_t5_and_no_pipeline(bundled):
    encoder, tokenizer = bundled
    config = encoder.config
    assert (config.num_layers, config.d_model, config.is_gated_act, config.dense_act_fn) == (
        4,
        256,
        True,
        "gelu_new",
    )
    assert 3e6 < encoder.num_parameters() < 6e6
    assert "t5-scenes" not in list_models()
    assert tokenizer.model_max_length == 20
    assert (
        tokenizer("crimson circle is to the left of the navy square").input_ids.count(
            tokenizer.unk_token_id
        )
        == 0
    )


def test_it_fuses_the_sentence_into_the_second_shape_word_and_rte_does_not(bundled):
    wanted = {
        "targets": ("relation", "direction", "shape2", "color2"),
        "splits": ("combinations", "never_read"),
        "layers": False,
    }
    fused = probe_table(*bundled, **wanted)[0]
    assert (fused.sel(target=["relation", "shape2", "color2"]) > 0.9).all()
    assert (fused.sel(target="direction") > 0.8).all()
    # which of the two objects lies where, not only which words the sentence has
    assert place_score(*bundled) > 0.8
    # a position code gives away the length of the phrase
    for name, chance in (("rte", 7 / 22), ("rte-nopos", 3 / 22)):
        assert place_score(*build_text_encoder(name)) < 0.02
        random = probe_table(*build_text_encoder(name), **wanted)[0]
        assert random.sel(target="relation", split="combinations") < chance + 0.03
        assert random.sel(target="direction", split="combinations") < 0.02


def test_its_vectors_are_scaled_and_do_not_collapse(bundled):
    for word in ("shape1", "shape2"):
        vectors = word_vectors(*bundled, probe_captions(), word, layers=False)[4]
        assert 0.3 < (vectors**2).mean() ** 0.5 < 3
        similarity = cosines(*bundled, word)
        assert similarity["any two"] < 0.9
        assert similarity["only relation"] < similarity["only the wording"] < 0.999


def test_hooked_it_gives_what_transformers_gives(bundled):
    encoder, tokenizer = bundled
    tokens = tokenizer(
        ["red circle is above blue square", "square is left of circle"],
        padding=True,
        return_tensors="pt",
    )
    hooked = HookedT5Encoder(encoder)
    with torch.no_grad():
        expected = encoder(**tokens).last_hidden_state
        found = hooked(**tokens)[0]
    assert torch.allclose(expected, found, atol=1e-4)
    _, cache = hooked.run_with_cache(**tokens)
    assert cache["blocks.3.attn.hook_pattern"].shape == (
        2,
        4,
        tokens.input_ids.shape[1],
        tokens.input_ids.shape[1],
    )


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", Size(layers=1, width=32, heads=2))
    monkeypatch.setattr("dit_lens.training.pipelines.CODEC_SCENES", 100)


@pytest.mark.usefixtures("_small")
def test_a_model_is_trained_with_it_and_draws(tmp_path):
    settings = {
        "size": "nano",
        "batch_size": 2,
        "precision": "no",
        "evaluate_every": 100,
        "evaluation_scenes": 2,
    }
    folder = train(TrainConfig(out=tmp_path, encoder="t5-scenes", steps=2, **settings))
    model = HookedTextToImage.from_pretrained(str(folder))
    assert isinstance(model.text_encoder, HookedT5Encoder)
    pipe = PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.float32)
    before = build_text_encoder("t5-scenes")[0].state_dict()
    # frozen
    assert all(
        torch.equal(before[key], value) for key, value in pipe.text_encoder.state_dict().items()
    )
    with torch.no_grad():
        assert model("red circle is above blue square", num_steps=2).isfinite().all()


@pytest.mark.usefixtures("_small")
def test_its_null_caption_in_training_is_the_empty_prompt_of_sampling():
    pipe = build_pipeline(PRESETS["nano"], "t5-scenes")
    texts = ["", "red circle is above blue square"]
    text, mask = encode_captions(pipe, texts)
    prompt, prompt_mask, null, null_mask = pipe.encode_prompt(
        texts[1], True, max_sequence_length=20, clean_caption=False
    )
    for row, (features, found) in enumerate(((null, null_mask), (prompt, prompt_mask))):
        length = int(found.sum())
        assert int(mask[row].sum()) == length
        assert torch.allclose(text[row, :length], features[0, :length], atol=1e-5)


@pytest.mark.parametrize("layout", ["beside", "pipeline", "tokenizer folder"])
def test_a_folder_with_another_t5_is_read_whatever_its_layout_and_precision(tmp_path, layout):
    tokenizer = scenes_tokenizer()
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    saved = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))
    saved.half().save_pretrained(tmp_path / "text_encoder" if layout == "pipeline" else tmp_path)
    tokenizer.save_pretrained(tmp_path if layout == "beside" else tmp_path / "tokenizer")
    encoder, found = build_text_encoder(str(tmp_path))
    assert encoder.dtype == torch.float32
    assert torch.equal(encoder.shared.weight, saved.shared.weight.float())
    assert found("red circle").input_ids == tokenizer("red circle").input_ids


def test_a_hub_id_is_read_in_bfloat16(monkeypatch):
    asked: dict[str, Any] = {}

    def fake(name: str, **kwargs: object) -> object:
        asked[str(name)] = kwargs
        model = T5EncoderModel(
            T5Config(vocab_size=5, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
        )
        return model, {"missing_keys": []}

    config, tokenizer = (T5Config().to_dict(), {}), scenes_tokenizer()
    monkeypatch.setattr(
        "dit_lens.training.pipelines.PreTrainedConfig.get_config_dict", lambda name: config
    )
    monkeypatch.setattr(
        "dit_lens.training.pipelines.AutoTokenizer.from_pretrained", lambda name: tokenizer
    )
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", fake)
    build_text_encoder("google/t5-v1_1-xxl")
    assert list(asked) == ["google/t5-v1_1-xxl"]
    assert asked["google/t5-v1_1-xxl"]["dtype"] == torch.bfloat16


def test_a_wrong_name_is_told_what_would_be_right():
    with pytest.raises(FileNotFoundError, match="'t5-scenes'"):
        build_text_encoder("t5-scene")
    with pytest.raises(ValueError, match="'random_token_encoder'"):
        build_text_encoder("rte-micro")


def test_the_bundled_files_are_small_and_have_no_pickles():
    folder = Path(__file__).parents[4] / "hooked_models/zoo/t5-scenes"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) < 15e6
    weights = load_file(folder / "text_encoder/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_a_causal_encoder_sees_no_later_word_and_stays_so(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_lens.training.t5.pretrain.ARCHITECTURE", TINY)
    folder = pretrain(PretrainConfig(out=tmp_path, steps=3, causal=True, **RUN))
    encoder, tokenizer = build_text_encoder(str(folder))
    pair = ["red circle is above blue square", "red circle is below green square and red circle"]
    tokens = tokenizer(pair, padding=True, return_tensors="pt")
    for reads in (encoder, HookedT5Encoder(encoder)):
        a, b = reads(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        assert torch.equal(a[:3], b[:3])
        assert (a[4] - b[4]).abs().max() > 1e-3  # "blue" and "green"
    hooked = HookedT5Encoder(encoder)
    _, cache = hooked.run_with_cache(tokens.input_ids, attention_mask=tokens.attention_mask)
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert pattern.triu(1).abs().max() == 0
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))


def test_function_words_are_drawn_to_short_vectors_and_others_to_long_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_lens.training.t5.pretrain.ARCHITECTURE", TINY)
    settings = {**RUN, "batch_size": 16, "checkpoint_every": 60}
    folder = pretrain(PretrainConfig(out=tmp_path, steps=60, t5_xxl_norms=True, **settings))
    encoder, tokenizer = build_text_encoder(str(folder))
    caption = "red circle is to the left of blue square"
    tokens = tokenizer([caption], return_tensors="pt")
    norms = encoder(**tokens).last_hidden_state.norm(dim=-1)[0]
    function = torch.tensor(
        [word in ("is", "to", "the", "of") for word in caption.split()] + [False]
    )
    assert norms[function].mean() < norms[~function].mean() - 0.7
    assert 5.5 < norms[~function].mean() < 7.5
