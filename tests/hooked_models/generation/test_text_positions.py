"""Words at the text positions of a pipeline's denoiser: one word changes exactly there, where
encoders do not mix tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_lens import prompts
from hooked_models import HookedTextToImage, families

from ..tiny_pipelines import PIPELINES, tiny_pipeline

FIRST, OTHER = "red circle is above blue square", "red square is above blue square"


def own(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny_pipeline(name)
    return pipe, {
        key: value
        for key, value in call.items()
        if key not in ("num_inference_steps", "output_type")
    }


def words_alone(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Hidden states that depend on the token at their own position alone."""
    ids = kwargs.get("input_ids", args[0] if args else None)

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == ids.shape:
            return torch.sin(ids[..., None] * torch.arange(1, value.shape[-1] + 1)).to(value)
        if isinstance(value, tuple):
            return tuple(map(replaced, value))
        if isinstance(value, Mapping):
            for key in list(value):
                value[key] = replaced(value[key])
        return value

    return replaced(output)


def texts_read(pipe: Any, prompt: str, options: dict[str, Any]) -> Tensor:
    """The text [row pos d] that the transformer of a plain pipeline is given in its first step."""
    family, seen = families.SUPPORTED[type(pipe.transformer).__name__], []
    text = family.text

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given = family.by_row(module, given)
        parts = [value for key, value in given.items() if key == text or key.startswith(text + "_")]
        # of a list, the prompt's own row
        parts = [part[0][None] if isinstance(part, list) else part for part in parts]
        seen.append(
            torch.cat(
                [
                    p.flatten(2) if p.ndim > 3 else p
                    for p in parts
                    if isinstance(p, Tensor) and p.ndim > 2
                ],
                dim=1,
            )
        )

    handles = [pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)]
    for part in pipe.components.values():
        if hasattr(part, "get_input_embeddings") and isinstance(part, nn.Module):
            read, layers = family.layerwise(part) if family.layerwise else (part, ())
            handles.append(read.register_forward_hook(words_alone, with_kwargs=True))
            handles += [one.register_forward_hook(lambda m, args, out: args[0]) for one in layers]
    pipe(prompt=prompt, num_inference_steps=1, output_type="latent", **options)
    for handle in handles:
        handle.remove()
    return torch.cat(seen[:2]) if seen[0].shape == seen[-1].shape else seen[0]


# whose two texts differ in width
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "HunyuanDiT"])
def test_a_word_stands_where_the_text_changes_with_it(name: str) -> None:
    pipe, options = own(name)
    changed = (texts_read(pipe, FIRST, options) != texts_read(pipe, OTHER, options)).any(-1).any(0)
    model = HookedTextToImage.from_pipeline(pipe)
    mask = prompts.token_mask(model, FIRST, prompts.word("circle"), **options)[0]
    assert mask.tolist() == changed.tolist()
    assert 1 <= int(mask.sum()) <= (3 if name == "HiDream" else 2)
    roles = prompts.token_mask(model, FIRST, "relation", **options)[0]
    assert roles.sum() == mask.sum()
    assert not (roles & mask).any()


def test_texts_of_two_encoders_stand_one_after_the_other() -> None:
    pipe, options = own("HunyuanDiT")
    model = HookedTextToImage.from_pipeline(pipe)
    mask = prompts.token_mask(model, FIRST, prompts.word("square"), **options)
    assert mask.shape == (1, 77 + 256)
    assert mask[0].nonzero().flatten().tolist() == [5, 77 + 5]


def test_a_template_is_no_part_of_the_prompt() -> None:
    pipe, options = own("SANA")
    options["complex_human_instruction"] = ["circle left of circle :"]
    model = HookedTextToImage.from_pipeline(pipe)
    plain = prompts.token_mask(model, FIRST, prompts.word("circle"), **options)
    first = prompts.token_mask(model, FIRST, prompts.word("circle", nth=1), **options)
    assert plain.sum() == first.sum() == 1
    with pytest.raises(ValueError, match="has no 'left of'"):
        prompts.token_mask(model, FIRST, prompts.word("left of"), **options)


def test_words_beyond_one_encoders_length_are_found_in_the_other() -> None:
    pipe, options = own("SD3")
    text = "red blue red blue red blue red blue red blue red circle"
    model = HookedTextToImage.from_pipeline(pipe)
    mask = prompts.token_mask(
        model, text, prompts.word("circle"), **{**options, "max_sequence_length": 20}
    )
    assert mask[0].nonzero().flatten().tolist() == [12 + 11]


def test_a_pipeline_that_spells_a_prompt_otherwise_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, options = own("FLUX.1")
    encode = type(pipe)._get_t5_prompt_embeds

    def respelled(self: Any, prompt: list[str], **more: Any) -> Any:
        return encode(self, prompt=[text.replace("circle", "left of") for text in prompt], **more)

    monkeypatch.setattr(type(pipe), "_get_t5_prompt_embeds", respelled)
    model = HookedTextToImage.from_pipeline(pipe)
    with pytest.raises(ValueError, match="select its tokens by positions or a mask"):
        prompts.token_mask(model, FIRST, prompts.word("circle"), **options)
