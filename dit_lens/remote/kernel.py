"""Code that runs inside an nnsight trace, on the model's machine.

Hooks by our names on the modules of a diffusers pipeline. nnsight sends these functions along as
source: those here, and those of `pixart_kernel` and `pipeline_kernel`. So: torch alone is imported,
nothing is imported inside a function, no method calls `super()` without arguments, and nothing may
be wrapped around them (`no_type_check`; for classes it also keeps run-time type checkers away). A
trace must ask for tensors in the order in which the model computes them, or, from the second step
on, it silently gets a later step's: the walks read and write in that order, whatever the order of
hooks.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch

from hooked_models.hooks.masks import pattern_of

from ..intervene.portable_ops import edited, sums_of_attention, sums_of_pattern


@no_type_check
class Point:
    """The `hook` argument of a hook function: the full `name`, `step`, `branch` and `layer()`."""

    def __init__(
        self, name: str, inner: str, step: int | None = None, branch: str | None = None
    ) -> None:
        self.name, self.inner, self.step, self.branch = name, inner, step, branch

    def layer(self) -> int:
        """The layer of a name that has one; ValueError for another."""
        parts = self.inner.split(".")
        if parts[0] != "blocks":
            raise ValueError(f"{self.name} belongs to no layer.")
        return int(parts[1])

    def __repr__(self) -> str:
        return f"Point({self.name!r})"


@no_type_check
class Walk:
    """The hooks of one call of a model, and the tensors that they keep.

    Args:
        actions: name within the model → [(point, action)]: a hook function, the arguments of
            `edited`, which puts the earlier run's activation there if it has no values, or None to
            keep the tensor under the point's name.
        sums: attention ("blocks.2.cross_attn") → [(key, branch, queries, keys, reduce, over_heads)]
            of its pattern, to be added up; equal keys add up to one sum.
        kept, added: dicts to be filled, by full name and by key.
        rows: branch → its rows of the batch; the branch None has all.
        to_cpu: whether kept tensors move to the CPU, for the client.
        clean: tensors that an earlier run kept, for edits that put them here.
    """

    def __init__(
        self, actions: Any, sums: Any, kept: dict, added: dict, rows: dict, to_cpu: bool, clean: Any
    ) -> None:
        self.actions, self.sums = actions, sums
        self.kept, self.added, self.rows, self.to_cpu, self.clean = kept, added, rows, to_cpu, clean

    def touches_prefix(self, prefix: str) -> bool:
        """True if a hook is attached at a name that begins with `prefix`."""
        return any(name.startswith(prefix) for name in (*self.actions, *self.sums))

    def hooks(self, *names: str) -> bool:
        """True if a hook is attached at one of the names."""
        return any(name in self.actions for name in names)

    def apply(self, name: str, tensor: Any) -> Any:
        """Show a tensor to its hooks, and return it as they leave it.

        None where none of them may have changed it.
        """
        written = None
        for point, function in self.actions.get(name, ()):
            rows = self.rows.get(point.branch, slice(None))
            seen = (tensor if written is None else written)[rows]
            if function is None:
                self.kept[point.name] = seen.detach().to(
                    "cpu" if self.to_cpu else seen.device, copy=True
                )
                continue
            seen = seen.clone()  # a hook may write in place, and a sandbox would not hear of it
            if not isinstance(function, dict):
                new = function(seen, hook=point)
            elif function["kind"] == "replace" and function["values"] is None:
                new = edited(seen, **{**function, "values": self.clean[point.name]})
            else:
                new = edited(seen, **function)
            written = tensor.clone() if written is None else written.clone()
            written[rows] = seen if new is None else new
        return written

    # A tensor that is some module's output, or its first input.

    def output(self, envoy: Any, name: str) -> None:
        """Show a module's output to its hooks, and write it if they change it."""
        if self.hooks(name):
            written = self.apply(name, envoy.output)
            if written is not None:
                envoy.output = written

    def input(self, envoy: Any, name: str) -> None:
        """Show a module's first input to its hooks, and write it if they change it."""
        if self.hooks(name):
            written = self.apply(name, envoy.input)
            if written is not None:
                envoy.input = written

    # Attention

    def needs_pattern(self, attention: str) -> bool:
        """True if a hook or a group sum needs the scores or the pattern of an attention."""
        return attention in self.sums or self.hooks(
            f"{attention}.hook_attn_scores", f"{attention}.hook_pattern"
        )

    def edited_pattern(self, name: str, read: dict, bias: Any, scale: float) -> Any:
        """The pattern if hooks may have changed it or the scores, else None; shows both to them."""
        if not self.hooks(f"{name}.hook_attn_scores", f"{name}.hook_pattern"):
            return None
        q, k = (read[leaf].transpose(1, 2) for leaf in ("q", "k"))
        scores = q @ k.transpose(-1, -2) * scale
        scores = scores if bias is None else scores + bias
        new_scores = self.apply(f"{name}.hook_attn_scores", scores)
        pattern = pattern_of(scores if new_scores is None else new_scores)
        new_pattern = self.apply(f"{name}.hook_pattern", pattern)
        if new_pattern is not None:
            return new_pattern
        return None if new_scores is None else pattern

    def add_up(self, name: str, read: dict, pattern: Any, bias: Any, scale: float) -> None:
        """Sums of the pattern between groups."""
        for key, branch, queries, keys, reduce, over_heads in self.sums.get(name, ()):
            rows, at = self.rows.get(branch, slice(None)), read["q"].device
            groups = (None if queries is None else queries.to(at), keys.to(at), reduce)
            if pattern is not None:
                found = sums_of_pattern(pattern[rows], *groups)
            else:
                mask = bias if bias is None or len(bias) == 1 else bias[rows]
                found = sums_of_attention(read["q"][rows], read["k"][rows], mask, scale, *groups)
            found = found.detach().to(torch.promote_types(found.dtype, torch.float32)).cpu()
            found = found.sum(1, keepdim=True) if over_heads else found
            self.added[key] = self.added[key] + found if key in self.added else found


@no_type_check
def arguments(call: dict) -> dict:
    """Arguments of one run, with its own copies of the generators, which a run advances."""
    own = [each.clone_state() for each in call["generator"]]
    return {**call, "generator": own or None}
