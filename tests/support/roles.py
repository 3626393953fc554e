"""Database roles of a test, with addresses under which they log in."""

from __future__ import annotations

from contextlib import asynccontextmanager
from urllib.parse import quote, urlsplit

import asyncpg


def address_of(url, role, password="p"):
    """The database's address for another role."""
    parts = urlsplit(url)
    _, at, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{quote(role)}:{password}{at or '@'}{place}").geturl()


@asynccontextmanager
async def made_roles(url, *names):
    """Roles that may log in and no more; gone afterwards with all that they were granted here."""
    owner = await asyncpg.connect(url)
    try:
        for name in names:
            await owner.execute(f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'p'")
        yield [address_of(url, name) for name in names]
    finally:
        for name in names:
            await owner.execute(f'DROP OWNED BY "{name}"')
            await owner.execute(f'DROP ROLE "{name}"')
        await owner.close()
