"""Groups of text positions against words counted by hand, branch by branch."""

from __future__ import annotations

import pytest
import torch

from dit_lens.readout.position_groups import stacked, text_keys

TEXTS = ["red circle is above blue square", "circle is left of square"]


def test_every_position_has_one_role_in_each_branch(trained_nano):
    """The unconditional branch reads an EOS and pads; given groups are not in it."""
    draft = trained_nano.draft(TEXTS)
    names, keys = text_keys(trained_nano, TEXTS, draft, ["cond", "uncond"], None)
    for branch in ("cond", "uncond"):
        assert (keys[branch].sum(dim=2) == 1).all()
    places = {name: keys["cond"][:, :, i].nonzero().tolist() for i, name in enumerate(names)}
    assert places["color1"] == [[0, 0]]
    assert places["shape2"] == [[0, 5], [1, 4]]
    assert places["pad"] == [[1, 6]]
    assert keys["uncond"].sum(dim=(0, 1)).nonzero().flatten().tolist() == [
        names.index("eos"),
        names.index("pad"),
    ]
    names, keys = text_keys(trained_nano, TEXTS, draft, ["cond", "uncond"], {"objects": "shape1"})
    assert keys["cond"].nonzero().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert not keys["uncond"].any()


def test_groups_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"must be \(4,\) or \(2, 4\)"):
        stacked({"left": torch.ones(3)}, 2, 4, "image")
    with pytest.raises(ValueError, match="name at least one"):
        stacked({}, 2, 4, "image")
