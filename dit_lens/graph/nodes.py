"""Nodes of path patching: components that send, that receive, and pairs that a path joins."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hooked_models.arguments import is_several, shown
from hooked_models.generation.names import Branch
from hooked_models.lazy_imports import renamed

__getattr__ = renamed(__name__, {"obstacle": "dit_lens.graph.nodes:why_no_path"})

from ..text.prompts import as_choice

FORMS = (
    "'cross_attn.L2H1' or 'attn.L2H1' (a head; as a receiver also with '.q', '.k' or '.v'), "
    "'cross_attn.L2' (its layer's heads), "
    "'mlp.L3', 'embed', 'text', 'text[4,5]', 'text[relation]', 'output', 'image'"
)
_FORM = re.compile(
    r"(?P<sublayer>attn|cross_attn)\.L(?P<layer>\d+)(H(?P<head>\d+))?(\.(?P<part>[qkv]))?"
    r"|mlp\.L(?P<mlp>\d+)|text(\[(?P<tokens>\d+(,\d+)*|[a-z]+\d?)\])?|embed|output|image"
)

Index = Any
"""Index (between [ and ]) of the part of a tensor [batch …] that a node owns."""


@dataclass(frozen=True)
class Node:
    """A component of the denoiser, as one end of a path.

    ======================= ============================== ==============================
    form                    sends to its readers           receives
    ======================= ============================== ==============================
    ``attn.L2H1[.q|.k|.v]`` ``attn.hook_z`` of the head    the residual before ln1, as Q,
                            (the gate is the same)         K or V (default: all) read it
    ``cross_attn.L2H1[.…]`` ``cross_attn.hook_z``          Q: the raw residual;
                            of the head                    K, V: the caption
    ``mlp.L3``              ``hook_mlp_out``               the residual before ln2
    ``text[…]``             positions of ``hook_text``     –
    ``embed``               ``hook_embed``                 the same
    ``output``              the final residual             the same
    ``image``               –                              the final latents
    ======================= ============================== ==============================

    A head's q is a function of its input alone, so the input is patched at ``hook_q`` (k, v and
    ``mlp.hook_pre`` likewise): the intervention is that on ``hook_q_input``, without a copy of the
    residual stream for every head, and LayerNorm is recomputed.

    Example:
        >>> Node.parse("cross_attn.L2H1.q")
        Node(kind='cross_attn', layer=2, head=1, part='q', tokens=None)
    """

    kind: Literal["attn", "cross_attn", "mlp", "text", "embed", "output", "image"]
    layer: int | None = None
    head: int | None = None
    """None: every head of the layer."""
    part: Literal["q", "k", "v"] | None = None
    tokens: Any = None
    """Positions, a role, `prompts.word("cat")`, several of these or a mask, as `tokens` of an
    `Intervention`; None: the whole text.
    """

    def __post_init__(self) -> None:
        if self.tokens is not None and not isinstance(self.tokens, str):
            choice = as_choice(self.tokens)
            object.__setattr__(self, "tokens", choice)
            if self.kind == "text" and not isinstance(choice[0], int):
                return  # words and masks have no form as text
        if _FORM.fullmatch(str(self)) is None:
            raise ValueError(f"{str(self)!r} is no node: write {FORMS}.")

    @classmethod
    def parse(cls, text: str | Node) -> Node:
        """Raises ValueError, with the forms allowed, for any other."""
        if isinstance(text, Node):
            return text
        found = _FORM.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{shown(text)} is no node: write {FORMS}.")
        layer, head, tokens = found["layer"] or found["mlp"], found["head"], found["tokens"]
        return cls(
            kind=re.split(r"[.\[]", text)[0],  # type: ignore[arg-type]
            layer=None if layer is None else int(layer),
            head=None if head is None else int(head),
            part=found["part"],  # type: ignore[arg-type]
            tokens=tuple(map(int, tokens.split(","))) if tokens and tokens[0].isdigit() else tokens,
        )

    def __str__(self) -> str:
        tokens = (
            self.tokens
            if self.tokens is None or isinstance(self.tokens, str)
            else ",".join(map(str, self.tokens))
        )
        return (
            self.kind
            + ("" if self.layer is None else f".L{self.layer}")
            + ("" if self.head is None else f"H{self.head}")
            + ("" if self.part is None else f".{self.part}")
            + ("" if tokens is None else f"[{tokens}]")
        )

    def check(self, cfg: Any, sends: bool) -> None:
        """Raise ValueError unless the model has this node and it can send, or else receive."""
        layers, heads = cfg.n_layers, cfg.n_heads
        if (self.layer or 0) >= layers or (self.head or 0) >= heads:
            raise ValueError(
                f"There is no {self}: the model has {layers} layers of {heads} heads, counted from "
                "0."
            )
        if sends and self.kind == "image":
            raise ValueError("image can only receive: it is where all paths end.")
        if sends and self.part is not None:
            raise ValueError(
                f"{self} can only receive: a head sends its result, so write {str(self)[:-2]!r}."
            )
        if not sends and self.kind == "text":
            raise ValueError("text can only send: nothing in the denoiser writes to it.")

    def output_hooks(self, dit: Any) -> list[str]:
        """The names in the denoiser of all tensors by which this node sends.

        An MLP of a model with a stream for the text, two.
        """
        own, text = self.output_hook(dit.cfg), f"blocks.{self.layer}.hook_text_mlp_out_pre_gate"
        return [own, text] if self.kind == "mlp" and text in dit.mod_dict else [own]

    def output_hook(self, cfg: Any) -> str:
        """The name in the denoiser of the tensor by which this node sends (to the image)."""
        names = {
            "mlp": f"blocks.{self.layer}.hook_mlp_out",
            "text": "hook_text",
            "embed": "hook_embed",
            "output": f"blocks.{cfg.n_layers - 1}.hook_resid_post",
        }
        return names.get(self.kind, f"blocks.{self.layer}.{self.kind}.hook_z")

    def input_hooks(self, cfg: Any) -> list[str]:
        """The names in the denoiser of the tensors that stand for this node's input."""
        if self.kind == "mlp":
            return [f"blocks.{self.layer}.mlp.hook_pre"]
        if self.kind in ("embed", "output"):
            return [self.output_hook(cfg)]
        return [f"blocks.{self.layer}.{self.kind}.hook_{part}" for part in self.part or "qkv"]

    def frozen_hooks(self, dit: Any) -> list[str]:
        """Names of the tensors that hold this node, a layer's sublayer, at another run's values.

        None for an MLP that leaves as one tensor with the attention (`path_patching` holds it
        there).
        """
        block = f"blocks.{self.layer}."
        if self.kind != "mlp":
            heads = [
                f"{block}{self.kind}.hook_z",
                *([f"{block}image_attn.hook_z"] if self.kind == "attn" else []),
            ]
            found = [name for name in heads if name in dit.mod_dict]
            return (
                found or [name for name in _outputs(block, self.kind) if name in dit.mod_dict][:1]
            )
        text = [f"{block}hook_text_mlp_out_pre_gate"]
        found = [name for name in _outputs(block, "mlp") if name in dit.mod_dict][:1]
        return found + [name for name in text if name in dit.mod_dict]

    @property
    def index(self) -> Index:
        """This node's share of a tensor that it reads or writes.

        Text apart, whose positions depend on the prompt.
        """
        return ... if self.head is None else (..., self.head, slice(None))

    def depth(self, cfg: Any) -> int:
        """Where the node stands along the residual stream of one denoiser call."""
        if self.layer is not None:
            return 3 * self.layer + ("attn", "cross_attn", "mlp").index(self.kind)
        return 3 * cfg.n_layers if self.kind == "output" else -1


def _outputs(block: str, kind: str) -> tuple[str, str]:
    """The hooks of a sublayer's output, after its gate and before."""
    return f"{block}hook_{kind}_out", f"{block}hook_{kind}_out_pre_gate"


@dataclass(frozen=True)
class Nodes:
    """A set of nodes at some denoising steps and in a guidance branch.

    A single denoiser call has neither.

    Example:
        >>> str(Nodes(["mlp.L0", "mlp.L1"], steps=[0, 1], branch="both"))
        'mlp.L0+mlp.L1@0,1/both'
    """

    names: str | Node | Sequence[str | Node]
    steps: int | Sequence[int] | None = None
    """None: every step."""
    branch: Branch | Literal["both"] = "cond"

    def __post_init__(self) -> None:
        if not self.nodes or (
            self.steps is not None and not isinstance(self.steps, int) and not self.steps
        ):
            raise ValueError(
                "This set is empty: give at least one node, and one step (or None for all)."
            )

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The parsed nodes, in order."""
        names: Any = self.names if is_several(self.names) else [self.names]
        return tuple(map(Node.parse, names))

    def __str__(self) -> str:
        steps = [self.steps] if isinstance(self.steps, int) else self.steps
        at = "" if steps is None else "@" + ",".join(map(str, steps))
        return (
            "+".join(map(str, self.nodes))
            + at
            + ("" if self.branch == "cond" else f"/{self.branch}")
        )


class Place(NamedTuple):
    """One denoiser call of a generation."""

    step: int
    branch: Branch


def why_no_path(
    from_: tuple[Node, Place], to: tuple[Node, Place], frozen: Collection[str], dit: Any
) -> str | None:
    """Why no path leads from a sender to a receiver; None where one does."""
    cfg = dit.cfg
    (sender, sent), (receiver, received) = from_, to
    if receiver.kind == "cross_attn" and receiver.part != "q":
        if sender.kind == "text" and sent == received:
            return None
        if receiver.part is not None:
            return (
                f"{receiver} reads the text alone: of all senders, only text at the same step and "
                "branch reaches it."
            )
    depth = sender.depth(cfg)
    if sender.kind == "text" and "blocks.0.cross_attn.hook_k" in dit.mod_dict:
        if "cross_attn" in frozen:
            return (
                f"No path leads from {sender} to {receiver}: the text acts through "
                "cross-attention, which is frozen."
            )
        # the first to write the text into the residual stream
        depth = Node("cross_attn", layer=0).depth(cfg)
    if receiver.kind == "image" or sent.step < received.step:
        return None  # by the sampler
    if sent.step > received.step:
        return (
            f"No path leads from {sender} to {receiver}: step {received.step} comes before step "
            f"{sent.step}."
        )
    if sent.branch != received.branch:
        return (
            f"No path leads from {sender} to {receiver}: within a step, {sent.branch} and "
            f"{received.branch} do not meet."
        )
    if depth < receiver.depth(cfg):
        return None
    return (
        f"No path leads from {sender} to {receiver}: within a denoiser call, {receiver} reads "
        f"before {sender} writes."
    )
