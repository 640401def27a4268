"""Packages that give out names without importing, beforehand, the files that these stand in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class Exporting(ModuleType):
    """A package each of whose names is imported when it is first asked for.

    So what is small starts quickly: a command that writes with a native model imports neither PyTorch nor training.
    """

    homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self.homes:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        value = getattr(importlib.import_module(self.homes[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a file that is called like what it gives out doesn't take that one's place."""
        if not (isinstance(value, ModuleType) and name in self.homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self.homes})


def exports(package: str, homes: Mapping[str, str]) -> None:
    """Make a package `Exporting`.

    Args:
        package: its dotted name.
        homes: the names that each of its files gives out, with spaces between them, by the name of the file.
    """
    module = sys.modules[package]
    module.__dict__["homes"] = {name: f"{package}.{file}" for file, names in homes.items() for name in names.split()}
    module.__class__ = Exporting


def import_all(package: str) -> None:
    """Import all that a package gives out, so that each type of record is known by its name."""
    for module in set(importlib.import_module(package).homes.values()):
        importlib.import_module(module)
