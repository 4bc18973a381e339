"""Object boxes from an open-vocabulary detector, and the relative position of two objects.

    images = sorted(Path("images").glob("*.png"))
    boxes = detect(images, labels, "google/owlv2-base-patch16-ensemble")
    # which of the two are there, and the first's place relative to the second
    pair_positions(boxes, pairs)

For models that draw more than the two-object task, whose judge is `dit_lens.scenes.evaluate`.
Source of the idea: T2I-CompBench (Huang et al., arXiv 2307.06350), which reads spatial relations
from the centres of detected boxes.
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

from hooked_models.arguments import number

COLUMNS = ("image", "label", "score", "xmin", "ymin", "xmax", "ymax")
"""Columns of a table of boxes: image file name, object, confidence, and pixels from the upper left
corner.
"""


def detect(
    images: Sequence[Path],
    labels: Mapping[str, Sequence[str]],
    model: str,
    threshold: float = 0.2,
    device: str | None = None,
) -> pd.DataFrame:
    """Boxes of named objects, by a zero-shot detector.

    Args:
        images: image files.
        labels: file name → names of the objects to find in that image.
        model: a zero-shot object detector of transformers (OWL-ViT, OWLv2, Grounding DINO): folder
            or hub id.
        threshold: smallest score of a box.
        device: as in `transformers.pipeline`.

    Returns:
        One row a box, columns `COLUMNS`.

    Raises:
        OSError: there is no such model, or it cannot be reached.

    Example:
        >>> labels = {"a.png": ["cat", "dog"]}
        >>> boxes = detect([Path("a.png")], labels, "google/owlv2-base-patch16")  # doctest: +SKIP
    """
    find = pipeline("zero-shot-object-detection", model=model, device=device)
    rows = []
    for path in track(images, "detecting", transient=True, console=Console(stderr=True)):
        found = find(
            Image.open(path).convert("RGB"),
            candidate_labels=list(labels[path.name]),
            threshold=threshold,
        )
        rows += [
            {"image": path.name, "label": box["label"], "score": box["score"], **box["box"]}
            for box in found
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read_boxes(path: Path) -> pd.DataFrame:
    r"""Table of boxes from a CSV or Parquet file.

    Raises:
        ValueError: a column of `COLUMNS` is missing.

    Example:
        >>> text = "image,label,score,xmin,ymin,xmax,ymax\na.png,cat,0.9,0,0,10,10\n"
        >>> _ = Path("boxes.csv").write_text(text)
        >>> read_boxes(Path("boxes.csv")).shape
        (1, 7)
    """
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}: boxes need {', '.join(COLUMNS)}."
        )
    return table[list(COLUMNS)]


def pair_positions(boxes: pd.DataFrame, pairs: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Position of one object relative to another, by the centres of their best boxes.

    A best box has the highest score of its object.

    Args:
        boxes: columns `COLUMNS`.
        pairs: image file name → its two labels.

    Returns:
        One row an image, index image: `both` (each has a box), `dx` and `dy` in pixels (y down),
        NaN unless both.

    Raises:
        ValueError: the boxes lack a column, or a score or coordinate is no finite number.

    Example:
        >>> rows = [("a.png", "cat", 0.9, 0, 0, 10, 10), ("a.png", "dog", 0.8, 30, 0, 40, 20)]
        >>> pair_positions(pd.DataFrame(rows, columns=list(COLUMNS)), {"a.png": ("cat", "dog")})
               both    dx   dy
        image
        a.png  True -30.0 -5.0
    """
    if missing := [column for column in COLUMNS if column not in boxes]:
        raise ValueError(
            f"The boxes have no column {', '.join(missing)}: they need {', '.join(COLUMNS)}."
        )
    for column in COLUMNS[2:]:
        for value in boxes[column]:
            number(f"boxes[{column!r}]", value)
    best = (
        boxes.sort_values("score")
        .drop_duplicates(["image", "label"], keep="last")
        .set_index(["image", "label"])
    )
    x, y = (best["xmin"] + best["xmax"]) / 2, (best["ymin"] + best["ymax"]) / 2
    first, second = ([(image, pair[part]) for image, pair in pairs.items()] for part in (0, 1))
    dx, dy = (
        of.reindex(first).to_numpy(float) - of.reindex(second).to_numpy(float) for of in (x, y)
    )
    return pd.DataFrame(
        {"both": ~np.isnan(dx), "dx": dx, "dy": dy}, index=pd.Index(list(pairs), name="image")
    )
