"""From hooks under our names to the plan that `kernel.run` follows inside a trace: plain dicts,
checked before it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_models import HookedT5Encoder, HookedTextToImage
from hooked_models.generation.cache import activation_shape
from hooked_models.generation.hooks import Attached
from hooked_models.generation.names import FINAL, Branch, Site
from hooked_models.generation.sampling import Solver

from ..intervene.edits import Edit, RowEdits
from .kernel import Point

UNKNOWN = torch.tensor(torch.nan)


class _CleanRun(Mapping[str, Tensor]):
    """Has a value for every name, which only `RemoteTextToImage.patch` can tell."""

    def __getitem__(self, name: str) -> Tensor:
        return UNKNOWN

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "CLEAN"


CLEAN = _CleanRun()
"""`Intervention(…, action=Replace(CLEAN))`: put there what the clean run of
`RemoteTextToImage.patch` had.
"""


class Sum(NamedTuple):
    """Attention between groups, summed where the model is: arguments of
    `intervene.portable_ops.sums_of_pattern`.
    """

    layer: int
    step: int
    branch: Branch
    sublayer: str
    queries: Float[Tensor, "batch pos group"]
    keys: Float[Tensor, "batch key_pos key_group"]
    reduce: str

    @property
    def key(self) -> tuple[int, int, Branch]:
        """Under which the kernel returns it."""
        return self.layer, self.step, self.branch


class Groups(NamedTuple):
    """Groups of positions whose attention is added up, and how."""

    queries: Float[Tensor, "batch pos group"]
    keys: Mapping[Branch, Float[Tensor, "batch key_pos key_group"]]
    reduce: Literal["sum", "max"]


class RunShape(NamedTuple):
    """Size of a generation: prompts, text positions, steps, and rows and columns of the latents."""

    batch: int
    length: int
    num_steps: int
    guidance: float
    grid: tuple[int, int]


def make(
    model: HookedTextToImage,
    attached: Sequence[Attached],
    shape: RunShape,
    *,
    keep: Sequence[Site] = (),
    sums: Sequence[Sum] = (),
    home: bool = True,
    patching: bool = False,
) -> dict[str, Any]:
    """The plan of one generation.

    Args:
        attached: hooks, in the order in which they act.
        shape: of the generation.
        keep: sites whose tensors, as hooks leave them, are returned.
        home: True to return kept tensors to the client, False to leave them with the model, for the
            next run of a session.
        patching: whether there is an earlier run for `CLEAN` to mean.

    Raises:
        ValueError: a tensor that no trace reaches, or an edit made for other prompts.
    """
    cfg, encoder, solver = model.cfg, model.names.text_encoder, model.solver(shape.num_steps)
    touches: dict[tuple[str, int], dict[str, list[tuple[Point, Any]]]] = {}
    actions: list[tuple[Site, Any]] = [(each.site, each.function) for each in attached]
    for site, action in [*actions, *((site, None) for site in keep)]:
        if (reason := _unreachable(model, site, solver, writes=action is not None)) is not None:
            raise ValueError(f"{site.name} is not within nnsight's reach: {reason}")
        point = Point(site.name, site.inner, site.step, site.branch)
        sent = _sendable(model, site, action, shape, patching)
        touches.setdefault(_call_of(site), {}).setdefault(site.inner, []).append((point, sent))
    added: dict[int, dict[str, list[Any]]] = {}
    for each in sums:
        there = added.setdefault(each.step, {}).setdefault(
            f"blocks.{each.layer}.{each.sublayer}", []
        )
        there.append((each.key, each.branch, each.queries, each.keys, each.reduce))

    steps = {}
    for step in {step for kind, step in touches if kind == "step"} | set(added):
        here = touches.get(("step", step), {})
        x0 = _x0_coefficients(solver, step) if "hook_x0" in here else (0.0, 1.0)
        steps[step] = (here, added.get(step, {}), *x0)
    return {
        "cfg": {
            **{"batch": shape.batch, "guided": shape.guidance > 1, "guidance": shape.guidance},
            **{"eps": cfg.eps, "layers": cfg.n_layers},
            # the other half of the channels, where there is one, is a learned variance
            **{"heads": cfg.n_heads, "scale": cfg.d_head**-0.5, "channels": cfg.in_channels},
        },
        "encoder": {} if encoder is None else _encoder(encoder, shape.batch),
        "calls": {call: here for (kind, call), here in touches.items() if kind == "call"},
        "steps": steps,
        "images": touches.get(("image", 0), {}),
        "home": home,
    }


def _call_of(site: Site) -> tuple[str, int]:
    """Kind and number of the call that computes a site's tensor."""
    if site.inner == FINAL:
        return "image", 0
    encoders = {"text_encoder": ("call", 0), "null_text_encoder": ("call", 1)}
    return encoders.get(site.part, ("step", site.step or 0))


def _sendable(
    model: HookedTextToImage, site: Site, action: Any, shape: RunShape, patching: bool
) -> Any:
    """A hook function as it is, an edit as its arguments."""
    if isinstance(action, RowEdits):
        raise ValueError(
            f"{site.name}: edits of some rows of a batch stay in sweeps, which need a model at "
            "hand."
        )
    if not isinstance(action, Edit):
        return action
    module: Any = model.names.text_encoder if site.part.endswith("text_encoder") else model
    image = model.image_size(shape.grid)
    action.check_shape(
        activation_shape(module.cfg, site, shape.batch, shape.grid, shape.length, image)
    )
    return _arguments(action, patching)


def _arguments(edit: Edit, patching: bool) -> dict[str, Any]:
    if edit.values is not UNKNOWN:
        return edit.arguments
    if not patching:
        raise ValueError(
            f"{edit.site.name}: Replace(CLEAN) has a meaning in RemoteTextToImage.patch alone."
        )
    return {**edit.arguments, "values": None}


def _encoder(encoder: Any, batch: int) -> dict[str, Any]:
    cfg = encoder.cfg
    if not isinstance(encoder, HookedT5Encoder):
        return {"kind": "tokens"}
    return {
        **{
            "kind": "t5",
            "layers": cfg.n_layers,
            "heads": cfg.n_heads,
            "eps": cfg.eps,
            "gated": cfg.gated_mlp,
            "batch": batch,
        },
    }


def _unreachable(model: HookedTextToImage, site: Site, solver: Solver, writes: bool) -> str | None:
    """Why a tensor cannot be read, or written, through a trace of the diffusers pipeline."""
    leaf = site.inner.rpartition(".")[2]
    if site.row.flag is not None:
        return "no module of diffusers computes it; take hook_z, or a HookedTextToImage at hand."
    if site.inner == "hook_latent" and writes:
        return (
            "the pipeline's own variable goes on to the scheduler; give latents=…, or write "
            "hook_out, hook_x0 or hook_embed."
        )
    if site.inner == "hook_latent" and abs(solver.input_scales[site.step or 0] - 1) > 1e-6:
        return f"{solver.name} scales what the denoiser gets."
    if site.part.endswith("text_encoder") and leaf == "hook_rel_pos_bias" and writes:
        return "all prompts share one; write blocks.{l}.attn.hook_attn_scores or hook_pattern."
    if leaf in ("hook_text", "hook_caption") and model.dit.caption_projection is None:
        return (
            "this model has no caption projection, whose input and output they are; write "
            "text_encoder.hook_out."
        )
    return None


def _x0_coefficients(solver: Solver, step: int) -> tuple[float, float]:
    """(a, b) of a step, where x0 = a · latent + b · out."""
    zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    return float(solver.x0(step, one, zero)), float(solver.x0(step, zero, one))
