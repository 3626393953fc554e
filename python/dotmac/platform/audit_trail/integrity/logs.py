"""The tenants' logs against their segments, their signed checkpoints and what was anchored elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dotmac.platform import _native
from dotmac.platform.audit_trail.ids import POSTGRES_EPOCH
from dotmac.platform.audit_trail.integrity.anchors import bounded_notes
from dotmac.platform.audit_trail.integrity.log import LEAF_COLUMNS, leaf_hash
from dotmac.platform.audit_trail.integrity.notes import Checkpoint, log_name, open_note, tenant_of
from dotmac.platform.audit_trail.integrity.report import Finding, FindingKind, in_reach, shown_time
from dotmac.platform.audit_trail.partitions import name_tenant
from dotmac.platform.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from datetime import datetime

    import asyncpg

    from dotmac.platform.audit_trail.integrity.anchors import Anchor
    from dotmac.platform.audit_trail.integrity.verify import Scope

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["check_anchors", "check_lateness", "check_logs", "check_unsealed"]

_PREFETCH = 2_000
_HASH_BYTES = 32
_BATCH = 500
# A writing transaction that began before another may commit after it; clocks of servers that took over from
# one another differ a little. What goes back further than this was set back.
_SLACK = timedelta(seconds=60)
# Null in a column that has none was put there: of what it says, the worst is taken.
_LONG_AGO = "({0} < $1 OR {0} > clock_timestamp() OR {0} IS NULL)"
_SLACK_MICROS = _SLACK // timedelta(microseconds=1)
_KINDS = {
    "malformed": FindingKind.CHECKPOINT_INVALID,
    "signature": FindingKind.CHECKPOINT_INVALID,
    "unknown_key": FindingKind.KEY_UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class _Claim:
    """That the log had this root at this size, and who says so."""

    tenant: str
    size: int
    root: bytes
    source: str


async def check_anchors(
    connection: Connection, scope: Scope, anchors: Iterable[Anchor]
) -> dict[str, list[Any]]:
    """Read back what was anchored.

    Returns: by tenant, the checkpoints that the database does not have, for `check_logs` to hold against
        the logs.
    """
    missing: dict[str, dict[tuple[int, bytes], _Claim]] = {}
    if scope.trail is None:
        return {}
    for anchor in anchors:
        batch: list[str] = []
        scope.reached.setdefault(anchor.place, {})
        async for note in bounded_notes(anchor, scope.trail):
            batch.append(note)
            if len(batch) == _BATCH:
                await _compare(connection, scope, anchor.place, batch, missing)
                batch.clear()
        await _compare(connection, scope, anchor.place, batch, missing)
    return {
        tenant: sorted(claims.values(), key=lambda claim: claim.size) for tenant, claims in missing.items()
    }


async def _compare(
    connection: Connection,
    scope: Scope,
    place: str,
    notes: list[str],
    missing: dict[str, dict[tuple[int, bytes], _Claim]],
) -> None:
    """Note which of these the database does not have, word for word; the others are checked there."""
    async with connection.transaction():
        if scope.one_tenant:
            await name_tenant(connection, scope.tenant or "")
        rows = await connection.fetch(
            "SELECT note FROM audit_checkpoints WHERE note = ANY($1::text[]) AND (tenant_id, size) IN "
            "(SELECT * FROM unnest($2::text[], $3::bigint[]))",
            *_keys(scope, notes),
        )
    stored = {row["note"] for row in rows}
    reached = scope.reached[place]
    for note, named, size in zip(*_keys(scope, notes), strict=True):
        scope.report.anchored += 1
        if note in stored:
            reached[named] = max(size, reached.get(named, 0))
            continue
        try:
            checkpoint, _ = open_note(note, scope.keys)
        except InvalidCheckpoint as error:
            if error.reason != "unknown_key" or scope.keys_given:
                scope.report.add(
                    Finding(kind=FindingKind.ANCHOR_UNREADABLE, text=f"{place}: {error}", found=note[:200])
                )
                continue
            checkpoint = Checkpoint.parse(note.rpartition("\n\n")[0] + "\n")
        tenant = tenant_of(scope.trail or "", checkpoint.origin)
        if tenant is None:
            continue
        reached[tenant] = max(checkpoint.size, reached.get(tenant, 0))
        if scope.tenant not in (None, tenant):
            continue
        claims = missing.setdefault(tenant, {})
        key = (checkpoint.size, checkpoint.root)
        if key in claims:
            continue
        claims[key] = _Claim(tenant, checkpoint.size, checkpoint.root, place)
        scope.report.add(
            Finding(
                kind=FindingKind.CHECKPOINT_MISSING,
                text=f"the checkpoint of {checkpoint.origin} at size {checkpoint.size}, anchored at {place}, "
                "is not in the database",
                tenant_id=tenant,
                place=checkpoint.size,
                expected=checkpoint.root.hex(),
                found="none",
            )
        )


def _keys(scope: Scope, notes: list[str]) -> tuple[list[str], list[str], list[int]]:
    tenants, sizes = [], []
    for note in notes:
        lines = note.split("\n", 2)
        tenants.append(tenant_of(scope.trail or "", lines[0]) or "")
        plain = len(lines) > 1 and lines[1].isascii() and lines[1].isdecimal() and len(lines[1]) < 19  # noqa: PLR2004 (digits of a bigint)
        sizes.append(int(lines[1]) if plain else -1)
    return notes, tenants, sizes


async def check_logs(connection: Connection, scope: Scope, anchored: dict[str, list[Any]]) -> None:
    """Walk every log in scope from its beginning, and every checkpoint beside it."""
    condition, values = ("l.tenant_id = $1", [scope.tenant]) if scope.tenant is not None else ("true", [])
    total = await connection.fetchval(f"SELECT count(*) FROM audit_log l WHERE {condition}", *values)  # noqa: S608 (ours)
    scope.tell("log", 0, total)
    claims = _claims(connection, scope, condition, values, anchored)
    waiting = await anext(claims, None)
    walk: _Walk | None = None
    cursor = await connection.cursor(
        "SELECT s.*, l.tenant_id AS log, l.position, l.segment, l.leaf, l.recorded_tx AS logged_tx, "  # noqa: S608 (as above)
        "timestamptz_send(coalesce(l.sealed_at, '-infinity')) AS sealed FROM audit_log l "
        f"LEFT JOIN (SELECT id, {LEAF_COLUMNS}, recorded_tx FROM audit_segments) s ON s.id = l.segment "
        f"WHERE {condition} ORDER BY l.tenant_id, l.position",
        *values,
    )
    # By blocks: a wait for each entry costs more than its hash.
    while block := await cursor.fetch(_PREFETCH):
        for entry in block:
            if walk is None or walk.tenant != entry["log"]:
                if walk is not None:
                    waiting = await _finish(walk, claims, waiting)
                # Logs of which only the checkpoints are left stand between the others.
                while waiting is not None and _before(waiting.tenant, entry["log"]):
                    waiting = await _finish(_Walk(scope, waiting.tenant), claims, waiting)
                walk = _Walk(scope, entry["log"])
            while waiting is not None and waiting.tenant == walk.tenant and waiting.size <= walk.size:
                walk.compare(waiting)
                waiting = await anext(claims, None)
            walk.take(entry)
        scope.report.log_entries += len(block)
        scope.tell("log", scope.report.log_entries, total)
    if walk is not None:
        waiting = await _finish(walk, claims, waiting)
    while waiting is not None:
        waiting = await _finish(_Walk(scope, waiting.tenant), claims, waiting)
    scope.tell("log", scope.report.log_entries, total)


def _time(sent: bytes) -> int:
    """Microseconds since 1970 of what `timestamptz_send` gives."""
    return int.from_bytes(sent, signed=True) + POSTGRES_EPOCH


def _before(one: str, other: str) -> bool:
    return one.encode() < other.encode()


async def _finish(walk: _Walk, claims: AsyncIterator[_Claim], waiting: _Claim | None) -> _Claim | None:
    """Compare what is left of the walk's tenant; returns the first claim of another."""
    while waiting is not None and waiting.tenant == walk.tenant:
        walk.compare(waiting)
        waiting = await anext(claims, None)
    return waiting


async def _claims(
    connection: Connection, scope: Scope, condition: str, values: list[Any], anchored: dict[str, list[Any]]
) -> AsyncIterator[_Claim]:
    """Checkpoints of the database whose signatures hold, and anchored ones, by tenant and size."""
    rows = connection.cursor(
        "SELECT tenant_id, size, root, key, note FROM audit_checkpoints l "  # noqa: S608 (conditions of ours)
        f"WHERE {condition} ORDER BY tenant_id, size, key",
        *values,
        prefetch=_PREFETCH,
    )
    others = sorted(
        (claim for claims in anchored.values() for claim in claims),
        key=lambda claim: (claim.tenant.encode(), claim.size),
        reverse=True,
    )
    async for row in rows:
        scope.report.checkpoints += 1
        claim = _checked(scope, row)
        if claim is None:
            continue
        place = (claim.tenant.encode(), claim.size)
        while others and (others[-1].tenant.encode(), others[-1].size) <= place:
            yield others.pop()
        yield claim
    while others:
        yield others.pop()


def _checked(scope: Scope, row: asyncpg.Record) -> _Claim | None:
    tenant, size = row["tenant_id"], row["size"]

    def bad(kind: FindingKind, text: str, expected: str = "", found: str = "") -> None:
        scope.report.add(
            Finding(kind=kind, text=text, tenant_id=tenant, place=size, expected=expected, found=found)
        )

    keys = scope.keys if scope.keys_given else (row["key"],)
    try:
        checkpoint, key = open_note(row["note"] or "", keys)
    except InvalidCheckpoint as error:
        wanted = ", ".join(known.hex() for known in keys)
        bad(
            _KINDS[error.reason],
            str(error),
            f"a signature by {wanted}",
            (row["note"] or "").rpartition("\n\n")[2],
        )
        return None
    says = (log_name(scope.trail or "", tenant), size, row["root"], row["key"])
    found = (checkpoint.origin, checkpoint.size, checkpoint.root, key)
    if says != found:
        bad(
            FindingKind.CHECKPOINT_INVALID,
            f"the row of the checkpoint at size {size} says something else than its note",
            _shown(found),
            _shown(says),
        )
    if checkpoint.origin != says[0]:
        return None
    return _Claim(tenant, checkpoint.size, checkpoint.root, "the database")


def _shown(values: tuple[Any, ...]) -> str:
    return " ".join(value.hex() if isinstance(value, bytes) else str(value) for value in values)


@dataclass(slots=True)
class _Walk:
    """One log, entry by entry."""

    scope: Scope
    tenant: str
    size: int = 0
    tree: _native.MerkleTree = field(default_factory=_native.MerkleTree)
    # Roots are told to differ once: all later ones differ, too.
    differs: bool = False
    latest: int | None = None
    sealed: int | None = None

    def take(self, entry: asyncpg.Record) -> None:
        """The next entry."""
        place, segment, leaf = entry["position"], entry["segment"], entry["leaf"] or b""
        if place is None:
            self.bad(
                FindingKind.LOG_GAP,
                f"the entry of segment {segment} has no place in the log",
                segment=segment,
                expected="a place",
                found="none",
            )
            return
        if place != self.size:
            self.bad(
                FindingKind.LOG_GAP,
                f"the log jumps from entry {self.size - 1} to {place}",
                segment=segment,
                place=self.size,
                expected=f"entry {self.size}",
                found=f"entry {place}",
            )
            self.size = place
        self.size += 1
        # One that is none must not shift those behind it.
        self.tree.extend(leaf if len(leaf) == _HASH_BYTES else bytes(_HASH_BYTES))
        if entry["id"] is None:
            self.bad(
                FindingKind.SEGMENT_MISSING,
                f"segment {segment}, entry {place} of the log, is gone",
                segment=segment,
                place=place,
                expected=leaf.hex(),
                found="none",
            )
            return
        # A column that is null was made so, by somebody who may drop constraints.
        parts = (entry["packed"], entry["tenant_id"], entry["root"], entry["link"])
        found = b"" if None in parts else leaf_hash(entry)
        if found != leaf:
            self.bad(
                FindingKind.SEGMENT_CHANGED,
                f"segment {segment}, entry {place} of the log, is not what was sealed",
                segment=segment,
                place=place,
                expected=leaf.hex(),
                found=found.hex(),
            )
        if entry["tenant_id"] != self.tenant:
            self.bad(
                FindingKind.TENANT_SWAPPED,
                f"segment {segment} stands in the log of another tenant",
                segment=segment,
                place=place,
                expected=entry["tenant_id"] or "",
                found=self.tenant,
            )
        if entry["logged_tx"] != entry["recorded_tx"]:
            self.bad(
                FindingKind.SEGMENT_CHANGED,
                f"segment {segment} and entry {place} of the log say different transactions",
                segment=segment,
                place=place,
                expected=str(entry["recorded_tx"]),
                found=str(entry["logged_tx"]),
            )
        if entry["packed"] is not None:
            self.look_at_clock(entry)

    def look_at_clock(self, entry: asyncpg.Record) -> None:
        """Entries are in the order of storing: their times go on."""
        recorded, sealed = _time(entry["packed"][-8:]), _time(entry["sealed"])
        if self.latest is not None and recorded < self.latest - _SLACK_MICROS:
            self.rewound(entry, "recorded", self.latest, recorded)
        if self.sealed is not None and sealed < self.sealed - _SLACK_MICROS:
            self.rewound(entry, "sealed", self.sealed, sealed)
        elif sealed < recorded - _SLACK_MICROS:
            self.rewound(entry, "sealed", recorded, sealed)
        self.latest = max(recorded, self.latest or recorded)
        self.sealed = max(sealed, self.sealed or sealed)

    def rewound(self, entry: asyncpg.Record, what: str, latest: int, found: int) -> None:
        """A time went back."""
        self.bad(
            FindingKind.CLOCK_REWOUND,
            f"segment {entry['segment']}, entry {entry['position']} of the log, says that it was {what} "
            "before what came earlier",
            segment=entry["segment"],
            place=entry["position"],
            expected=f"not before {shown_time(latest)}",
            found=shown_time(found),
        )

    def compare(self, claim: _Claim) -> None:
        """Hold a checkpoint against the log, which has come to its size or to its own end."""
        if claim.size > self.size:
            self.bad(
                FindingKind.LOG_TRUNCATED,
                f"the log has {self.size} entries; a checkpoint (from {claim.source}) covers {claim.size}: "
                "it was rolled back",
                place=self.size,
                expected=f"{claim.size} entries",
                found=f"{self.size} entries",
            )
            return
        root = self.tree.root()
        if root == claim.root and claim.size == len(self.tree):
            return
        if not self.differs:
            self.differs = True
            self.bad(
                FindingKind.CHECKPOINT_MISMATCH,
                f"the first {claim.size} entries of the log are not those of the checkpoint "
                f"(from {claim.source})",
                place=claim.size,
                expected=claim.root.hex(),
                found=root.hex(),
            )

    def bad(self, kind: FindingKind, text: str, **more: Any) -> None:
        """Report it."""
        self.scope.report.add(Finding(kind=kind, text=text, tenant_id=self.tenant, **more))


async def check_lateness(connection: Connection, scope: Scope) -> None:
    """Signing and anchoring that somebody has switched off: what they should have done a while ago.

    Times in the database are whoever's who can write there, so one that lies ahead is taken for an old one.
    """
    report = scope.report
    late = report.started_at - scope.overdue
    condition, values = ("l.tenant_id = $3", [scope.tenant]) if scope.tenant is not None else ("true", [])
    since = in_reach("min(l.sealed_at)", "since", always=True)
    rows = await connection.fetch(
        f"SELECT l.tenant_id, count(*) AS entries, {since} FROM audit_log l "  # noqa: S608 (ours)
        "LEFT JOIN (SELECT tenant_id, max(size) AS size FROM audit_checkpoints GROUP BY 1) c "
        f"USING (tenant_id) WHERE {condition} AND l.position >= coalesce(c.size, 0) "
        "AND (c.size IS NOT NULL OR $2) "
        f"AND {_LONG_AGO.format('l.sealed_at')} GROUP BY 1 ORDER BY 1",
        late,
        scope.keys_given,
        *values,
    )
    for row in rows:
        report.add(
            Finding(
                kind=FindingKind.CHECKPOINT_OVERDUE,
                text=f"{row['entries']} entries of the log since {row['since'].isoformat()} are under no "
                "checkpoint: is the sealer running, and signing?",
                tenant_id=row["tenant_id"],
                expected="a checkpoint",
                found="none",
            )
        )
    if scope.reached:
        await _check_anchoring(connection, scope, late)


async def _check_anchoring(connection: Connection, scope: Scope, late: datetime) -> None:
    condition, values = ("l.tenant_id = $2", [scope.tenant]) if scope.tenant is not None else ("true", [])
    newest = await connection.fetch(
        "SELECT l.tenant_id, max(l.size) AS size FROM audit_checkpoints l "  # noqa: S608 (ours)
        f"WHERE {condition} AND {_LONG_AGO.format('l.signed_at')} GROUP BY 1 ORDER BY 1",
        late,
        *values,
    )
    # Not every role may read which places were ever used.
    may = await connection.fetchval("SELECT has_table_privilege('audit_anchors', 'SELECT')")
    for place, reached in scope.reached.items():
        if may and not reached:
            named = await connection.fetchval("SELECT max(size) FROM audit_anchors WHERE place = $1", place)
            if named is not None:
                _behind(scope, place, None, f"up to size {named}, as audit_anchors says", "none")
                continue
        for row in newest:
            found = reached.get(row["tenant_id"], 0)
            if found < row["size"]:
                _behind(scope, place, row["tenant_id"], f"size {row['size']}", f"size {found}")


def _behind(scope: Scope, place: str, tenant: str | None, expected: str, found: str) -> None:
    scope.report.add(
        Finding(
            kind=FindingKind.ANCHOR_BEHIND,
            text=f"{place} does not give back the checkpoints that it should have ({expected}): it was "
            "emptied, or nothing was sent",
            tenant_id=tenant,
            expected=expected,
            found=found,
        )
    )


async def check_unsealed(connection: Connection, scope: Scope) -> None:
    """Segments that are in no log: of the last seconds, or because nothing seals, or taken out of it."""
    report = scope.report
    condition, values = ("s.tenant_id = $3", [scope.tenant]) if scope.tenant is not None else ("true", [])
    newest = await connection.fetchrow(
        f"SELECT {in_reach('max(sealed_at)', 'at')}, max(recorded_tx) AS tx FROM audit_log"  # noqa: S608 (ours)
    )
    # Sealing went past it: everything that was stored before is in a log.
    since = in_reach("min(s.recorded_at) OVER ()", "since", always=True)
    passed = "coalesce(s.recorded_tx < $1 AND s.recorded_at < $2, $1 IS NOT NULL)"
    rows = await connection.fetch(
        f"SELECT s.id, s.tenant_id, {passed} AS passed, "  # noqa: S608 (ours)
        f"count(*) OVER () AS total, {since} FROM audit_segments s "
        f"WHERE {condition} AND NOT EXISTS (SELECT FROM audit_log l WHERE l.segment = s.id) "
        f"ORDER BY passed DESC NULLS LAST, s.id LIMIT {report.max_findings}",
        newest["tx"] if newest else None,
        newest["at"] - _SLACK if newest and newest["at"] else None,
        *values,
    )
    report.unsealed = rows[0]["total"] if rows else 0
    for row in rows:
        if row["passed"]:
            report.add(
                Finding(
                    kind=FindingKind.SEGMENT_UNLOGGED,
                    text=f"segment {row['id']} is not in the log, although later ones are",
                    tenant_id=row["tenant_id"],
                    segment=row["id"],
                    expected="an entry of the log",
                    found="none",
                )
            )
    if rows and rows[0]["since"] < report.started_at - _SLACK:
        report.add(
            Finding(
                kind=FindingKind.NOT_SEALED,
                text=f"{report.unsealed} segments since {rows[0]['since'].isoformat()} are in no log: is the "
                "sealer running?",
                found=str(report.unsealed),
            )
        )
    if report.log_entries and not report.checkpoints:
        report.add(
            Finding(
                kind=FindingKind.NO_CHECKPOINT,
                text="there is no signed checkpoint: the logs can be made anew by whoever may write them",
            )
        )
