"""`dotmac demo`: the platform's main job on real servers, every claim checked. Names are loaded on use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotmac.platform._lazy import lazily

if TYPE_CHECKING:
    from dotmac.platform.cli.demo.command import demo

__all__ = ["demo"]

__getattr__, __dir__ = lazily(__name__, {"demo": "command"})
