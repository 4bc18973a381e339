"""The training loop.

Every random choice of a step is a function of (seed, step, process), so resuming is exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import disable_progress_bar
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hooked_models import FusedTokenEncoder, HookedTextToImage, RandomTokenEncoder
from hooked_models.lazy_imports import renamed

from ..store import Store
from ..task.evaluation import score, summarise
from ..task.protocol import Task, Trios, TwoObjects
from . import dynamics
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .curriculum import Curriculum
from .data import StepData
from .history import CHECKPOINT, History, open_run
from .objectives import OBJECTIVES
from .pipelines import PRESETS, build_pipeline, load_pipeline
from .precision import muon, resolve_precision

__getattr__ = renamed(
    __name__,
    {
        "refuse_other_kind": "dit_lens.training.loop:check_kind",
        "encode_captions": "dit_lens.training.data:encode_captions",
        "all_captions": "dit_lens.task.sentences:all_captions",
        "all_trio_captions": "dit_lens.task.sentences:all_trio_captions",
    },
)

LOG_EVERY = 25
MAY_CHANGE = (
    *(
        "out",
        "steps",
        "decay_from",
        "biased_steps",
        "anchored_steps",
        "spreading_steps",
        "compile",
        "precision",
    ),
    *("checkpoint_every", "evaluate_every", "evaluation_scenes", "dynamics_points", "noises"),
)
"""Settings of a run that may differ when it is resumed."""


def train(config: TrainConfig, task: Task | None = None) -> Path:
    """Train, or go on training, and return the folder of the finished pipeline (EMA weights).

    `out/` gets start/ (the untrained pipeline), checkpoint.safetensors (the whole state),
    metrics.jsonl (loss, speed, accuracy on held-out scenes), dynamics.parquet (`dynamics.measure`
    at log-spaced steps) and pipeline/.

    Args:
        config: settings of the run.
        task: scenes, prompts, images and judge; by default, two objects with the curriculum and
            trios of `config`.

    Raises:
        TypeError: `task` lacks a member of `Task`.
        ValueError: `out` holds a run with other settings, or another process is training in it, or
            the encoder lacks words of the task.
        OSError: a file in `out` that the run goes on from is damaged or missing, or cannot be
            written.

    Example:
        >>> from pathlib import Path
        >>> from dit_lens.training import TrainConfig, train
        >>> tiny = TrainConfig(
        ...     Path("run"),
        ...     "nano",
        ...     steps=1,
        ...     batch_size=2,
        ...     precision="no",
        ...     evaluation_scenes=1,
        ...     dynamics_points=0,
        ... )
        >>> train(tiny).name
        'pipeline'
    """
    if task is not None and not isinstance(task, Task):
        missing = [name for name in vars(Task) if name[0] != "_" and not hasattr(task, name)]
        raise TypeError(f"{type(task).__name__} is no Task: it lacks {', '.join(missing)}.")
    if config.evaluation_scenes < 1:
        raise ValueError(
            f"evaluation_scenes={config.evaluation_scenes}: a run looks at one scene at least."
        )
    with ExitStack() as stack:
        _Training(config, stack, task).run()
    return config.out / "pipeline"


class _Training:
    """A run in one process: its network, averages, optimisers, data and history.

    Args:
        config: settings of the run.
        stack: closes the folder of the run, which the main process alone opens.
        task: of the run; by default, that of `config`.
    """

    def __init__(self, config: TrainConfig, stack: ExitStack, task: Task | None) -> None:
        # Accelerator alone would read the variable, when the state is there already
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = resolve_precision(config.precision, PartialState(cpu=on_cpu).device)
        self.config = config = replace(config, precision=precision)
        self.accelerator = Accelerator(mixed_precision=precision)
        self.facts = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        self.facts |= {"processes": self.accelerator.num_processes, "noises": "one a scene"}
        self.own, self.task = task is None, task or Curriculum(config)
        if not self.own:
            self.facts["task"] = self.task.name
        self.folder: Store | None = None
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process:
                self.folder = stack.enter_context(open_run(config.out, self.facts, MAY_CHANGE))
            self.pipe = start_pipeline(config, self.folder, self.task)
        self.pipe.to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        disable_progress_bar()
        self._prepare_network()
        self.ema_model = HookedTextToImage.from_pipeline(self.pipe)
        self.data = StepData(self.pipe, config, self.accelerator, self.task)
        n_scenes = config.evaluation_scenes
        self.held_out: list[Any] = self.task.sample(n_scenes, seed=1, split="held_out")
        self.held_out_trios = Trios().sample(
            n_scenes if self.own and config.trios else 0, seed=1, split="held_out"
        )
        self.objective = OBJECTIVES[config.objective]()
        self.record_at = dynamics.record_points(config.steps, config.dynamics_points)

    def _prepare_network(self) -> None:
        """Make the network, its averages and optimisers, with the state of a checkpoint if any."""
        config = self.config
        self.model = model = deepcopy(self.pipe.transformer).train().requires_grad_(True)
        self.ema = EMAModel(
            model.parameters(),
            config.ema_decay,
            use_ema_warmup=True,
            power=config.ema_power,
            foreach=True,
            inv_gamma=1.0,
        )
        names = (name for name, _ in model.named_parameters())
        self.shadow = dict(zip(names, self.ema.shadow_params, strict=True))
        self.optimizers = build_optimizers(model, config)

        self.first, self.history = 0, History()
        if (saved := config.out / CHECKPOINT).exists():
            self.first = load_checkpoint(
                saved, model, self.shadow, self.optimizers, self.facts, MAY_CHANGE
            )
        self.ema.optimization_step = self.first
        if self.first:
            self.history = History.read(config.out)
        if self.folder is not None:
            self.history.show(self.folder)

        if self.accelerator.device.type == "cpu":
            # 64 tokens: plain products beat CPU fused attention's backward by a third
            model.set_attn_processor(AttnProcessor())
        if config.compile:
            model.compile()
        self.network, *self.steppers = self.accelerator.prepare(model, *self.optimizers.values())

    @property
    def samples_per_step(self) -> int:
        return self.config.batch_size * self.accelerator.num_processes

    def run(self) -> None:
        """Make the remaining steps, and write the pipeline."""
        config, self.losses = self.config, list[Tensor]()
        with progress_bar(self.accelerator) as progress:
            bar = progress.add_task(
                "training", total=config.steps, completed=self.first, loss="", speed="", accuracy=""
            )
            self.clock = time.perf_counter()
            for step in range(self.first, config.steps):
                loss = self.update(step)
                if self.folder is not None:
                    self.losses.append(loss)
                    self.report(self.folder, step + 1, partial(progress.update, bar))
                self.accelerator.wait_for_everyone()
        if self.folder is not None and self.first >= config.steps:
            # it had ended already, and whatever has become of its files is made good
            self.ema.copy_to(self.pipe.transformer.parameters())
            self.folder.put_folder("pipeline", self.pipe.save_pretrained)

    def update(self, step: int) -> Float[Tensor, ""]:
        """Make one step of the optimisers, and return its loss."""
        clean, text, mask, generator = self.data(step)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.network(
                noisy,
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                timestep=timestep,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0].float()

        loss = self.objective.loss(predict, clean, generator)
        self.accelerator.backward(loss)
        for optimizer in self.steppers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.config.learning_rate_factor(step)
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return loss.detach()

    def report(self, folder: Store, done: int, show: Callable[..., None]) -> None:
        """Log, evaluate, measure and save after `done` steps, each if it is due."""
        config = self.config
        if done % LOG_EVERY == 0:
            self.log_speed(folder, done, show)
        paused = time.perf_counter()  # measurements do not count as training time
        if done % config.evaluate_every == 0 or done == config.steps:
            accuracy = self.evaluate()
            samples = done * self.samples_per_step
            self.history.log(folder, {"step": done, "samples": samples, **accuracy})
            shown = (
                ("dipole", "unique_binding", "relation_loose") if self.own else self.task.metrics
            )
            show(accuracy=" ".join(f"{name} {accuracy[name]:.2f}" for name in shown))
            folder.put_folder("pipeline", self.pipe.save_pretrained)
        if done in self.record_at:
            with self.averaged_weights():
                samples = done * self.samples_per_step
                rows = dynamics.measure(self.ema_model, self.held_out, done, samples, self.task)
            self.history.add(folder, rows)
        self.clock += time.perf_counter() - paused
        # last, so that a run killed before this line repeats the steps after the last checkpoint
        if done % config.checkpoint_every == 0 or done == config.steps:
            state = self.model, self.shadow, self.optimizers, self.facts, self.history
            folder.put(CHECKPOINT, lambda path: save_checkpoint(path, done, *state))

    def log_speed(self, folder: Store, done: int, show: Callable[..., None]) -> None:
        """Log mean loss and speed since the last call."""
        seconds = time.perf_counter() - self.clock
        speed = self.samples_per_step * len(self.losses) / seconds
        mean = torch.stack(self.losses).mean().item()
        row = {"step": done, "loss": round(mean, 5), "samples_per_second": round(speed, 1)}
        self.history.log(folder, row)
        show(completed=done, loss=f"loss {mean:.4f}", speed=f"{speed:,.0f} samples/s")
        self.losses, self.clock = [], time.perf_counter()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Put the averaged weights into the pipeline; its precision lasts for the block."""
        self.ema.copy_to(self.pipe.transformer.parameters())
        return self.accelerator.autocast() if self.config.precision != "no" else nullcontext()

    def evaluate(self) -> dict[str, float]:
        """Accuracies on held-out scenes, and the layout dipole of scenes that have one."""
        accuracy: dict[str, float] = {}
        with self.averaged_weights():
            means = summarise(
                score(self.ema_model, self.held_out, task=self.task), self.task.metrics
            )["mean"]
            if isinstance(self.task, TwoObjects):
                accuracy["dipole"] = float(dynamics.dipole(self.ema_model, self.held_out).mean())
        accuracy = {str(name): float(mean) for name, mean in means.items()} | accuracy
        if self.held_out_trios:
            trios = summarise(score(self.ema_model, self.held_out_trios))["mean"]
            accuracy |= {f"trio_{name}": mean for name, mean in trios.items()}
        return {name: round(mean, 4) for name, mean in accuracy.items()}


def start_pipeline(
    config: TrainConfig, run: Store | None, task: Task | None = None
) -> PixArtSigmaPipeline:
    """The untrained pipeline of a run, kept in `out/start/`.

    Made once by the process that writes to it. A resumed run so keeps its own codec and text
    encoder, even if the code that makes them has changed since.

    Raises:
        ValueError: `init_from` is a model of another kind than the settings say.
        OSError: a file in `out/start/` is damaged or missing.
    """
    # by version 0.1, which listed nothing
    begun = (config.out / CHECKPOINT).exists() and (config.out / "start").is_dir()
    if run is not None and "start" not in run.files and not begun:
        if config.init_from:
            new = load_pipeline(config.init_from)
            check_kind(config, new)
        else:
            size = PRESETS[config.size]
            size = replace(size, heads=config.heads or size.heads)
            new = build_pipeline(
                size, config.encoder, config.objective, config.seed, config.moved_share, task
            )
        run.put_folder("start", new.save_pretrained)
    if run is not None and "start" in run.files:
        run.path("start")
    return load_pipeline(str(config.out / "start"))


def check_kind(config: TrainConfig, pipe: PixArtSigmaPipeline) -> None:
    """Raise ValueError unless the model to start from is of the kind that its card will name.

    The kind is size, encoder and objective.
    """
    its, size = pipe.transformer.config, PRESETS[config.size]
    width = its.num_attention_heads * its.attention_head_dim
    predicts, encoder = pipe.scheduler.config.prediction_type, pipe.text_encoder
    heads = config.heads or size.heads
    if isinstance(encoder, FusedTokenEncoder):
        own, same_encoder = (
            "fused",
            config.encoder == "fused" and encoder.config.share == config.moved_share,
        )
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
            f"{' '.join(f'--{name} {getattr(config, name)}' for name in wrong)} says: say what it "
            "is."
        )


def build_optimizers(
    model: PixArtTransformer2DModel, config: TrainConfig
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest.

    About twice the sample efficiency of AdamW alone (measured).
    """
    matrices = [m.weight for m in model.transformer_blocks.modules() if isinstance(m, nn.Linear)]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": muon(matrices, config.muon_lr, config.precision, config.weight_decay),
        "adamw": torch.optim.AdamW(
            rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def progress_bar(accelerator: Accelerator) -> Progress:
    """Loss, speed and accuracy of a run, on the main process only."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    fields = [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "speed", "accuracy")]
    console = Console(stderr=True)
    return Progress(
        *columns,
        *fields,
        console=console,
        disable=not accelerator.is_main_process,
        refresh_per_second=1,
    )
