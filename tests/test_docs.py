"""Python blocks in the pages run, in order, and links between files lead somewhere."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from dit_lens import viz
from hooked_models import HookedTextToImage

from .hooked_models.tiny_pipelines import tiny_pipeline

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
RUN = ("start.md", "tour.md", "results.md", "share.md", "explore.md", "your_model.md")
EXECUTED = [page for page in PAGES if page.parent.name == "extending" or page.name in RUN]


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}  # dataclasses read their module
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        exec(compile(code, str(page), "exec"), names)


def test_what_a_user_comes_for_takes_no_more_than_15_lines() -> None:
    """Heads of one's own model and prompt, a task, an experiment with hooks, a result to send, a walk
    through a run: no block of these pages, all of them run above, is longer.
    """
    for name in ("your_model.md", "extending/task.md", "start.md", "share.md", "explore.md"):
        page = ROOT / "docs" / name
        assert page in EXECUTED
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
            assert len([line for line in code.splitlines() if line.strip()]) <= 15, name


@pytest.mark.parametrize("family", ["FLUX.1", "SD3", "Qwen-Image", "SANA"])
def test_your_model_runs_on_other_families(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's lines, unchanged, on folders of small random pipelines: heads are ranked, and
    hiding a word moves the image.
    """
    monkeypatch.chdir(tmp_path)
    pipe, call = tiny_pipeline(family)
    pipe.save_pretrained(tmp_path / "model")
    model = HookedTextToImage.from_pretrained(tmp_path / "model")
    model.pipe.set_progress_bar_config(disable=True)
    model.options = {
        name: value
        for name, value in call.items()
        if name not in ("num_inference_steps", "output_type")
    }
    monkeypatch.setattr(HookedTextToImage, "from_pretrained", lambda name: model)
    names: dict[str, Any] = {}
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/your_model.md").read_text(), flags=re.S
    )
    # two of them imports
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 2 + 15
    for code in blocks:
        exec(compile(code, "your_model.md", "exec"), names)
        if code == blocks[0]:
            effect = names["found"]["moved_effect"].sel(interval="mean")
            assert bool((effect > 0).all())
    heads, ranking = names["heads"], names["ranking"]
    assert len(heads) == len(ranking) == model.cfg.n_layers * model.cfg.n_heads
    assert heads.is_monotonic_decreasing
    assert ranking.iloc[0] > 0
    assert names["picture"].dims == ("y", "x")
    assert Path("page.html").exists()


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "recipes/README.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_reference_names_what_is_there() -> None:
    """A name that moved to another module would break the site, which this suite does not build."""
    names = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^\.\. auto\w+:: (\S+)", page.read_text(), flags=re.M)
    ]
    assert len(names) > 50
    missing = []
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


def test_the_reference_has_a_picture_of_all_that_is_drawn() -> None:
    """Figures, which the site draws; photographs of pages."""
    drawn = {name for name in viz.__all__ if callable(getattr(viz, name))}
    drawn -= {"Effects", "bare", "name_rows", "show"}  # the last shows the attention page
    figures = set(runpy.run_path(str(ROOT / "docs/gallery.py"), run_name="gallery")["FIGURES"])
    photographs = {path.stem: path for path in (ROOT / "docs/_static/viz").glob("*.webp")}
    assert not figures & set(photographs)
    assert figures | set(photographs) == drawn | {"Lab"}
    assert all(path.stat().st_size < 250_000 for path in photographs.values())
