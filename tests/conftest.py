"""Settings of the whole suite, and the models that many tests share.

Shared models are for reading: a test that changes weights builds its own. The packages are imported
inside of fixtures, because the import hook that checks types (`make test TYPES=1`) is installed
after this file is read.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import beartype  # noqa: F401  (before nnsight gives `object` a method that it cannot hash)
import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from dit_lens.planted import Kind, PlantedTruth
    from hooked_models import HookedDiT, HookedTextToImage

# Workers share the cores, and threads of their own would only wait for one another; and a child
# that is forked has only one.
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
LONG = (Path(__file__).parent, Path(__file__).parent / "recipes")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--shard k/n`: every n-th test, from the k-th."""
    parser.addoption("--shard", default="1/1", help="k/n: every n-th test, from the k-th")


def pytest_configure(config: pytest.Config) -> None:
    """Let only the tests of a GPU see one, and start autograd without threads for it.

    With such threads a forked child cannot differentiate. In a CUDA build of torch they also start
    without a GPU if the first backward pass comes after torch.compile's imports.
    """
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.hookimpl(trylast=True)  # after deselection by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the shard; begin with pages and recipes, whose tests are the longest: at the
    end they would leave one worker alone.
    """
    items.sort(key=lambda item: item.path.parent not in LONG)
    part, of = map(int, config.getoption("--shard").split("/"))
    if not 1 <= part <= of:
        raise pytest.UsageError(f"--shard {part}/{of}: the parts are 1 to {of}.")
    config.hook.pytest_deselected(items=[one for i, one in enumerate(items) if i % of != part - 1])
    items[:] = items[part - 1 :: of]


def pytest_collection_finish() -> None:
    """Leave the half million objects of the imports out of every later garbage collection, which
    take 0.3 s otherwise.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dit() -> HookedDiT:
    """A random PixArt denoiser in which every parameter matters."""
    from hooked_models import HookedDiT

    from .hooked_models.tiny import tiny_transformer

    return HookedDiT(tiny_transformer())


@pytest.fixture(scope="session")
def tiny_model() -> HookedTextToImage:
    """A random text-to-image model in which every parameter matters, 4 × 4 latents."""
    from hooked_models import HookedTextToImage

    from .hooked_models.pipelines import tiny_pipeline

    return HookedTextToImage.from_pipeline(tiny_pipeline())


@pytest.fixture(scope="session")
def trained_micro() -> HookedTextToImage:
    """The bundled rte-micro."""
    from hooked_models import HookedTextToImage

    return HookedTextToImage.from_pretrained("rte-micro")


@pytest.fixture(scope="session")
def trained_nano() -> HookedTextToImage:
    """The bundled rte-nano."""
    from hooked_models import HookedTextToImage

    return HookedTextToImage.from_pretrained("rte-nano")


@pytest.fixture(scope="session")
def planted_model() -> Callable[..., tuple[HookedTextToImage, PlantedTruth]]:
    """`planted_circuit(kind, seed)`, each built once."""
    from dit_lens.planted import planted_circuit

    @functools.lru_cache(maxsize=4)
    def build(kind: Kind, seed: int = 0) -> tuple[HookedTextToImage, PlantedTruth]:
        return planted_circuit(kind, seed)

    return build


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    folder = tempfile.mkdtemp()
    for flag in (
        *(
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
        ),
        *(
            "disable-component-update",
            "disable-sync",
            "disable-dev-shm-usage",
            f"user-data-dir={folder}",
        ),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()
    shutil.rmtree(folder, ignore_errors=True)
