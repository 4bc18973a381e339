"""The documentation builds without a warning, and in a browser every internal link of every page
leads somewhere.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest

ROOT = Path(__file__).parents[1]
LINKS = """
return [[...document.querySelectorAll('a[href]')].map((link) => link.href),
        [...document.querySelectorAll('[id]')].map((node) => node.id),
        [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src)]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-b",
        "html",
        "-W",
        "--keep-going",
        str(ROOT / "docs"),
        str(folder),
    ]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_every_internal_link_leads_somewhere(site: Path, browser: Any) -> None:
    """Pages of the site, the anchors in them, and pictures; nothing is fetched from elsewhere while
    a page opens.
    """
    pages: dict[Path, tuple[list[str], set[str]]] = {}
    waiting = [site / "index.html"]
    missing = []
    while waiting:
        page = waiting.pop()
        if page in pages:
            continue
        browser.get(page.as_uri())
        links, ids, broken = browser.execute_script(LINKS)
        pages[page] = [link for link in links if link.startswith("file:")], set(ids)
        missing += [(page.name, picture) for picture in broken]
        for link in pages[page][0]:
            target = Path(unquote(urlparse(link).path))
            if not target.is_file():
                missing.append((page.name, link))
            elif target.suffix == ".html":
                waiting.append(target)
    for page, (links, _) in pages.items():
        for link in links:
            address, anchor = urldefrag(link)
            target = Path(unquote(urlparse(address).path))
            if anchor and target in pages and unquote(anchor) not in pages[target][1]:
                missing.append((page.name, link))
    assert not missing, "\n".join(f"{page}: {link}" for page, link in missing)
    assert len(pages) > 30
