"""The commands of `dit-lens`.

Each imports its modules itself, so that `--help` and `models` need not wait for torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ..store import Store, write_whole
from ..training.config import PretrainConfig, TrainConfig
from .output import TABLES, first_line, save, say, show, step_bar

if TYPE_CHECKING:
    from hooked_models import HookedTextToImage

    from ..task import Scene

Prompts = tuple[str, ...]
Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
DIRECTION_WORDS = ("above", "below", "left", "right", "upper", "lower", "higher")


@dataclass(frozen=True)
class Machine:
    """Device and precision of a model."""

    device: str = "cpu"
    """Device of the model: cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights."""
    quiet: bool = False
    """Print the result alone: no progress bars and no warnings."""

    def load(self, model: str) -> HookedTextToImage:
        """The hooked model of a name or folder.

        Raises:
            ValueError: torch has no such device here.
        """
        import torch

        from hooked_models import HookedTextToImage

        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--device {self.device}: torch cannot use it here ({first_line(error)})."
            ) from None
        return HookedTextToImage.from_pretrained(model, dtype=getattr(torch, self.dtype)).to(
            self.device
        )


On = Annotated[Machine, tyro.conf.arg(name="")]


def train_command(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a model, or continue a run that was stopped.

    `dit-lens train --out runs/mine --size nano`. Several GPUs or nodes: `accelerate launch -m
    dit_lens.cli train …`.
    """
    import torch

    from ..training import train

    folder = train(config)
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_rank() != 0
    ):
        return
    say(f"Trained: {folder}")


def pretrain_command(config: Annotated[PretrainConfig, tyro.conf.arg(name="")]) -> None:
    """Pre-train a small T5 encoder on a caption grammar, or continue a run that was stopped.

    `train --encoder` reads it: `dit-lens pretrain-text-encoder --out runs/encoder`.
    """
    from ..training.t5.pretrain import pretrain

    say(f"Pre-trained: {pretrain(config)}")


def generate(
    model: Name,
    machine: On,
    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None,
    prompts: Prompts = (),
    seed: int = 0,
    num_steps: int = 14,
    guidance: float = 4.5,
    batch_size: int = 16,
    out: Path = Path("image.png"),
) -> None:
    """Draw a prompt, or several from one noise, and save the pictures.

    `dit-lens generate rte-micro "red circle is above blue square"`.

    Args:
        model: bundled name (`dit-lens models`), pipeline folder, folder of a training run, or hub
            id.
        machine: device and precision, see `Machine`.
        prompt: text to draw, such as "red circle is above blue square".
        prompts: several texts instead, such as "a red cube" "a blue ball", or a text file with one
            a line, such as prompts.txt.
        seed: seed of the noise.
        num_steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 switches it off.
        batch_size: prompts at once.
        out: picture file; its suffix names the format. Several pictures are numbered: image-0.png.
    """
    import torch
    from PIL import Image

    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(
            f"--out {out}: name a picture file, such as "
            f"{out / 'image.png' if out.is_dir() else out}.png."
        )
    if (prompt is None) == (not prompts):
        raise ValueError('give one PROMPT, or --prompts "a red cube" "a blue ball".')
    texts = [prompt] if prompt is not None else read_prompts(prompts)
    hooked = machine.load(model)
    starts = range(0, len(texts), batch_size)
    with torch.no_grad(), step_bar(len(starts) * hooked.count_steps(num_steps)) as advance:
        for start in starts:
            images = hooked.run_with_hooks(
                texts[start : start + batch_size],
                seed,
                num_steps,
                guidance,
                fwd_hooks=[(lambda name: name.endswith(".hook_latent"), advance)],
            )
            for i, image in enumerate(images, start):
                pixels = (image.permute(1, 2, 0).float() * 255).round().byte().cpu().numpy()
                path = out if prompt is not None else out.with_stem(f"{out.stem}-{i}")
                write_whole(path, Image.fromarray(pixels).save)
                say(f"Saved {path}")


def evaluate(
    model: Name, machine: On, prompts: Prompts = (), n: int = 512, out: Path | None = None
) -> None:
    """Score a model on held-out and trained scenes, with 95 % intervals.

    By relation, phrase and template: `dit-lens evaluate rte-micro --n 64 --out accuracies.csv`.

    Args:
        model: bundled name (`dit-lens models`), pipeline folder, folder of a training run, or hub
            id.
        machine: device and precision, see `Machine`.
        prompts: captions of scenes to score instead, such as "red circle is above blue square", or
            a text file with one a line; the i-th is drawn from noise i.
        n: scenes of each split.
        out: table file, such as accuracies.csv (or .parquet, .json, .html), or a folder for
            evaluation.parquet (one row an image) and evaluation.md, in which a stopped evaluation
            continues.
    """
    from .. import task as scenes
    from ..task import evaluation

    if n < 1:
        raise ValueError(f"--n {n}: score at least one scene.")
    if prompts:
        drawn = [scenes.from_caption(prompt) for prompt in read_prompts(prompts)]
        table = evaluation.summarise(evaluation.score(machine.load(model), drawn)).reset_index()
        show(table, out, f"{model}, {len(drawn)} images")
        return
    folder = None if out is None or out.suffix in TABLES else out
    rows = evaluation.evaluate_model(machine.load(model), n, out=folder and folder / "batches")
    if folder is not None:
        with Store(folder, {}, wait=True) as store:
            store.put("evaluation.parquet", lambda path: rows.to_parquet(path, index=False))
            store.put(
                "evaluation.md", lambda path: path.write_text(evaluation.to_markdown(rows) + "\n")
            )
    elif out is not None:
        save(evaluation.accuracies(rows, ["split", "template", "relation"]), out)
    say(evaluation.to_markdown(rows))


def screen(
    model: Name, machine: On, words: tuple[str, ...] = DIRECTION_WORDS, out: Path | None = None
) -> None:
    """Rank cross-attention heads by the match of their maps with words' directions.

    The maps are position by word: `dit-lens screen rte-micro --words above below --out heads.csv`.
    Relation heads of the paper have |cosine| ≥ .5 and p ≤ .01.

    Args:
        model: bundled name (`dit-lens models`), pipeline folder, folder of a training run, or hub
            id.
        machine: device and precision, see `Machine`.
        words: direction words.
        out: table file, such as heads.csv (or .parquet, .json, .html).
    """
    from ..readout import screening

    hooked = machine.load(model)
    vectors = {word: screening.word_vector(hooked, word) for word in words}
    show(screening.screen_heads(hooked.dit, vectors), out, f"{model}: heads by {', '.join(words)}")


def synopsis_command(
    model: Name,
    machine: On,
    prompts: Prompts = (),
    image_group: str | None = None,
    key_group: str | None = None,
    sublayer: Literal["cross_attn", "attn"] = "cross_attn",
    reduce: Literal["sum", "mass", "mean", "max"] = "mean",
    step: int | None = None,
    branch: Literal["cond", "uncond"] = "cond",
    num_scenes: int = 32,
    scene_seed: int = 100,
    batch_size: int = 16,
    threshold: float | None = None,
    out: Path | None = None,
) -> None:
    """Rank heads by the attention of an image region to words of the prompt.

    In "attn", to another region: `dit-lens synopsis rte-micro --key-group relation --out
    attention.csv`.

    Args:
        model: bundled name (`dit-lens models`), pipeline folder, folder of a training run, or hub
            id.
        machine: device and precision, see `Machine`.
        prompts: prompts of your own, such as "a red cube" "a blue ball", or a text file with one a
            line; their only region is the whole "image"; by default `num_scenes` scenes.
        image_group: region that attends, such as object1, object2 (the default) or background of a
            scene, or image.
        key_group: role of the words attended to ("relation" by default), or a word of all prompts,
            such as above; in "attn", a region.
        sublayer: cross-attention to the text, or self-attention.
        reduce: sum over both groups, mass per image token, mean per pair of tokens, or their max.
        step: denoising step, such as 0 for the first; by default the mean over all.
        branch: guidance branch.
        num_scenes: scenes drawn where no prompts are given.
        scene_seed: seed of the scenes.
        batch_size: prompts at once.
        threshold: tokens covered at least to this share, such as 0.5, belong to an object; by
            default they count by their share.
        out: table file, such as attention.csv (or .parquet, .json, .html), or a folder in which a
            stopped run continues.
    """
    from ..readout import synopsis

    hooked = machine.load(model)
    drawn, texts = scenes_of(prompts, num_scenes, scene_seed)
    groups = _regions(hooked, drawn, texts, batch_size, threshold) if drawn else None
    region, other = ("object2", "object1") if drawn else ("image", "image")
    region, keys = (
        image_group or region,
        key_group or ("relation" if sublayer == "cross_attn" else other),
    )
    folder, file = folder_or_file(out)
    seen = synopsis.attention_synopsis(
        hooked,
        texts,
        range(len(texts)),
        sublayer,
        groups,
        reduce,
        text_groups=_words(hooked, texts, keys) if sublayer == "cross_attn" else None,
        batch_size=batch_size,
        out=folder,
    )
    table = synopsis.rank_heads(seen, region, keys, "mean" if step is None else step, branch)
    when = "mean over steps" if step is None else f"step {step}"
    title = f"{model}: {region} → {keys}, {reduce}, {when}, {branch}, {len(texts)} prompts"
    show(table, file, title)


def scenes_of(prompts: Sequence[str], n: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes to draw, none if there are prompts; and the prompts, or the scenes' captions."""
    from .. import task as scenes

    if prompts:
        return [], read_prompts(prompts)
    drawn = scenes.sample(n, seed=seed, split="all", color_words="both")
    return drawn, [scenes.caption(scene) for scene in drawn]


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts; the name of a text file (.txt) stands for its lines.

    Raises:
        ValueError: a file has no prompts.
        OSError: a file cannot be read.
    """
    texts: list[str] = []
    for prompt in prompts:
        if not prompt.endswith(".txt"):
            texts.append(prompt)
            continue
        lines = [line.strip() for line in Path(prompt).read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {prompt}: the file is empty; write one prompt a line.")
        texts += lines
    return texts


def folder_or_file(out: Path | None) -> tuple[Path | None, Path | None]:
    """`out` as a folder of results, or as the file of a table."""
    return (None, out) if out is not None and out.suffix in TABLES else (out, None)


def _regions(
    model: HookedTextToImage,
    drawn: Sequence[Scene],
    texts: list[str],
    batch: int,
    threshold: float | None,
) -> Any:
    """The objects that the model draws, as groups of image tokens."""
    import torch

    from ..readout import synopsis

    with torch.no_grad():
        parts = range(0, len(texts), batch)
        images = torch.cat(
            [
                model(texts[i : i + batch], seed=list(range(len(texts)))[i : i + batch])
                for i in parts
            ]
        )
    side = model.cfg.sample_size // model.cfg.patch_size
    return synopsis.image_groups_from_images(images, drawn, (side, side), threshold)


def _words(model: HookedTextToImage, texts: list[str], keys: str) -> Any:
    """Text groups for a word and the other tokens; None for a role, which has its own groups."""
    from typing import get_args

    from ..text import prompts

    if keys in get_args(prompts.Role):
        return None
    word = prompts.phrase_mask(model, texts, keys)
    return {keys: word, "other tokens": ~word}


def models() -> None:
    """List the bundled models, with size, text encoder and held-out accuracy: `dit-lens models`."""
    from hooked_models.pipelines.hub import ZOO, list_models

    table = Table(box=None)
    for column in ("model", "layers", "heads", "encoder", "relation, held out", "disk"):
        table.add_column(column, no_wrap=True)
    for name in list_models():
        encoder = json.loads((ZOO / name / "training.json").read_text())["encoder"]
        size = json.loads((ZOO / name / "transformer/config.json").read_text())
        heads, width = (
            size["num_attention_heads"],
            size["num_attention_heads"] * size["attention_head_dim"],
        )
        megabytes = (
            sum(path.stat().st_size for path in (ZOO / name).rglob("*") if path.is_file()) / 1e6
        )
        shape = f"{size['num_layers']} × {width}"
        table.add_row(
            name,
            shape,
            str(heads),
            encoder,
            _held_out(ZOO / name / "README.md"),
            f"{megabytes:.0f} MB",
        )
    if not table.rows:
        say("No model is bundled.")
        return
    Console().print(table)
    say(f"in {ZOO}")


def _held_out(card: Path) -> str:
    """The loose relation's accuracy and interval in a card's table of splits."""
    rows = [
        line.strip("| ").split(" | ")
        for line in card.read_text().splitlines()
        if line.startswith("|")
    ]
    columns = next(row for row in rows if row[0] == "split")
    return next(row for row in rows if row[0] == "held_out")[columns.index("relation_loose")]
