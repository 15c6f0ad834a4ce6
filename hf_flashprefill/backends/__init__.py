"""Implementations of the operator's stages: packages whose functions are those of ``interface.Backend``."""
