"""Implementations of pool, select and attend; each package offers the same three functions."""
