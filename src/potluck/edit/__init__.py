"""Correcting what a model knows, and making it forget, alone and together."""
