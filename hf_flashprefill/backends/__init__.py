"""Implementations of the operator's stages; each package offers the same functions, triton also ``obstacle``."""
