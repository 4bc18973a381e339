"""Resolve a model's name to a folder: bundled, local, or the hub's at one commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..store import Index
from ..store.folder import LOCK

ZOO = Path(__file__).parents[1] / "zoo"
NOT_IN_THE_WHEEL = ("-nano", "-mini")
"""Sizes of bundled models that only a checkout of the repository has (pyproject.toml)."""
WITHOUT_WEIGHTS = ("*.json", "tokenizer/*", "scheduler/*")


@dataclass(frozen=True)
class Source:
    """Origin of a loaded model."""

    name: str
    """As given to `from_pretrained`."""
    folder: Path
    commit: str | None = None
    """Commit of a hub model, for `from_pretrained(name, revision=commit)`."""

    @property
    def lasting_name(self) -> str:
        """A name that means the same in every process.

        A hub id with a commit, a bundled name, or an absolute path.
        """
        return (
            self.name
            if self.commit is not None or self.name in list_models()
            else str(self.folder.resolve())
        )


def list_models() -> list[str]:
    """List the names of the bundled models.

    Example:
        >>> "rte-micro" in list_models()
        True
    """
    return sorted(
        folder.name for folder in ZOO.iterdir() if (folder / "model_index.json").is_file()
    )


def resolve(name: str | Path) -> str:
    """Find the folder or hub id for diffusers to open; in a training run's folder, its pipeline.

    Raises:
        FileNotFoundError: `name` is neither a bundled model, nor a pipeline folder or training run,
            nor "owner/model".
        OSError: a file of a training run's pipeline was damaged since it was written.
    """
    text = str(name)
    if text in list_models():
        return str(ZOO / text)
    if Path(text).is_dir():
        places = [
            place
            for place in (Path(text), Path(text, "pipeline"))
            if (place / "model_index.json").is_file()
        ]
        if not places:
            raise FileNotFoundError(f"{text} is not a pipeline folder: it has no model_index.json.")
        check_listed(places[0])
        return str(places[0])
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    near = get_close_matches(text, list_models(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if text.endswith(NOT_IN_THE_WHEEL):
        hint = (
            " The wheel carries the micro models only; others come with a checkout of the "
            f"repository.{hint}"
        )
    raise FileNotFoundError(
        f"There is no model {text!r}: give a bundled name ({', '.join(list_models()) or 'none'}), "
        f"a pipeline folder, or a hub id such as 'PixArt-alpha/PixArt-Sigma-XL-2-512-MS'.{hint}"
    )


def check_listed(folder: Path) -> None:
    """Compare a pipeline folder of a training run with the run's index, which lists its files.

    Raises:
        OSError: a file is damaged or missing.
    """
    run = folder.absolute().parent
    if not (run / LOCK).is_file():  # which every store has
        return
    index = Index.read(
        run, "save the pipeline again, by going on with the run, or take it from a copy"
    )
    if index is not None and folder.name in index.files:
        index.path(folder.name)


def recorded_source(name: object, commit: object) -> str | None:
    """The model of a folder of results, if its name means the same everywhere.

    In every process and folder.

    Args:
        name: `Source.lasting_name`, as read from a file that anybody may have written.
        commit: `Source.commit`, from the same file.

    Example:
        >>> recorded_source("rte-nano", None), recorded_source("../model", None)
        ('rte-nano', None)
    """
    if not isinstance(name, str):
        return None
    lasting = (
        name in list_models()
        or Path(name).is_absolute()
        or (isinstance(commit, str) and name.count("/") == 1)
    )
    return name if lasting else None


def fetch(
    name: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
    **hub: Any,
) -> Source:
    """Get a model's folder.

    From the hub, download its files at one commit unless the cache has them.

    Args:
        name: bundled name, local folder, or hub id.
        revision: a commit, tag or branch of a hub model.
        variant: "fp16" for files such as `model.fp16.safetensors`.
        weights: False for configurations, tokenizer and scheduler alone.
        hub: `token`, `cache_dir`, `local_files_only`, as in diffusers.

    Raises:
        FileNotFoundError: no such model or revision, or it is neither in the cache nor can the hub
            be reached.
        PermissionError: the model is gated, and its licence has not been accepted with the token in
            use.
        ValueError: a revision was given with a folder.
    """
    place = resolve(name)
    if Path(place).is_dir():
        if revision is not None:
            raise ValueError(
                f"{name} is a folder, which has no revisions: leave out revision={revision!r}."
            )
        return Source(str(name), Path(place))
    # here, not above: names and folders need neither library
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if weights:
            folder = DiffusionPipeline.download(
                place, revision=revision, variant=variant, use_safetensors=True, **hub
            )
        else:
            folder = snapshot_download(
                place, revision=revision, allow_patterns=list(WITHOUT_WEIGHTS), **hub
            )
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _friendly(error, place, revision) from error
    snapshot = Path(folder)
    if not (snapshot / "model_index.json").is_file():
        raise FileNotFoundError(f"{place} is not a pipeline: it has no model_index.json.")
    return Source(place, snapshot, snapshot.name if snapshot.parent.name == "snapshots" else None)


def _friendly(error: BaseException, place: str, revision: str | None) -> Exception:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))
    page = f"https://huggingface.co/{place}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return PermissionError(
            f"{place} is gated: accept its terms at {page} and log in with `hf auth login`."
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return FileNotFoundError(
            f"{place} has no revision {revision!r}: its commits are listed at {page}/commits/main."
        )
    if any(isinstance(cause, (RepositoryNotFoundError, HFValidationError)) for cause in causes):
        return FileNotFoundError(
            f"The hub has no model {place!r} (or it is private: log in with `hf auth login`)."
        )
    at = "" if revision is None else f" at revision {revision!r}"
    pin = "" if revision is None else f" --revision {revision}"
    return FileNotFoundError(
        f"{place}{at} is not complete in the local cache, and the hub cannot be reached: run `hf "
        f"download {place}{pin}` where there is a connection, or give a folder."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
