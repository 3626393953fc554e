"""The fixtures that users get serve these tests as well."""

from __future__ import annotations

pytest_plugins = ["dotmac.platform.testing.plugin"]
