"""The report of a recipe: claims of the paper with a prediction stated beforehand, the value
measured here, and a verdict.

claims = [Claim("…", paper=".67 → .33", here=Interval(…), predicted=(-1.0, -0.1), control="…")]
report("Relation heads", claims, out)  # prints the table, writes claims.json and claims.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from dit_lens import evaluation
from dit_lens.stats import Interval
from dit_lens.store import Store, digest, fingerprint
from hooked_models import HookedTextToImage, list_models
from hooked_models.pipelines.hub import ZOO


@dataclass(frozen=True)
class Claim:
    """One row of a recipe's table."""

    what: str
    paper: str
    """The paper's own numbers; "–" where it has none."""
    here: Interval
    predicted: tuple[float, float] | None
    """Where the number must lie, stated before it was measured, for the claim to hold here; None if
    nothing was predicted.
    """
    control: str = ""
    """The control, and its number."""
    contrast: Interval | None = None
    """The paper's own quantity here, minus that of its control; without it a claim does not say
    that the paper replicates.
    """
    basis: str = ""
    """How many images, noises and training runs the number is of."""
    questions: int = 1
    """Questions of this kind that the recipe asks; the verdict is by `together`."""
    share: bool = False
    """The number is a share, between 0 and 1."""

    @property
    def told_basis(self) -> str:
        """Basis, with the number of questions where the verdict is corrected for it."""
        return self.basis + (f"; one of {self.questions} questions" if self.questions > 1 else "")

    @property
    def verdict(self) -> str:
        """Verdict by the interval: inside the predicted range, outside of it, or neither.

        "replicates" needs a number of the paper, and a contrast with the control that is beyond
        doubt, too.
        """
        if np.isnan(self.here.mean):
            return "not run here"
        if self.predicted is None:
            return "exploratory"
        low, high = self.predicted
        yes, no = (
            ("as predicted", "not as predicted")
            if self.paper == "–"
            else ("replicates", "does not replicate here")
        )
        here = together(self.here, self.questions)
        if self.share:
            here = Interval(*np.clip(here, 0, 1))
        if low <= here.low and here.high <= high:
            contrast = None if self.contrast is None else together(self.contrast, self.questions)
            beyond = contrast is not None and (contrast.low > 0 or contrast.high < 0)
            return yes if beyond else "as predicted"
        return no if here.high < low or here.low > high else "undecided"


def together(found: Interval, questions: int) -> Interval:
    """Interval of one number of several that are to hold all at once, with 95 % (Bonferroni).

    Bounds of 2.5 % a side are moved outwards to 2.5 % / questions as under an exponential tail, by
    ln(.025 / questions) / ln(.025): the exact factor of a count of zero, and more than a normal
    tail needs.

    Example:
        >>> print(together(Interval(0.5, 0.4, 0.6), 10))
        0.500 [0.338, 0.662]
    """
    factor = np.log(0.025 / questions) / np.log(0.025)
    return Interval(
        found.mean,
        found.mean - factor * (found.mean - found.low),
        found.mean + factor * (found.high - found.mean),
    )


def independent(one: Interval, other: Interval) -> Interval:
    """Difference one − other of two independent numbers (Zou & Donner 2008, Statistics in Medicine
    27, p. 1693).

    Example:
        >>> print(independent(Interval(0.5, 0.2, 0.8), Interval(0.9, 0.5, 1.3)))
        -0.400 [-0.900, 0.100]
    """
    difference = one.mean - other.mean
    low = difference - np.hypot(one.mean - one.low, other.high - other.mean)
    high = difference + np.hypot(one.high - one.mean, other.mean - other.low)
    return Interval(difference, float(low), float(high))


def report(
    title: str,
    claims: Sequence[Claim],
    out: Path,
    basis: str = "",
    family: bool = False,
    **facts: object,
) -> None:
    """Print the table; write claims.json (with `facts`), claims.parquet and claims.csv into `out`.

    Args:
        basis: that of the claims that state none.
        family: all claims are questions of one kind, and their verdicts are by intervals that hold
            together.
    """
    if family:
        claims = [replace(claim, questions=len(claims)) for claim in claims]
    claims = [claim if claim.basis else replace(claim, basis=basis) for claim in claims]
    rows = [
        {
            "claim": c.what,
            "paper": c.paper,
            **c.here._asdict(),
            "predicted": list(c.predicted or ()),
            "control": c.control,
        }
        | {"contrast": str(c.contrast or ""), "basis": c.told_basis, "verdict": c.verdict}
        for c in claims
    ]
    shown_table = Table(
        "claim", "paper", "here [95 %]", "predicted", "control", "basis", "verdict", title=title
    )
    for claim in claims:
        shown = "–" if np.isnan(claim.here.mean) else str(claim.here)
        expected = f"{claim.predicted[0]:g} … {claim.predicted[1]:g}" if claim.predicted else "–"
        shown_table.add_row(
            claim.what, claim.paper, shown, expected, claim.control, claim.told_basis, claim.verdict
        )
    Console(width=170).print(shown_table)
    clean = [
        {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    with Store(out, {}, wait=True) as store:
        store.put_json("claims.json", {"title": title, **facts, "claims": clean})
        table = pd.DataFrame(rows)
        store.put("claims.parquet", lambda path: table.to_parquet(path, index=False))
        bounds = pd.DataFrame([row["predicted"] or [None, None] for row in rows])
        flat = table.drop(columns="predicted").assign(
            predicted_low=bounds[0], predicted_high=bounds[1]
        )
        store.put("claims.csv", lambda path: flat.to_csv(path, index=False))


def evaluation_of(model: str, n: int, out: Path) -> pd.DataFrame:
    """The evaluation that is bundled with a model, or one of `n` scenes a split of any other (a
    stopped one goes on).
    """
    bundled = ZOO / model / "evaluation.parquet"
    if model in list_models() and bundled.exists():
        return pd.read_parquet(bundled)
    return evaluation.evaluate_model(
        HookedTextToImage.from_pretrained(model), n, out=out / "evaluation" / Path(model).name
    )


def stage(
    out: Path,
    name: str,
    model: HookedTextToImage,
    make: Callable[..., pd.DataFrame],
    *settings: object,
) -> pd.DataFrame:
    """`make(model, *settings)`, or the table in `out` that a call with equal weights, settings and
    code has left.

    The code is that of `make` and of the recipes' functions that it calls.

    Raises:
        OSError: the table is damaged, or cannot be written; the message says which file, and what
            to do.
    """
    made_from = {
        "model": model.digest(),
        "code": fingerprint(make),
        "settings": fingerprint(settings),
    }
    return kept_table(out / "stages", name, made_from, lambda: make(model, *settings))


def kept_table(
    folder: Path, name: str, made_from: Mapping[str, str], make: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """The table of this name that was made from this, or a new one, which then stands there;
    another process waits for it.
    """
    with Store(folder / f"{name}-{digest(*made_from.values())}", made_from, wait=True) as store:
        store.load_or(
            "table.parquet",
            make,
            lambda table, path: table.to_parquet(path, index=False),
            pd.read_parquet,
        )
        return pd.read_parquet(store.path("table.parquet"))
