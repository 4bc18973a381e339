"""Results on disk: see `hooked_models.store`, whose names these are."""

from __future__ import annotations

from hooked_models.store import (
    Index,
    Store,
    digest,
    disk_errors,
    fingerprint,
    refuse_other_settings,
    replace_folder,
    write_json,
    write_whole,
)

__all__ = [
    "Index",
    "Store",
    "digest",
    "disk_errors",
    "fingerprint",
    "refuse_other_settings",
    "replace_folder",
    "write_json",
    "write_whole",
]
