"""A whole generation as a hooked model: runs, names by step and branch, caches, views."""
