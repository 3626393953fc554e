"""The fixtures that users get serve these tests as well; `support` has those of several rooms."""

from __future__ import annotations

pytest_plugins = ["dotmac.platform.testing.plugin", "support.fixtures"]
