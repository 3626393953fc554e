"""A trail of random events, stored by SQL, and what queries over it should answer, worked out in Python."""

from __future__ import annotations

import ipaddress
import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from dotmac.platform.audit_trail import AuditCategory, AuditLevel, AuditOutcome

ORIGIN = datetime(2024, 3, 29, tzinfo=UTC)  # Europe puts its clocks forward on the 31st
DAYS = 6
USERS, TENANTS = [None, "ada", "bob", "100%"], [None, "t1", "t2"]
ACTIONS = ["user.login", "user_login", "userXlogin", "order.read", "100%", "Größe.ändern", "a\\b"]
ADDRESSES = [None, "10.0.0.7", "10.0.1.9", "2001:db8::5", "2001:db8:1::5"]
LEAVES = [None, True, False, 0, 1, 2.5, -3, 10**20, "", "paid", "Paid", "a*b", 'say "hi"', "é", "É", "1"]
COLUMNS = (
    "occurred_at", "id", "category", "action", "level", "outcome", "user_id", "tenant_id", "resource_type",
    "resource_id", "ip_address", "correlation_id", "trace_id", "subject_id", "metadata", "anomaly_score",
)  # fmt: skip


def random_rows(chance, count):
    """Rows in the order of COLUMNS; several share a moment."""

    def metadata():
        made = {}
        if chance.random() < 0.8:
            made["order"] = {"total": chance.choice(LEAVES), "a.b": chance.choice(LEAVES)}
        if chance.random() < 0.5:
            made["tags"] = [chance.choice(LEAVES) for _ in range(chance.randrange(4))]
        if chance.random() < 0.3:
            made["items"] = [{"sku": chance.choice(["A-1", "A-2", "B-1"])} for _ in range(2)]
        if chance.random() < 0.3:
            made["1"] = chance.choice(LEAVES)
        return json.dumps(made)

    for _ in range(count):
        yield (
            ORIGIN + timedelta(minutes=chance.randrange(60 * 24 * DAYS)),
            UUID(int=chance.getrandbits(128)),
            chance.choice(list(AuditCategory)[:4]).value,
            chance.choice(ACTIONS),
            chance.choice(list(AuditLevel)).value,
            chance.choice(list(AuditOutcome)).value,
            chance.choice(USERS),
            chance.choice(TENANTS),
            chance.choice([None, "order", "user"]),
            chance.choice([None, "1", "2"]),
            chance.choice(ADDRESSES),
            chance.choice([None, "c1", "c2", "c3"]),
            chance.choice([None, "f" * 32]),
            chance.choice([None, "s1"]),
            metadata(),
            chance.choice([None, 0.0, 0.25, 0.5, 1.0]),
        )


async def store(connection, rows):
    """Store rows with their counts per day, as one commit."""
    rows = list(rows)
    rollup = Counter((row[7] or "", row[0].date(), row[2], row[5], row[4]) for row in rows)
    async with connection.transaction():
        await connection.execute(
            "SELECT audit_ensure_partition(m) FROM unnest($1::timestamptz[]) AS m",
            list({row[0].replace(day=1) for row in rows}),
        )
        await connection.copy_records_to_table("audit_events", records=rows, columns=COLUMNS)
        await connection.copy_records_to_table(
            "audit_rollup",
            records=[(*key, count, UUID(int=1)) for key, count in rollup.items()],
            columns=("tenant_id", "day", "category", "outcome", "level", "events", "batch"),
        )


class Stored(NamedTuple):
    """What the database holds beside an event: its metadata as PostgreSQL writes it, whom it is about."""

    metadata: str
    subject_id: str | None


class Events(list):
    """Pairs of an event and what is `Stored` beside it; short where a failure is shown."""

    def __repr__(self):
        return f"<{len(self)} events>"


MISSING = object()


def at(metadata, path):
    """The value at a path, as PostgreSQL's `#>` finds it."""
    value = metadata
    for key in path:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", key) and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def same(one, other):
    """Equal as jsonb is: 1 equals 1.0, True does not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def holds(metadata, path, operator, wanted):  # noqa: PLR0911 (one for each kind)
    """Does a condition on metadata hold?"""
    value = at(metadata, path)
    if operator == "exists":
        return (value is not MISSING) == wanted
    if value is MISSING:
        return False
    if operator in {"gt", "gte", "lt", "lte"}:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (value, wanted))
        if not numbers and not (isinstance(value, str) and isinstance(wanted, str)):
            return False
        return {"gt": value > wanted, "gte": value >= wanted, "lt": value < wanted, "lte": value <= wanted}[
            operator
        ]
    if operator == "like":
        return isinstance(value, str) and like(wanted, value)
    if operator == "in":
        return any(same(value, one) for one in wanted)
    if operator == "contains":
        return isinstance(value, list) and any(same(one, wanted) for one in value)
    return same(value, wanted) == (operator == "eq")


def like(pattern, text):
    """Does the text fit a pattern whose `*` stands for anything?"""
    return (
        re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), text, re.DOTALL) is not None
    )


def has_text(event, written, needle):
    """Does the text occur in the action, or in the metadata as `written`?"""
    escaped = json.dumps(needle, ensure_ascii=False)[1:-1]
    return needle.lower() in event.action.lower() or escaped.lower() in written.lower()


def conditions(event, stored, filters):
    """For each condition of the filters: does it hold?"""
    for name, wanted in filters.items():
        several = [wanted] if isinstance(wanted, str) else wanted
        if name == "start_time":
            yield event.occurred_at >= wanted
        elif name == "end_time":
            yield event.occurred_at < wanted
        elif name in {"categories", "levels"}:
            yield getattr(event, {"categories": "category", "levels": "level"}[name]) in wanted
        elif name == "actions":
            yield any(like(pattern, event.action) for pattern in several)
        elif name == "ip_address":
            yield event.ip_address is not None and any(
                ipaddress.ip_address(event.ip_address) in ipaddress.ip_network(network) for network in several
            )
        elif name == "text":
            yield from (has_text(event, stored.metadata, needle) for needle in several)
        elif name == "metadata":
            for path, wanted_there in wanted.items():
                keys = tuple(re.sub(r"\\(.)", r"\1", key) for key in re.split(r"(?<!\\)\.", path))
                yield from (holds(event.metadata, keys, *one) for one in wanted_there.items())
        elif name == "min_anomaly_score":
            yield event.anomaly_score is not None and event.anomaly_score >= wanted
        elif name == "missing":
            yield from (getattr(event, field) is None for field in several)
        elif name == "exclude":
            yield not any(conditions(event, stored, wanted))
        elif name == "subject_id":
            yield stored.subject_id in several
        else:
            yield getattr(event, name) in several


def select(events, filters):
    """The events that fit, in their order."""
    return [event for event, stored in events if all(conditions(event, stored, filters))]
