"""Construction of a planted model and its truth from a kind and a seed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, get_args

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from transformers import PreTrainedModel

from hooked_models import (
    FusedTokenEncoder,
    FusedTokenEncoderConfig,
    HookedTextToImage,
    RandomTokenEncoder,
    RandomTokenEncoderConfig,
    word_tokenizer,
)
from hooked_models.generation.model import DEFAULT_STEPS
from hooked_models.text_encoders.random_tokens import DEFAULT_LENGTH, SPECIAL_TOKENS

from .. import task as scenes
from ..text.prompts import Role
from .assembly import Assembly, When, Wire, install_heads, install_units, well_conditioned
from .circuit import (
    AXES,
    CAPTION_FEATURES,
    DRAWN,
    N_LAYERS,
    OBJECTS,
    RESIDUAL_FEATURES,
    SEEN,
    WORD_AXIS,
    plant,
)
from .disguise import LEAK, modulate_at_random, perturb
from .distractors import Placed, fill, leak, plant_decoys, random_head
from .geometry import ResidualSpace, Space, orthonormal
from .surroundings import (
    HORIZONTAL,
    LATE_BELOW,
    LATENT_CHANNELS,
    VERTICAL,
    caption_mlp,
    clock,
    codec,
    patches_in_and_out,
)
from .truth import HeadRole, Kind, PlantedHead, PlantedTruth, edges_of

N_HEADS = 8
D_HEAD = 24
D_TEXT = 256
CONSTANT = 50.0
"""Length of the constant direction; the position code has about 7, everything else 5."""

RELATION_HEADS: dict[str, str] = {
    f"side{k}_{axis}": f"{WORD_AXIS[axis]} word: marks the side where object {k} goes"
    for k in OBJECTS
    for axis in AXES
}
OBJECT_HEADS = {
    "shape": "reads an object's shape word at its tokens",
    "color": "reads an object's colour word at its tokens",
}
HELPER_HEADS: dict[str, tuple[HeadRole, str]] = {
    "peak": ("noise", "tells every token where the noise has its peak, which shifts the layout"),
    "presence": ("presence", "tells every token that the sentence has objects"),
    "locate1": ("locator", "tells every token where object 1's tag is"),
    "locate2": ("locator", "tells every token where object 2's tag is"),
}


def planted_circuit(
    kind: Kind | str = "two-stage", seed: int = 0
) -> tuple[HookedTextToImage, PlantedTruth]:
    """Model with weights set by hand, which draws two-object scenes by a known circuit.

    Float32, on the CPU. Captions are those of `dit_lens.scenes` with both colors named, in any of
    the 22 phrases; a caption without a relation is drawn in a layout chosen by the noise. The clock
    is made for 14 steps: a timestep within 35 of 606 or 107 (as 20, 25 and 30 steps have) spoils
    the image.

    Args:
        kind: "two-stage": separate vertical and horizontal relation heads read plain word vectors;
            "fused": the relation is in the second shape word's contextual vector instead;
            "rotated": two-stage in random gauges, with weight noise (0.1 %) and leaking
            distractors; "no-relation": two-stage with idle heads of the same norms in the relation
            heads' places, all other weights equal.
        seed: of the places of heads and hidden units, directions and word vectors.

    Raises:
        ValueError: there is no such kind.

    Source: the two-stage mechanism of Wang, Fan, Pan (arXiv 2601.06338). `docs/planted_circuit.md`
    has the algebra.

    Example:
        >>> model, truth = planted_circuit("two-stage", seed=0)
        >>> model.cfg.n_layers, [str(head) for head in truth.object_heads]
        (6, ['cross_attn.L5H7', 'cross_attn.L5H3'])
    """
    if kind not in get_args(Kind):
        raise ValueError(
            f"There is no planted circuit {kind!r}: choose one of {', '.join(get_args(Kind))}."
        )

    chosen: Kind = kind  # type: ignore[assignment]

    # one for each purpose, so that kinds of one seed share weights
    def stream(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(100 * seed + number)

    hidden = kind == "rotated"
    transformer = empty_transformer()
    d = transformer.inner_dim
    encoder, table = text_encoder(chosen, seed)
    code = transformer.pos_embed.pos_embed[0]
    residual = ResidualSpace(code, RESIDUAL_FEATURES, CONSTANT, stream(0))
    caption = Space(
        orthonormal(d, d, stream(1)) if hidden else torch.eye(d, dtype=torch.float64),
        CAPTION_FEATURES,
    )
    build = Assembly(residual, caption, N_LAYERS, D_HEAD)
    plant(build)
    decoys = plant_decoys(build, stream(2))
    idle = fill(build, N_HEADS, stream(3))
    if kind == "no-relation":
        heads, generator = build.layers[1].heads["cross_attn"], stream(4)
        for name in RELATION_HEADS:
            heads[name] = random_head(build, "cross_attn", heads[name].norms, generator)
    if hidden:
        leak(build, [*decoys, *idle], LEAK, stream(5))

    words = dict(zip((*SPECIAL_TOKENS, *scenes.WORDS), table.embed_tokens.weight, strict=True))
    order = torch.randperm(d, generator=stream(6))
    caption_mlp(
        transformer.caption_projection, caption, words, table.position_code(DEFAULT_LENGTH), order
    )
    clock(transformer, residual)
    pixels = codec(stream(7) if hidden else None)
    patches_in_and_out(transformer, pixels, residual, stream(8))
    places = install(build, transformer, stream(9), mixed=hidden)
    if hidden:
        modulate_at_random(transformer, stream(10))
        perturb(transformer, stream(11))

    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)
    model = HookedTextToImage(
        transformer.eval(), encoder, word_tokenizer(scenes.WORDS), pixels, scheduler
    ).eval()
    return model, describe(chosen, seed, build, places, decoys, idle)


def empty_transformer() -> Any:
    """PixArt transformer with all parameters zero."""
    transformer = PixArtTransformer2DModel(
        num_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        attention_head_dim=D_HEAD,
        cross_attention_dim=N_HEADS * D_HEAD,
        caption_channels=D_TEXT,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        sample_size=16,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    for parameter in transformer.parameters():
        parameter.data.zero_()
    return transformer


def text_encoder(kind: Kind, seed: int) -> tuple[PreTrainedModel, RandomTokenEncoder]:
    """Text encoder, and the table of word vectors and positions in it."""
    if kind == "fused":
        moved = [*VERTICAL, *HORIZONTAL]
        encoder = FusedTokenEncoder(
            FusedTokenEncoderConfig(scenes.WORDS, moved=moved, d_model=D_TEXT, seed=seed)
        ).eval()
        return encoder, encoder.table
    table = RandomTokenEncoder(
        RandomTokenEncoderConfig(scenes.WORDS, d_model=D_TEXT, seed=seed)
    ).eval()
    return table, table


def install(
    build: Assembly, transformer: Any, generator: torch.Generator, mixed: bool
) -> dict[Placed, int]:
    """Write heads and units into the blocks, in random order; returns the heads' numbers.

    `mixed`: in random gauges.
    """
    plain = torch.eye(D_HEAD, dtype=torch.float64)
    places: dict[Placed, int] = {}
    for number, (block, layer) in enumerate(
        zip(transformer.transformer_blocks, build.layers, strict=True)
    ):
        for sublayer, attention in (("attn", block.attn1), ("cross_attn", block.attn2)):
            heads: dict[str, Any] = layer.heads[sublayer]  # type: ignore[index]
            names = [list(heads)[i] for i in torch.randperm(N_HEADS, generator=generator)]
            mixes = (
                [well_conditioned(D_HEAD, generator) for _ in range(2 * N_HEADS)]
                if mixed
                else [plain] * 2 * N_HEADS
            )
            install_heads(
                attention,
                [heads[name] for name in names],
                list(zip(mixes[::2], mixes[1::2], strict=True)),
            )
            places |= {(sublayer, number, name): i for i, name in enumerate(names)}  # type: ignore[misc]
        order = torch.randperm(block.ff.net[0].proj.out_features, generator=generator)
        install_units(block.ff, layer.units, order[: len(layer.units)].tolist())
    return places


def describe(
    kind: Kind,
    seed: int,
    build: Assembly,
    places: dict[Placed, int],
    decoys: dict[Placed, str],
    idle: list[Placed],
) -> PlantedTruth:
    """Ground truth of a planted model, from its wires and the numbers of its heads."""
    circuit = _Circuit(build.wires, places, _phases(), _feature_roles(kind))
    removed: list[Placed] = []
    if kind == "no-relation":
        removed = [(*circuit.named.pop(name), name) for name in RELATION_HEADS]  # type: ignore[misc]
    random = "random, with the norms of another head"
    return PlantedTruth(
        kind=kind,
        seed=seed,
        relation_heads=circuit.heads(
            {name: ("relation", what) for name, what in RELATION_HEADS.items()}
        ),
        object_heads=circuit.heads({name: ("object", what) for name, what in OBJECT_HEADS.items()}),
        helper_heads=circuit.heads(HELPER_HEADS),
        decoy_heads=tuple(
            circuit.distractor(placed, "decoy", what) for placed, what in decoys.items()
        ),
        idle_heads=tuple(
            circuit.distractor(placed, "idle", random) for placed in [*removed, *idle]
        ),
        edges=edges_of([*circuit.remaining, *SEEN, *DRAWN], places, circuit.roles, circuit.steps),
        phrases=tuple(chain.from_iterable(scenes.PHRASES.values())),
    )


def _phases() -> dict[When, tuple[int, ...]]:
    """Steps of each phase of a run of the default length."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True)
    scheduler.set_timesteps(DEFAULT_STEPS)
    is_late = (scheduler.timesteps < LATE_BELOW).tolist()
    return {
        "early": tuple(step for step, late in enumerate(is_late) if not late),
        "late": tuple(step for step, late in enumerate(is_late) if late),
        "always": tuple(range(DEFAULT_STEPS)),
    }


def _feature_roles(kind: Kind) -> dict[str, tuple[Role, ...]]:
    """Caption feature → roles of the tokens that have it."""
    said_by: tuple[Role, ...] = ("shape2",) if kind == "fused" else ("relation",)
    objects: tuple[Role, ...] = ("shape1", "shape2", "color1", "color2")
    roles: dict[str, tuple[Role, ...]] = {str(name): (name,) for name in objects}
    roles |= dict.fromkeys(("vertical", "horizontal", "is_vertical", "is_horizontal"), said_by)
    roles |= dict.fromkeys(scenes.SHAPES, ("shape1", "shape2"))
    return roles | dict.fromkeys(scenes.COLORS, ("color1", "color2"))


class _Circuit:
    """Named heads of the circuit, and their place in the model.

    Attributes:
        named: name of a head → its sublayer and layer.
    """

    def __init__(
        self,
        wires: list[Wire],
        places: dict[Placed, int],
        steps: dict[When, tuple[int, ...]],
        roles: dict[str, tuple[Role, ...]],
    ) -> None:
        self.wires, self.places, self.steps, self.roles = wires, places, steps, roles
        self.named = {wire.head: (wire.kind, wire.layer) for wire in wires if wire.head}

    @property
    def remaining(self) -> list[Wire]:
        """Wires of the heads that are named, and of the MLPs."""
        return [wire for wire in self.wires if not wire.head or wire.head in self.named]

    def heads(self, purposes: Mapping[str, tuple[HeadRole, str]]) -> tuple[PlantedHead, ...]:
        """The heads of these names that the model has: name → role and purpose."""
        return tuple(
            self.head(name, role, what)
            for name, (role, what) in purposes.items()
            if name in self.named
        )

    def head(self, name: str, role: HeadRole, what: str) -> PlantedHead:
        sublayer, layer = self.named[name]
        wires = [w for w in self.wires if (w.kind, w.layer, w.head) == (sublayer, layer, name)]
        on_text = [w for w in wires if w.port in "kv" and sublayer == "cross_attn"]
        read = chain.from_iterable(self.roles.get(wire.feature, ()) for wire in on_text)
        written = [wire.feature for wire in wires if wire.port == "out"]
        return PlantedHead(
            sublayer,  # type: ignore[arg-type]
            layer,
            self.places[sublayer, layer, name],  # type: ignore[index]
            role,
            what,
            tuple(dict.fromkeys(read)),
            tuple(dict.fromkeys(written)),
            self.steps[wires[0].when],
        )

    def distractor(self, placed: Placed, role: HeadRole, what: str) -> PlantedHead:
        """A head outside of the circuit."""
        return PlantedHead(placed[0], placed[1], self.places[placed], role, what)
