"""Pre-training of a small T5 encoder on captions of scenes."""
