"""The command line `dit-lens`: the library's own functions, nothing more.

Each command imports what it needs, so that `--help` need not wait for torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from .training.config import PretrainConfig, TrainConfig

Name = Annotated[str, tyro.conf.Positional]


def train_command(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a model, or go on with a run that was stopped. Several GPUs or nodes: `accelerate launch -m dit_lens.cli train …`."""
    import torch

    from .training import train

    folder = train(config)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    Console().print(f"Trained: {folder}")


def pretrain_command(config: Annotated[PretrainConfig, tyro.conf.arg(name="")]) -> None:
    """Pre-train a small T5 encoder on a caption grammar, or go on with a run that was stopped; `train --encoder` reads it."""
    from .training.t5.pretrain import pretrain

    Console().print(f"Pre-trained: {pretrain(config)}")


def generate(
    model: Name, prompt: Name, seed: int = 0, num_steps: int = 14, guidance: float = 4.5, out: Path = Path("image.png")
) -> None:
    """Draw one prompt and save it as a picture."""
    import torch
    from PIL import Image

    from hooked_models import HookedTextToImage

    with torch.no_grad():
        image = HookedTextToImage.from_pretrained(model)(prompt, seed, num_steps, guidance)[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()).save(out)
    Console().print(f"Saved {out}")


def evaluate(model: Name, n: int = 512, out: Path | None = None) -> None:
    """Score a model on held-out and trained scenes, by relation, phrase and template, with 95 % intervals.

    `n`: scenes a split. `out`: a folder for evaluation.parquet and evaluation.md, in which a stopped evaluation goes on.
    """
    from hooked_models import HookedTextToImage

    from .task import evaluation

    rows = evaluation.evaluate_model(HookedTextToImage.from_pretrained(model), n, out=out and out / "batches")
    table = evaluation.to_markdown(rows)
    if out is not None:
        rows.to_parquet(out / "evaluation.parquet", index=False)
        (out / "evaluation.md").write_text(table + "\n")
    Console(soft_wrap=True, markup=False).print(table)


def screen(model: Name, words: tuple[str, ...] = ("above", "below", "left", "right", "upper", "lower", "higher")) -> None:
    """Rank cross-attention heads by how well their position-by-word maps match the words' directions."""
    from hooked_models import HookedTextToImage

    from .readout import screening

    hooked = HookedTextToImage.from_pretrained(model)
    vectors = {word: screening.word_vector(hooked, word) for word in words}
    Console().print(screening.screen_heads(hooked.dit, vectors).round(3).to_string(index=False))


def synopsis_command(
    model: Name,
    image_group: Literal["object1", "object2", "background"] = "object2",
    key_group: str = "relation",
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
    """Rank heads by how much the objects that they draw attend to a role of the prompt (or, in "attn", to an object).

    `step`: one denoising step, else their mean. `threshold`: tokens covered by an object at least so much are its own; without it
    they count by their share. `out`: a folder in which a stopped run goes on.
    """
    import torch

    from hooked_models import HookedTextToImage

    from . import task as scenes
    from .readout import synopsis

    hooked = HookedTextToImage.from_pretrained(model)
    wanted = scenes.sample(num_scenes, seed=scene_seed, split="all", color_words="both")
    prompts, seeds = [scenes.caption(scene) for scene in wanted], range(num_scenes)
    with torch.no_grad():
        batches = [slice(start, start + batch_size) for start in range(0, num_scenes, batch_size)]
        images = torch.cat([hooked(prompts[rows], seed=seeds[rows]) for rows in batches])
    side = hooked.cfg.sample_size // hooked.cfg.patch_size
    groups = synopsis.image_groups_from_images(images, wanted, (side, side), threshold)
    seen = synopsis.attention_synopsis(hooked, prompts, seeds, sublayer, groups, reduce, batch_size=batch_size, out=out)
    table = synopsis.rank_heads(seen, image_group, key_group, "mean" if step is None else step, branch)
    when = "mean over steps" if step is None else f"step {step}"
    Console().print(f"{model}: {image_group} → {key_group}, {reduce}, {when}, {branch}\n{table.round(4).to_string(index=False)}")


def sweep_command(
    model: Name,
    prompts: tuple[str, ...] = (),
    site: str = "blocks.*.cross_attn.hook_z",
    each: tuple[Literal["layer", "head", "step"], ...] = ("layer", "head"),
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
    steps: tuple[int, ...] | None = None,
    tokens: str | None = None,
    action: Literal["zero", "mean", "resample", "knockout"] = "zero",
    branch: Literal["cond", "uncond", "both"] = "cond",
    metric: Literal["displacement", "relation", "scene"] = "displacement",
    on: str = "image",
    seeds: tuple[int, ...] = (0,),
    num_scenes: int = 8,
    scene_seed: int = 100,
    num_steps: int = 14,
    guidance: float = 4.5,
    top: int | None = None,
    sample: int = 40,
    score: Literal["step", "attribution"] | None = None,
    show: int = 20,
    explain: bool = False,
    executor: Literal["local", "ray"] = "local",
    workers: int | None = None,
    out: Path | None = None,
) -> None:
    """What changes when heads, layers or words are switched off: cell by cell, the strongest first, with 95 % intervals.

    `prompts`: what is drawn; without any, `num_scenes` scenes. `each`: what is gone over one by one; what is not is taken
    together. `layers`, `heads`, `steps`: those gone over, all unless given (`site` has a * for the layer). `tokens`: a role of
    the prompt, such as "relation". `metric`: "displacement" from the run without, of the tensor `on` (image, latent, x0, out,
    eps); "relation", how far objects lie apart along their relation, or "scene", the judge's verdicts: both of scenes. `top`:
    score all cells, and run so many and a random `sample` exactly (not with distances and verdicts, which have no slope).
    `score`: by "attribution", or by "step", each cell's own step exactly, which is dearer and better. `explain`: only say
    what it would take. `out`: a folder in which a stopped sweep goes on.
    """
    from hooked_models import HookedTextToImage

    from . import sweep
    from . import task as scenes
    from .intervene.interventions import Intervention

    hooked = HookedTextToImage.from_pretrained(model)
    wanted = [] if prompts else scenes.sample(num_scenes, seed=scene_seed, split="all", color_words="both")
    if prompts and metric != "displacement":
        raise ValueError(f"--metric {metric} judges scenes: leave --prompts out, or measure the displacement.")
    measures: dict[str, sweep.Metric] = {
        "displacement": sweep.Metric(sweep.displacement, on=on, given=("baseline",)),
        "relation": sweep.relation_metric(wanted),
        "scene": sweep.scene_metric(wanted),
    }
    several = Intervention(site, None if "head" in each else heads, tokens, None if "step" in each else steps, branch, action)
    cells = sweep.grid(
        several,
        layers=(layers or range(hooked.cfg.n_layers)) if "layer" in each and "*" in site else None,
        heads=(heads or range(hooked.cfg.n_heads)) if "head" in each else None,
        steps=(steps or range(num_steps)) if "step" in each else None,
    )
    texts = list(prompts) or [scenes.caption(scene) for scene in wanted]
    chosen: dict[str, Any] = {metric: measures[metric]}
    plan = sweep.plan(hooked, texts, seeds, cells, chosen, num_steps=num_steps, guidance=guidance)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if explain:
        console.print(plan.explain())
        return
    column = "scene_relation_loose" if metric == "scene" else metric
    if top is not None:
        search = sweep.two_stage(plan, column, top, sample, out=out, executor=executor, workers=workers, score=score)
        console.print(search.table[search.table["drawn"] != ""].head(show).round(4).to_string(index=False))
        console.print(f"scores against exact effects: rank correlation {search.spearman}, of sizes {search.of_sizes}")
        console.print(str(search.missed()))
        return
    found = plan.run(out, executor, workers)
    names = [name for name in found if str(name).endswith("_effect")]
    table = found[names].reset_coords(drop=True).to_dataframe().unstack("interval")
    strongest = table[f"{column}_effect", "mean"].abs().sort_values(ascending=False).index[:show]
    console.print(f"{model}, {len(texts)} prompts × {len(seeds)} seeds: effect on {metric}, after − before")
    console.print(table.loc[strongest].round(4).to_string())
    if failed := int((found["error"] != "").sum()):
        console.print(f"{failed} cells failed; the first: {next(filter(None, found['error'].values.flatten().tolist()))}")


def models() -> None:
    """List the bundled models."""
    from hooked_models import list_models

    Console().print("\n".join(list_models()) or "No model is bundled.")


def main() -> None:
    """Entry point."""
    commands: Any = {
        "train": train_command,
        "pretrain-text-encoder": pretrain_command,
        "generate": generate,
        "evaluate": evaluate,
        "screen": screen,
        "synopsis": synopsis_command,
        "sweep": sweep_command,
        "models": models,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="dit-lens", description="Ask questions of diffusion transformers.")
    except (ValueError, FileNotFoundError) as error:  # bad input: one sentence, which says what to do
        sys.exit(f"dit-lens: {error}")
    except KeyError as error:  # an unknown hook; str(error) would quote its sentence
        sys.exit(f"dit-lens: {error.args[0]}")


if __name__ == "__main__":
    main()
