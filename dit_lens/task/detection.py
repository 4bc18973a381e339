"""Where named things are in a picture: an open-vocabulary detector's boxes, or anybody's, and the relation between two of them.

    boxes = detect(sorted(Path("images").glob("*.png")), labels, "google/owlv2-base-patch16-ensemble")
    pair_positions(boxes, pairs)  # both there? where is the first, seen from the second?

For models that draw more than the two-object task, whose judge is `dit_lens.scenes.evaluate`. Source of the idea: T2I-CompBench
(Huang et al., arXiv 2307.06350), which reads spatial relations from the centres of detected boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console
from rich.progress import track
from transformers import pipeline

COLUMNS = ("image", "label", "score", "xmin", "ymin", "xmax", "ymax")
"""Of a table of boxes: the picture's file name, what is in the box, how sure that is, and pixels from the upper left corner."""


def detect(
    images: Sequence[Path], labels: Mapping[str, Sequence[str]], model: str, threshold: float = 0.2, device: str | None = None
) -> pd.DataFrame:
    """Boxes of named things.

    Args:
        images: picture files.
        labels: file name → what to look for in it.
        model: a zero-shot object detector of transformers (OWL-ViT, OWLv2, Grounding DINO): folder or hub id.
        threshold: the least score of a box.

    Returns:
        A row a box, columns `COLUMNS`.

    Raises:
        OSError: there is no such model, or it cannot be reached.
    """
    find = pipeline("zero-shot-object-detection", model=model, device=device)
    rows = []
    for path in track(images, "detecting", transient=True, console=Console(stderr=True)):
        found = find(Image.open(path).convert("RGB"), candidate_labels=list(labels[path.name]), threshold=threshold)
        rows += [{"image": path.name, "label": box["label"], "score": box["score"], **box["box"]} for box in found]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read_boxes(path: Path) -> pd.DataFrame:
    """A table of boxes from a CSV or Parquet file.

    Raises:
        ValueError: it lacks a column.
    """
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{path} has no column {', '.join(missing)}: boxes need {', '.join(COLUMNS)}.")
    return table[list(COLUMNS)]


def pair_positions(boxes: pd.DataFrame, pairs: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Where the first of two things lies, seen from the second, by the centres of the surest box of each.

    Args:
        boxes: columns `COLUMNS`.
        pairs: picture's file name → its two labels.

    Returns:
        A row a picture, index image: `both` (each has a box), `dx` and `dy` in pixels (y down), NaN unless both.
    """
    best = boxes.sort_values("score").drop_duplicates(["image", "label"], keep="last").set_index(["image", "label"])
    x, y = (best["xmin"] + best["xmax"]) / 2, (best["ymin"] + best["ymax"]) / 2
    first, second = ([(image, pair[part]) for image, pair in pairs.items()] for part in (0, 1))
    dx, dy = (of.reindex(first).to_numpy(float) - of.reindex(second).to_numpy(float) for of in (x, y))
    return pd.DataFrame({"both": ~np.isnan(dx), "dx": dx, "dy": dy}, index=pd.Index(list(pairs), name="image"))
