"""Merging in weight space: several parts trained apart become one of the same shape."""
