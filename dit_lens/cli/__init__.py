"""The command line `dit-lens`: the library's own functions, and tables instead of objects."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import io
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import tyro

from . import commands, sweep
from .lab import lab
from .output import first_line, say

COMMANDS: dict[str, Callable[..., None]] = {
    "train": commands.train_command,
    "pretrain-text-encoder": commands.pretrain_command,
    "generate": commands.generate,
    "evaluate": commands.evaluate,
    "screen": commands.screen,
    "synopsis": commands.synopsis_command,
    "sweep": sweep.sweep_command,
    "lab": lab,
    "models": commands.models,
}


def main() -> None:
    """Run `dit-lens` on the arguments of the process."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        say(importlib.metadata.version("dit_lens"))
        return
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(COMMANDS)}."
        sys.exit(f"dit-lens: there is no command {arguments[0]!r}: {hint}")
    silenced = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(silenced)
            if "--quiet" in arguments
            else contextlib.nullcontext()
        ):
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="dit-lens",
                description="Interpret text-to-image diffusion transformers.",
                args=arguments,
            )
    except SystemExit:  # arguments that do not parse: the reason is on the error stream
        sys.stderr.write(silenced.getvalue())
        raise
    except Exception as error:
        if not _is_meant(error):
            raise
        sys.exit(f"dit-lens: {first_line(error)}")


def _is_meant(error: Exception) -> bool:
    """True for an error whose message is for the user: bad input, a file, memory, or our own."""
    if isinstance(error, (OSError, ValueError, ImportError, MemoryError)):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    here = Path(__file__).parents[1]
    return any(
        folder in Path(frame.filename).parents for folder in (here, here.with_name("hooked_models"))
    )
