"""The least rights on a server, on Valkey and on Redis.

Promises: a user with exactly the rights that the deployment page lists can use locks and registry; no command
of the scripts or of the handshake is missing in that list, and none is listed in vain; where any one of them
is taken away, somebody is told which.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from dotmac.platform.errors import AuthenticationFailed, DotmacError, ServerRefused
from support import permissions
from support.everything import use_everything

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dotmac.platform.connection.embedded import EmbeddedValkey

SCRIPTS = Path(__file__).parents[2] / "rust/engine/src/scripts"
HANDSHAKE = {"select", "info", "script|load", "subscribe"}
CALLS = {"evalsha", "eval"}


@pytest.fixture
def admin(each_server: EmbeddedValkey) -> Iterator[redis.Redis]:
    with redis.Redis(port=each_server.port, decode_responses=True) as client:
        yield client


def user(admin: redis.Redis, namespace: str, without: str = "") -> str:
    """The address for a user of its own, with the rights that are listed, without one of them."""
    admin.execute_command("ACL", "SETUSER", namespace, "on", ">pw", *permissions.rules(namespace, without))
    port = admin.connection_pool.connection_kwargs["port"]
    return f"redis://{namespace}:pw@127.0.0.1:{port}"


async def test_the_rights_that_are_listed_are_enough(admin: redis.Redis, unique: str) -> None:
    assert await use_everything(user(admin, unique), unique) == []
    # Also where scripts have to be sent anew.
    admin.script_flush()
    assert await use_everything(user(admin, unique), unique) == []
    assert admin.acl_log() == []


async def test_none_of_them_is_listed_in_vain(admin: redis.Redis, unique: str) -> None:
    async def untold(number: int, rule: str) -> list[DotmacError] | None:
        """What went wrong where the rule is missing, if that did not come out."""
        namespace = f"{unique}-{number}"
        # Scripts are sent whole only where the server has forgotten them.
        meanwhile = admin.script_flush if rule == "+eval" else lambda: None
        wrong = await use_everything(user(admin, namespace, rule), namespace, meanwhile)
        name = {"~": "key", "&": "channel"}.get(rule[0], rule[1:].partition("|")[0])
        told = [error for error in wrong if isinstance(error, AuthenticationFailed | ServerRefused)]
        return None if any(name in str(error).lower() for error in told) else wrong

    needed = [rule for rule in permissions.listed() if rule[0] in "+~&"]
    assert len(needed) > 20
    results = await asyncio.gather(*(untold(number, rule) for number, rule in enumerate(needed)))
    assert {rule: wrong for rule, wrong in zip(needed, results, strict=True) if wrong is not None} == {}


def test_the_list_is_what_scripts_and_handshake_use() -> None:
    called = set()
    for file in SCRIPTS.glob("*.lua"):
        called |= set(re.findall(r"""redis\.p?call\(\s*['"](\w+)['"]""", file.read_text()))
    assert {name.lower() for name in called} | HANDSHAKE | CALLS == permissions.commands()
