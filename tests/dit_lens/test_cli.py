"""What the command line adds to the functions that it calls: a table, a way to go on, and no waiting for torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from dit_lens import cli, scenes, sweep
from dit_lens.intervene.interventions import Intervention
from hooked_models import HookedTextToImage

from ..hooked_models.pipelines import PROMPTS, tiny_pipeline


def dit_lens(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dit-lens", *arguments])
    cli.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    HookedTextToImage.from_pipeline(tiny_pipeline()).save_pretrained(path)
    return str(path)


def test_help_waits_for_nothing_heavy():
    """Of any command: tyro reads all of them."""
    code = "import sys; sys.argv = ['dit-lens', 'sweep', '--help']\nfrom dit_lens import cli\ntry: cli.main()\n"
    code += "except SystemExit: print(*sorted({'torch', 'diffusers', 'transformers', 'pandas'} & set(sys.modules)), 'loaded')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--explain" in printed
    assert printed.splitlines()[-1].split() == ["loaded"]


def test_a_sweep_prints_its_strongest_cells_and_goes_on(folder, monkeypatch, capsys, tmp_path):
    options = [
        "--prompts",
        *PROMPTS,
        "--each",
        "layer",
        "step",
        "--num-steps",
        "3",
        "--show",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    dit_lens(monkeypatch, "sweep", folder, *options)
    printed = capsys.readouterr().out
    model = HookedTextToImage.from_pretrained(folder)
    cells = sweep.grid(Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), steps=range(3))
    metric = sweep.Metric(sweep.displacement, given=("baseline",))
    found = sweep.run(model, PROMPTS, 0, cells, {"displacement": metric}, num_steps=3)["displacement_effect"]
    strongest = found.sel(interval="mean").to_series().sort_values(ascending=False).head(2)
    for label, value in strongest.items():
        line = next(line for line in printed.splitlines() if line.startswith(label))
        assert [float(part) for part in line.split()[-3:]] == found.sel(intervention=label).round(4).values.tolist()
        assert f"{value:.4f}".rstrip("0") in line
    ran = []
    monkeypatch.setattr(HookedTextToImage, "_step", lambda *args: ran.append(1))
    dit_lens(monkeypatch, "sweep", folder, *options)
    assert capsys.readouterr().out == printed
    assert not ran


def test_a_sweep_is_explained_before_it_runs(folder, monkeypatch, capsys):
    dit_lens(monkeypatch, "sweep", folder, "--prompts", *PROMPTS, "--num-steps", "2", "--explain")
    assert "8 cells in 8 forks" in capsys.readouterr().out


def test_a_search_on_scenes(monkeypatch, capsys):
    """Along the relation, on a model that can draw; verdicts and prompts of one's own are refused there."""
    options = ["rte-nano", "--num-scenes", "2", "--num-steps", "2", "--metric", "relation", "--top", "2", "--sample", "4"]
    dit_lens(monkeypatch, "sweep", *options)
    printed = capsys.readouterr().out
    assert "rank correlation" in printed
    assert printed.count(" top ") == 2
    with pytest.raises(SystemExit, match="judges scenes"):
        dit_lens(monkeypatch, "sweep", *options, "--prompts", PROMPTS[0])


def test_the_relation_metric_rises_with_the_right_layout():
    wanted = scenes.sample(20, seed=3, split="all")
    right = sweep.relation_metric(wanted).function(scenes.render(wanted), prompt=np.arange(20))
    turned = sweep.relation_metric(wanted).function(scenes.render(wanted).flip(2, 3), prompt=np.arange(20))
    assert (right > 0).all()
    torch.testing.assert_close(turned, -right, rtol=0, atol=1e-6)
