"""potluck: train language models together."""

__version__ = "0.1.0"
