"""The wheel that `python -m build` makes: its content, and what it does in an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRAW = """
from hooked_models import HookedTextToImage, list_models
model = HookedTextToImage.from_pretrained("rte-micro")
print(list_models(), tuple(model("red circle is above blue square", num_steps=2).shape))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_content(wheel: Path) -> None:
    """Both packages whole, the micro models, no tests and no recipes; small enough for an index."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(
            archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        )
    listed = ["git", "ls-files", "dit_lens", "hooked_models"]
    tracked = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    left_out = (
        "hooked_models/zoo/rte-nano/",
        "hooked_models/zoo/rte-mini/",
        "hooked_models/zoo/t5-mini/",
    )
    expected = {name for name in tracked.stdout.splitlines() if not name.startswith(left_out)}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "hooked_models/zoo/rte-micro/transformer/diffusion_pytorch_model.safetensors" in names
    assert wheel.stat().st_size < 60e6  # an index takes 100 MB
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"viz", "remote", "ray", "captions"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.slow
@pytest.mark.network
def test_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """A bundled model draws, and the command line answers, with nothing else installed."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    # torch first and by its exact version: a looser requirement resolves to gigabytes of CUDA
    # libraries
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def printed(*command: str) -> str:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=tmp_path, env=clean
        ).stdout

    models = "['rte-micro', 'rte-nopos-micro', 'rte-trios-micro', 't5-micro']"
    assert printed(str(python), "-c", DRAW).strip() == f"{models} (1, 3, 128, 128)"
    assert "rte-micro" in printed(str(tmp_path / "venv/bin/dit-lens"), "models")
