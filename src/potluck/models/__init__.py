"""Causal language models through `transformers`, and one flat view of their parameters."""
