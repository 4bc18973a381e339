"""Prompts of PixArt: the tokens and the features that they become."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from jaxtyping import Int
from torch import Tensor, nn

from ..arguments import RENAMED, integer, is_several, shown, token_ids
from ..pixart.text_state import TextState
from ..text_encoders.random_tokens import PAD_ID, HookedTokenEncoder
from ..text_encoders.words import EncodedText, encode_text
from .attached import attach
from .model import DEFAULT_GUIDANCE, HookedTextToImage
from .names import Part

_TOKENIZING = threading.Lock()
"""A tokenizer keeps its padding as state while it works."""
LONGEST_TEXT = 2**16
"""Tokens of a padded prompt."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments of a run that PixArt has not."""
    for name in options:
        raise TypeError(
            f"{name}= "
            + (
                f"is called {RENAMED[name]}= here."
                if name in RENAMED
                else "does not exist for PixArt."
            )
        )


class PixArtText(HookedTextToImage):
    """The side of a `HookedPixArt` that reads prompts.

    Example:
        >>> isinstance(HookedTextToImage.from_pretrained("rte-nano"), PixArtText)
        True
    """

    allow_unknown_words = False
    """Let the text encoder read words outside of its vocabulary, as <unk>; by default they are an
    error.
    """

    def prompt_texts(self, prompts: str | Sequence[str]) -> list[str]:
        """The texts that are tokenised: prompts in lower case, as diffusers does it.

        With `clean_caption` they are cleaned as diffusers does (addresses, HTML, quotation marks,
        brackets, …).

        Raises:
            ValueError: there is no prompt, or one is no string.
            ImportError: `clean_caption` lacks its libraries, where diffusers would go on without
                cleaning.

        Example:
            >>> HookedTextToImage.from_pretrained("rte-micro", weights=False).prompt_texts(
            ...     " Red circle"
            ... )
            ['red circle']
        """
        if isinstance(prompts, Mapping) or not (isinstance(prompts, str) or is_several(prompts)):
            raise ValueError(
                f"prompts={shown(prompts)}: give a string or several, or token ids as one tensor."
            )
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts is empty: give at least one prompt.")
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise ValueError(
                f"prompts holds {shown(wrong[0])}, which is no string: give strings, or token ids "
                "as one tensor."
            )
        texts = [prompt.lower().strip() for prompt in prompts]
        if self.clean_caption:
            if not (is_bs4_available() and is_ftfy_available()):
                raise ImportError(
                    "clean_caption=True needs two more packages: pip install beautifulsoup4 ftfy"
                )
            texts = self.as_diffusers()._text_preprocessing(texts, clean_caption=True)
        return texts

    def to_tokens(
        self, prompts: str | Sequence[str], length: int | None = None
    ) -> Int[Tensor, "batch text_pos"]:
        """Tokenize `prompt_texts(prompts)`.

        Ids with EOS, padded to the longest prompt or to `length`.

        Raises:
            ValueError: a prompt is too long, or has a word outside of the encoder's vocabulary
                (which the message names; `model.allow_unknown_words = True` lets a T5 read it as
                <unk>).

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> model.to_tokens(["red circle", "circle"]).shape
            torch.Size([2, 3])
        """
        texts = self.prompt_texts(prompts)
        length = None if length is None else integer("length", length, 1, LONGEST_TEXT)
        with _TOKENIZING:
            padding = "longest" if length is None else "max_length"
            tokens = self.tokenizer(texts, padding=padding, max_length=length, return_tensors="pt")
        ids = tokens.input_ids
        limit = length or self.max_sequence_length
        if ids.shape[1] > limit:
            raise ValueError(
                f"A prompt has {ids.shape[1]} tokens, but {limit} is the longest that this model "
                "reads: shorten it."
            )
        if self.tokenizer.unk_token_id in ids.unique().tolist():
            self._check_known(texts)
        # without weights, tokens keep their values
        return ids if self.device.type == "meta" else ids.to(self.device)

    def _check_known(self, texts: Sequence[str]) -> None:
        """Raise ValueError with the words outside of the vocabulary, unless they are allowed."""
        unknown = {
            text: words
            for text in texts
            if (words := encode_text(self.tokenizer, text).unknown_words)
        }
        words = list(dict.fromkeys(word for found in unknown.values() for word in found))
        if not words:  # CLIP's <unk> is its EOS
            return
        if isinstance(self.text_encoder, HookedTokenEncoder):
            raise ValueError(self.text_encoder.wrapped.no_vector_for(words))
        if not self.allow_unknown_words:
            raise ValueError(
                f"The text encoder does not know {', '.join(map(repr, words))} in "
                f"{next(iter(unknown))!r} and would read <unk>: "
                "use other words, or set model.allow_unknown_words = True."
            )

    def to_str_tokens(self, prompt: str | Int[Tensor, " text_pos"]) -> list[str]:
        """The tokens of one prompt as strings."""
        ids = self.to_tokens(prompt)[0] if isinstance(prompt, str) else prompt
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(ids.tolist())]

    def _token_ids(self, tokens: Tensor) -> Tensor:
        return token_ids(
            tokens, getattr(getattr(self.text_encoder, "cfg", None), "d_vocab", len(self.tokenizer))
        )

    def encode(
        self, tokens: Int[Tensor, "batch text_pos"], guidance: float = DEFAULT_GUIDANCE
    ) -> TextState:
        """Text features, captions, keys and values, computed once for all steps.

        With guidance for rows [uncond; cond].

        Example:
            >>> model.encode(
            ...     model.to_tokens("red circle above blue square"), guidance=1.0
            ... ).text.shape[0]
            1
        """
        self._use("text_encoder")
        tokens = tokens.to(self.text_encoder.device)
        mask = (tokens != PAD_ID).long()
        cond = self._features("text_encoder", tokens, mask)
        if guidance <= 1:
            self._use("dit")
            return self.dit.encode_text(cond, mask.to(self.device))
        null_tokens = self.tokenizer([""], return_tensors="pt").input_ids.to(tokens.device)
        null_tokens = nn.functional.pad(
            null_tokens, (0, tokens.shape[1] - null_tokens.shape[1]), value=PAD_ID
        )
        # a row a prompt, so that hooks can tell them apart
        null_tokens = null_tokens.expand(len(tokens), -1)
        null_mask = (null_tokens != PAD_ID).long()
        uncond = self._features("null_text_encoder", null_tokens, null_mask)
        self._use("dit")
        return self.dit.encode_text(
            torch.cat([uncond, cond]), torch.cat([null_mask, mask]).to(self.device)
        )

    def _features(self, part: Part, tokens: Tensor, mask: Tensor) -> Tensor:
        """Text features as the denoiser takes them, through the hooks of a part."""
        hooks = self.active_hooks(
            lambda site: site.part == part, lambda: self.names.sites(steps=[])
        )
        with attach(hooks, self.names.module, contexts=self.contexts()):
            features = self.text_encoder(tokens, attention_mask=mask)[0]
        return features.to(self.device, self.dit.dtype)

    def encoded_texts(
        self, prompts: str | Sequence[str], length: int | None = None, **options: Any
    ) -> list[EncodedText]:
        """Each prompt as it is tokenised, with character offsets.

        Padded to the longest or to `length`.

        Example:
            >>> model = HookedTextToImage.from_pretrained("rte-micro", weights=False)
            >>> model.encoded_texts("red circle")[0].spans
            [(0, 3), (4, 10), (0, 0)]
        """
        check_options(options)
        length = self.to_tokens(prompts).shape[1] if length is None else length
        return [encode_text(self.tokenizer, text, length) for text in self.prompt_texts(prompts)]
