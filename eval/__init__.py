"""Harnesses that compare a patched model with the unpatched one; run as ``python -m eval.NAME``."""
