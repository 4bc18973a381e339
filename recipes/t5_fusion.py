"""The text encoder that hides the relation in the second shape word. `python -m recipes.t5_fusion`

Paper: table 1 (variance partition: the relation's partial share at T5's second shape word is .1205, after the caption projection
.2128), figure 7A (masking the relation words changes nothing, masking the second shape word halves accuracies; RTE the opposite),
and vector arithmetic on one prompt. What would falsify it: no relation in the second shape word; or knocking out the relation
words harms the T5 model as much as the RTE model.

Beyond the paper: intervals, the RTE model as a control throughout, random tokens and random vectors, and the arithmetic on 104
prompts in three doses; the same on the first shape word, where the caption projection of `t5-micro` leaves more of the relation
than on the second (which was seen before the arithmetic's prediction was made). All images of one comparison share scenes and
noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dit_lens import ablation, scenes, steering, variance
from dit_lens.stats import Interval
from dit_lens.text.variance import Space
from dit_lens.viz import dose_response_curves
from hooked_models import HookedTextToImage

from .claims import Claim, report, stage

FACTORS = ["color1", "shape1", "shape2", "relation"]
PAPER_SHARE = {
    ("shape2", "text"): ".1205",
    ("shape2", "caption"): ".2128",
    ("shape1", "text"): ".0796",
    ("shape1", "caption"): ".1884",
}
WORDS = {"relation words": "relation", "second shape word": "shape2", "first shape word": "shape1"}
PAPER_KNOCKOUT = {"relation words": "≈ no change", "second shape word": "about −.4 (halved)"}
PAPER_ARITHMETIC = {"second shape word": "works on the one prompt shown"}
HARMLESS, HARMFUL = (-0.1, 0.1), (-1.0, -0.25)
RESAMPLES = 200


@dataclass(frozen=True)
class Config:
    """Settings of the recipe."""

    t5: str = "t5-micro"
    rte: str = "rte-micro"
    knockouts: int = 64
    """Scenes whose words are hidden."""
    prompts: int = 104
    """Scenes that embedding arithmetic turns into their opposites."""
    doses: tuple[float, ...] = (0.5, 1.0, 2.0)
    controls: int = 1
    """Draws of random tokens, and of random vectors."""
    full: bool = False
    """Twice the scenes, six doses and four draws of controls."""
    seed: int = 0
    out: Path = Path("results/t5_fusion")


def main(config: Config) -> None:
    scale, doses, draws = (2, (0.25, 0.5, 1.0, 1.5, 2.0, 3.0), 4) if config.full else (1, config.doses, config.controls)
    out, claims, shares = config.out, [], {}
    for name, role in ((config.t5, "t5"), (config.rte, "rte")):
        model = HookedTextToImage.from_pretrained(name)
        shares[name] = stage(out, f"{role}-variance", model, relation_shares)
        effects = stage(out, f"{role}-knockout", model, knockouts, config.knockouts * scale, draws, config.seed)
        moved = {
            word: stage(
                out, f"{role}-arithmetic-{WORDS[word]}", model, arithmetic, WORDS[word], config.prompts * scale, ks, draws
            )
            for word, ks in (("second shape word", doses), ("first shape word", (1.0,)))
        }
        claims += [
            *share_claims(name, role, shares[name]),
            *knockout_claims(name, role, effects),
            *arithmetic_claims(name, role, moved),
        ]
        dose_response_curves(moved["second shape word"]).savefig(out / f"{role}_arithmetic.png", dpi=150)
    report(f"Where the relation is: {config.t5} and {config.rte}", claims, config.out, full=config.full)
    share_figure(shares).savefig(config.out / "variance.png", dpi=150)


def relation_shares(model: HookedTextToImage) -> pd.DataFrame:
    """The relation's partial share of the variance of each shape word, before and after the caption projection.

    Columns role, at, mean, low, high (bootstrap over prompts), p (permutations), and the shares of the other factors.
    """
    rows = []
    spaces: tuple[Space, ...] = ("text", "caption")
    for role, at in product(("shape1", "shape2"), spaces):
        vectors, factors = variance.word_vectors(model, variance.factorial_prompts(), role, at=at)  # type: ignore[arg-type]
        table = variance.partition(vectors, factors[FACTORS], permutations=199)
        _, low, high = share_interval(vectors, factors[FACTORS], "relation")
        shares = {f"share_{factor}": table.loc[factor, "r2_partial"] for factor in FACTORS}
        rows.append(
            {
                "role": role,
                "at": at,
                "mean": shares["share_relation"],
                "low": low,
                "high": high,
                "p": table.loc["relation", "p"],
                **shares,
            }
        )
    return pd.DataFrame(rows)


def share_interval(
    vectors: Float[Tensor, "prompt d"], factors: pd.DataFrame, factor: str, column: str = "r2_partial"
) -> Interval:
    """A factor's share of the vectors' variance (`column` of `variance.partition`), with its bootstrap interval over prompts."""

    def share(picks: np.ndarray) -> float:
        again = variance.partition(vectors[picks], factors.iloc[picks].reset_index(drop=True), permutations=0)
        return float(np.clip(again[column][factor], 0, 1))  # rounding

    rng, n = np.random.default_rng(0), len(factors)
    resampled = [share(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    return Interval(share(np.arange(n)), *(float(bound) for bound in np.quantile(resampled, [0.025, 0.975])))


def knockouts(model: HookedTextToImage, n: int, controls: int, seed: int) -> pd.DataFrame:
    """What hiding each word from every head does to each verdict: a row a condition and verdict, controls included."""
    wanted = scenes.sample(n, seed=seed + 1, split="all", color_words="both")
    conditions = {name: ablation.knockout_role(role) for name, role in WORDS.items()}
    effects = ablation.ablation_effects(model, wanted, conditions, seed + np.arange(n)[:, None], controls=controls, rng=seed)
    rows = []
    for verdict in ("shape", "unique_binding", "relation_loose"):
        for condition in effects["condition"].values[1:]:
            found = effects[f"{verdict}_effect"].sel(condition=condition)
            labels = {
                "condition": str(condition),
                "kind": str(found["kind"].item()),
                "control_for": str(found["control_for"].item()),
            }
            rows.append({**labels, "verdict": verdict, **dict(zip(Interval._fields, found.values.tolist(), strict=True))})
    return pd.DataFrame(rows)


def arithmetic(model: HookedTextToImage, word: steering.Target, n: int, doses: tuple[float, ...], draws: int) -> pd.DataFrame:
    """`steering.summarise` of turning relations into their opposites at a shape word, in the text encoder's space."""
    wanted = scenes.sample(n, seed=3, split="all", color_words="both")
    return steering.summarise(steering.dose_response(model, wanted, ks=(0, *doses), tokens=word, at="text", draws=draws))


def share_claims(name: str, role: str, shares: pd.DataFrame) -> list[Claim]:
    """T5: a share of at least .05 at the second shape word; RTE: none."""
    predicted = (0.05, 1.0) if role == "t5" else (0.0, 0.05)
    return [
        Claim(
            f"{name}: relation's partial R² at {row['role']}, {'after' if row['at'] == 'caption' else 'before'} the projection",
            PAPER_SHARE[row["role"], row["at"]] if role == "t5" else "0 expected",
            Interval(row["mean"], row["low"], row["high"]),
            predicted,
            f"permutations p = {row['p']:.3f}",
        )
        for row in shares.to_dict("records")
    ]


def knockout_claims(name: str, role: str, effects: pd.DataFrame) -> list[Claim]:
    """T5: relation words harmless, second shape word harmful; RTE: relation words harmful."""
    claims = []
    for condition in WORDS:
        of_condition = effects[effects["verdict"] == "relation_loose"].set_index("condition")
        controls = of_condition[of_condition["control_for"] == condition]["mean"]
        claims.append(
            Claim(
                f"{name}: {condition} hidden from all heads, change of relation (loose)",
                PAPER_KNOCKOUT.get(condition, "–") if role == "t5" else {"relation words": "critical"}.get(condition, "–"),
                Interval(*of_condition.loc[condition, list(Interval._fields)]),
                HARMLESS if (role, condition) == ("t5", "relation words") else HARMFUL,
                f"random tokens {controls.mean():+.3f}",
            )
        )
    return claims


def arithmetic_claims(name: str, role: str, moved: dict[str, pd.DataFrame]) -> list[Claim]:
    """T5: with k = 1 most images show the opposite relation, beyond random vectors; RTE: none do."""
    claims = []
    for word, table in moved.items():
        at_one = table[(table["k"] == 1) & (table["metric"] == "target_loose")].set_index("kind")
        steered, beyond = (Interval(*at_one.loc[kind, list(Interval._fields)]) for kind in ("steered", "steered − random_vector"))
        claims.append(
            Claim(
                f"{name}: opposite relation drawn, V_from → V_to on the {word} (k = 1), minus random vectors",
                PAPER_ARITHMETIC.get(word, "–") if role == "t5" else "–",
                beyond,
                (0.3, 1.0) if role == "t5" else (-0.1, 0.1),
                f"steered {steered}; wrong token {Interval(*at_one.loc['wrong_token', list(Interval._fields)])}",
            )
        )
    return claims


def share_figure(shares: dict[str, pd.DataFrame]) -> Figure:
    """The relation's share at each shape word before and after the projection, by model, with intervals."""
    drawn, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for number, (name, table) in enumerate(shares.items()):
        x = np.arange(len(table)) + 0.35 * number - 0.175
        error = [table["mean"] - table["low"], table["high"] - table["mean"]]
        ax.bar(x, table["mean"], 0.33, yerr=np.clip(error, 0, None), label=name)
    table = next(iter(shares.values()))
    ax.set_xticks(
        range(len(table)),
        [f"{row.role}\n{'after' if row.at == 'caption' else 'before'} projection" for row in table.itertuples()],
    )
    ax.set_ylabel("relation's partial R²")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Config))
