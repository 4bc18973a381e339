"""Tokens of a prompt at the text positions of any denoiser: marks followed through its encoding.

Each token's hidden state is replaced by a mark of (encoder call, row, token), and the pipeline's
own code goes on with it: it cuts templates off, drops pads, joins encoders. The marks that reach
the denoiser say which token stands where. Tokenizers are copies that also keep character offsets.
So no pipeline's treatment of text is written again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..families.adapter import Family
from ..text_encoders.words import EncodedText, TokenKind, split_words
from .loops import Call
from .pipeline_inputs import PipelineInputs
from .pipeline_loop import Running, Trial

DIGIT = 128
"""Marks are exact in bfloat16, which holds whole numbers up to 256."""


@dataclass
class _Reading:
    """One text as a tokenizer read it."""

    encoded: EncodedText
    tokenizer: Any


@dataclass
class _Trace:
    """Texts that were tokenised, and the token ids [row pos] of each call of a text encoder."""

    readings: list[_Reading] = field(default_factory=list)
    ids: list[list[list[int]]] = field(default_factory=list)

    def at(self, call: int, row: int, prompt: str) -> list[_Token]:
        """The tokens of one row of an encoder's call, as parts of the prompt."""
        ids = self.ids[call][row]
        found = [
            (reading, start)
            for reading in self.readings
            if (start := _place(reading.encoded.ids, ids)) is not None
        ]
        if not found:
            return [_Token(token, (0, 0), "text", True, False) for token in ids]
        if split_words(prompt):  # a pipeline may tokenise a template apart
            found = [each for each in found if each[0].encoded.phrases(prompt)] or found
        reading, start = max(
            found, key=lambda each: (len(each[0].encoded.ids), len(each[0].encoded.text))
        )
        pad = reading.tokenizer.pad_token_id
        inside = _tokens_of(reading.encoded, prompt)
        around = [
            _Token(token, (0, 0), "pad" if token == pad else "text", True, False) for token in ids
        ]
        return [*around[:start], *inside, *around[start + len(inside) :]]


@dataclass(frozen=True)
class _Token:
    id: int
    span: tuple[int, int]
    kind: TokenKind
    special: bool
    unknown: bool


NOTHING = _Token(-1, (0, 0), "pad", True, False)
"""A position that no token stands at."""


def encoded_at_positions(inputs: PipelineInputs, family: Family) -> list[EncodedText]:
    """Each prompt with one entry for each text position of the denoiser, of all text encoders.

    Args:
        inputs: of a run; nothing but its text is computed.
        family: names the transformer's argument that holds the (first) text; others whose names
            begin with it follow.

    Raises:
        ValueError: the pipeline changes a prompt's words before it encodes them.
        TypeError: a tokenizer keeps no character offsets.
    """
    trace, pipe = _Trace(), copy.copy(inputs.pipe)
    for name, part in inputs.pipe.components.items():
        if _is_tokenizer(part):
            vars(pipe)[name] = _reading(part, trace)
        elif _is_tokenizer(inner := getattr(part, "tokenizer", None)) and not isinstance(
            part, nn.Module
        ):
            vars(pipe)[name] = processor = copy.copy(part)
            processor.tokenizer = _reading(inner, trace)
    encoders = [
        part
        for part in pipe.components.values()
        if isinstance(part, nn.Module) and hasattr(part, "get_input_embeddings")
    ]
    encoders = [part for part in encoders if part is not pipe.transformer]
    with torch.no_grad(), _marking(encoders, trace, family):
        arguments = text_arguments(replace(inputs, pipe=pipe, encoded=()))
    marks = _marks(arguments, family.text)
    return [_joined(prompt, row, trace) for prompt, row in zip(inputs.prompts, marks, strict=True)]


def text_arguments(inputs: PipelineInputs) -> Mapping[str, Any]:
    """Arguments of the first conditional call of a run's transformer, latents left out.

    The call itself is not computed.
    """
    try:
        Running(inputs, _FirstCall(), 1).quiet().run(output_type="latent")
    except _Reached as reached:
        return reached.arguments
    raise AssertionError("a run has a conditional call in its first step")


def _is_tokenizer(part: Any) -> bool:
    return hasattr(part, "is_fast") and callable(part)


# Tokenizers


def _reading(tokenizer: Any, trace: _Trace) -> Any:
    """Copy of a tokenizer whose calls also leave texts and offsets in `trace`."""
    if not tokenizer.is_fast:
        raise TypeError(
            f"{type(tokenizer).__name__} keeps no character offsets, by which words are found: "
            "load its fast version."
        )
    kind: Any = type(tokenizer)

    def call(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        several = [text] if isinstance(text, str) else text
        more = {
            "return_offsets_mapping": True,
            "return_attention_mask": True,
            "return_tensors": None,
        }
        again = kind.__call__(self, several, *args, **kwargs | more)
        rows = zip(again.input_ids, again.offset_mapping, again.attention_mask, strict=True)
        for one, row in zip(several, rows, strict=True):
            trace.readings.append(_Reading(EncodedText.read(tokenizer, one, *row), tokenizer))
        return kind.__call__(self, text, *args, **kwargs)

    copied = copy.copy(tokenizer)
    copied.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__}
    )
    return copied


def _place(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Where `part` begins in `whole`, if it is in it."""
    starts = range(len(whole) - len(part) + 1)
    return next(
        (start for start in starts if list(whole[start : start + len(part)]) == list(part)), None
    )


def _tokens_of(encoded: EncodedText, prompt: str) -> list[_Token]:
    """Tokens of a text that holds the prompt, with their characters in it.

    Those around are special.
    """
    words, places = (
        split_words(prompt),
        encoded.phrases(prompt) if split_words(prompt) else [(0, 0)],
    )
    start, end = places[-1] if places else (0, 0)
    shift = start - words[0].start if words else 0
    if not places and encoded.text.strip() and encoded.text in prompt:  # a part is encoded
        end, shift = len(encoded.text), -prompt.index(encoded.text)
        return [_token(encoded, i, 0, end, shift) for i in range(len(encoded.ids))]
    if [
        word.start - shift for word in encoded.words if start <= word.start and word.end <= end
    ] != [word.start for word in words]:
        raise ValueError(
            f"{prompt!r} is encoded as {encoded.text!r}: select its tokens by positions or a mask."
        )
    return [_token(encoded, i, start, end, shift) for i in range(len(encoded.ids))]


def _token(encoded: EncodedText, i: int, start: int, end: int, shift: int) -> _Token:
    """Token `i`, with its characters in the prompt at `start` to `end` of the text."""
    low, high = encoded.spans[i]
    mark = not encoded.text[low:high].strip()
    within = not encoded.special[i] and (high == start if mark else low < end and start < high)
    span = (max(low - shift, 0), high - shift) if within else (0, 0)
    return _Token(encoded.ids[i], span, encoded.kinds[i], not within, encoded.unknown[i] and within)


# Marks


@contextmanager
def _marking(encoders: Sequence[nn.Module], trace: _Trace, family: Family) -> Iterator[None]:
    """Let text encoders return marks for the time of the block."""

    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return output
        trace.ids.append(ids.tolist())
        return _replaced(output, (ids.shape[0], ids.shape[1]), len(trace.ids))

    with ExitStack() as stack:
        for encoder in encoders:
            embedding, layers = family.layerwise(encoder) if family.layerwise else (encoder, ())
            stack.callback(embedding.register_forward_hook(mark, with_kwargs=True).remove)
            for layer in layers:  # passes marks on
                stack.callback(layer.register_forward_hook(lambda m, args, out: args[0]).remove)
        yield


def _replaced(output: Any, shape: tuple[int, int], number: int) -> Any:
    """Hidden states [row pos d] of an encoder's output replaced by marks."""
    if isinstance(output, Tensor):
        if output.ndim != 3 or tuple(output.shape[:2]) != shape or not output.is_floating_point():
            return output
        rows, length = shape
        marks = torch.zeros_like(output)
        marks[..., 0] = number
        marks[..., 1] = torch.arange(rows, device=output.device)[:, None].to(output)
        positions = torch.arange(length, device=output.device)
        marks[..., 2], marks[..., 3] = (
            (positions % DIGIT).to(output),
            (positions // DIGIT).to(output),
        )
        return marks
    if isinstance(output, (tuple, list)):
        return type(output)(_replaced(each, shape, number) for each in output)
    if isinstance(output, Mapping):
        for key in list(output):
            output[key] = _replaced(output[key], shape, number)  # type: ignore[index]
    return output


class _Reached(BaseException):  # which no pipeline reports as an error
    """The arguments of the first conditional call of the transformer."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _FirstCall(Trial):
    """A visitor that ends the loop at the first conditional call."""

    def denoise(self, call: Call, x: Tensor, timestep: Any, text: Any) -> Tensor:
        if "cond" not in call.branches:
            return torch.zeros_like(x)
        part = call.part("cond")
        raise _Reached(text.expanded().take(torch.arange(part.start, part.stop)).arguments)


def _marks(arguments: Mapping[str, Any], text: str) -> list[Float[Tensor, "text_pos 4"]]:
    """The marks of each row's text, of all arguments that hold text one after the other."""
    rows: list[list[Tensor]] = []
    for name in [name for name in arguments if name == text or name.startswith(f"{text}_")]:
        value = arguments[name]
        parts = (
            list(value)
            if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 2)
            else []
        )
        if parts and all(isinstance(part, Tensor) and part.ndim > 1 for part in parts):
            rows.append(
                [part.reshape(len(part), -1)[:, :4].float().round().cpu() for part in parts]
            )
    return [torch.cat(each) for each in zip(*rows, strict=True)]


def _joined(prompt: str, marks: Float[Tensor, "text_pos 4"], trace: _Trace) -> EncodedText:
    """One text with an entry for each position."""
    rows: dict[tuple[int, int], list[_Token]] = {}

    def token(call: int, row: int, low: int, high: int) -> _Token:
        if call == 0:
            return NOTHING
        if (call, row) not in rows:
            rows[call, row] = trace.at(call - 1, row, prompt)
        return rows[call, row][low + DIGIT * high]

    tokens = [token(*map(int, mark)) for mark in marks.tolist()]
    kinds: list[TokenKind] = [each.kind for each in tokens]
    ids, spans = [each.id for each in tokens], [each.span for each in tokens]
    return EncodedText(
        prompt,
        ids,
        spans,
        kinds,
        [each.special for each in tokens],
        [each.unknown for each in tokens],
    )
