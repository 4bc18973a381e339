"""Activation patching as one request.

Several runs in one session, of which only images come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_models.generation.model import Prompts
from hooked_models.generation.noise import Seeds

from ..intervene.interventions import Intervention
from . import plan
from .kernel import arguments
from .server import import_nnsight


def patched(
    model: Any,
    clean: Prompts,
    corrupt: Prompts,
    conditions: Mapping[str, Sequence[Intervention]],
    seed: Seeds,
    num_steps: int,
    guidance: float | None,
    latents: Tensor | None,
) -> dict[str, Float[Tensor, "batch 3 height width"]]:
    """As `RemoteTextToImage.patch`, which calls it.

    Example:
        >>> from dit_lens import Intervention, Replace
        >>> from dit_lens.remote import CLEAN, RemoteTextToImage
        >>> model = RemoteTextToImage("rte-nano")
        >>> head = Intervention("blocks.1.cross_attn.hook_z", heads=[0], action=Replace(CLEAN))
        >>> above, below = "red circle is above blue square", "red circle is below blue square"
        >>> sorted(patched(model, above, below, {"L1H0": [head]}, 0, 2, None, None))
        ['L1H0', 'clean', 'corrupt']
    """
    if reserved := {"clean", "corrupt"} & set(conditions):
        raise ValueError(
            f"A condition cannot be called {reserved.pop()!r}: that is what a run without any is "
            "called."
        )
    source, target = (
        model.draft(texts, seed, num_steps, guidance, latents) for texts in (clean, corrupt)
    )
    _check_pairs(model, source, target)
    from_clean, from_corrupt = model.call_of(clean, source), model.call_of(corrupt, target)
    edits = {
        name: [
            edit
            for each in condition
            for edit in each.resolve(model, from_corrupt["prompt"], num_steps=num_steps)
        ]
        for name, condition in conditions.items()
    }
    sites = {
        e.site.name: e.site
        for every in edits.values()
        for e in every
        if e.values is plan.FROM_CLEAN_RUN
    }
    attached = model.checked_hooks(source)
    first = model.plan_of(source, plan.Request(attached, list(sites.values()), to_cpu=False))
    plans = {"corrupt": model.plan_of(target, plan.Request(attached))}
    for name, every in edits.items():
        with model.hooks([(edit.site.name, edit) for edit in every]):
            attached = model.checked_hooks(target)
        plans[name] = model.plan_of(target, plan.Request(attached, patching=True))

    opened, run, nnsight, backend = model.nnsight, model.kernel, import_nnsight(), model.backend()

    def ask() -> Any:
        found = None  # on a server, where it has a value later
        with opened.session(backend=backend):
            found = nnsight.save({})
            with opened.generate(**arguments(from_clean)) as tracer:
                source = run(opened, tracer, first)
            found["clean"] = source["images"]
            for name in plans:
                with opened.generate(**arguments(from_corrupt)) as tracer:
                    result = run(opened, tracer, plans[name], source["kept"])
                found[name] = result["images"]
        return found

    return model.answer(ask, backend)


def _check_pairs(model: Any, clean: Any, corrupt: Any) -> None:
    """Raise ValueError unless prompts and positions of two drafts correspond by number."""
    counts = [(len(each), model.layout(each).text_mask.shape[1]) for each in (clean, corrupt)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"clean is {counts[0][0]} prompts of {counts[0][1]} tokens, corrupt {counts[1][0]} of "
            f"{counts[1][1]}: make them equally many, and equally long, so that equal positions "
            "correspond."
        )
