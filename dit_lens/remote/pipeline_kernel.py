"""The code that runs inside an nnsight trace of any other pipeline.

`kernel` has the rules for it. Streams are inputs and outputs of blocks' modules. Queries, keys,
values and z are those of the call of the attention kernel inside a module's processor; latents and
the guided prediction, those of the pipeline's own call of `scheduler.step`: nnsight reaches both by
`.source`. A pattern is computed from queries and keys, only where a hook or a sum needs it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from hooked_models.hooks.masks import as_bias, finite_bias
from hooked_models.hooks.streams import joined, parted, permute
from hooked_models.hooks.texts import joined_text, parted_text

from .kernel import Walk

KERNEL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@no_type_check
class CallWalk(Walk):
    """The hooks of one denoiser call of a pipeline."""

    def call(self, transformer: Any, tracer: Any, items: list, branches: tuple, text: dict) -> None:
        """Go through the call: `items` in the order in which it reaches them."""
        # counts calls from the run's beginning, unlike points inside an attention
        args, kwargs = transformer.inputs
        if self.hooks("hook_text"):
            self.text(transformer, args, kwargs, text)
        for item in items:
            envoy = transformer
            for part in item["path"]:
                envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
            if item["kind"] == "kernel":
                for part in item["within"]:
                    envoy = getattr(envoy.source, part)
                self.kernel(envoy, item)
            elif item["kind"] == "input":
                self.stream_in(envoy, item)
            elif item["visit"] is None:
                self.stream_out(envoy, item)
            else:
                for _ in tracer.iter[[item["visit"]]]:
                    self.stream_out(envoy, item)
        if self.hooks(*(f"hook_out_{branch}" for branch in branches)):
            self.prediction(transformer, branches)

    # Streams

    def text(self, transformer: Any, args: tuple, kwargs: dict, text: dict) -> None:
        """The text that enters: arguments of the transformer, by the names of its parameters."""
        given = {**dict(zip(text["parameters"], args, strict=False)), **kwargs}
        whole = joined_text(given, text["text"], len(given[text["image"]]))
        written = self.apply("hook_text", whole)
        if written is not None:
            transformer.inputs = ((), {**given, **parted_text(given, text["text"], written)})

    def stream(self, tensors: list, item: dict) -> Any:
        """The tensors as hooks on the joined streams leave them; None where nothing is written."""
        given, name = [tensors[i] for i in item["places"]], item["name"]
        there, back = item["orders"]
        whole = joined(given, item["axes"], there)
        if whole.shape[1] != item["positions"]:
            raise ValueError(
                f"{name} has {whole.shape[1]} positions where {item['positions']} were declared."
            )
        written = self.apply(name, whole)
        if written is None:
            return None
        new = list(tensors)
        parts = parted(written, given, item["axes"], back)
        for i, part in zip(item["places"], parts, strict=True):
            new[i] = part
        return new

    def stream_in(self, envoy: Any, item: dict) -> None:
        """Show the streams that enter a module to their hooks."""
        args, kwargs = envoy.inputs
        where = item["arguments"]
        new = self.stream([kwargs[n] if n in kwargs else args[i] for n, i in where], item)
        if new is not None:
            args, kwargs = list(args), dict(kwargs)
            for (name, i), tensor in zip(where, new, strict=True):
                if name in kwargs:
                    kwargs[name] = tensor
                else:
                    args[i] = tensor
            envoy.inputs = (tuple(args), kwargs)

    def stream_out(self, envoy: Any, item: dict) -> None:
        """Show the streams that leave a module to their hooks."""
        output = envoy.output
        if not isinstance(output, (tuple, list)):
            new = self.stream([output], item)
            new = None if new is None else new[0]
        else:
            new = self.stream(list(output), item)
            new = None if new is None else tuple(new)
        if new is not None:
            envoy.output = new

    def prediction(self, transformer: Any, branches: tuple) -> None:
        """The transformer's output, branch by branch."""
        output = transformer.output
        first = output[0] if isinstance(output, (tuple, list)) else output.sample
        whole, changed = torch.stack(list(first)) if isinstance(first, list) else first, False
        for branch in branches:
            name = f"hook_out_{branch}"
            written = self.apply(name, whole[self.rows[branch]]) if self.hooks(name) else None
            if written is not None:
                whole, changed = whole.clone(), True
                whole[self.rows[branch]] = written
        if changed:
            new = list(whole) if isinstance(first, list) else whole
            is_tuple = isinstance(output, (tuple, list))
            transformer.output = (new, *output[1:]) if is_tuple else type(output)(sample=new)

    # Attention

    def kernel(self, op: Any, item: dict) -> None:
        """One call of an attention kernel, on tensors [batch head pos d_head].

        With `item["pos_first"]`, they are [batch pos head d_head].
        """
        args, kwargs = op.inputs
        given = {**dict(zip(KERNEL, args, strict=False)), **kwargs}
        pos_first = item["pos_first"]
        read, written = self.heads(given, item)
        if written:
            new = {long: x if pos_first else x.transpose(1, 2) for long, x in written.items()}
            positional = [new.pop(long, value) for long, value in zip(KERNEL, args, strict=False)]
            op.inputs = (tuple(positional), {**kwargs, **new})
        pattern = self.weights(item, given, read) if self.needs_pattern(item["name"]) else None
        self.values(op, item, read, pattern)

    def weights(self, item: dict, given: dict, read: dict) -> Any:
        """The pattern if hooks may have changed it or the scores, else None; sums are added up."""
        name, scale = item["name"], given.get("scale") or read["q"].shape[-1] ** -0.5
        bias = self.bias(given, item, read["q"], read["k"])
        pattern = self.edited_pattern(name, read, bias, scale)
        self.add_up(name, read, pattern, finite_bias(bias), scale)
        return pattern

    def values(self, op: Any, item: dict, read: dict, pattern: Any) -> None:
        """z, of the kernel or, where a pattern is given, of it."""
        name, (there, back), pos_first = item["name"], item["orders"][0], item["pos_first"]
        if pattern is not None:
            z = (pattern @ read["v"].transpose(1, 2)).transpose(1, 2)
        elif self.hooks(f"{name}.hook_z"):
            out = op.output
            z = permute(out if pos_first else out.transpose(1, 2), there, 1)
        else:
            return
        new = self.apply(f"{name}.hook_z", z)
        if new is not None or pattern is not None:
            z = permute(z if new is None else new, back, 1)
            op.output = z if pos_first else z.transpose(1, 2)

    def heads(self, given: dict, item: dict) -> tuple:
        """q, k and v [batch pos head d_head] as hooks leave them, and the kernel's own arguments.

        The latter are those that must be handed to the kernel, by its arguments, positions as in
        the model.
        """
        name, n_heads, read, written = item["name"], None, {}, {}
        for leaf, long, side in (("q", "query", 0), ("k", "key", 1), ("v", "value", 1)):
            x = given[long] if item["pos_first"] else given[long].transpose(1, 2)
            n_heads = x.shape[2] if n_heads is None else n_heads
            there, back = item["orders"][side]
            if x.shape[1] != item["positions"][side]:
                raise ValueError(
                    f"{name}.hook_{leaf} has {x.shape[1]} positions where "
                    f"{item['positions'][side]} were declared."
                )
            shared = x.shape[2] != n_heads
            x = x.repeat_interleave(n_heads // x.shape[2], dim=2) if shared else x
            x = permute(x, there, 1)
            new = self.apply(f"{name}.hook_{leaf}", x)
            read[leaf] = x if new is None else new
            if new is not None:
                written[long] = permute(new, back, 1)
        if "key" in written or "value" in written:  # heads that share keys are repeated in both
            back = item["orders"][1][1]
            both = {"key": permute(read["k"], back, 1), "value": permute(read["v"], back, 1)}
            written = {**written, **both}
        return read, written

    def bias(self, given: dict, item: dict, q: Tensor, k: Tensor) -> Any:
        """Mask as a bias of the scores [#batch #head #query key], positions as hooks see them."""
        mask, keys = given.get("attn_mask"), k.shape[1]
        if mask is not None and item["pos_first"] and mask.shape == (len(q), keys):
            mask = mask[:, None, None]
        mask = as_bias(mask, bool(given.get("is_causal")), q.transpose(1, 2), keys)
        if mask is None:
            return None
        for dim, (there, _) in zip((2, 3), item["orders"], strict=True):
            mask = permute(mask, there, dim) if mask.shape[dim] > 1 else mask
        return mask


@no_type_check
class StepWalk(Walk):
    """The hooks between the denoiser calls of a pipeline."""

    def latents(self, op: Any) -> None:
        """The latents that `prepare_latents` or `scheduler.step` returns."""
        output = op.output
        several = isinstance(output, (tuple, list))
        is_tensor = isinstance(output, Tensor)
        latents = output if is_tensor else output[0] if several else output.prev_sample
        written = self.apply("hook_latent", latents)
        if written is not None and several:
            op.output = (written, *output[1:])
        elif written is not None:
            op.output = written if is_tensor else type(output)(prev_sample=written)

    def step(self, op: Any, a: float, b: float) -> None:
        """The guided prediction and the clean image that it implies, a · latent + b · out."""
        if not self.hooks("hook_out", "hook_x0"):
            return
        args, kwargs = op.inputs
        out, latent = args[0], args[2]
        written = self.apply("hook_out", out)
        now = out if written is None else written
        x0 = self.apply("hook_x0", a * latent + b * now) if self.hooks("hook_x0") else None
        if x0 is not None:
            written = (x0 - a * latent) / b
        if written is not None:
            op.inputs = ((written, *args[1:]), kwargs)


@no_type_check
def run(model: Any, tracer: Any, plan: dict, clean: dict | None = None) -> dict:
    """Body of a trace of a generation.

    `plan` is `pipeline_plan.make`'s, `clean` the tensors kept by an earlier run. Returns a dict:
    the images [batch 3 height width] as "images", kept tensors by full name as "kept", sums by key
    as "added".
    """
    kept, added, to_cpu = {}, {}, plan["to_cpu"]
    # before the pipeline runs, so that its steps are counted from the first
    own = model.source.self_pipeline_0.source if plan["between"] else None
    for event in plan["events"]:
        walk = CallWalk if event["kind"] == "call" else StepWalk
        here = walk(
            event["actions"], event.get("sums", {}), kept, added, event["rows"], to_cpu, clean
        )
        for _ in tracer.iter[[event["number"]]]:
            if event["kind"] == "call":
                here.call(
                    model.transformer, tracer, event["items"], event["branches"], event["text"]
                )
            elif event["kind"] == "prepared":
                here.latents(own.self_prepare_latents_0)
            elif event["kind"] == "step":
                here.step(own.self_scheduler_step_0, *event["x0"])
            else:
                here.latents(own.self_scheduler_step_0)
    images = model.output[0]
    written = Walk(plan["images"], {}, kept, added, {}, to_cpu, clean).apply("hook_image", images)
    images = images if written is None else written
    return {"images": images.detach().cpu(), "kept": kept, "added": added}
