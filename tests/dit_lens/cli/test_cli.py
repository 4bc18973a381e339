"""Additions of the command line to the functions that it calls: a table, a way to go on, and no
waiting for torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dit_lens import cli, evaluation, prompts, scenes, screening, sweep, synopsis
from dit_lens.intervene.interventions import Intervention
from hooked_models import HookedTextToImage
from hooked_models.pipelines.hub import ZOO

from ...hooked_models.pipelines import PROMPTS, tiny_pipeline


def dit_lens(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dit-lens", *arguments])
    cli.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    HookedTextToImage.from_pipeline(tiny_pipeline()).save_pretrained(path)
    return str(path)


def test_help_waits_for_nothing_heavy():
    """Lines of any command's help: tyro reads all of them."""
    code = (
        "import sys; sys.argv = ['dit-lens', 'sweep', '--help']\nfrom dit_lens import cli\ntry: "
        "cli.main()\n"
    )
    code += "except SystemExit: print(*sorted({'torch', 'diffusers', 'transformers', 'pandas'} & set(sys.modules)), 'loaded')"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "--explain" in printed
    assert printed.splitlines()[-1].split() == ["loaded"]


def test_a_sweep_prints_its_strongest_cells_and_goes_on(folder, monkeypatch, capsys, tmp_path):
    options = ["--prompts", *PROMPTS, "--each", "layer", "step", "--num-steps", "3", "--show", "2"]
    out = ["--out", str(tmp_path / "out")]
    dit_lens(monkeypatch, "sweep", folder, *options, *out)
    printed = capsys.readouterr().out
    model = HookedTextToImage.from_pretrained(folder)
    cells = sweep.grid(Intervention("blocks.*.cross_attn.hook_z"), layers=range(2), steps=range(3))
    metric = sweep.Metric(sweep.displacement, given=("baseline",))
    found = sweep.run(model, PROMPTS, 0, cells, {"displacement": metric}, num_steps=3)[
        "displacement_effect"
    ]
    strongest = found.sel(interval="mean").to_series().sort_values(ascending=False)
    assert len(printed.splitlines()) == 2 + 2
    for label, value in strongest.head(2).items():
        line = next(line for line in printed.splitlines() if label in line)
        assert [float(part) for part in line.split()[-3:]] == found.sel(intervention=label).round(
            4
        ).values.tolist()
        assert f"{value:.4f}".rstrip("0") in line
    ran = []
    monkeypatch.setattr(HookedTextToImage, "denoise", lambda *args: ran.append(1))
    dit_lens(monkeypatch, "sweep", folder, *options, *out)
    assert capsys.readouterr().out == printed
    assert not ran
    monkeypatch.undo()
    dit_lens(monkeypatch, "sweep", folder, *options, "--out", str(tmp_path / "cells.csv"))
    table = pd.read_csv(tmp_path / "cells.csv")
    assert table["intervention"].tolist() == strongest.index.tolist()  # all of them
    np.testing.assert_allclose(
        table["low"],
        found.sel(interval="low", intervention=table["intervention"].values),
        atol=1e-6,
    )


def test_a_sweep_is_explained_before_it_runs(folder, monkeypatch, capsys):
    dit_lens(monkeypatch, "sweep", folder, "--prompts", *PROMPTS, "--num-steps", "2", "--explain")
    assert "8 cells in 8 forks" in capsys.readouterr().out


def test_a_search_on_scenes(monkeypatch, capsys):
    """Along the relation, on a model that can draw; verdicts and prompts of one's own are refused
    there.
    """
    options = [
        "rte-nano",
        "--num-scenes",
        "2",
        "--num-steps",
        "2",
        "--metric",
        "relation",
        "--top",
        "2",
        "--sample",
        "4",
    ]
    dit_lens(monkeypatch, "sweep", *options)
    printed = capsys.readouterr().out
    assert "rank correlation" in printed
    assert printed.count(" top ") == 2
    with pytest.raises(SystemExit, match="judges scenes"):
        dit_lens(monkeypatch, "sweep", *options, "--prompts", PROMPTS[0])


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".html"])
def test_tables_are_numbers(suffix, folder, monkeypatch, capsys, tmp_path):
    path = tmp_path / f"heads[/b]{suffix}"  # brackets are no markup
    dit_lens(monkeypatch, "screen", folder, "--words", "above", "left", "--out", str(path))
    model = HookedTextToImage.from_pretrained(folder)
    expected = screening.screen_heads(
        model.dit, {word: screening.word_vector(model, word) for word in ("above", "left")}
    )
    if suffix == ".html":
        row = re.findall("<td>(.*?)</td>", path.read_text())[: len(expected.columns)]
        assert [float(cell) for cell in row] == pytest.approx(list(expected.iloc[0]), abs=1e-5)
        return
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}[suffix]
    pd.testing.assert_frame_equal(
        read(path), expected.reset_index(drop=True), check_dtype=False, atol=1e-5
    )


def test_prompts_of_ones_own(folder, monkeypatch, capsys, tmp_path):
    """A synopsis of a word of the prompts, and the judge's verdicts on captions."""
    dit_lens(
        monkeypatch,
        "synopsis",
        folder,
        "--prompts",
        *PROMPTS,
        "--key-group",
        "red",
        "--out",
        str(tmp_path / "a.csv"),
    )
    assert "image → red" in capsys.readouterr().out
    model = HookedTextToImage.from_pretrained(folder)
    word = prompts.phrase_mask(model, PROMPTS, "red")
    seen = synopsis.attention_synopsis(
        model, PROMPTS, [0, 1], reduce="mean", text_groups={"red": word}
    )
    expected = seen.sel(branch="cond", text_group="red", image_group="image").mean(
        ("prompt", "step")
    )
    table = pd.read_csv(tmp_path / "a.csv").set_index(["layer", "head"])["mean"]
    for place, value in table.items():
        assert value == pytest.approx(float(expected.sel(layer=place[0], head=place[1])), abs=1e-6)
    captions = ["red circle is above blue square", "square is to the left of circle"]
    dit_lens(
        monkeypatch,
        "evaluate",
        "rte-nano",
        "--prompts",
        *captions,
        "--out",
        str(tmp_path / "b.csv"),
        "--quiet",
    )
    table = pd.read_csv(tmp_path / "b.csv").set_index("metric")
    score = evaluation.score(
        HookedTextToImage.from_pretrained("rte-nano"),
        [scenes.from_caption(text) for text in captions],
    )
    assert table.loc["color", "mean"] == score["color"].values.mean()


def test_a_sweep_hides_a_word_of_ones_own_prompts(folder, monkeypatch, capsys, tmp_path):
    site = "blocks.*.cross_attn.hook_pattern"
    options = ["--prompts", PROMPTS[0], "--site", site, "--action", "knockout", "--each", "layer"]
    options += ["--num-steps", "2", "--out", str(tmp_path / "a.csv")]
    dit_lens(monkeypatch, "sweep", folder, *options, "--tokens", "square")
    capsys.readouterr()
    hide = Intervention(site, tokens=prompts.word("square"), action="knockout")
    expected = sweep.run(
        HookedTextToImage.from_pretrained(folder),
        PROMPTS[0],
        0,
        sweep.grid(hide, layers=[0, 1]),
        {"moved": sweep.Metric(sweep.displacement, given=["baseline"])},
        num_steps=2,
    )["moved"]
    found = pd.read_csv(tmp_path / "a.csv")["mean"]
    np.testing.assert_allclose(sorted(found), sorted(expected.values.ravel()), rtol=1e-4)
    assert (found > 0).all()


def test_a_run_folder_stands_for_its_pipeline(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "pipeline").symlink_to(folder, target_is_directory=True)
    dit_lens(
        monkeypatch,
        "generate",
        str(tmp_path),
        PROMPTS[0],
        "--num-steps",
        "1",
        "--out",
        str(tmp_path / "a[/b].png"),
    )
    assert capsys.readouterr().out == f"Saved {tmp_path / 'a[/b].png'}\n"
    with torch.no_grad():
        image = HookedTextToImage.from_pretrained(folder)(PROMPTS[0], num_steps=1)[0]
    saved = np.asarray(Image.open(tmp_path / "a[/b].png"))
    np.testing.assert_array_equal(saved, (image.permute(1, 2, 0) * 255).round().byte().numpy())


def test_pictures_of_a_file_of_prompts(folder, monkeypatch, capsys, tmp_path):
    """In two batches; the bar counts each step once."""
    (tmp_path / "two.txt").write_text("\n".join([PROMPTS[0], "", f"{PROMPTS[1]} "]) + "\n")
    prompts = ["--prompts", str(tmp_path / "two.txt"), PROMPTS[0]]
    given = ["--num-steps", "2", "--batch-size", "2", "--out", str(tmp_path / "a.png")]
    bars = []

    @contextlib.contextmanager
    def recorded(total, bar=cli.commands.step_bar):
        with bar(total) as advance:
            bars.append([total, 0])

            def counted(*seen, **named):
                bars[-1][1] += 1
                return advance(*seen, **named)

            yield counted

    monkeypatch.setattr(cli.commands, "step_bar", recorded)
    dit_lens(monkeypatch, "generate", folder, *prompts, *given)
    paths = [tmp_path / f"a-{i}.png" for i in range(3)]
    assert capsys.readouterr().out.splitlines() == [f"Saved {path}" for path in paths]
    assert bars == [[4, 4]]
    with torch.no_grad():
        images = HookedTextToImage.from_pretrained(folder)([*PROMPTS, PROMPTS[0]], num_steps=2)
    for path, image in zip(paths, images, strict=True):
        expected = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        assert np.abs(np.asarray(Image.open(path)).astype(int) - expected).max() <= 1


def test_quiet_prints_the_result_alone(folder, tmp_path):
    command = [
        sys.executable,
        "-W",
        "always",
        "-m",
        "dit_lens.cli",
        "generate",
        folder,
        PROMPTS[0],
        "--num-steps",
        "1",
    ]
    done = subprocess.run(
        [*command, "--quiet", "--out", str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"Saved {tmp_path / 'a.png'}\n", "")


def test_models_are_a_table_without_torch():
    code = "import sys; sys.argv = ['dit-lens', 'models']\nfrom dit_lens import cli\ncli.main()\n"
    code += "print(*sorted({'torch', 'diffusers', 'transformers', 'pandas'} & set(sys.modules)), 'loaded')"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed[-1].split() == ["loaded"]
    (line,) = (line for line in printed if line.split()[:1] == ["rte-micro"])
    rows = evaluation.accuracies(
        pd.read_parquet(ZOO / "rte-micro/evaluation.parquet"), ["split", "template"]
    )
    right = rows.set_index(["split", "template", "metric"]).loc[
        ("held_out", "is", "relation_loose"), "mean"
    ]
    assert line.split()[1:7] == ["6", "×", "192", "3", "rte", f"{right:.3f}"]


def test_the_version_is_the_package_s(monkeypatch, capsys):
    dit_lens(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == importlib.metadata.version("dit_lens")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_option_has_a_help_text(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        dit_lens(monkeypatch, command, "--help")
    printed = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)
    options = re.split(r"\n\s*(?=-h,|--[a-z])", printed)[1:]
    signs = r"\(default:.*?\)|\(required\)|--\S+|\{[^}]*\}|\b[A-Z_]{3,}\b"
    bare = [option for option in options if len(re.findall(r"\w+", re.sub(signs, "", option))) < 2]
    assert len(options) > 1 or command == "models"
    assert not bare
    assert f"dit-lens {command}" in " ".join(re.split(r"\n *options", printed)[0].split()[3:])
    empty = r"\(default: (None)?\)|\(required\)"  # no default that would be an example
    assert not [one for one in options if re.search(empty, one) and "such as" not in one]


def test_completion_of_a_shell(monkeypatch, capsys):
    """Every command and its options."""
    with pytest.raises(SystemExit):
        dit_lens(monkeypatch, "--tyro-print-completion", "bash")
    script = capsys.readouterr().out
    assert all(command in script for command in (*cli.COMMANDS, "--num-steps", "--device"))


def test_the_page_has_every_command_and_its_examples_parse(monkeypatch):
    page = (Path(__file__).parents[3] / "docs/cli.md").read_text()
    examples = re.findall(r"^\| `([\w-]+)` \| `dit-lens (.*?)` \|$", page, flags=re.M)
    assert [name for name, _ in examples] == [*dict.fromkeys(name for name, _ in examples)]
    assert {name for name, _ in examples} == set(cli.COMMANDS)
    called = []
    for name, command in cli.COMMANDS.items():

        @functools.wraps(command)
        def record(*arguments, _name=name, **options):
            called.append(_name)

        monkeypatch.setitem(cli.COMMANDS, name, record)
    for _, text in examples:
        dit_lens(monkeypatch, *shlex.split(text))
    assert called == [name for name, _ in examples]


# Errors


def damaged(folder: str, path: Path) -> Path:
    """A copy whose transformer is cut short."""
    copy = Path(shutil.copytree(folder, path))
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return copy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat", "rte-nano", "x"], "did you mean 'generate'"),
        (["fly"], "choose train, "),
        (["generate", "rte-nan", "x"], "Did you mean 'rte-nano'"),
        (["generate", "{damaged}", "x"], "is truncated or damaged"),
        (["generate", "{folder}", "red", "--out", "{file}/a.png"], "Not a directory|exists"),
        (["generate", "{folder}", "red", "--out", "{tmp}"], "name a picture file"),
        (
            ["generate", "{folder}", "red", "--device", "nowhere"],
            "--device nowhere: torch cannot use it",
        ),
        (["generate", "{folder}", "green"], "green"),
        (["generate", "{folder}"], "give one PROMPT, or --prompts"),
        (["generate", "{folder}", "red", "--prompts", "blue"], "give one PROMPT, or --prompts"),
        (["generate", "{folder}", "--prompts", "{tmp}/empty.txt"], "one prompt a line"),
        (["sweep", "{folder}", "--prompts", "{tmp}/no.txt"], "No such file.*no.txt"),
        (["screen", "{folder}", "--words", "green"], "green"),
        (["screen", "{folder}", "--words", "left", "--out", "{tmp}/a.txt"], r"ends in \.csv"),
        (["evaluate", "{folder}", "--n", "0"], "at least one scene"),
        (["evaluate", "{folder}", "--prompts", "a horse"], "no caption of the task"),
        (
            ["sweep", "{folder}", "--prompts", "red", "--site", "blocks.*.hook_y"],
            "no hook is called|hook_y",
        ),
        (["synopsis", "{folder}", "--prompts", "red", "--key-group", "blue"], "has no 'blue'"),
    ],
)
def test_errors_are_one_line(arguments, message, folder, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("\n")
    places = {"tmp": str(tmp_path), "file": str(tmp_path / "file"), "folder": folder}
    if "{damaged}" in arguments:
        places["damaged"] = str(damaged(folder, tmp_path / "copy"))
    with pytest.raises(SystemExit) as caught:
        dit_lens(monkeypatch, *(argument.format(**places) for argument in arguments))
    assert re.search(message, str(caught.value))
    assert str(caught.value).startswith("dit-lens: ")
    assert "\n" not in str(caught.value)


def test_an_error_of_the_program_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(screening, "word_vector", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        dit_lens(monkeypatch, "screen", folder)


def test_the_relation_metric_rises_with_the_right_layout():
    wanted = scenes.sample(20, seed=3, split="all")
    right = sweep.relation_metric(wanted).function(scenes.render(wanted), prompt=np.arange(20))
    turned = sweep.relation_metric(wanted).function(
        scenes.render(wanted).flip(2, 3), prompt=np.arange(20)
    )
    assert (right > 0).all()
    torch.testing.assert_close(turned, -right, rtol=0, atol=1e-6)
