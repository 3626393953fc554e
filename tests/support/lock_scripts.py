"""The scripts of the locks on a real server, called one by one, under a clock that the test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis

SCRIPTS = Path(__file__).parents[2] / "rust" / "engine" / "src" / "scripts"
KEYS = ("s", "h", "q", "w", "m", "x")
CLOCK = "the clock"
# The others get the prefix of the inbox channels behind their arguments.
WITHOUT_INBOX = {"close", "list", "waits", "mine"}


def _text(*names: str) -> str:
    text = "".join((SCRIPTS / f"{name}.lua").read_text() for name in names)
    return text.replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'u')")


def _texts() -> dict[str, str]:
    plain = ("cancel", "extend", "heartbeat", "offer", "assert", "mine", "force")
    fast = _text("acquire_fast")
    # Up to where it looks whether it can be quick.
    known = fast[: fast.index("local h = ")] + "local h = redis.call('HGET', KEYS[2], ARGV[1])\n"
    return {name: _text("common", name) for name in plain} | {
        "close": _text("close"),
        "acquire": _text("acquire_fast", "common", "cycles", "acquire"),
        "acquire slowly": known + _text("common", "cycles", "acquire"),
        "release": _text("release_fast", "common", "release"),
    }


class Scripts:
    """One partition.

    Args:
        url: the server's address; it is a test's own, for its clock is a key.
    """

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)
        self.keys = [f"{{scripts:0}}:{key}" for key in KEYS]
        self.inbox = "{scripts:0}:inbox:"
        self.process = "A"
        self.now = 1_800_000_000_000  # milliseconds
        self._scripts = {name: self.client.register_script(text) for name, text in _texts().items()}
        self.tick(0)

    def tick(self, milliseconds: int) -> None:
        """Time passes."""
        self.now += milliseconds
        self.client.hset(CLOCK, mapping={"s": self.now // 1000, "u": self.now % 1000 * 1000 + 7})

    def key(self, letter: str) -> str:
        """The name of a key, as common.lua abbreviates it."""
        return self.keys[KEYS.index(letter)]

    def used_before(self) -> None:
        """As if locks had been used there, so that nobody is kept waiting."""
        self.client.hset(self.key("m"), "e", "1")

    def lose_data(self) -> None:
        self.client.delete(*self.keys)

    def call(self, name: str, *arguments: Any) -> Any:
        """What a script replies."""
        inbox = () if name in WITHOUT_INBOX else (self.inbox,)
        return self._scripts[name](keys=self.keys, args=[*arguments, *inbox])

    def heartbeat(
        self,
        sid: str,
        mode: str = "h",
        *,
        longest: int = 10_000,
        gen: int = 1,
        claims: tuple[tuple[str, int], ...] = (),
        acknowledge: str = "",
    ) -> Any:
        opens = mode != "h"
        who, process = ("{}", self.process) if opens else ("", "")
        claimed = [cell for claim in claims for cell in claim]
        return self.call("heartbeat", sid, gen, 5, longest, mode, who, acknowledge, process, *claimed)

    def acquire(
        self,
        name: str,
        sid: str,
        number: int,
        *,
        owner: str = "",
        timeout: int = 10_000,
        unusual: str = "",
        wait: str = "w",
        waiting: str = "",
        gen: int = 1,
        script: str = "acquire",
    ) -> Any:
        request = f"{sid}:{number}"
        return self.call(
            script, name, sid, gen, owner or request, timeout, request, 1, unusual, wait, waiting, "here"
        )

    def release(self, name: str, fence: int) -> Any:
        return self.call("release", name, fence)

    def holders(self) -> dict[bytes, list[bytes]]:
        """The cells of each holder's record, its flag apart, by field."""
        records = self.client.hgetall(self.key("h"))
        return {
            field: [record[:1], *record[1:].split(b"\0")]
            for field, record in records.items()
            if record[:1] not in b"*&"
        }

    def left(self) -> dict[str, Any]:
        """What there is beside the counters."""
        found: dict[str, Any] = {}
        for letter in "shqwx":
            key = self.key(letter)
            kind = self.client.type(key)
            if kind == b"hash":
                found[letter] = self.client.hgetall(key)
            elif kind == b"zset":
                found[letter] = self.client.zrange(key, 0, -1, withscores=True)
        return found
