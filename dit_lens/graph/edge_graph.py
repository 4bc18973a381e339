"""The edges of one denoiser call.

Lists the components that send, those that receive, and the hooks at which each can be read and
edited. Everything that is written to the residual stream reaches everything that reads it later;
the words reach cross-attention's keys and values. Source: the graphs of EAP (arXiv 2310.10348) and
of TransformerLens' attribution patching, with cross-attention added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hooked_models import HookedDiT
from hooked_models.hooks.scopes import scope
from hooked_models.lazy_imports import renamed

from .nodes import Node

__getattr__ = renamed(
    __name__,
    {
        "read_at": "dit_lens.graph.edge_graph:input_hook",
        "written_at": "dit_lens.graph.edge_graph:output_hook",
        "share": "dit_lens.graph.edge_graph:index_of",
    },
)


def all_senders(dit: HookedDiT, words: int) -> list[Node]:
    """Senders: every component that writes to the residual stream, in order, and then the words."""
    heads = range(dit.cfg.n_heads)
    written = [Node("embed")]
    for layer in range(dit.cfg.n_layers):
        written += [Node("attn", layer, head) for head in heads] + [
            Node("cross_attn", layer, head) for head in heads
        ]
        written.append(Node("mlp", layer))
    return written + [Node("text", tokens=(word,)) for word in range(words)]


def all_receivers(dit: HookedDiT) -> list[Node]:
    """Receivers: every input that is read from the residual stream or the words, in order."""
    read = []
    for layer in range(dit.cfg.n_layers):
        for kind in ("attn", "cross_attn"):
            for part in "qkv":
                heads = range(dit.cfg.n_heads)
                read += [Node(kind, layer, head, part) for head in heads]  # type: ignore[arg-type]
        read.append(Node("mlp", layer))
    return [*read, Node("output")]


def output_hook(dit: HookedDiT, node: Node) -> str:
    """The hook of a sender's contribution to its readers' inputs."""
    if node.kind in ("attn", "cross_attn"):
        return f"blocks.{node.layer}.{node.kind}.hook_result"
    return "hook_caption" if node.kind == "text" else node.output_hook(dit.cfg)


def input_hook(dit: HookedDiT, node: Node) -> str:
    """The hook of a receiver's own copy of its input."""
    if node.kind == "output":
        return node.output_hook(dit.cfg)
    return f"blocks.{node.layer}." + (
        "hook_mlp_in" if node.kind == "mlp" else f"{node.kind}.hook_{node.part}_input"
    )


def index_of(node: Node, words: tuple[int, ...] | str | None = None) -> tuple[Any, ...]:
    """Index of a node's share of a tensor [batch pos (head) d_model].

    With `words`, of the first of them alone.
    """
    everywhere = slice(None) if words is None else words[0]
    return (slice(None), everywhere) if node.head is None else (slice(None), everywhere, node.head)


@contextmanager
def edge_flags(dit: HookedDiT) -> Iterator[None]:
    """Give every sender's contribution and every receiver's own input a hook, inside the block.

    Raises:
        ValueError: cfg.use_attn_in is on, which excludes separate inputs.
    """
    if dit.cfg.use_attn_in:
        raise ValueError(
            "use_split_qkv_input and use_attn_in exclude each other: call set_use_attn_in(False) "
            "first"
        )
    with scope() as inner:
        inner.values |= {
            (id(dit.cfg), flag): True
            for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
        }
        yield
