"""A text encoder with context, as little as there can be: some words move into the last word before EOS.

It stands for what T5 does to relation words (Wang, Fan, Pan, arXiv 2601.06338, section 5): the relation is gone from its own
place and is found in the second object's contextual embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .rte import PAD_ID, SPECIAL_TOKENS, RandomTokenEncoder, RandomTokenEncoderConfig


class FusedTokenEncoderConfig(RandomTokenEncoderConfig):
    """As `RandomTokenEncoderConfig`; `moved` are the words that end up in the last word."""

    model_type = "fused_token_encoder"

    def __init__(self, words: Sequence[str] = (), moved: Sequence[str] = (), **kwargs: object) -> None:
        self.moved = list(moved)
        super().__init__(words=words, **kwargs)  # type: ignore[arg-type]


class FusedTokenEncoder(PreTrainedModel):
    """A `RandomTokenEncoder` in which the vectors of `config.moved` words are added to the last word's and leave their place."""

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
        """Embed tokens: [batch text_pos d_model]. The mask has no effect: pads are known by their id.

        Raises:
            ValueError: a token is unknown, or outside the table.
        """
        moved_ids = [len(SPECIAL_TOKENS) + self.config.words.index(word) for word in self.config.moved]
        hidden = self.table(input_ids, return_dict=False)[0]
        moved = torch.isin(input_ids, torch.tensor(moved_ids, device=input_ids.device))
        words = self.table.embed_tokens(input_ids) * moved[..., None]
        last = ((input_ids != PAD_ID).sum(dim=1) - 2).clamp(min=0)  # EOS is the last token that is no pad
        receives = torch.arange(input_ids.shape[1], device=input_ids.device) == last[:, None]
        hidden = hidden - words + receives[..., None] * words.sum(dim=1, keepdim=True)
        return BaseModelOutput(last_hidden_state=hidden) if return_dict else (hidden,)


# Checkpoints name these classes by package (model_index.json), so the file may move without breaking them.
FusedTokenEncoder.__module__ = "hooked_models"
FusedTokenEncoderConfig.__module__ = "hooked_models"
