"""Trails that a second, plain writer has written: sealed, signed, verified."""

from __future__ import annotations

from datetime import timedelta

from dotmac.platform.audit_trail.integrity import SigningKey
from dotmac.platform.audit_trail.integrity.checkpoints import Signer
from dotmac.platform.audit_trail.integrity.log import seal
from dotmac.platform.audit_trail.integrity.verify import verify
from support.segments import PlainWriter, event

KEY = SigningKey.generate()
AT_ONCE = timedelta(0)


async def sealed(connection, count=40, *, tenants=(None, "a", "b"), size=4, signer=None, keep_leaves=True):
    writer = await PlainWriter(connection, keep_leaves=keep_leaves).begin()
    for first in range(0, count, size):
        numbers = range(first, min(first + size, count))
        await writer.store([event(n, tenant=tenants[n % len(tenants)]) for n in numbers])
    await writer.end()
    await seal(connection, 0, durably=False)
    signer = signer or Signer(KEY, "example.com/audit")
    signed, broken = await signer.sign_due(connection, AT_ONCE, durably=False)
    assert not broken
    return signed


async def checked(connection, **more):
    return await verify(connection, keys=[KEY.public_key], **more)


def kinds(report):
    return {kind.value for kind, count in report.counts.items() if count}


async def free(connection, table, *columns):
    """Drop what keeps odd values out of a table, and null out of these columns."""
    await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    for (name,) in await connection.fetch(
        "SELECT conname FROM pg_constraint "
        "WHERE conrelid = $1::text::regclass AND contype IN ('c', 'p', 'u')",
        table,
    ):
        await connection.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')
    for column in columns:
        await connection.execute(f"ALTER TABLE {table} ALTER {column} DROP NOT NULL")
