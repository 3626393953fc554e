"""Runs statements with the parameters of a report, over one snapshot of the log."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Statements"]

_TYPES = {
    "start": "timestamptz",
    "end": "timestamptz",
    "tenant": "text",
    "zone": "text",
    "seed": "text",
    "size": "bigint",
    "subject": "text",
    "threshold": "float8",
    "log": "text",
    "first": "bigint",
    "last": "bigint",
}
_NAME = re.compile(rf"\$({'|'.join(_TYPES)})\b")


class Statements:
    """Statements that mention parameters by name.

    Args:
        connection: in a read-only transaction of one snapshot.
        values: by name, all of them.
    """

    def __init__(self, connection: Connection, values: Mapping[str, Any]) -> None:
        self._connection, self._values = connection, values

    def with_values(self, **more: Any) -> Statements:
        """The same, with further values."""
        return Statements(self._connection, {**self._values, **more})

    async def rows(self, sql: str) -> list[asyncpg.Record]:
        """All rows."""
        sql, used = self._bound(sql)
        return list(await self._connection.fetch(sql, *used))

    async def stream(self, sql: str) -> AsyncIterator[asyncpg.Record]:
        """The rows one by one, in constant memory."""
        sql, used = self._bound(sql)
        async for record in self._connection.cursor(sql, *used, prefetch=5_000):
            yield record

    def _bound(self, sql: str) -> tuple[str, list[Any]]:
        """PostgreSQL wants exactly the parameters that a statement mentions, by number."""
        names: list[str] = []

        def number(found: re.Match[str]) -> str:
            name = found[1]
            if name not in names:
                names.append(name)
            return f"${names.index(name) + 1}::{_TYPES[name]}"

        return _NAME.sub(number, sql), [self._values[name] for name in names]
