"""The ACL that the deployment page lists, as the tests use it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/howto/deployment.md"


def listed(user: str = "app") -> list[str]:
    """The page's rules for a user: `app` on a server, `member` on a cluster, `asker` on sentinels."""
    pattern = rf"^    ACL SETUSER {user} on >password (.*(?:\n      .*)+)"
    found = re.search(pattern, PAGE.read_text(), re.MULTILINE)
    assert found, f"the page lists no user {user}"
    return found[1].split()


def commands() -> set[str]:
    """The commands among them, as the server writes them."""
    return {rule[1:] for rule in listed() if rule.startswith("+")}


def rules(namespace: str, without: str = "", user: str = "app") -> list[str]:
    """The same for another namespace, one rule left out."""
    assert not without or without in listed(user)
    return [rule.replace("{dotmac:", f"{{{namespace}:") for rule in listed(user) if rule != without]
