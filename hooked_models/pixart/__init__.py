"""PixArt's transformer as a hooked model: the definition, and nothing else."""
