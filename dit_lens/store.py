"""Results on disk: see `hooked_models.store`, whose names these are."""

from __future__ import annotations

from hooked_models.lazy_imports import renamed
from hooked_models.store import (
    Index,
    Store,
    check_settings,
    digest,
    disk_errors,
    fingerprint,
    replace_folder,
    write_json,
    write_whole,
)

__getattr__ = renamed(__name__, {"refuse_other_settings": "hooked_models.store:check_settings"})

__all__ = [
    "Index",
    "Store",
    "check_settings",
    "digest",
    "disk_errors",
    "fingerprint",
    "replace_folder",
    "write_json",
    "write_whole",
]
