"""Pre-train `t5-scenes`: a small T5 encoder that has read a caption grammar, and nothing else.

Source: Raffel et al. (arXiv 1910.10683), span corruption, §3.1.4; the T5 v1.1 architecture (gated
GELU, relative positions), through transformers' `T5ForConditionalGeneration`. It stands where the
paper (arXiv 2601.06338) puts T5-XXL: an encoder whose word vectors know their sentence. Every text
of a step is a function of (seed, step), so resuming is exact.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from hooked_models.text_encoders.random_tokens import DEFAULT_LENGTH, SPECIAL_TOKENS

from ...store import Store
from ...text.probes import place_score, probe_table
from ..checkpoint import load_checkpoint, save_checkpoint
from ..config import PretrainConfig
from ..history import CHECKPOINT, History, open_run
from ..precision import muon, resolve_precision
from .grammar import PUNCTUATION, VOCABULARY, Writer

SENTINELS = 10
TEXT_LENGTH = 32
"""Longest text of pre-training, in tokens, EOS included."""
NOISE_DENSITY = 0.25
MEAN_SPAN = 1.5
"""T5 corrupts 15 % in spans of three; a caption has eight words, of which that would be one span
and mostly the relation.
"""
POSITION_BIAS = 2.0
"""Standard deviation of half of the heads' relative position biases at the start: these heads look
at certain places from the first step, so that word order is there to be used. The other half start
with T5's own (0.06 at this width).
"""
FUNCTION_WORDS = ("a", "an", "and", "are", "at", "in", "is", "of", "on", "the", "there", "to")
FUNCTION_NORM, CONTENT_NORM = 2.5, 7.0
"""Norms of T5-XXL's vectors of function words and of other tokens (arXiv 2601.06338, appendix)."""
NEVER = -1e9
"""Score that softmax turns to exactly zero, in bfloat16 too."""
ARCHITECTURE = {
    "d_model": 256,
    "num_heads": 4,
    "d_kv": 64,
    "d_ff": 640,
    "num_layers": 4,
    "num_decoder_layers": 1,
}
"""One decoder layer, so that the encoder, which is kept, has to do the work."""
LOG_EVERY = 25
MAY_CHANGE = ("checkpoint_every", "evaluate_every", "precision")
IGNORED = -100
"""Label of a padded target position (torch's cross-entropy skips it)."""


def scenes_tokenizer(max_length: int = DEFAULT_LENGTH) -> T5Tokenizer:
    """A `T5Tokenizer` of the grammar's whole words.

    Pad 0, EOS 1, unknown 2, words, punctuation, then the sentinels.
    """
    pieces = [*SPECIAL_TOKENS, *(f"▁{word}" for word in VOCABULARY), *PUNCTUATION]
    vocabulary = [(piece, 0.0 if piece in SPECIAL_TOKENS else -2.0) for piece in pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS, model_max_length=max_length)


def corrupt_spans(
    ids: Sequence[int], sentinels: Sequence[int], rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """T5's objective on one text (without EOS).

    Spans become sentinels, and the target spells them out after theirs. `NOISE_DENSITY` of the
    tokens go, in spans of `MEAN_SPAN` on average; spans never touch, so two sentinels never meet.
    Unlike T5's, a text may begin or end with a kept token or with a span: the last word of a
    caption must not always be missing.
    """
    count = int(np.clip(round(len(ids) * NOISE_DENSITY), 1, len(ids) - 1))
    spans = int(
        np.clip(round(count / MEAN_SPAN), 1, min(count, len(ids) - count + 1, len(sentinels) - 1))
    )
    removed = _partition(count, spans, rng)
    kept = _partition(len(ids) - count + 2, spans + 1, rng)  # the outer two may be empty
    kept[0] -= 1
    kept[-1] -= 1
    inputs, targets, at = list(ids[: kept[0]]), [], int(kept[0])
    for sentinel, gone, stay in zip(sentinels, removed, kept[1:], strict=False):
        inputs += [sentinel, *ids[at + gone : at + gone + stay]]
        targets += [sentinel, *ids[at : at + gone]]
        at += int(gone + stay)
    return inputs, [*targets, sentinels[spans]]


def _partition(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, " parts"]:
    """`total` as a sum of `parts` positive whole numbers, every composition equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


class PretrainData:
    """The texts of one step, corrupted: a function of (seed, step)."""

    def __init__(self, tokenizer: T5Tokenizer, config: PretrainConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.sentinels = tokenizer.convert_tokens_to_ids(
            [f"<extra_id_{i}>" for i in range(SENTINELS)]
        )

    def __call__(self, step: int) -> dict[str, Int[Tensor, "batch text_pos"]]:
        """Arguments of `T5ForConditionalGeneration`: input_ids, attention_mask, labels."""
        rng = np.random.default_rng((self.config.seed, step))
        writer = Writer(rng)
        texts = [writer.text(TEXT_LENGTH - 1) for _ in range(self.config.batch_size)]
        eos = self.tokenizer.eos_token_id
        pairs = [
            corrupt_spans(ids[:-1], self.sentinels, rng) for ids in self.tokenizer(texts).input_ids
        ]
        inputs = _padded([[*given, eos] for given, _ in pairs], self.tokenizer.pad_token_id)
        labels = _padded([[*target, eos] for _, target in pairs], IGNORED)
        return {
            "input_ids": inputs,
            "attention_mask": (inputs != self.tokenizer.pad_token_id).long(),
            "labels": labels,
        }


def _padded(rows: Sequence[list[int]], fill: int) -> Int[Tensor, "batch text_pos"]:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=fill
    )


def untrained_model(
    vocabulary_size: int, seed: int, causal: bool = False
) -> T5ForConditionalGeneration:
    """The encoder that is kept and the decoder that is not, with weights of a new model.

    As transformers initialises them, position biases excepted. A causal encoder is a T5 whose
    relative position biases of later tokens are `NEVER`: the softmax gives these exactly zero, so
    no gradient reaches the biases, and any T5 code reads the result as it is.
    """
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary_size,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **ARCHITECTURE,
    )
    model = T5ForConditionalGeneration(config)
    for stack in (model.encoder, model.decoder):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [bucket head]
        torch.nn.init.normal_(bias[:, ::2], std=POSITION_BIAS)
    if causal:
        bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        with torch.no_grad():
            # the upper half of the buckets is of tokens to the right
            bias[len(bias) // 2 :] = NEVER
    return model


def build_optimizers(
    model: T5ForConditionalGeneration, config: PretrainConfig
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest.

    T5 does not divide attention scores by √d_head but starts W_Q smaller by as much, so W_Q's
    learning rate is smaller too. With one rate for all, even the colour before a shape word could
    not be read from its vector after 300 steps (measured).
    """
    linear = [
        (name, module.weight)
        for stack in (model.encoder, model.decoder)
        for name, module in stack.block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    queries = [weight for name, weight in linear if name.endswith(".q")]
    others = [weight for name, weight in linear if not name.endswith(".q")]
    taken = {id(weight) for _, weight in linear}
    groups = [
        {"params": others},
        {"params": queries, "lr": config.muon_lr / model.config.d_kv**0.5},
    ]
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": muon(groups, config.muon_lr, config.precision),
        "adamw": torch.optim.AdamW(
            rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def pretrain(config: PretrainConfig) -> Path:
    """Pre-train, or go on pre-training, and return `out`.

    It then holds `text_encoder/` and `tokenizer/`.

    Raises:
        ValueError: `out` holds a run with other settings, or another process writes to it.
        OSError: the checkpoint is damaged, or a file cannot be written.
    """
    config = replace(config, precision=resolve_precision(config.precision, torch.device("cpu")))
    facts = {k: v for k, v in asdict(config).items() if k != "out"}
    with open_run(config.out, facts, MAY_CHANGE) as run:
        _pretrain(config, run)
    return config.out


def _pretrain(config: PretrainConfig, run: Store) -> None:
    tokenizer = scenes_tokenizer()
    reader = scenes_tokenizer(TEXT_LENGTH)
    model = untrained_model(len(tokenizer), config.seed, config.causal)
    # texts this short: plain products are quicker on a CPU than fused attention
    model.set_attn_implementation("eager")
    optimizers = build_optimizers(model, config)
    saved, facts = config.out / CHECKPOINT, run.settings
    first = (
        load_checkpoint(saved, model, {}, optimizers, facts, MAY_CHANGE) if saved.exists() else 0
    )
    history = History.read(config.out) if first else History()
    history.show(run)

    data = PretrainData(reader, config)
    norms = _target_norms(tokenizer) if config.t5_xxl_norms else None
    if norms is not None and not first:
        _leave_room_for_norms(model)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("pre-training", total=config.steps, completed=first, news="")
        losses: list[Tensor] = []
        clock = time.perf_counter()
        for step in range(first, config.steps):
            losses.append(_update(model, optimizers.values(), data(step), config, step, norms))
            done = step + 1
            entry: dict[str, float] = {}
            if done % LOG_EVERY == 0 or done == config.steps:
                mean = torch.stack(losses).mean().item()
                seconds = (time.perf_counter() - clock) / len(losses)
                entry = {
                    "step": done,
                    "loss": round(mean, 4),
                    "seconds_per_step": round(seconds, 3),
                }
                progress.update(bar, completed=done, news=f"loss {mean:.3f}")
                losses = []
            if done % config.evaluate_every == 0 or done == config.steps:
                entry |= {"step": done} | _probes(as_encoder(model), tokenizer)
            if entry:
                history.log(run, entry)
                clock = time.perf_counter()
            # last, so that a run killed before this line repeats the steps after the checkpoint
            # before
            if done % config.checkpoint_every == 0 or done == config.steps:
                write = partial(
                    save_checkpoint, step=done, model=model, ema={}, optimizers=optimizers
                )
                run.put(CHECKPOINT, partial(write, facts=facts, history=history))
    run.put_folder("text_encoder", as_encoder(model).save_pretrained)
    run.put_folder("tokenizer", tokenizer.save_pretrained)


def _update(
    model: T5ForConditionalGeneration,
    optimizers: Collection[torch.optim.Optimizer],
    batch: Mapping[str, Tensor],
    config: PretrainConfig,
    step: int,
    norms: Float[Tensor, " token"] | None,
) -> Tensor:
    """One step of the optimisers; returns the loss of its texts, without that of the norms."""
    with torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext():
        output = model(**batch)
    loss = output.loss
    if norms is None:
        loss.backward()
    else:
        inputs, vectors = batch["input_ids"], output.encoder_last_hidden_state
        excess = (vectors.float().norm(dim=-1) - norms[inputs]) / CONTENT_NORM
        (loss + excess[batch["attention_mask"] > 0].square().mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.learning_rate_factor(step)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def _target_norms(tokenizer: T5Tokenizer) -> Float[Tensor, " token"]:
    """Norm that the vector of a token is drawn to."""
    norms = torch.full((len(tokenizer),), CONTENT_NORM)
    norms[tokenizer.convert_tokens_to_ids([f"▁{word}" for word in FUNCTION_WORDS])] = FUNCTION_NORM
    return norms


def _leave_room_for_norms(model: T5ForConditionalGeneration) -> None:
    """Start the last RMS norm with a quarter of small weights, the place of short vectors.

    A vector of even entries then has the norm `CONTENT_NORM`.
    """
    weight = model.encoder.final_layer_norm.weight
    with torch.no_grad():
        weight.fill_(CONTENT_NORM / (0.75 * len(weight)) ** 0.5)
        weight[: len(weight) // 4] = 0.1


def _probes(encoder: T5EncoderModel, tokenizer: Any) -> dict[str, float]:
    """Scores of probes on the encoder's output."""
    table = probe_table(encoder, tokenizer, targets=("relation", "direction"), layers=False)
    found = {f"probe_{t}": round(table.sel(target=t).item(), 4) for t in table.target.values}
    return found | {"probe_place": round(place_score(encoder, tokenizer), 4)}


def as_encoder(model: T5ForConditionalGeneration) -> T5EncoderModel:
    """The encoder alone, as a copy, in evaluation mode."""
    with torch.random.fork_rng():
        encoder = T5EncoderModel(model.config)
    encoder.shared.load_state_dict(model.shared.state_dict())
    encoder.encoder.load_state_dict(model.encoder.state_dict())
    return encoder.eval()
