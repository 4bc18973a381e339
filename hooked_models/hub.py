"""Where a model's name leads: a bundled folder, a local one, or the hub."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

ZOO = Path(__file__).parent / "zoo"


def list_models() -> list[str]:
    """Names of the bundled models."""
    return sorted(folder.name for folder in ZOO.iterdir() if (folder / "model_index.json").is_file())


def resolve(name: str | Path) -> str:
    """The folder or hub id that diffusers should open.

    Raises:
        FileNotFoundError: `name` is neither a bundled model, nor a pipeline folder, nor of the form "owner/model".
    """
    text = str(name)
    if text in list_models():
        return str(ZOO / text)
    if Path(text).is_dir():
        if not Path(text, "model_index.json").is_file():
            raise FileNotFoundError(f"{text} is not a pipeline folder: it has no model_index.json.")
        return text
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    near = get_close_matches(text, list_models(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"There is no model {text!r}: give a bundled name ({', '.join(list_models()) or 'none'}), "
        f"a pipeline folder, or a hub id such as 'PixArt-alpha/PixArt-Sigma-XL-2-512-MS'.{hint}"
    )
