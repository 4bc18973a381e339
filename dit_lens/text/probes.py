"""Linear probes of a text encoder's word vectors, one layer and one word at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, PredefinedSplit, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..task import COMBINATIONS, DIRECTIONS, HELD_OUT, PHRASES
from ..task.scene import other_color

Word = Literal["color1", "shape1", "color2", "shape2"]
TARGETS = ("relation", "direction", "shape1", "color1", "shape2", "color2")
SPLITS = ("captions", "combinations", "wordings", "never_read")


def probe_captions() -> pd.DataFrame:
    """The 264 captions that name both colors (paper, prompt set b).

    96 combinations × the wordings of their relation.

    Returns:
        Columns text, shape1, color1, relation, shape2, color2, dx, dy (`scenes.DIRECTIONS`),
        combination (number), wording (number within the relation), held_out.

    Example:
        >>> probe_captions().shape
        (264, 11)
    """
    rows = []
    for number, c in enumerate(COMBINATIONS):
        for wording, phrase in enumerate(PHRASES[c.relation]):
            color2 = other_color(c.color1)
            text = f"{c.color1} {c.shape1} is {phrase} {color2} {c.shape2}"
            dx, dy = DIRECTIONS[c.relation]
            rows.append(
                (
                    text,
                    c.shape1,
                    c.color1,
                    c.relation,
                    c.shape2,
                    color2,
                    dx,
                    dy,
                    number,
                    wording,
                    c in HELD_OUT,
                )
            )
    columns = (
        "text",
        "shape1",
        "color1",
        "relation",
        "shape2",
        "color2",
        "dx",
        "dy",
        "combination",
        "wording",
        "held_out",
    )
    return pd.DataFrame(rows, columns=list(columns))


@torch.no_grad()
def word_vectors(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    captions: pd.DataFrame,
    word: Word,
    layers: bool = True,
) -> dict[int, Float[np.ndarray, "caption d_text"]]:
    """Vectors of one word of every caption, by layer.

    Layer 0 is the word embedding, the last is the encoder's output.

    Args:
        encoder: text encoder, called as in transformers.
        tokenizer: the encoder's fast tokenizer.
        captions: of `probe_captions`, one row a caption.
        word: column of `captions` that names the word.
        layers: False for the output only, under the last layer's number (1 for an encoder without
            layers).

    Example:
        >>> encoder, captions = model.text_encoder, probe_captions()
        >>> found = word_vectors(encoder, model.tokenizer, captions, "shape2", layers=False)
        >>> {layer: vectors.shape for layer, vectors in found.items()}
        {1: (264, 256)}
    """
    texts = list(captions.text)
    tokens = tokenizer(texts, padding="longest", return_tensors="pt", return_offsets_mapping=True)
    which = 1 if word.endswith("2") else 0
    # the first shape or color is at the caption's first such word, the second at its last
    starts = [
        (text.rindex if which else text.index)(value)
        for text, value in zip(texts, captions[word], strict=True)
    ]
    places = [
        next(i for i, (low, high) in enumerate(offsets.tolist()) if low <= start < high)
        for offsets, start in zip(tokens.offset_mapping, starts, strict=True)
    ]
    extra = {"output_hidden_states": True} if layers else {}
    out = encoder(tokens.input_ids, attention_mask=tokens.attention_mask, **extra)
    depth = getattr(encoder.config, "num_layers", 1)
    states = dict(enumerate(out.hidden_states)) if layers else {depth: out.last_hidden_state}
    rows = torch.arange(len(texts))
    return {layer: state[rows, places].float().numpy() for layer, state in states.items()}


def probe(
    vectors: Float[np.ndarray, "caption d_text"], captions: pd.DataFrame, target: str, split: str
) -> float:
    """Accuracy of a linear probe for a target, on captions it was not fitted on.

    Args:
        vectors: of `word_vectors`.
        captions: of `probe_captions`.
        target: one of `TARGETS`. The result is the share of right answers (logistic regression);
            for "direction", R² of (dx, dy) by ridge regression, whose chance level is 0 even for a
            code of the word's position, because opposite relations have wordings of the same
            lengths.
        split: "captions", five random folds; "combinations", five folds of whole combinations;
            "wordings", folds that leave out one wording of every relation; "never_read", fit on the
            trained combinations and tested on `scenes.HELD_OUT`.

    Example:
        >>> captions = probe_captions()
        >>> vectors = captions[["dx", "dy"]].to_numpy(float)
        >>> round(probe(vectors, captions, "direction", "never_read"), 2)
        1.0
    """
    held_out = captions.held_out.to_numpy()
    labels = (
        captions[["dx", "dy"]].to_numpy(float)
        if target == "direction"
        else captions[target].to_numpy()
    )
    folds = {
        "captions": StratifiedKFold(5, shuffle=True, random_state=0).split(
            vectors, captions.relation
        ),
        "combinations": GroupKFold(5, shuffle=True, random_state=0).split(
            vectors, groups=captions.combination
        ),
        "wordings": PredefinedSplit(captions.wording).split(),
        "never_read": [(np.flatnonzero(~held_out), np.flatnonzero(held_out))],
    }[split]
    right, total = 0.0, 0.0
    for fit, test in folds:
        if target == "direction":
            model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13))).fit(
                vectors[fit], labels[fit]
            )
            right += ((labels[test] - labels[fit].mean(0)) ** 2).sum() - (
                (labels[test] - model.predict(vectors[test])) ** 2
            ).sum()
            total += ((labels[test] - labels[fit].mean(0)) ** 2).sum()
        else:
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(
                vectors[fit], labels[fit]
            )
            right += (model.predict(vectors[test]) == labels[test]).sum()
            total += len(test)
    return float(right / total)


def probe_table(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    word: Word = "shape2",
    targets: Sequence[str] = TARGETS,
    splits: Sequence[str] = ("combinations",),
    layers: bool = True,
) -> xr.DataArray:
    """All probes of one word: dims (layer, target, split), values as in `probe`."""
    captions = probe_captions()
    vectors = word_vectors(encoder, tokenizer, captions, word, layers)
    values = [
        [[probe(v, captions, target, split) for split in splits] for target in targets]
        for v in vectors.values()
    ]
    coords = {"layer": list(vectors), "target": list(targets), "split": list(splits)}
    return xr.DataArray(values, dims=("layer", "target", "split"), coords=coords, name="probe")


def place_score(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """R² of an object's direction from the other object, by one probe for both shape words.

    "circle" in "circle is above square" and in "square is below circle" have the same label, in
    "circle is below square" the opposite: vectors that hold the prompt's words, or the word's
    position in it, or both side by side, score 0. Ridge regression, five folds of whole
    combinations, encoder output.
    """
    captions = probe_captions()
    vectors, labels = [], []
    words: tuple[tuple[Word, float], ...] = (("shape1", 1.0), ("shape2", -1.0))
    for word, sign in words:
        vectors += list(word_vectors(encoder, tokenizer, captions, word, layers=False).values())
        labels.append(sign * captions[["dx", "dy"]].to_numpy(float))
    groups = np.tile(captions.combination, 2)
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
    places = np.concatenate(labels)
    predicted = cross_val_predict(
        model, np.concatenate(vectors), places, groups=groups, cv=GroupKFold(5)
    )
    return float(r2_score(places, predicted))


def cosines(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, word: Word = "shape2"
) -> pd.Series:
    """Mean cosine between two captions' vectors of one word (encoder output).

    One mean for each respect in which two captions may differ.

    Returns:
        "only the wording", "only shape1", …, and "any two".
    """
    captions = probe_captions()
    vectors = next(iter(word_vectors(encoder, tokenizer, captions, word, layers=False).values()))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    fields = ("shape1", "color1", "relation", "shape2")
    same = {f: captions[f].to_numpy()[:, None] == captions[f].to_numpy()[None] for f in fields}
    other = ~np.eye(len(captions), dtype=bool)
    wordings = np.logical_and.reduce([same[f] for f in fields]) & other
    rows = {"only the wording": float(similarity[wordings].mean())}
    for changed in fields:
        matched = np.logical_and.reduce([same[f] for f in fields if f != changed]) & ~same[changed]
        rows[f"only {changed}"] = float(similarity[matched].mean())
    rows["any two"] = float(similarity[other].mean())
    return pd.Series(rows, name="cosine")
