"""Runs repeated with hooks on copies of their rows, and gradients through them."""
