"""Building from parts: what participants trained apart, on a common base, made into one model."""
