"""Names of nodes, and the calls that no path connects."""

from __future__ import annotations

import pytest

from dit_lens.graph.nodes import Node, Nodes, Place, why_no_path


def test_nodes_of_other_forms_are_refused():
    for wrong in (
        {"kind": "attn"},
        {"kind": "mlp", "layer": 1, "head": 0},
        {"kind": "embed", "tokens": (1,)},
    ):
        with pytest.raises(ValueError, match="is no node"):
            Node(**wrong)
    with pytest.raises(ValueError, match="set is empty"):
        Nodes([])
    assert Node.parse("cross_attn.L2H1.k") == Node("cross_attn", 2, 1, "k")
    assert str(Node.parse("text[4,5]")) == "text[4,5]"


@pytest.mark.parametrize(
    ("sender", "sent", "receiver", "received", "why"),
    [
        ("attn.L0H0", (0, "cond"), "attn.L1H0.q", (0, "cond"), None),
        ("attn.L0H0", (0, "cond"), "attn.L0H1.q", (1, "uncond"), None),
        ("text", (0, "cond"), "cross_attn.L1H0.k", (0, "cond"), None),
        ("mlp.L1", (0, "uncond"), "image", (0, "cond"), None),
        ("attn.L0H0", (0, "cond"), "cross_attn.L1H0.k", (0, "cond"), "reads the text alone"),
        ("attn.L0H0", (1, "cond"), "attn.L1H0.q", (0, "cond"), "step"),
        ("mlp.L1", (0, "cond"), "attn.L0H0.q", (0, "cond"), ""),
    ],
)
def test_paths_lead_forward_alone(tiny_dit, sender, sent, receiver, received, why):
    ends = (Node.parse(sender), Place(*sent)), (Node.parse(receiver), Place(*received))
    found = why_no_path(*ends, frozen=(), dit=tiny_dit)
    assert (found is None) == (why is None)
    assert why is None or why in found
