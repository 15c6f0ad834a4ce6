"""What the package's own commands have in common."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A mistake ends in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")
