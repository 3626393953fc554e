"""The tenants' logs against their segments, their signed checkpoints and what was anchored elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform import _native
from dotmac.platform.audit_trail.integrity.anchors import bounded_notes
from dotmac.platform.audit_trail.integrity.copying import copy_rows
from dotmac.platform.audit_trail.integrity.notes import Checkpoint, is_utf8, log_name, open_note, tenant_of
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
# So many checkpoints are held at a time.
_CLAIMS = 2_000
_LAST_PLACE = (1 << 63) - 1
_KEY_BYTES = 32
_BATCH = 500
# As in the check of the logs' clocks.
_SLACK = timedelta(seconds=60)
# Null in a column that has none was put there: of what it says, the worst is taken.
_LONG_AGO = "({0} < $1 OR {0} > clock_timestamp() OR {0} IS NULL)"
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
    strange = [note for note in notes if "\0" in note or not is_utf8(note)]
    for note in strange:
        text = f"{place}: no text that the database could have"
        scope.report.add(Finding(kind=FindingKind.ANCHOR_UNREADABLE, text=text, found=ascii(note)[:200]))
    notes = [note for note in notes if note not in strange] if strange else notes
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
    """Walk every log in scope from its beginning, and hold every checkpoint against it."""
    condition, values = ("l.tenant_id = $1", [scope.tenant]) if scope.tenant is not None else ("true", [])
    total = await connection.fetchval(f"SELECT count(*) FROM audit_log l WHERE {condition}", *values)  # noqa: S608 (ours)
    scope.tell("log", 0, total)
    await _name_placeless(connection, scope, condition, values)
    check = _native.LogCheck(scope.report.max_findings)
    claims = _claims(connection, scope, condition, values, anchored)
    after: tuple[str, int] | None = None
    more = True
    # In turns, as one connection has to do: some checkpoints, then the entries up to the last of them.
    while more:
        block = [claim async for claim in _some(claims)]
        for claim in block:
            check.expect(claim.tenant, claim.size, claim.root, claim.source)
        more = len(block) == _CLAIMS
        upto = _place(block[-1], after) if more else None
        query, given = _entries(condition, values, after, upto)
        scope.report.log_entries = await copy_rows(
            connection, query, check.feed, *given, told=lambda done: scope.tell("log", done, total)
        )
        check.end_copy(upto[0] if upto is not None else None)
        after = upto
    found, counts = check.finish()
    for one in found:
        scope.report.add(_log_finding(*one))
    for kind, count in counts.items():
        scope.report.counts[_LOG_KINDS[kind][0]] += max(0, count - scope.report.max_findings)
    scope.tell("log", scope.report.log_entries, total)


def _place(claim: _Claim, after: tuple[str, int] | None) -> tuple[str, int]:
    """Up to where the entries are to be read for a claim; never back, whatever somebody made of its size."""
    place = (claim.tenant, min(claim.size, _LAST_PLACE))
    return place if after is None else max(place, after)


def _entries(
    condition: str, values: list[Any], after: tuple[str, int] | None, upto: tuple[str, int] | None
) -> tuple[str, list[Any]]:
    """The query for the entries from one place on, up to another, and its values."""
    parts, values = [condition, "l.tenant_id IS NOT NULL", "l.position IS NOT NULL"], list(values)
    for place, compares in ((after, ">="), (upto, "<")):
        if place is not None:
            values.extend(place)
            parts.append(f"(l.tenant_id, l.position) {compares} (${len(values) - 1}, ${len(values)})")
    query = (
        f"SELECT {', '.join(_native.AUDIT_LOG_COLUMNS)} FROM audit_log l "  # noqa: S608 (ours)
        f"LEFT JOIN audit_segments s ON s.id = l.segment WHERE {' AND '.join(parts)} "
        "ORDER BY l.tenant_id, l.position"
    )
    return query, values


async def _name_placeless(connection: Connection, scope: Scope, condition: str, values: list[Any]) -> None:
    """Entries that nobody can order; only who drops constraints can make such."""
    rows = await connection.fetch(
        "SELECT tenant_id, position, segment, count(*) OVER () AS total FROM audit_log l "  # noqa: S608 (ours)
        f"WHERE (tenant_id IS NULL OR position IS NULL) AND {condition} LIMIT {scope.report.max_findings}",
        *values,
    )
    if rows:
        scope.report.counts[FindingKind.LOG_GAP] += rows[0]["total"] - len(rows)
    for row in rows:
        scope.report.add(
            Finding(
                kind=FindingKind.LOG_GAP,
                text=f"the entry of segment {row['segment']} has no place in a log",
                tenant_id=row["tenant_id"],
                segment=row["segment"],
                place=row["position"],
                expected="a tenant and a place",
                found="none",
            )
        )


async def _some(claims: AsyncIterator[_Claim]) -> AsyncIterator[_Claim]:
    for _ in range(_CLAIMS):
        claim = await anext(claims, None)
        if claim is None:
            return
        yield claim


# What the check calls it, what it is, and a sentence for it.
_LOG_KINDS = {
    "gap": (FindingKind.LOG_GAP, "the log jumps from entry {before} to {found}"),
    "gone": (FindingKind.SEGMENT_MISSING, "segment {segment}, entry {place} of the log, is gone"),
    "changed": (
        FindingKind.SEGMENT_CHANGED,
        "segment {segment}, entry {place} of the log, is not what was sealed",
    ),
    "tenant": (FindingKind.TENANT_SWAPPED, "segment {segment} stands in the log of another tenant"),
    "transactions": (
        FindingKind.SEGMENT_CHANGED,
        "segment {segment} and entry {place} of the log say different transactions",
    ),
    "recorded": (
        FindingKind.CLOCK_REWOUND,
        "segment {segment}, entry {place} of the log, says that it was recorded before what came earlier",
    ),
    "sealed": (
        FindingKind.CLOCK_REWOUND,
        "segment {segment}, entry {place} of the log, says that it was sealed before what came earlier",
    ),
    "truncated": (
        FindingKind.LOG_TRUNCATED,
        "the log has {found} entries; a checkpoint (from {source}) covers {expected}: it was rolled back",
    ),
    "mismatch": (
        FindingKind.CHECKPOINT_MISMATCH,
        "the first {place} entries of the log are not those of the checkpoint (from {source})",
    ),
}


def _log_finding(
    kind: str, tenant: str, segment: bytes | None, place: int, expected: str, found: str, source: str
) -> Finding:
    named, text = _LOG_KINDS[kind]
    id_ = None if segment is None else UUID(bytes=segment)
    told = text.format(
        segment=id_,
        place=place,
        before=place - 1,
        expected=expected,
        found=found,
        source=source,
    )
    if named is FindingKind.CLOCK_REWOUND:
        expected, found = f"not before {shown_time(int(expected))}", shown_time(int(found))
    elif named is FindingKind.LOG_TRUNCATED:
        expected, found = f"{expected} entries", f"{found} entries"
    elif named is FindingKind.LOG_GAP:
        expected, found = f"entry {expected}", f"entry {found}"
    return Finding(
        kind=named,
        text=told,
        tenant_id=tenant,
        segment=id_,
        place=place,
        expected=expected,
        found=found,
    )


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

    own = row["key"] or b""
    if not scope.keys_given and len(own) != _KEY_BYTES:
        text = f"the row of the checkpoint at size {size} has no Ed25519 key"
        bad(FindingKind.CHECKPOINT_INVALID, text, f"{_KEY_BYTES} bytes", own.hex())
        return None
    keys = scope.keys if scope.keys_given else (own,)
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
    name = None if tenant is None else log_name(scope.trail or "", tenant)
    says = (name, size, row["root"], row["key"])
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
        "SELECT l.tenant_id, coalesce(max(l.size), 0) AS size FROM audit_checkpoints l "  # noqa: S608 (ours)
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
