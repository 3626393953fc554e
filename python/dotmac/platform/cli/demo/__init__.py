"""`dotmac demo`: the platform's main job on real servers, every claim checked. Names are loaded on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dotmac.platform.cli.demo.command import demo

__all__ = ["demo"]


def __getattr__(name: str) -> Any:
    if name == "demo":
        from dotmac.platform.cli.demo.command import demo

        return demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
