"""The stored events against their segments: copied in binary, hashed and compared in Rust.

Segments are taken in the order of their ids, a few thousand at a time, each time with every event that says
to be in one of that stretch. The stretches leave no gap, so an event with an invented segment is seen, too.
Several are read at once, and judged in their order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dotmac.platform import _native
from dotmac.platform.audit_trail.integrity.copying import copy_rows
from dotmac.platform.audit_trail.integrity.report import Finding, FindingKind, in_reach, shown_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    import asyncpg

    from dotmac.platform.audit_trail.integrity.readers import Readers
    from dotmac.platform.audit_trail.integrity.verify import Scope

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["check_events", "check_uncovered", "copy_events", "count_events", "readers_for"]

_BLOCK = 20_000
_STRETCH_EVENTS = 50_000
# An event that is not from before integrity was recorded; of a time that is null or unknown, too.
_NEW = "(recorded_at < (SELECT min(before) FROM audit_legacy)) IS NOT TRUE"
_FIRST = UUID(int=0)
_LAST = UUID(int=(1 << 128) - 1)
_NAMED = 100
_GONE = frozenset({FindingKind.EVENT_MISSING, FindingKind.EVENTS_TRUNCATED, FindingKind.SEGMENT_EMPTIED})
_TEXTS = {
    FindingKind.EVENT_CHANGED: "event {event} (place {place} of segment {segment}) is not what was stored",
    FindingKind.EVENT_MISSING: "the event at place {place} of segment {segment} is gone",
    FindingKind.EVENTS_TRUNCATED: "the events from place {place} on of segment {segment} are gone",
    FindingKind.SEGMENT_EMPTIED: "all events of segment {segment} are gone",
    FindingKind.EVENT_INSERTED: "event {event} was not stored with segment {segment}",
    FindingKind.EVENT_REORDERED: "event {event} of segment {segment} was moved",
    FindingKind.EVENTS_CHANGED: "the events of segment {segment} are not what was stored",
    FindingKind.TENANT_SWAPPED: "event {event} of segment {segment} says another tenant than the segment",
    FindingKind.CLOCK_REWOUND: "event {event} says another time of recording than segment {segment}",
    FindingKind.SEGMENT_CHANGED: "the leaf hashes of segment {segment} are not what was stored",
}


@dataclass(frozen=True, slots=True)
class _Stretch:
    """So many segments without a gap, and the first and last id that count as theirs."""

    segments: int
    low: UUID
    high: UUID


@dataclass(frozen=True, slots=True)
class _Compared:
    """What the events of a stretch are, against its segments."""

    stretch: _Stretch
    findings: Sequence[tuple[str, bytes, int | None, bytes | None, str, str]]
    untold: int
    strangers: Sequence[tuple[bytes, int, bytes]]
    events: int


async def count_events(connection: Connection, scope: Scope) -> int:
    """How many events the segments in scope say to have."""
    where, values = scope.segments()
    found: int = await connection.fetchval(
        f"SELECT coalesce(sum(size), 0)::bigint FROM audit_segments s WHERE {where}",  # noqa: S608 (conditions of ours)
        *values,
    )
    return found


def readers_for(events: int) -> int:
    """How many readers have something to do with so many events."""
    return max(1, events // _STRETCH_EVENTS)


async def check_events(readers: Readers, scope: Scope, total: int) -> None:
    """Check every event of the segments in scope; `total` is how many there should be."""
    scope.tell("events", 0, total)
    reading: deque[asyncio.Task[_Compared]] = deque()
    try:
        async for stretch in _stretches(readers, scope):
            if len(reading) == readers.count:
                await _judge(readers, scope, await reading.popleft(), total)
            reading.append(asyncio.create_task(_compare(readers, scope, stretch), name="dotmac-audit-verify"))
        while reading:
            await _judge(readers, scope, await reading.popleft(), total)
    finally:
        if reading:
            # A turn of the loop, for those whose connections are lost to hear of it.
            await asyncio.wait(reading, timeout=0)
            for task in reading:
                task.cancel()
            await asyncio.wait(reading)


async def _stretches(readers: Readers, scope: Scope) -> AsyncIterator[_Stretch]:
    where, values = scope.segments()
    low = begin = _FIRST
    while True:
        async with readers.one() as connection:
            block = await connection.fetch(
                f"SELECT id, size FROM audit_segments s WHERE {where} AND id >= ${len(values) + 1} "  # noqa: S608 (conditions of ours)
                f"ORDER BY id LIMIT {_BLOCK}",
                *values,
                begin,
            )
        last = len(block) < _BLOCK
        parts = list(_parts(block)) or [block]
        for number, part in enumerate(parts):
            ends = last and number == len(parts) - 1
            if not part and scope.is_partial:
                break
            high = _LAST if ends and not scope.is_partial else part[-1]["id"]
            if scope.is_partial:
                low = part[0]["id"]
            yield _Stretch(len(part), low, high)
            low = _after(high)
        if last or block[-1]["id"] == _LAST:
            return
        begin = _after(block[-1]["id"])


def _parts(block: Sequence[asyncpg.Record]) -> Iterator[Sequence[asyncpg.Record]]:
    begin = events = 0
    for place, row in enumerate(block):
        if place > begin and events + (row["size"] or 0) > _STRETCH_EVENTS:
            yield block[begin:place]
            begin, events = place, 0
        events += max(0, row["size"] or 0)
    if block:
        yield block[begin:]


def _after(value: UUID) -> UUID:
    return UUID(int=min(value.int + 1, _LAST.int))


async def _compare(readers: Readers, scope: Scope, stretch: _Stretch) -> _Compared:
    where, values = scope.segments()
    columns = ", ".join(_native.AUDIT_EXPECTED_COLUMNS)
    between = f"BETWEEN '{stretch.low}' AND '{stretch.high}'"
    check = _native.SegmentCheck()
    async with readers.one() as connection:
        expected = await copy_rows(
            connection,
            f"SELECT {columns} FROM audit_segments s WHERE {where} AND id {between}",  # noqa: S608 (conditions of ours)
            check.expect,
            *values,
        )
        # More may have come meanwhile, where a caller's transaction is read committed; none ever goes.
        if expected < stretch.segments:
            raise RuntimeError(f"of {stretch.segments} segments {between} only {expected} came again")
        await copy_events(connection, f"segment {between}", check.feed)
    return _Compared(stretch, *check.finish())


async def _judge(readers: Readers, scope: Scope, compared: _Compared, total: int) -> None:
    segments: dict[UUID, asyncpg.Record] = {}
    if compared.findings:
        times = ", ".join(
            in_reach(name, name, always=True) for name in ("recorded_at", "first_at", "last_at")
        )
        wanted = list({UUID(bytes=segment) for _, segment, *_ in compared.findings})
        async with readers.one() as connection:
            rows = await connection.fetch(
                f"SELECT id, tenant_id, size, {times} FROM audit_segments WHERE id = ANY($1::uuid[])",  # noqa: S608 (ours)
                wanted,
            )
        segments = {row["id"]: row for row in rows}
    scope.report.events += compared.events - sum(count for _, count, _ in compared.strangers)
    gone: dict[UUID, int] = {}
    for kind, segment, place, event, expected, found in compared.findings:
        row = segments[UUID(bytes=segment)]
        named = FindingKind(kind)
        if named in _GONE and scope.drops.months(row["first_at"], row["last_at"], row["recorded_at"]):
            gone[row["id"]] = int(found.split()[0]) if named is not FindingKind.EVENT_MISSING else -1
            continue
        scope.report.add(_finding(named, row, place, event, expected, found))
    scope.report.untold += compared.untold
    if gone or compared.strangers:
        async with readers.one() as connection:
            await _count_dropped(connection, scope, gone, segments)
            await _name_strangers(
                connection, scope, sorted(UUID(bytes=segment) for segment, _, _ in compared.strangers)
            )
    scope.report.segments += compared.stretch.segments
    scope.tell("events", scope.report.events, total)


def _finding(
    kind: FindingKind,
    row: asyncpg.Record,
    place: int | None,
    event: bytes | None,
    expected: str,
    found: str,
) -> Finding:
    event_id = None if event is None else UUID(bytes=event)
    if kind is FindingKind.CLOCK_REWOUND:
        expected, found = shown_time(int(expected)), shown_time(int(found))
    return Finding(
        kind=kind,
        text=_TEXTS[kind].format(event=event_id, place=place, segment=row["id"]),
        tenant_id=row["tenant_id"],
        event_id=event_id,
        segment=row["id"],
        place=place,
        expected=expected,
        found=found,
    )


async def _count_dropped(
    connection: Connection, scope: Scope, gone: dict[UUID, int], segments: dict[UUID, asyncpg.Record]
) -> None:
    for segment, there in gone.items():
        row = segments[segment]
        if there < 0:
            there = await connection.fetchval("SELECT count(*) FROM audit_events WHERE segment = $1", segment)  # noqa: PLW2901
        missing = (row["size"] or 0) - there
        scope.report.dropped += missing
        scope.drops.excuse(
            scope.drops.months(row["first_at"], row["last_at"], row["recorded_at"]), max(0, missing)
        )
        if there and await connection.fetchval(
            "SELECT leaves IS NULL FROM audit_segments WHERE id = $1", segment
        ):
            scope.report.add(
                Finding(
                    kind=FindingKind.SEGMENT_CHANGED,
                    text=f"segment {segment} has no leaf hashes: what retention left of it can't be checked",
                    tenant_id=row["tenant_id"],
                    segment=segment,
                    expected="leaf hashes",
                    found="none",
                )
            )


async def _name_strangers(connection: Connection, scope: Scope, strangers: list[UUID]) -> None:
    """Events of segments that were not in this stretch: of another scope, or of none that there is."""
    known = (
        "SELECT id FROM audit_segments WHERE id = ANY($1) "
        "UNION SELECT segment FROM audit_log WHERE segment = ANY($1)"
    )
    there = {row["id"] for row in await connection.fetch(known, strangers)}
    for segment in strangers:
        if segment in there:
            continue
        rows = await connection.fetch(
            f"SELECT id, tenant_id FROM audit_events WHERE segment = $1 ORDER BY leaf, id LIMIT {_NAMED}",  # noqa: S608 (a constant)
            segment,
        )
        for row in rows:
            scope.report.add(
                Finding(
                    kind=FindingKind.EVENT_INSERTED,
                    text=f"event {row['id']} says to be in segment {segment}, which there is not",
                    tenant_id=row["tenant_id"] or "",
                    event_id=row["id"],
                    segment=segment,
                    expected="a row of audit_segments",
                    found="none",
                )
            )


async def copy_events(connection: Connection, where: str, feed: Callable[[bytes], Any]) -> None:
    """Copy the matching events to `feed`, as `_native.SegmentCheck.feed` takes them.

    Args: where: a condition without values of others' making: it is put into the statement.
    """
    columns = ", ".join(_native.AUDIT_CHECK_COLUMNS)
    await copy_rows(connection, f"SELECT {columns} FROM audit_events WHERE {where}", feed)  # noqa: S608 (see above)


async def check_uncovered(connection: Connection, scope: Scope) -> None:
    """Events that no segment covers: from before there were any, which are counted, and others.

    Nothing covers the count: whoever administers the database can change it.
    """
    report = scope.report
    where, values = scope.events()
    counted = await connection.fetchrow(
        f"SELECT count(*) FILTER (WHERE {_NEW}) AS new, count(*) AS found, "  # noqa: S608 (conditions of ours)
        "(SELECT min(events) FROM audit_legacy) AS known "
        f"FROM audit_events WHERE segment IS NULL AND {where}",
        *values,
    )
    new, found, known = counted or (0, 0, 0)
    report.legacy = found - new
    condition = _NEW
    if report.legacy > (known or 0):
        # There are more of that age than there were then: the time in them is made up.
        new, condition = found, "true"
        report.legacy = 0
    if new:
        await _name_uncovered(connection, scope, condition, new)
    if report.legacy:
        # How many there were is known of the whole trail only.
        say = "say to be" if scope.is_partial else "are"
        report.add(
            Finding(
                kind=FindingKind.EVENTS_LEGACY,
                text=f"{report.legacy} events {say} from before integrity was recorded: "
                "nothing protects them",
                found=str(report.legacy),
            )
        )


async def _name_uncovered(connection: Connection, scope: Scope, condition: str, count: int) -> None:
    where, values = scope.events()
    rows = await connection.fetch(
        "SELECT id, tenant_id FROM audit_events WHERE segment IS NULL "  # noqa: S608 (conditions of ours)
        f"AND {where} AND {condition} ORDER BY recorded_at DESC, id LIMIT {scope.report.max_findings}",
        *values,
    )
    for row in rows:
        scope.report.add(
            Finding(
                kind=FindingKind.EVENT_UNCOVERED,
                text=f"event {row['id']} is in no segment: it was inserted, or stored with integrity off",
                tenant_id=row["tenant_id"] or "",
                event_id=row["id"],
                expected="a segment",
                found="none",
            )
        )
    scope.report.counts[FindingKind.EVENT_UNCOVERED] += count - len(rows)
