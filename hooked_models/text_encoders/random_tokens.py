"""RTE, random token embeddings: a text encoder of words and positions, without context.

Source: Wang, Fan, Pan (arXiv 2601.06338), the paper's "RTE" condition: a frozen random vector for
each word, plus (or, in "RTE without positions", not plus) a sinusoidal position code of the same
norm. The DiT itself has to combine the words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedConfig, PreTrainedModel, T5Tokenizer
from transformers.modeling_outputs import BaseModelOutput

from ..hooks.module import HookedModule
from ..pixart.config import HookedConfig

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
PAD_ID, UNKNOWN_ID = 0, 2
DEFAULT_LENGTH = 20
"""Tokens, as in the paper."""


def word_tokenizer(words: Sequence[str], max_length: int = DEFAULT_LENGTH) -> T5Tokenizer:
    """Make a `T5Tokenizer` of whole words: pad 0, EOS 1, unknown 2, then `words` in order.

    Example:
        >>> word_tokenizer(["red", "circle"])("red circle").input_ids
        [3, 4, 1]
    """
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS] + [("▁" + word, -2.0) for word in words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


class RandomTokenEncoderConfig(PreTrainedConfig):
    """Configuration of a `RandomTokenEncoder`.

    Args:
        words: in the order of their token ids, after pad, EOS and unknown.
        positions: add a position code.
        norm: of a word's vector; √d_model by default.
        seed: of the table.

    Example:
        >>> RandomTokenEncoderConfig(["red", "circle"], d_model=16).norm
        4.0
    """

    model_type = "random_token_encoder"

    def __init__(
        self,
        words: Sequence[str] = (),
        d_model: int = 256,
        positions: bool = True,
        norm: float | None = None,
        seed: int = 42,
        **kwargs: object,
    ) -> None:
        self.words = list(words)
        self.d_model = d_model
        self.positions = positions
        self.norm = d_model**0.5 if norm is None else norm
        self.seed = seed
        super().__init__(**kwargs)


class RandomTokenEncoder(PreTrainedModel):
    """Embed tokens by a frozen random table, plus a position code if `config.positions`.

    The code has the same norm. The table is a function of (`seed`, `words`, `d_model`) and is saved
    with the model. Sequences may have any length: the position code is computed, not stored.

    Example:
        >>> encoder = RandomTokenEncoder(RandomTokenEncoderConfig(["red", "circle"], d_model=16))
        >>> encoder(torch.tensor([[3, 4, 1]])).last_hidden_state.shape
        torch.Size([1, 3, 16])
    """

    config_class = RandomTokenEncoderConfig
    base_model_prefix = "rte"
    main_input_name = "input_ids"
    _no_split_modules: list[str] = []  # noqa: RUF012  (declared so by PreTrainedModel)

    def __init__(self, config: RandomTokenEncoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(len(SPECIAL_TOKENS) + len(config.words), config.d_model)
        self.embed_tokens.requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "embed_tokens", None):
            generator = torch.Generator().manual_seed(self.config.seed)
            rows = torch.randn(self.embed_tokens.weight.shape, generator=generator)
            with torch.no_grad():
                self.embed_tokens.weight.copy_(
                    self.config.norm * rows / rows.norm(dim=1, keepdim=True)
                )

    def position_code(self, length: int) -> Float[Tensor, "text_pos d"]:
        """Compute sine and cosine (base 10,000) of each position, or zeros.

        Interleaved and scaled to the words' norm.
        """
        d = self.config.d_model
        if not self.config.positions:
            return torch.zeros(length, d)
        frequencies = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
        # norm √(d/2) at every position
        code = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
        return (code * (self.config.norm / (d / 2) ** 0.5)).float()

    def forward(
        self,
        input_ids: Int[Tensor, "batch text_pos"],
        attention_mask: Int[Tensor, "batch text_pos"] | None = None,
        return_dict: bool | None = True,
        **_: object,
    ) -> BaseModelOutput | tuple[Tensor]:
        """Embed tokens: [batch text_pos d_model]. The mask has no effect: no token sees another.

        Raises:
            ValueError: a token is unknown, or outside the table.
        """
        self.check_known(input_ids)
        words = self.embed_tokens(input_ids)
        hidden = words + self.position_code(input_ids.shape[1]).to(words)
        return BaseModelOutput(last_hidden_state=hidden) if return_dict else (hidden,)

    def check_known(self, input_ids: Int[Tensor, "batch text_pos"]) -> None:
        """Raise a ValueError that lists the vocabulary if a token is not in it."""
        if bool(
            (
                (input_ids == UNKNOWN_ID)
                | (input_ids < 0)
                | (input_ids >= self.embed_tokens.num_embeddings)
            ).any()
        ):
            raise ValueError(self.no_vector_for([]))

    def no_vector_for(self, words: Sequence[str]) -> str:
        """The message for words outside of the vocabulary, which it lists."""
        return (
            "This random-token encoder has no vector for "
            f"{', '.join(map(repr, words)) or 'a word of the prompt'}. "
            f"It knows: {', '.join(self.config.words)}."
        )


class HookedTokenEncoder(HookedModule):
    """A `RandomTokenEncoder` with a HookPoint on each of its tensors.

    Arguments and output are the wrapped module's.

    Example:
        >>> encoder = RandomTokenEncoder(RandomTokenEncoderConfig(["red", "circle"], d_model=16))
        >>> _, cache = HookedTokenEncoder(encoder).run_with_cache(torch.tensor([[3, 4, 1]]))
        >>> list(cache)
        ['hook_embed', 'hook_pos_embed', 'hook_out']
    """

    hook_part = "text_encoder"

    wrapped: RandomTokenEncoder
    """The live encoder; not registered as a child, because its table is."""

    def __init__(self, encoder: RandomTokenEncoder) -> None:
        super().__init__()
        self.__dict__["wrapped"] = encoder
        config = encoder.config
        self._cfg = HookedConfig(
            d_model=config.d_model,
            d_head=config.d_model,
            n_layers=0,
            n_ctx=DEFAULT_LENGTH,
            d_vocab=encoder.embed_tokens.num_embeddings,
            normalization_type=None,
            device=str(encoder.device),
            dtype=encoder.dtype,
        )
        self.embed_tokens = encoder.embed_tokens
        self.hook_embed = HookPoint()  # all [batch text_pos d_model]
        self.hook_pos_embed = HookPoint()  # zeros without positions
        self.hook_out = HookPoint()
        self.setup()
        self.train(encoder.training)

    @property
    def cfg(self) -> HookedConfig:
        """Without layers; device and precision are those of the live table."""
        self._cfg.device, self._cfg.dtype = str(self.device), self.dtype
        return self._cfg

    @property
    def config(self) -> RandomTokenEncoderConfig:
        """The wrapped encoder's own configuration."""
        return self.wrapped.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embedding."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.embed_tokens.weight.device

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Vectors of the words, by token id."""
        return self.embed_tokens.weight

    def forward(
        self,
        input_ids: Int[Tensor, "batch text_pos"],
        attention_mask: Int[Tensor, "batch text_pos"] | None = None,
        return_dict: bool | None = True,
        **_: object,
    ) -> BaseModelOutput | tuple[Tensor]:
        """As `RandomTokenEncoder.forward`."""
        self.wrapped.check_known(input_ids)
        words = self.hook_embed(self.embed_tokens(input_ids))
        code = self.wrapped.position_code(input_ids.shape[1]).to(words)
        hidden = self.hook_out(words + self.hook_pos_embed(code.repeat(len(words), 1, 1)))
        return BaseModelOutput(last_hidden_state=hidden) if return_dict else (hidden,)


# Checkpoints name these classes by package (model_index.json), so the file may move without
# breaking them.
RandomTokenEncoder.__module__ = "hooked_models"
RandomTokenEncoderConfig.__module__ = "hooked_models"
