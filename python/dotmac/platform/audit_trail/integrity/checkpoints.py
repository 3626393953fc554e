"""Signing checkpoints of the logs, and handing them to the places outside the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dotmac.platform import _native
from dotmac.platform.audit_trail.integrity.log import trail_name
from dotmac.platform.audit_trail.integrity.notes import Checkpoint, log_name, sign_text
from dotmac.platform.errors import AnchorUnavailable, ConfigurationError, LogInconsistent

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta

    import asyncpg

    from dotmac.platform.audit_trail.integrity.anchors import Anchor
    from dotmac.platform.audit_trail.integrity.keys import SigningKey

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["Sender", "Signed", "Signer"]

_BLOCK = 50_000
_REMEMBERED = 10_000
# The logs that grew, or whose newest checkpoint is another key's, and that were not signed a moment ago
# (or in the future, as somebody says who wants none to be signed).
_DUE = """
    SELECT l.tenant_id, c.size, c.root, c.key
    FROM (SELECT tenant_id, max(position) + 1 AS size FROM audit_log GROUP BY tenant_id) AS l
    LEFT JOIN LATERAL (
        SELECT size, root, key, signed_at FROM audit_checkpoints c WHERE c.tenant_id = l.tenant_id
        ORDER BY size DESC, signed_at DESC LIMIT 1
    ) AS c ON true
    WHERE (c.size IS NULL OR c.size <> l.size OR c.key <> $2)
      AND (c.signed_at IS NULL OR c.signed_at <= now() - $1::interval OR c.signed_at > now())
    ORDER BY 1
"""
_STORE = """
    INSERT INTO audit_checkpoints (tenant_id, size, root, key, note) VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT DO NOTHING
"""
# The newest of each log, one look into the primary key's index each.
_NEWEST = """
    WITH RECURSIVE newest AS (
        (SELECT tenant_id, size FROM audit_checkpoints ORDER BY tenant_id DESC, size DESC LIMIT 1)
        UNION ALL
        SELECT more.* FROM newest, LATERAL (
            SELECT c.tenant_id, c.size FROM audit_checkpoints c WHERE c.tenant_id < newest.tenant_id
            ORDER BY c.tenant_id DESC, c.size DESC LIMIT 1) AS more
    )
    SELECT tenant_id, size, EXISTS (SELECT FROM audit_anchors a WHERE a.place = $1
        AND a.tenant_id = newest.tenant_id AND a.size = newest.size) AS told
    FROM newest ORDER BY 1
"""
_NOTE = """
    SELECT root, note FROM audit_checkpoints WHERE tenant_id = $1 AND size = $2
    ORDER BY signed_at DESC LIMIT 1
"""


class Signed(NamedTuple):
    """A checkpoint that was signed, and its note."""

    tenant_id: str
    checkpoint: Checkpoint
    note: str


class Signer:
    """Signs what follows from what was signed before, and nothing else.

    It remembers the logs that it signed, so that a log that somebody replaced under it is noticed, and only
    what is new is read. A long log, which takes more than one pass to read, is read on where a pass ended.
    """

    def __init__(self, key: SigningKey, origin: str | None) -> None:
        self.key = key
        self._wanted = origin
        self._trees: dict[str, _native.MerkleTree] = {}
        # Logs that a pass which was broken off had begun to read, and what they were held against.
        self._begun: dict[str, tuple[int, bytes | None, _native.MerkleTree]] = {}

    async def sign_due(
        self, connection: Connection, interval: timedelta, *, durably: bool
    ) -> tuple[list[Signed], list[LogInconsistent]]:
        """Sign every log that grew and was not signed within `interval`.

        Returns: the checkpoints, and an error for each log that does not go on from its last one.
        Raises: ConfigurationError: the trail has another name than the one asked for.
        """
        trail = await trail_name(connection, self._wanted)
        if self._wanted is not None and trail != self._wanted:
            raise ConfigurationError(
                f"AUDIT_TRAIL_ORIGIN: this trail's checkpoints are signed as {trail!r} and can't become "
                f"those of {self._wanted!r}",
                [("AUDIT_TRAIL_ORIGIN", self._wanted, f"give {trail!r}, or leave it out")],
            )
        signed: list[Signed] = []
        broken: list[LogInconsistent] = []
        for row in await connection.fetch(_DUE, interval, self.key.public_key):
            tenant = row["tenant_id"]
            try:
                tree = await self._grown(connection, tenant, row["size"] or 0, row["root"])
            except LogInconsistent as error:
                self._begun.pop(tenant, None)
                broken.append(error)
                continue
            checkpoint = Checkpoint(log_name(trail, tenant), len(tree), tree.root())
            signature = await self.key.sign(checkpoint.text.encode())
            note = sign_text(checkpoint.text, checkpoint.origin, self.key.public_key, signature)
            async with connection.transaction():
                if durably:
                    await connection.execute("SET LOCAL synchronous_commit = on")
                await connection.execute(
                    _STORE, tenant, checkpoint.size, checkpoint.root, self.key.public_key, note
                )
            self._remember(tenant, tree)
            self._begun.pop(tenant, None)
            signed.append(Signed(tenant, checkpoint, note))
        return signed, broken

    def _remember(self, tenant: str, tree: _native.MerkleTree) -> None:
        self._trees.pop(tenant, None)
        self._trees[tenant] = tree
        if len(self._trees) > _REMEMBERED:
            del self._trees[next(iter(self._trees))]

    async def _grown(
        self, connection: Connection, tenant: str, size: int, root: bytes | None
    ) -> _native.MerkleTree:
        """The log's tree as it is now, after it was held against the last checkpoint (of `size`)."""
        known = self._trees.get(tenant)
        tree = known.copy() if known is not None else _native.MerkleTree()
        if size < len(tree):
            raise LogInconsistent(
                f"{_named(tenant)} was signed here at size {len(tree)}; the newest checkpoint in the "
                f"database has size {size}: it was rolled back, and nothing is signed"
            )
        begun = self._begun.pop(tenant, None)
        if begun is not None and begun[:2] == (size, root) and len(begun[2]) > len(tree):
            tree = begun[2]
        while True:
            if len(tree) == size and root is not None and tree.root() != root:
                raise LogInconsistent(
                    f"{_named(tenant)}: its first {size} entries are not those that were signed: they were "
                    "changed, and nothing is signed"
                )
            # Up to the last checkpoint first, to compare there, then on to the end.
            limit = min(_BLOCK, size - len(tree)) if len(tree) < size else _BLOCK
            rows = await connection.fetch(
                "SELECT position, leaf FROM audit_log WHERE tenant_id = $1 AND position >= $2 "
                "ORDER BY position LIMIT $3",
                tenant,
                len(tree),
                limit,
            )
            if any(row["position"] != place for place, row in enumerate(rows, len(tree))):
                raise LogInconsistent(f"{_named(tenant)}: an entry is missing, and nothing is signed")
            tree.extend(b"".join(row["leaf"] for row in rows))
            self._begun[tenant] = (size, root, tree)
            if len(rows) < limit:
                break
        if len(tree) < size:
            raise LogInconsistent(
                f"{_named(tenant)} has {len(tree)} entries, and was signed when it had {size}: it was rolled "
                "back, and nothing is signed"
            )
        return tree


def _named(tenant: str) -> str:
    return f"the log of tenant {tenant!r}" if tenant else "the log of events without a tenant"


class Sender:
    """Hands checkpoints to places outside the database.

    What `audit_anchors` says is believed only of checkpoints that others signed: what was signed here is
    sent from here, and after a start the newest of every log, once more.
    """

    def __init__(self, anchors: Iterable[Anchor]) -> None:
        self._anchors = tuple(anchors)
        self._sent: dict[tuple[str, str], int] = {}
        self._signed: dict[str, Signed] = {}

    async def send(self, connection: Connection, signed: Iterable[Signed]) -> list[AnchorUnavailable]:
        """Hand the newest checkpoint of every log to each place that does not have it.

        Args: signed: what was signed here since the last call.
        Returns: an error for each place that failed; it gets the checkpoints at the next call.
        """
        if not self._anchors:
            return []
        self._signed.update((one.tenant_id, one) for one in signed)
        failed: list[AnchorUnavailable] = []
        for anchor in self._anchors:
            try:
                await self._send_to(connection, anchor)
            except AnchorUnavailable as error:
                failed.append(error)
        return failed

    async def _send_to(self, connection: Connection, anchor: Anchor) -> None:
        known = {row["tenant_id"]: row for row in await connection.fetch(_NEWEST, anchor.place)}
        for tenant in sorted({*known, *self._signed}):
            own, row = self._signed.get(tenant), known.get(tenant)
            sent = self._sent.get((anchor.place, tenant))
            if (
                own is not None
                and sent != own.checkpoint.size
                and (row is None or row["size"] <= own.checkpoint.size)
            ):
                checkpoint, note = own.checkpoint, own.note
            elif row is None or sent == row["size"] or (sent is not None and row["told"]):
                continue
            else:
                found = await connection.fetchrow(_NOTE, tenant, row["size"])
                if found is None:
                    continue
                note = found["note"]
                checkpoint = Checkpoint(note.partition("\n")[0], row["size"], found["root"])
            await anchor.put(checkpoint, note)
            self._sent[anchor.place, tenant] = checkpoint.size
            await connection.execute(
                "INSERT INTO audit_anchors (place, tenant_id, size) VALUES ($1, $2, $3) "
                "ON CONFLICT DO NOTHING",
                anchor.place,
                tenant,
                checkpoint.size,
            )
