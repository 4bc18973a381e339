"""Results on disk, written whole or not at all.

Known by their settings, listed with digests, locked while they are written.

    with Store(out, {"model": model.digest(), "metric": fingerprint(metric)}) as store:
        values = store.load_or("values.npy", make, write, read)

A process that is killed, loses power, fills the disk or is started twice leaves the old file or the
new one; later damage is named in one sentence, with its remedy.
"""

from __future__ import annotations

from ..lazy_imports import renamed
from .folder import Index, Store, check_settings
from .hashing import digest, fingerprint
from .writing import disk_errors, replace_folder, write_json, write_whole

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
