"""The plan of one generation of a diffusers pipeline.

`pipeline_kernel.run` follows it inside a trace. Where a tensor is, its family's file says: the taps
of the hooked denoiser are read here, and written nowhere again. The order in which a call reaches
modules is seen in one call of the denoiser, which without weights computes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooked_models.families.adapter import Family
from hooked_models.families.kernel_tap import HEAD_POINTS, KernelTap
from hooked_models.families.taps import StreamTap
from hooked_models.generation.loops import Call
from hooked_models.generation.names import IMAGE_HOOK, Site
from hooked_models.generation.pipeline_inputs import PipelineInputs
from hooked_models.generation.pipeline_loop import Running, Trial

from .plan import Request, action_of, unreachable, x0_coefficients

BETWEEN = ("hook_latent", "hook_out", "hook_x0")
KERNELS = {"dispatch_attention_fn": True, "F.scaled_dot_product_attention": False}
"""Function that an attention processor calls → True if its tensors are [batch pos head d_head]."""
Orders = tuple[Tensor | None, Tensor | None]


class Events(NamedTuple):
    """How often, and when, one denoiser call enters and leaves modules, by their paths."""

    when: dict[tuple[str, str, int], int]
    """("in" or "out", path, which time) → its place in the order of all."""
    times: dict[str, int]


def make(model: Any, draft: PipelineInputs, request: Request) -> dict[str, Any]:
    """The plan of a run.

    Args:
        model: a `RemotePipeline`, whose `order` is set where it is needed.
        draft: inputs of the run.
        request: the hooks, sums and tensors that the client asked for.

    Raises:
        ValueError: a tensor that no trace reaches, or an edit made for other prompts.
    """
    check_text(model.dit.family, [site for site, _ in request.actions])
    actions: dict[tuple[str, int], dict[str, list[Any]]] = {}
    for site, action in request.actions:
        sent = action_of(model, draft, site, action, request.patching)
        place = _place(draft, site)
        actions.setdefault(place, {}).setdefault(site.inner, []).append(sent)
    if between := [site for site, _ in request.actions if site.inner in BETWEEN]:
        check_between(type(model.pipe), between[0])
    sums: dict[int, dict[str, list[Any]]] = {}
    for each in request.sums:
        number = _number(draft, each.step, each.branch)
        there = sums.setdefault(number, {})
        there.setdefault(each.attention, []).append(each.sent)
    return {
        "events": _events(model, draft, actions, sums),
        "between": bool(between),
        "images": actions.get(("images", 0), {}),
        "to_cpu": request.to_cpu,
    }


def _place(draft: PipelineInputs, site: Site) -> tuple[str, int]:
    """Kind and number of the event in which a trace gets at a site's tensor."""
    step = site.step or 0
    if site.inner == IMAGE_HOOK:
        return "images", 0
    if site.part == "dit":
        return "call", _number(draft, step, site.branch)
    if site.inner in ("hook_out_cond", "hook_out_uncond"):
        return "call", _number(draft, step, site.inner.removeprefix("hook_out_"))
    if site.inner == "hook_latent":
        return ("prepared", 0) if step == 0 else ("after", step - 1)
    return "step", step


def _number(draft: PipelineInputs, step: int, branch: Any) -> int:
    """Number of the denoiser call that computes a branch of a step."""
    return next(
        number
        for number, call in enumerate(draft.calls)
        if call.step == step and branch in call.branches
    )


def _events(
    model: Any,
    draft: PipelineInputs,
    actions: dict[tuple[str, int], dict[str, list[Any]]],
    sums: dict[int, dict[str, list[Any]]],
) -> list[dict[str, Any]]:
    """Events of the run that a hook, a kept tensor or a sum acts in, in order."""
    places = {*actions, *(("call", number) for number in sums)} - {("images", 0)}
    inside = any(kind == "call" for kind, _ in places)
    if inside and model.order is None:
        model.order = order_of(model, draft)
    seen = model.order or Events({}, {})

    def when(place: tuple[str, int]) -> tuple[int, int]:
        kind, number = place
        if kind == "call":
            return draft.calls[number].step, 1 + number
        return (-1, 0) if kind == "prepared" else (number, len(draft.calls) + 1 + (kind == "after"))

    events = []
    for kind, number in sorted(places, key=when):
        here = actions.get((kind, number), {})
        event: dict[str, Any] = {"kind": kind, "number": number, "actions": here, "rows": {}}
        if kind == "call":
            call = draft.calls[number]
            names = {*here, *(f"{name}.hook_q" for name in sums.get(number, {}))}
            event |= {
                "sums": sums.get(number, {}),
                "rows": {branch: call.part(branch) for branch in call.branches},
                "branches": call.branches,
                "text": _text(model.dit),
                "items": _items(model, draft, call, names, seen),
            }
        elif kind == "step":
            x0 = "hook_x0" in here
            event["x0"] = x0_coefficients(draft.solver, number) if x0 else (0.0, 1.0)
        events.append(event)
    return events


def _text(dit: Any) -> dict[str, Any]:
    """Names of the denoiser's parameters, and of those that hold its text and its latents."""
    parameters = list(inspect.signature(type(dit.wrapped).forward).parameters)[1:]
    return {"parameters": parameters, "text": dit.family.text, "image": dit.family.image}


def check_text(family: Family, sites: Iterable[Site]) -> None:
    """Raise ValueError for a hook on text whose arguments a trace would have to arrange anew.

    Example:
        >>> from hooked_models import families
        >>> hidream = families.SUPPORTED["HiDreamImageTransformer2DModel"]
        >>> check_text(hidream, [Site("dit", "hook_text", 0, "cond")])
        Traceback (most recent call last):
        ValueError: hook_text is not within nnsight's reach in HiDream: ...
    """
    if family.by_row is not Family.by_row and any(site.inner == "hook_text" for site in sites):
        raise ValueError(
            f"hook_text is not within nnsight's reach in {family.name}: its text does not enter "
            "row by row; open the model here, or hook blocks.0.hook_resid_pre."
        )


def _items(
    model: Any, draft: PipelineInputs, call: Call, names: set[str], seen: Events
) -> list[dict[str, Any]]:
    """The taps that lead to these names, in the order in which a call reaches them."""
    paths = {id(module): path for path, module in model.dit.wrapped.named_modules()}
    items = []
    for block in model.dit.blocks:
        for tap in block.taps:
            reached = _reached(tap)
            if names & set(reached):
                path = paths[id(tap.module)]
                when, item = _item(tap, path, reached[0], draft, call, seen)
                items.append((when, {"path": path.split("."), **item}))
    return [item for _, item in sorted(items, key=lambda each: each[0])]


def _reached(tap: Any) -> list[str]:
    """Names of the tensors that a tap leads to."""
    if isinstance(tap, KernelTap):
        return [f"{tap.heads.place}.{leaf}" for leaf in HEAD_POINTS]
    return [str(tap.point.name)]


def _item(
    tap: Any, path: str, name: str, draft: PipelineInputs, call: Call, seen: Events
) -> tuple[int, dict[str, Any]]:
    """A tap's place in the order of a call, and the kernel's arguments for it.

    Raises:
        ValueError: its module runs never, or too often.
    """
    times, nth = seen.times.get(path, 0), getattr(tap, "call", 0)
    enters = isinstance(tap, KernelTap) or bool(tap.arguments)
    if times <= nth or (enters and times > 1):
        raise ValueError(
            f"{name} is not within nnsight's reach: its module, {path}, runs {times} times in a "
            "call."
        )
    describe: Any = _kernel_item if isinstance(tap, KernelTap) else _stream_item
    item = describe(tap, lambda *streams: _order_in(draft, call, streams))
    number = draft.calls.index(call)
    item["visit"] = None if times == 1 else times * number + nth
    return seen.when["in" if enters else "out", path, nth], item


def _stream_item(tap: StreamTap, orders: Callable[..., tuple[Orders, int]]) -> dict[str, Any]:
    present = [i for i, s in enumerate(tap.streams) if tap.keeps_text or s != "text"]
    places = sorted(present, key=lambda i: tap.streams[i])  # image before text
    order, positions = orders(*(tap.streams[i] for i in places))
    parameters = list(inspect.signature(type(tap.module).forward).parameters)[1:]
    return {
        "kind": "input" if tap.arguments else "output",
        "name": str(tap.point.name),
        "places": places,
        "axes": tap.axes,
        "orders": order,
        "positions": positions,
        "arguments": [(name, parameters.index(name)) for name in tap.arguments],
    }


def _kernel_item(tap: KernelTap, orders: Callable[..., tuple[Orders, int]]) -> dict[str, Any]:
    within, pos_first = kernel_of(tap.module, tap.heads.place)
    queries, keys = orders(tap.heads.queries), orders(tap.heads.keys)
    return {
        "kind": "kernel",
        "name": tap.heads.place,
        "within": within,
        "pos_first": pos_first,
        "orders": (queries[0], keys[0]),
        "positions": (queries[1], keys[1]),
    }


def kernel_of(attention: nn.Module, place: str) -> tuple[tuple[str, str], bool]:
    """Nnsight's names of the calls of an attention's processor and of that one's kernel.

    The last entry is True if tensors are [batch pos head d_head] there.

    Raises:
        ValueError: the processor calls no kernel that is known.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> kernel_of(Attention(8), "blocks.0.attn")
        (('self_processor_0', 'F_scaled_dot_product_attention_0'), False)
    """
    processor: Any = getattr(attention, "processor", None)
    source = "" if processor is None else inspect.getsource(type(processor).__call__)
    for name, pos_first in KERNELS.items():
        if (calls := source.count(f"{name}(")) > 0:
            # the last one: those before it, where there are any, are about reference images
            return ("self_processor_0", f"{name.replace('.', '_')}_{calls - 1}"), pos_first
    raise ValueError(
        f"{place}.hook_q is not within nnsight's reach: {type(processor).__name__} calls no "
        "attention kernel of torch or diffusers."
    )


def _order_in(draft: PipelineInputs, call: Call, streams: Sequence[str]) -> tuple[Orders, int]:
    """Indices from the model's order of these streams to that of hooks and back, for a call's rows.

    The number of positions comes second.
    """
    layouts = [draft.layouts[branch] for branch in call.branches]
    each = [layout.order(tuple(streams)) for layout in layouts]
    positions = layouts[0].length(*streams)
    if all(there is None for there, _ in each):
        return (None, None), positions
    rows = []
    for there, back in each:
        plain = torch.arange(positions)[None]
        rows.append([plain if order is None else order for order in (there, back)])
    if all(len(order) == 1 and torch.equal(order, rows[0][0]) for order, _ in rows):
        return (rows[0][0], rows[0][1]), positions
    there, back = (
        torch.cat([pair[side].expand(call.rows, -1) for pair in rows]) for side in (0, 1)
    )
    return (there, back), positions


def check_between(pipeline: type, site: Site) -> None:
    """Raise where nnsight cannot tell a pipeline's calls between steps.

    Raises:
        ValueError: the pipeline calls its scheduler or draws latents in several places, or in none.

    Example:
        >>> from diffusers import FluxPipeline
        >>> check_between(FluxPipeline, Site("sampler", "hook_latent", 0))
    """
    source = inspect.getsource(pipeline.__call__)
    for call in ("self.scheduler.step(", "self.prepare_latents("):
        if (found := source.count(call)) != 1:
            raise unreachable(
                site, f"{pipeline.__name__} calls {call[:-1]} in {found} places of its loop."
            )


@torch.no_grad()
def order_of(model: Any, draft: PipelineInputs) -> Events:
    """The order in which one denoiser call enters and leaves the modules that are hooked.

    Example:
        >>> from dit_lens.remote.pipeline_plan import Events
        >>> Events({("in", "blocks.0", 0): 0}, {"blocks.0": 1}).times["blocks.0"]
        1
    """
    transformer = model.dit.wrapped
    hooked = {id(tap.module) for block in model.dit.blocks for tap in block.taps}
    when: dict[tuple[str, str, int], int] = {}
    times: dict[tuple[str, str], int] = {}

    def logging(kind: str, path: str) -> Callable[..., None]:
        def log(*args: Any) -> None:
            nth = times.get((kind, path), 0)
            when[kind, path, nth], times[kind, path] = len(when), nth + 1

        return log

    with ExitStack() as stack:
        for path, module in transformer.named_modules():
            if id(module) in hooked:
                stack.callback(module.register_forward_pre_hook(logging("in", path)).remove)
                stack.callback(module.register_forward_hook(logging("out", path)).remove)
        Running(draft, Trial(transformer), 1).quiet().run(output_type="latent")
    return Events(when, {path: n for (kind, path), n in times.items() if kind == "in"})
