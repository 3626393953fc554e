"""Packages that only some exports need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dotmac.platform.errors import MissingExtra

__all__ = ["extra"]

_EXTRA = "export"


def extra(module: str, what: str) -> Any:
    """A module of a package that may be missing.

    Args:
        module: its name.
        what: the format, compression or place that needs it.
    Raises: MissingExtra: says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{what} needs the package {error.name!r}: pip install 'dotmac-platform[{_EXTRA}]'"
        ) from error
