"""Minimal contextual text encoder.

Adds the vectors of some words to the last word and removes them from their place. A model of T5 in
the reading of Wang, Fan, Pan (arXiv 2601.06338, section 5): the relation leaves its own token and
is found in the second object's contextual embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .random_tokens import PAD_ID, SPECIAL_TOKENS, RandomTokenEncoder, RandomTokenEncoderConfig


class FusedTokenEncoderConfig(RandomTokenEncoderConfig):
    """Configuration of a `FusedTokenEncoder`.

    Further arguments are those of `RandomTokenEncoderConfig`.

    Args:
        moved: words whose vectors move to the last word.
        share: of those vectors, in [0, 1].

    Raises:
        ValueError: for a share outside [0, 1].

    Example:
        >>> FusedTokenEncoderConfig(["circle", "above"], moved=["above"], d_model=8).share
        1.0
    """

    model_type = "fused_token_encoder"

    def __init__(
        self,
        words: Sequence[str] = (),
        moved: Sequence[str] = (),
        share: float = 1.0,
        **kwargs: object,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: the moved share of a word's vector lies in [0, 1].")
        self.moved = list(moved)
        self.share = share
        super().__init__(words=words, **kwargs)  # type: ignore[arg-type]


class FusedTokenEncoder(PreTrainedModel):
    """A `RandomTokenEncoder` that moves a share of some words' vectors to the last word.

    The words are `config.moved`; the share leaves their place. With `config.share` 1 a moved word
    keeps only its position code; with 0 this is the `RandomTokenEncoder` itself.

    Example:
        >>> config = FusedTokenEncoderConfig(
        ...     ["circle", "above", "square"], moved=["above"], share=0.5, d_model=8
        ... )
        >>> encoder, plain = FusedTokenEncoder(config), RandomTokenEncoder(config)
        >>> ids = torch.tensor([[3, 4, 5, 1]])
        >>> change = encoder(ids).last_hidden_state - plain(ids).last_hidden_state
        >>> torch.allclose(change[0, 2], 0.5 * plain.embed_tokens.weight[4], atol=1e-6)
        True
    """

    config_class = FusedTokenEncoderConfig
    base_model_prefix = "fused"
    main_input_name = "input_ids"
    _no_split_modules: list[str] = []  # noqa: RUF012  (declared so by PreTrainedModel)

    def __init__(self, config: FusedTokenEncoderConfig) -> None:
        super().__init__(config)
        self.table = RandomTokenEncoder(config)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if module is getattr(self, "table", None):
            self.table._init_weights(self.table.embed_tokens)

    def forward(
        self,
        input_ids: Int[Tensor, "batch text_pos"],
        attention_mask: Int[Tensor, "batch text_pos"] | None = None,
        return_dict: bool | None = True,
        **_: object,
    ) -> BaseModelOutput | tuple[Tensor]:
        """Embed tokens: [batch text_pos d_model].

        The mask has no effect: pads are known by their id.

        Raises:
            ValueError: a token is unknown, or outside the table.
        """
        moved_ids = [
            len(SPECIAL_TOKENS) + self.config.words.index(word) for word in self.config.moved
        ]
        hidden = self.table(input_ids, return_dict=False)[0]
        moved = torch.isin(input_ids, torch.tensor(moved_ids, device=input_ids.device))
        words = self.config.share * self.table.embed_tokens(input_ids) * moved[..., None]
        # EOS is the last token that is no pad
        last = ((input_ids != PAD_ID).sum(dim=1) - 2).clamp(min=0)
        receives = torch.arange(input_ids.shape[1], device=input_ids.device) == last[:, None]
        hidden = hidden - words + receives[..., None] * words.sum(dim=1, keepdim=True)
        return BaseModelOutput(last_hidden_state=hidden) if return_dict else (hidden,)


# Checkpoints name these classes by package (model_index.json), so the file may move without
# breaking them.
FusedTokenEncoder.__module__ = "hooked_models"
FusedTokenEncoderConfig.__module__ = "hooked_models"
