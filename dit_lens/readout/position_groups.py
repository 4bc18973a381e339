"""Groups of positions: of the image, and of the text that each guidance branch reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from hooked_models import HookedTextToImage
from hooked_models.arguments import mapping, shown
from hooked_models.generation.names import Branch

from ..text.prompts import Role, Word, by_role, roles_of, token_mask

Groups = Mapping[str, Shaped[Tensor, "*prompt pos"]]
"""Name → positions, [pos] or [prompt pos]: booleans, or shares in [0, 1]."""
TextGroups = Mapping[str, Shaped[Tensor, "*prompt pos"] | Role | Word | Sequence[Role | Word]]
"""Name → its text positions, as in `Groups`, or roles and words (`prompts.word`)."""

TextKeys = tuple[list[str], dict[Branch, Float[Tensor, "prompt text_pos group"]]]
"""Names of text groups, and their positions by branch."""


def text_keys(
    model: HookedTextToImage,
    texts: Sequence[str],
    inputs: Any,
    branches: Sequence[Branch],
    text_groups: TextGroups | None,
    roles: list[list[Role]] | None = None,
) -> TextKeys:
    """Text groups of runs, by default those of all roles.

    Args:
        model: the model whose tokens are grouped.
        texts: the prompts.
        inputs: inputs of the runs, or a draft, which give each branch's text positions.
        branches: guidance branches to place the groups in.
        text_groups: name → tokens, as in `attention_synopsis`; None for all roles.
        roles: of each prompt's tokens, if they are known.

    Example:
        >>> texts = ["red circle is above blue square"]
        >>> names, keys = text_keys(model, texts, model.draft(texts), ["cond"], {"all": "relation"})
        >>> names, keys["cond"].shape
        (['all'], torch.Size([1, 7, 1]))
    """
    length = model.layout(inputs).text_mask.shape[1]
    if text_groups is None:
        roles = roles_of(model.encoded_texts(texts, length)) if roles is None else roles
        return _by_role(model, roles, inputs, branches)
    mapping("text_groups", text_groups, "positions, a role or prompts.word('…')")
    positions = {
        name: group if isinstance(group, Tensor) else token_mask(model, texts, group, length=length)
        for name, group in text_groups.items()
    }
    return _given(model, positions, inputs, branches)


def _by_role(
    model: HookedTextToImage, roles: list[list[Role]], inputs: Any, branches: Sequence[Branch]
) -> TextKeys:
    """Groups of all roles; the unconditional branch has those of the text that it reads."""
    keys, n = {}, len(inputs)
    for branch in branches:
        length = model.layout(inputs, branch).text_mask.shape[1]
        read = (
            roles
            if branch == "cond"
            else roles_of(model.encoded_texts(model.texts_read([""] * n, branch), length))
        )
        # a branch's text may be padded to another branch's
        fitted = [[*row[:length], *["pad"] * (length - len(row))] for row in read]
        keys[branch] = stacked(by_role(fitted), n, length, "text")  # type: ignore[arg-type]
    return list(get_args(Role)), keys


def _given(
    model: HookedTextToImage, groups: Groups, inputs: Any, branches: Sequence[Branch]
) -> TextKeys:
    """Given groups; the unconditional branch has none of their positions."""
    keys, n = {}, len(inputs)
    for branch in branches:
        length = model.layout(inputs, branch).text_mask.shape[1]
        given = stacked(groups, n, length, "text") if branch == "cond" else None
        keys[branch] = (
            torch.zeros(n, length, len(groups), dtype=torch.float64) if given is None else given
        )
    return list(groups), keys


def stacked(
    groups: Mapping[Any, Tensor], n: int, pos: int, what: str
) -> Float[Tensor, "{n} {pos} group"]:
    """Groups side by side, for each of n prompts.

    Raises:
        ValueError: there is no group, or one is no tensor of that many positions.

    Example:
        >>> stacked({"first": torch.tensor([True, False])}, 3, 2, "text").shape
        torch.Size([3, 2, 1])
    """
    if not groups:
        raise ValueError(f"There is no {what} group: name at least one.")
    columns = []
    for name, positions in groups.items():
        if not isinstance(positions, Tensor):
            raise ValueError(
                f"The {what} group {name!r} is {shown(positions)}: give a tensor of its positions."
            )
        if tuple(positions.shape) not in ((pos,), (n, pos)):
            raise ValueError(
                f"The {what} group {name!r} has shape {tuple(positions.shape)}: for {n} prompts "
                f"with {pos} {what} positions it must be ({pos},) or ({n}, {pos})."
            )
        columns.append(positions.detach().cpu().double().expand(n, pos))
    return torch.stack(columns, dim=-1)
