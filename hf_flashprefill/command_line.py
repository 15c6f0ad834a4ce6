"""What the package's own commands have in common."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A mistake ends in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def unwritable_reason(path: Path, suffix: str = "") -> str | None:
    """Why no file of this name can be written, in folders that may be missing yet; None if one can. Leaves nothing behind.

    Args:
        path: The file.
        suffix: Of files that will lie beside it, whose names may be too long.
    """
    try:
        if path.exists():
            return "it is a folder" if path.is_dir() else None if os.access(path, os.W_OK) else "it may not be written"
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            return f"{folder} is no folder"
        tempfile.NamedTemporaryFile(dir=folder, prefix=f"{path.name}.", suffix=suffix).close()
    except OSError as error:
        return error.strerror
    return None
