"""Text encoders as hooked models: T5, random token embeddings, and a planted fusion of tokens."""
