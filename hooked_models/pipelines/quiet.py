"""Loading without progress bars and warnings about components replaced on purpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Switch off progress bars and type warnings for the time of a load.

    Those of diffusers and transformers. diffusers warns where a component is of another class than
    the pipeline's signature names ("Expected types for vae …"), as a `PatchCodec` is;
    `inspect_folder` has checked the classes already. Downloads keep their bars.
    """
    bars = [
        lib for lib in (diffusers_logging, transformers_logging) if lib.is_progress_bar_enabled()
    ]
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    for lib in bars:
        lib.disable_progress_bar()
    logger.addFilter(_is_no_type_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_type_warning)
        for lib in bars:
            lib.enable_progress_bar()


def _is_no_type_warning(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Expected types for")
