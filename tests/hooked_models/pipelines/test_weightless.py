"""Names and cache estimates of models at their real size, from configurations alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dit_lens import prompts
from hooked_models import HookedTextToImage
from hooked_models.generation.cache_estimate import estimate

from ..tiny_pipelines import NO_FOLDER, PIPELINES, tiny_pipeline, tokenizer
from . import PROMPTS

CONFIGS = json.loads((Path(__file__).parents[2] / "data" / "large_models.json").read_text())
"""Model → its pipeline class and the public configuration of each component, without tokenizers."""
PROMPT = "red circle is above blue square"
SECONDS = 10
"""Seconds of CPU time, for opening and estimating."""
EXPECTED: dict[str, tuple[int, int, int, int | None]] = {
    "FLUX.1-dev": (11_901_408_320, 57, 24, 512),
    "SD3.5-large": (8_056_627_520, 38, 38, 77 + 256),
    "Qwen-Image": (20_430_401_088, 60, 24, None),
    "Z-Image-Turbo": (6_154_908_736, 30, 30, None),
}
"""Model → parameters of its transformer, blocks, heads and text positions (None: as long as the
prompt).
"""


def write_folder(name: str, folder: Path) -> Path:
    """A pipeline's folder without weights, with a small tokenizer in the place of each of its
    own.
    """
    parts = dict(CONFIGS[name])
    index: dict[str, Any] = {
        "_class_name": parts.pop("pipeline"),
        "_diffusers_version": diffusers.__version__,
    }
    for part, values in parts.items():
        kind = values["_class_name"]
        index[part] = ["diffusers" if hasattr(diffusers, kind) else "transformers", kind]
        (folder / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps(values))
        if part.startswith("text_encoder"):
            own = part.replace("text_encoder", "tokenizer")
            index[own] = ["transformers", "T5Tokenizer"]
            tokenizer(77 if kind.startswith("CLIP") else 512).save_pretrained(folder / own)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Models by name, each opened once."""

    @cache
    def open_(name: str) -> Any:
        folder = write_folder(name, tmp_path_factory.mktemp("model"))
        return HookedTextToImage.from_pretrained(folder, weights=False, dtype=torch.bfloat16)

    return open_


@pytest.mark.parametrize("name", EXPECTED)
def test_names_and_estimates_cost_seconds(name: str, opened: Callable[[str], Any]) -> None:
    parameters, n_layers, n_heads, n_text = EXPECTED[name]
    start = time.process_time()
    model = opened(name)
    size = estimate(model, PROMPT, 28, names_filter=lambda name: name.endswith("attn.hook_pattern"))
    assert time.process_time() - start < SECONDS
    assert sum(parameter.numel() for parameter in model.pipe.transformer.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.pipe.transformer.parameters())
    layout = model.layout(PROMPT)
    text = layout.length("joint") - layout.n_image
    assert n_text in (None, text)
    assert layout.grid == (64, 64, 1)  # 1024 pixels in patches of 16
    last = f"blocks.{n_layers - 1}.attn.hook_z"
    assert f"steps.27.cond.{last}" in estimate(model, PROMPT, 28, names_filter=last).sizes
    assert size.nbytes == 28 * n_layers * n_heads * (64 * 64 + text) ** 2 * 2
    one = estimate(
        model,
        PROMPT,
        28,
        names_filter=lambda name: name.endswith("attn.hook_pattern"),
        heads=["L5H1"],
    )
    assert one.nbytes * n_layers * n_heads == size.nbytes
    stream = estimate(model, [PROMPT] * 3, 2, names_filter="blocks.1.hook_resid_post", steps=0)
    assert stream.nbytes == 3 * (64 * 64 + text) * model.cfg.d_model * 2


def test_words_are_found_without_weights_and_nothing_is_drawn(
    opened: Callable[[str], Any],
) -> None:
    model = opened("SD3.5-large")
    mask = prompts.token_mask(model, PROMPT, prompts.word("circle"))
    assert mask[0].nonzero().flatten().tolist() == [1, 77 + 1]
    with pytest.raises(ValueError, match="opened without weights"):
        model(PROMPT, num_steps=1)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in NO_FOLDER])
def test_estimates_without_weights_are_those_of_the_live_model(name: str, tmp_path: Path) -> None:
    pipe, call = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    sizes = []
    for model in (
        HookedTextToImage.from_pipeline(pipe),
        HookedTextToImage.from_pretrained(tmp_path, weights=False),
    ):
        found: Any = model
        found.options = {
            key: value
            for key, value in call.items()
            if key not in ("num_inference_steps", "output_type")
        }
        sizes.append(estimate(found, PROMPTS, 2, branch="both").sizes)
    assert sizes[0] == sizes[1]
