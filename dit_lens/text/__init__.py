"""Words in prompts, and the vectors that a text encoder gives them."""
