"""Decoding together: several models, wherever they are, say one text, token by token, and no weights travel."""
