"""What several modules ask of their arguments."""

from __future__ import annotations

from typing import Any


def is_number(value: Any, kind: type | tuple[type, ...] = int) -> bool:
    """Whether ``value`` is of ``kind`` and no bool, which Python counts among its integers."""
    return isinstance(value, kind) and not isinstance(value, bool)
