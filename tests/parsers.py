"""The parsers of all commands that start with ``python -m``."""

import argparse
import importlib
import pkgutil

import eval as harnesses


def parser_of(command: str) -> argparse.ArgumentParser | None:
    """That of a module, or of the command that a package is; None if it is neither."""
    module = importlib.import_module(command)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command}.__main__")
    return module.build_parser() if hasattr(module, "build_parser") else None


def all_commands() -> list[str]:
    found = [f"eval.{module.name}" for module in pkgutil.iter_modules(harnesses.__path__)]
    return [name for name in [*found, "hf_flashprefill.crossover", "hf_flashprefill.support"] if parser_of(name)]
