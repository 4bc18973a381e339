"""Write docs/transformer_lens.md from what the tests of this folder say they establish: `python -m
tests.conformance.table`.

A test states it by `oracles.tool(name, on, verdict, check=…, note=…)`. The page is as true as the
suite is green, and a test compares it with the file.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "transformer_lens.md"
MODELS = {"bind": "`dit.bind`", "at": "`model.at`", "fold": "folded", "model": "itself"}
INTRODUCTION = """# TransformerLens' tools on a diffusion transformer

Every public tool of TransformerLens 4.3 that can apply to a model which makes images is called, unmodified, by
`tests/conformance`, and its result compared with an intervention or an identity written out by hand, in float64. This page is
generated from that suite (`python -m tests.conformance.table`).

```python
from transformer_lens import patching

view, tokens = model.at(step=0, prompts=[clean, corrupted], seed=0, pos="text", returns="x0")  # a generation, hooked at a step
view, tokens = model.dit.bind(latents, timestep, text, text_mask, pos="image")  # one call of the denoiser
folded = model.dit.fold_timestep(t)  # the denoiser at one timestep, adaLN folded into its weights
view, tokens = folded.bind(latents, t, text, text_mask, returns="patches")  # output channels as "logits"

_, clean_cache = view.run_with_cache(tokens[:1])  # an ActivationCache; cache.at(step=0) of a full run serves too
patching.get_act_patch_attn_head_out_all_pos(view, tokens[1:], clean_cache, metric)
```

`tokens` are row numbers, one for each position that a sweep goes over; `pos` chooses image or text positions. Weights of an
unfolded model lack the timestep's shift, scale and gate, so a tool that reads them refuses until the timestep is folded.
Cross-attention: `cache["z", layer, "cross_attn"]`, `activation_name="cross_z"`, `dit.cross_QK`.

"exact" means equal to the check to 1e-10 or better, "refuses" means one sentence that says why and what to do instead; an empty
cell is not tested. Columns: a view of one denoiser call, a view of one step of a generation, a folded denoiser, the model
itself.
"""

Cells = dict[str, str]


class _Collector:
    """A pytest plugin that keeps what it finds."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = items


def page(tests: list[pytest.Item]) -> str:
    """The page, from the markers of all tests of this folder."""
    cells: dict[str, Cells] = defaultdict(dict)
    checks: dict[str, list[str]] = defaultdict(list)
    notes: dict[str, list[str]] = defaultdict(list)
    for marker in (marker for test in tests for marker in test.iter_markers("tool")):
        (tool,) = marker.args
        cells[tool] |= dict.fromkeys(marker.kwargs["on"], marker.kwargs["verdict"])
        if marker.kwargs["verdict"] != "refuses":
            checks[tool] += [marker.kwargs["check"]]
        notes[tool] += [marker.kwargs["note"]]
    rows = [["tool", *MODELS.values(), "checked against", "notes"]]
    rows += [["---"] * len(rows[0])]
    for tool, verdicts in sorted(cells.items(), key=lambda item: item[0].partition(".")[0]):
        found = [verdicts.get(model, "") for model in MODELS]
        rows += [[f"`{tool}`", *found, unique(checks[tool]), unique(notes[tool])]]
    return (
        INTRODUCTION
        + "\n"
        + "\n".join(f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |" for row in rows)
        + "\n"
    )


def unique(texts: list[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))


if __name__ == "__main__":
    collector = _Collector()
    options = ["--collect-only", "-qq", "--no-header", "-p", "no:cacheprovider", "-m", ""]
    pytest.main([*options, str(Path(__file__).parent)], [collector])
    PAGE.write_text(page(collector.items))
