"""The training loop. Every random choice of a step is a function of (seed, step, process), so resuming is exact."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import disable_progress_bar
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hooked_models import FusedTokenEncoder, HookedTextToImage, RandomTokenEncoder

from .. import task as scenes
from ..store import Store
from ..task.evaluation import score, summarise
from ..task.scene import COLORS, PHRASES, RELATIONS, SHAPES, Scene, Trio, caption, other_color
from . import dynamics
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .history import CHECKPOINT, History, open_run
from .objectives import OBJECTIVES
from .pipelines import PRESETS, build_pipeline, load_pipeline
from .precision import muon, resolve_precision

LOG_EVERY = 25
MAY_CHANGE = (
    *("out", "steps", "decay_from", "biased_steps", "anchored_steps", "spreading_steps", "compile", "precision"),
    *("checkpoint_every", "evaluate_every", "evaluation_scenes", "dynamics_points", "noises"),
)
"""Settings of a run that may differ when it is resumed."""


def train(config: TrainConfig) -> Path:
    """Train, or go on training, and return the folder of the finished pipeline (EMA weights).

    `out/` gets start/ (the untrained pipeline), checkpoint.safetensors (the whole state), metrics.jsonl (loss, speed, accuracy
    on held-out scenes), dynamics.parquet (`dynamics.measure` at log-spaced steps) and pipeline/.

    Raises:
        ValueError: `out` holds a run with other settings, or another process is training in it.
        OSError: a file in `out` that the run goes on from is damaged or missing, or cannot be written.
    """
    with ExitStack() as stack:
        return _train(config, stack)


def _train(config: TrainConfig, stack: ExitStack) -> Path:
    if config.evaluation_scenes < 1:
        raise ValueError(f"evaluation_scenes={config.evaluation_scenes}: a run looks at one scene at least.")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # which only Accelerator would read, when the state is there already
    config = replace(config, precision=resolve_precision(config.precision, PartialState(cpu=on_cpu).device))
    accelerator = Accelerator(mixed_precision=config.precision)
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    facts |= {"processes": accelerator.num_processes, "noises": "one a scene"}
    with accelerator.main_process_first():
        run = stack.enter_context(open_run(config.out, facts, MAY_CHANGE)) if accelerator.is_main_process else None
        pipe = start_pipeline(config, run)
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    disable_progress_bar()
    model = deepcopy(pipe.transformer).train().requires_grad_(True)
    ema = EMAModel(model.parameters(), config.ema_decay, use_ema_warmup=True, power=config.ema_power, foreach=True, inv_gamma=1.0)
    shadow = dict(zip((name for name, _ in model.named_parameters()), ema.shadow_params, strict=True))
    optimizers = build_optimizers(model, config)

    saved = config.out / CHECKPOINT
    first = load_checkpoint(saved, model, shadow, optimizers, facts, MAY_CHANGE) if saved.exists() else 0
    ema.optimization_step = first
    history = History.read(config.out) if first else History()
    if run is not None:
        history.show(run)

    if accelerator.device.type == "cpu":
        model.set_attn_processor(AttnProcessor())  # 64 tokens: plain products beat CPU fused attention's backward by a third
    if config.compile:
        model.compile()
    prepared = accelerator.prepare(model, *optimizers.values())
    network, steppers = prepared[0], prepared[1:]

    ema_model = HookedTextToImage.from_pipeline(pipe)
    data = StepData(pipe, config, accelerator)
    held_out = scenes.sample(config.evaluation_scenes, seed=1, split="held_out", color_words="both")
    held_out_trios = scenes.sample_trios(config.evaluation_scenes if config.trios else 0, seed=1, split="held_out")
    objective = OBJECTIVES[config.objective]()

    def save(step: int) -> None:
        if run is not None:
            run.put(CHECKPOINT, lambda path: save_checkpoint(path, step, model, shadow, optimizers, facts, history))

    def evaluate() -> dict[str, float]:
        ema.copy_to(pipe.transformer.parameters())
        with accelerator.autocast() if config.precision != "no" else nullcontext():
            means = summarise(score(ema_model, held_out))["mean"]
            early = dynamics.dipole(ema_model, held_out).mean()
        accuracy = {str(name): float(mean) for name, mean in means.items()} | {"dipole": float(early)}
        if held_out_trios:
            accuracy |= {f"trio_{name}": mean for name, mean in summarise(score(ema_model, held_out_trios))["mean"].items()}
        return {name: round(mean, 4) for name, mean in accuracy.items()}

    record_at = dynamics.record_points(config.steps, config.dynamics_points)

    with progress_bar(accelerator) as progress:
        bar = progress.add_task("training", total=config.steps, completed=first, loss="", speed="", accuracy="")
        losses: list[Tensor] = []
        clock = time.perf_counter()
        for step in range(first, config.steps):
            clean, text, mask, generator = data(step)

            def predict(noisy: Tensor, timestep: Tensor, text: Tensor = text, mask: Tensor = mask) -> Tensor:
                return network(
                    noisy,
                    encoder_hidden_states=text,
                    encoder_attention_mask=mask,
                    timestep=timestep,
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                    return_dict=False,
                )[0].float()

            loss = objective.loss(predict, clean, generator)
            accelerator.backward(loss)
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * config.learning_rate_factor(step)
                optimizer.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            losses.append(loss.detach())

            done = step + 1
            if done % LOG_EVERY == 0 and run is not None:
                now = time.perf_counter()
                speed = config.batch_size * accelerator.num_processes * len(losses) / (now - clock)
                mean = torch.stack(losses).mean().item()
                history.log(run, {"step": done, "loss": round(mean, 5), "samples_per_second": round(speed, 1)})
                progress.update(bar, completed=done, loss=f"loss {mean:.4f}", speed=f"{speed:,.0f} samples/s")
                losses, clock = [], time.perf_counter()
            paused = time.perf_counter()  # measurements do not count as training time
            if (done % config.evaluate_every == 0 or done == config.steps) and run is not None:
                accuracy = evaluate()
                history.log(run, {"step": done, "samples": done * config.batch_size * accelerator.num_processes, **accuracy})
                summary = " ".join(f"{name} {accuracy[name]:.2f}" for name in ("dipole", "unique_binding", "relation_loose"))
                progress.update(bar, accuracy=summary)
                run.put_folder("pipeline", pipe.save_pretrained)
            if done in record_at and run is not None:
                ema.copy_to(pipe.transformer.parameters())
                with accelerator.autocast() if config.precision != "no" else nullcontext():
                    rows = dynamics.measure(ema_model, held_out, done, done * config.batch_size * accelerator.num_processes)
                history.add(run, rows)
            clock += time.perf_counter() - paused
            # last, so that a run killed before this line repeats the steps after the checkpoint before
            if done % config.checkpoint_every == 0 or done == config.steps:
                save(done)
            accelerator.wait_for_everyone()
    if run is not None and first >= config.steps:  # it had ended already, and whatever has become of its files is made good
        ema.copy_to(pipe.transformer.parameters())
        run.put_folder("pipeline", pipe.save_pretrained)
    return config.out / "pipeline"


def start_pipeline(config: TrainConfig, run: Store | None) -> PixArtSigmaPipeline:
    """The untrained pipeline of a run, made once by the process that writes to it, and kept in `out/start/`.

    A resumed run so keeps its own codec and text encoder, even if the code that makes them has changed since.

    Raises:
        ValueError: `init_from` is a model of another kind than the settings say.
        OSError: a file in `out/start/` is damaged or missing.
    """
    begun = (config.out / CHECKPOINT).exists() and (config.out / "start").is_dir()  # by version 0.1, which listed nothing
    if run is not None and "start" not in run.files and not begun:
        if config.init_from:
            new = load_pipeline(config.init_from)
            refuse_other_kind(config, new)
        else:
            size = PRESETS[config.size]
            size = replace(size, heads=config.heads or size.heads)
            new = build_pipeline(size, config.encoder, config.objective, config.seed, config.moved_share)
        run.put_folder("start", new.save_pretrained)
    if run is not None and "start" in run.files:
        run.path("start")
    return load_pipeline(str(config.out / "start"))


def refuse_other_kind(config: TrainConfig, pipe: PixArtSigmaPipeline) -> None:
    """Raise ValueError unless the model to start from has the size, encoder and objective that the card of the run will tell."""
    its, size = pipe.transformer.config, PRESETS[config.size]
    width = its.num_attention_heads * its.attention_head_dim
    predicts, encoder = pipe.scheduler.config.prediction_type, pipe.text_encoder
    heads = config.heads or size.heads
    if isinstance(encoder, FusedTokenEncoder):
        own, same_encoder = "fused", config.encoder == "fused" and encoder.config.share == config.moved_share
    elif isinstance(encoder, RandomTokenEncoder):
        own = "rte" if encoder.config.positions else "rte-nopos"
        same_encoder = config.encoder == own
    else:
        own = type(encoder).__name__
        same_encoder = not config.encoder.startswith(("rte", "fused"))
    same_size = (its.num_layers, width, its.num_attention_heads) == (size.layers, size.width, heads)
    kind = {
        "size": (f"{its.num_layers} layers of width {width}", same_size),
        "objective": (predicts, (predicts == "sample") == (config.objective == "x0")),
        "encoder": (own, same_encoder),
    }
    if wrong := {name: found for name, (found, same) in kind.items() if not same}:
        raise ValueError(
            f"{config.init_from} has {' and '.join(wrong.values())}, not what "
            f"{' '.join(f'--{name} {getattr(config, name)}' for name in wrong)} says: say what it is."
        )


class StepData:
    """Clean latents, captions and the random generator of one step, for this process: a function of the step alone."""

    def __init__(self, pipe: PixArtSigmaPipeline, config: TrainConfig, accelerator: Accelerator) -> None:
        self.codec = pipe.vae
        self.config = config
        self.device = accelerator.device
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        captions = ["", *all_captions(), *(all_trio_captions() if config.trios else ())]
        self.row = {text: i for i, text in enumerate(captions)}
        self.text, self.mask = encode_captions(pipe, captions)

    @torch.no_grad()
    def __call__(
        self, step: int
    ) -> tuple[
        Float[Tensor, "batch channel rows columns"],
        Float[Tensor, "batch text_pos d_text"],
        Int[Tensor, "batch text_pos"],
        torch.Generator,
    ]:
        """Draw the step's scenes; captions are dropped here, into the empty prompt's own encoding and mask."""
        config = self.config
        size = config.batch_size
        trios = round(size * config.trios)
        number = step * self.processes + self.process
        batch: list[Scene | Trio] = [*scenes.sample_trios(trios, config.seed, start=number * trios)]
        batch += scenes.sample(
            size - trios,
            config.seed,
            start=number * (size - trios),
            color_words="both" if step < config.anchored_steps else "optional",
            spread=config.spread(step),
            red_first=config.red_first(step),
            without=config.hold_out,
        )
        state = np.random.SeedSequence((config.seed, step, self.process)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(self.device).manual_seed(int(state >> np.uint64(1)))
        images = scenes.render(batch).to(self.device)
        clean = self.codec.encode(images * 2 - 1).latent_dist.mode() * self.codec.config.scaling_factor
        dropped = torch.rand(size, generator=generator, device=self.device) < config.caption_dropout
        rows = torch.tensor([self.row[caption(scene)] for scene in batch], device=self.device).masked_fill(dropped, 0)
        return clean, self.text[rows], self.mask[rows], generator


def all_captions() -> list[str]:
    """Every sentence a scene can have: 6 ordered shape pairs × 22 phrases × 7 patterns of colour words = 924."""
    found: dict[str, None] = {}
    for c, named in itertools.product(scenes.COMBINATIONS, itertools.product((True, False), repeat=2)):
        for phrase in PHRASES[c.relation]:
            scene = Scene(c.shape1, c.color1, 0, 0, c.shape2, other_color(c.color1), 0, 0, c.relation, phrase, *named)
            found[caption(scene)] = None
    return list(found)


def all_trio_captions() -> list[str]:
    """Every sentence a trio can have: 6 orders of the shapes × 4 colour patterns × 14 phrases × those of 7 other relations."""
    found: dict[str, None] = {}
    for shapes, color1, color3 in itertools.product(itertools.permutations(SHAPES), COLORS, COLORS):
        for relations in itertools.permutations(RELATIONS, 2):
            for phrases in itertools.product(*(scenes.TRIO_PHRASES[relation] for relation in relations)):
                first, second = (
                    Scene(shapes[0], color1, 0, 0, shape, color, 0, 0, relation, phrase)
                    for shape, color, relation, phrase in zip(
                        shapes[1:], (other_color(color1), color3), relations, phrases, strict=True
                    )
                )
                found[caption(Trio(first, second))] = None
    return list(found)


@torch.no_grad()
def encode_captions(
    pipe: PixArtSigmaPipeline, captions: Sequence[str], batch_size: int = 128
) -> tuple[Float[Tensor, "caption text_pos d_text"], Int[Tensor, "caption text_pos"]]:
    """Text features and masks, cut to the longest caption (pads carry exactly no attention, so nothing is lost)."""
    tokens = pipe.tokenizer(list(captions), padding="longest", return_tensors="pt").to(pipe.device)
    ids, masks = tokens.input_ids.split(batch_size), tokens.attention_mask.split(batch_size)
    features = [pipe.text_encoder(i, attention_mask=m)[0].float() for i, m in zip(ids, masks, strict=True)]
    return torch.cat(features), tokens.attention_mask


def build_optimizers(model: PixArtTransformer2DModel, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest: about twice the sample efficiency of AdamW alone (measured)."""
    matrices = [m.weight for m in model.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": muon(matrices, config.muon_lr, config.precision, config.weight_decay),
        "adamw": torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def progress_bar(accelerator: Accelerator) -> Progress:
    """Loss, speed and accuracy of a run, on the main process only."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    fields = [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "speed", "accuracy")]
    return Progress(*columns, *fields, disable=not accelerator.is_main_process, refresh_per_second=1)
