"""A thousand random tamperings by a superuser whom no trigger stops: each is found, and named.

Every one is done in a transaction with the triggers off (`session_replication_role = replica`), verified
there and rolled back. Named means: a finding bears the event, or its segment and place, or the segment or
tenant that was tampered with. The seed is printed where one is not found.
"""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.integrity import SigningKey
from dotmac.platform.audit_trail.integrity.checkpoints import Signer
from dotmac.platform.audit_trail.integrity.log import LEAF_COLUMNS, leaf_hash, seal
from dotmac.platform.audit_trail.integrity.verify import verify
from support.segments import FIELDS, PlainWriter, canonical, event, leaf, micros, root, uuid7

KEY = SigningKey.generate()
TAMPERINGS = 1_000
SEED = 20_261_127
MONTH = timedelta(days=31)


@pytest.fixture
async def connection(postgres_database):
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
    connection = await asyncpg.connect(postgres_database)
    now = datetime.now(UTC)
    await connection.execute("SELECT audit_ensure_partition($1)", now - MONTH)
    numbers = iter(range(10_000))
    for _ in range(2):
        writer = await PlainWriter(connection).begin()
        for size in (1, 2, 3, 5, 8, 1, 4):
            for at in (now - MONTH, now):
                await writer.store(
                    [
                        event(
                            next(numbers),
                            tenant=(None, "a", "b")[place % 3],
                            at=at + timedelta(milliseconds=place),
                            correlation_id="c-1",
                            trace_id="0" * 31 + "1",
                            span_id="0" * 15 + "1",
                            subject_id="s-1",
                            personal={"key": "k", "fields": {"email": "AAAA"}},
                            anomaly_score=0.5,
                            anomaly_reasons=["because"],
                        )
                        for place in range(size)
                    ]
                )
        await writer.end()
    await seal(connection, 0, durably=False)
    await Signer(KEY, "example.com/audit").sign_due(connection, timedelta(0), durably=False)
    yield connection
    await connection.close()


class Superuser:
    """Tampers, and says how a finding names what was done."""

    def __init__(self, connection, chance):
        self.connection, self.chance = connection, chance

    async def rows(self, table, where="true"):
        return await self.connection.fetch(f"SELECT * FROM {table} WHERE {where} ORDER BY 1, 2")

    async def any_event(self, where="true"):
        return self.chance.choice(await self.rows("audit_events", where))

    async def any_segment(self, where="true"):
        return self.chance.choice(await self.rows("audit_segments", where))

    async def execute(self, statement, *values):
        done = await self.connection.execute(statement, *values)
        assert not done.endswith(" 0"), f"nothing was tampered with: {statement}"

    # --- events

    async def change_a_field(self):
        row = await self.any_event()
        name = self.chance.choice([*FIELDS, "recorded_at", "recorded_tx", "segment", "leaf"])
        value = self.other(name, row[name])
        if name == "occurred_at":
            value = row[name] + timedelta(microseconds=self.chance.choice([-1, 1]))
        await self.execute(f"UPDATE audit_events SET {name} = $2 WHERE id = $1", row["id"], value)
        new = value if name == "id" else row["id"]
        return f"{name} of {row['id']}", lambda one: one.event_id == new

    def other(self, name, value):  # noqa: PLR0911 (one for each type)
        chance = self.chance
        if name in ("metadata", "personal", "anomaly_reasons"):
            changes = ["{}", '{"n": 1.5, "x": [null]}', '{"n": 12345678901234567890123}', "[]"]
            # What is there already in another form is no change.
            return chance.choice([one for one in changes if json.loads(one) != json.loads(value)])
        if name in ("id", "segment"):
            return uuid.UUID(int=chance.getrandbits(128))
        if name == "recorded_at":
            return value - timedelta(microseconds=chance.randrange(1, 10**12))
        if name == "recorded_tx":
            return value + chance.randrange(1, 100)
        if name == "leaf":
            return chance.choice([one for one in range(-1, 12) if one != value])
        if name == "anomaly_score":
            return chance.choice([None, 0.4999999999999999, 0.0, float("nan"), float("inf")])
        if name == "ip_address":
            return chance.choice([None, "198.51.100.1", "2001:db8::8", "192.0.2.0/24"])
        texts = [f"{value}x", f"{value} ", chance.choice("abc")]
        if name not in ("category", "action", "level", "outcome"):
            texts += [None, ""]
        return chance.choice([text for text in texts if text != value])

    async def delete_an_event(self):
        row = await self.any_event()
        await self.execute("DELETE FROM audit_events WHERE id = $1", row["id"])
        return (
            f"{row['id']} deleted",
            lambda one: (
                one.segment == row["segment"] and (one.place == row["leaf"] or one.kind == "segment_emptied")
            ),
        )

    async def insert_an_event(self):
        row = dict(await self.any_event())
        row["id"] = uuid7(row["occurred_at"])
        row["segment"], row["leaf"] = self.chance.choice(
            [
                (row["segment"], row["leaf"]),
                (row["segment"], row["leaf"] + 50),
                (row["segment"], None),
                (uuid7(), 0),
                (uuid.UUID(int=0), 0),
                (uuid.UUID(int=(1 << 128) - 1), 0),
                (None, None),
            ]
        )
        if row["segment"] is None and self.chance.random() < 0.5:
            row["recorded_at"] -= timedelta(days=1000)  # as if it had been there before the proofs
        numbers = ", ".join(f"${number}" for number in range(1, len(row) + 1))
        await self.execute(f"INSERT INTO audit_events ({', '.join(row)}) VALUES ({numbers})", *row.values())
        return f"{row['id']} inserted in {row['segment']}", lambda one: one.event_id == row["id"]

    async def reorder(self):
        segment = await self.any_segment("size > 1")
        one, other = self.chance.sample(range(segment["size"]), 2)
        await self.execute(
            "UPDATE audit_events SET leaf = CASE leaf WHEN $2 THEN $3 ELSE $2 END WHERE segment = $1 "
            "AND leaf IN ($2, $3)",
            segment["id"],
            one,
            other,
        )
        return (
            f"{segment['id']}: {one} and {other} reordered",
            lambda found: (
                found.kind == "event_reordered" and (found.segment, found.place) == (segment["id"], one)
            ),
        )

    async def truncate(self):
        segment = await self.any_segment("size > 2")
        first = self.chance.randrange(1, segment["size"] - 1)
        await self.execute("DELETE FROM audit_events WHERE segment = $1 AND leaf >= $2", segment["id"], first)
        return (
            f"{segment['id']} truncated at {first}",
            lambda one: (one.kind, one.segment, one.place) == ("events_truncated", segment["id"], first),
        )

    async def swap_tenants(self):
        row = await self.any_event("coalesce(tenant_id, '') <> 'b'")
        await self.execute("UPDATE audit_events SET tenant_id = 'b' WHERE id = $1", row["id"])
        whole = self.chance.random() < 0.3
        if whole:  # with all of its segment, its entry of the log, and the numbers there
            segment = row["segment"]
            await self.execute("UPDATE audit_events SET tenant_id = 'b' WHERE segment = $1", segment)
            await self.execute(
                "UPDATE audit_segments SET tenant_id = 'b', seq = seq + 1000 WHERE id = $1", segment
            )
            await self.execute(
                "UPDATE audit_log SET tenant_id = 'b', position = position + 1000 WHERE segment = $1", segment
            )
        return (
            f"tenant of {row['id']} swapped",
            lambda one: one.segment == row["segment"] if whole else one.event_id == row["id"],
        )

    # --- the clock

    async def rewind_the_clock(self):
        segment = await self.any_segment()
        back = timedelta(seconds=self.chance.choice([0.000001, 1, 3_600, 86_400 * 40]))
        depth = self.chance.randrange(3)
        await self.execute(
            "UPDATE audit_events SET recorded_at = recorded_at - $2::interval WHERE segment = $1",
            segment["id"],
            back,
        )
        if depth > 0:
            await self.execute(
                "UPDATE audit_segments SET recorded_at = recorded_at - $2::interval WHERE id = $1",
                segment["id"],
                back,
            )
        if depth > 1:
            await self.forge_log(segment["id"])
            return (
                f"clock of {segment['id']} rewound, log forged",
                lambda one: one.kind == "checkpoint_mismatch" and one.tenant_id == segment["tenant_id"],
            )
        return f"clock of {segment['id']} rewound", lambda one: one.segment == segment["id"]

    # --- segments and logs

    async def change_a_segment(self):
        row = await self.any_segment()
        name = self.chance.choice(
            [
                "size",
                "root",
                "link",
                "first_at",
                "last_at",
                "recorded_at",
                "recorded_tx",
                "seq",
                "writer",
                "leaves",
            ]
        )
        value = row[name]
        if name == "size":
            await self.execute("UPDATE audit_segments SET leaves = NULL WHERE id = $1", row["id"])
        changed = {
            bytes: lambda: hashlib.sha256(value).digest() * (len(value) // 32),
            int: lambda: value + 1_000,
            datetime: lambda: value - timedelta(seconds=1),
            uuid.UUID: uuid.uuid4,
        }[next(kind for kind in (bytes, int, datetime, uuid.UUID) if isinstance(value, kind))]()
        await self.execute(f"UPDATE audit_segments SET {name} = $2 WHERE id = $1", row["id"], changed)
        return f"{name} of segment {row['id']}", lambda one: one.segment == row["id"]

    async def delete_a_segment(self):
        row = await self.any_segment()
        await self.execute("DELETE FROM audit_segments WHERE id = $1", row["id"])
        if self.chance.random() < 0.5:
            await self.execute("DELETE FROM audit_events WHERE segment = $1", row["id"])
        return (
            f"segment {row['id']} deleted",
            lambda one: (
                one.kind == "segment_missing" and (one.segment == row["id"] or one.writer == row["writer"])
            ),
        )

    async def insert_a_segment(self):
        writer = await PlainWriter(self.connection).begin()
        if self.chance.random() < 0.5:
            writer.id = (await self.any_segment())["writer"]  # goes on with a chain that has closed
            writer.links = {"a": (bytes(32), 1_000)}
        (segment,) = await writer.store([event(self.chance.randrange(10**6), tenant="a")])
        old = (await self.any_segment("tenant_id = 'a'"))["recorded_at"] - timedelta(hours=2)
        await self.execute("UPDATE audit_events SET recorded_at = $2 WHERE segment = $1", segment, old)
        await self.execute("UPDATE audit_segments SET recorded_at = $2 WHERE id = $1", segment, old)
        place = await self.connection.fetchval("SELECT count(*) FROM audit_log WHERE tenant_id = 'a'")
        row = await self.connection.fetchrow(
            f"SELECT {LEAF_COLUMNS}, recorded_tx FROM audit_segments WHERE id = $1", segment
        )
        await self.execute(
            "INSERT INTO audit_log (tenant_id, position, segment, leaf, recorded_tx) "
            "VALUES ('a', $1, $2, $3, $4)",
            place,
            segment,
            leaf_hash(row),
            row["recorded_tx"],
        )
        return f"segment {segment} slipped in", lambda one: one.segment == segment

    async def damage_the_log(self):
        row = self.chance.choice(await self.rows("audit_log"))
        key = (row["tenant_id"], row["position"])
        kind = self.chance.randrange(5)
        where = "WHERE tenant_id = $1 AND position = $2"
        if kind == 0:
            await self.execute(f"DELETE FROM audit_log {where}", *key)
        elif kind == 1:
            await self.execute("DELETE FROM audit_log WHERE tenant_id = $1 AND position >= $2", *key)
        elif kind == 2:
            await self.execute(f"UPDATE audit_log SET leaf = sha256(leaf) {where}", *key)
        elif kind == 3:
            await self.execute(f"UPDATE audit_log SET position = position + 1000 {where}", *key)
        else:
            await self.execute(f"UPDATE audit_log SET segment = gen_random_uuid() {where}", *key)
        return (
            f"log {key}, {kind}",
            lambda one: (
                one.tenant_id == key[0]
                and (
                    one.place == key[1]
                    or one.segment == row["segment"]
                    or one.kind in ("log_truncated", "log_gap", "checkpoint_mismatch")
                )
            ),
        )

    async def damage_a_checkpoint(self):
        row = self.chance.choice(await self.rows("audit_checkpoints"))
        change = self.chance.choice(
            [
                "root = sha256(root)",
                "size = size + 1",
                "note = replace(note, '— example', '— examples')",
                "note = overlay(note placing 'x' from 3)",
                "key = sha256(key)",
                "tenant_id = 'other'",
            ]
        )
        await self.execute(f"UPDATE audit_checkpoints SET {change} WHERE tenant_id = $1", row["tenant_id"])
        tenants = {row["tenant_id"], "other"}
        return (
            f"checkpoint of {row['tenant_id']!r}: {change}",
            lambda one: (
                one.tenant_id in tenants
                and one.kind in ("checkpoint_invalid", "key_unknown", "log_truncated")
            ),
        )

    # --- all that belongs together

    async def roll_back_the_newest_partition(self):
        depth = self.chance.randrange(4)
        newest = f"audit_events_{datetime.now(UTC):%Y_%m}"
        segments = [
            row["segment"] for row in await self.connection.fetch(f"SELECT DISTINCT segment FROM {newest}")
        ]
        some = self.chance.choice(segments)
        tenants = {
            row["tenant_id"]
            for row in await self.rows("audit_segments", "last_at > now() - interval '1 day'")
        }
        await self.connection.execute(f"{self.chance.choice(['TRUNCATE', 'DROP TABLE'])} {newest}")
        if depth > 0:
            await self.execute("DELETE FROM audit_segments WHERE id = ANY($1)", segments)
            if depth < 3:
                await self.execute("DELETE FROM audit_writer_ends")
        if depth > 1:
            await self.execute("DELETE FROM audit_log WHERE segment = ANY($1)", segments)
        if depth == 0:
            return "newest partition gone", lambda one: (one.kind, one.segment) == ("segment_emptied", some)
        if depth == 1:
            return "and its segments", lambda one: (one.kind, one.segment) == ("segment_missing", some)
        tenant = self.chance.choice(sorted(tenants))
        return (
            "and its part of the log",
            lambda one: (
                one.tenant_id == tenant and one.kind in ("log_truncated", "log_gap", "checkpoint_mismatch")
            ),
        )

    async def forge_everything(self):
        """Change an event and all that follows from it; only the checkpoint's signature can't be made."""
        row = await self.any_event()
        await self.execute("UPDATE audit_events SET action = 'forged' WHERE id = $1", row["id"])
        segment = await self.connection.fetchrow("SELECT * FROM audit_segments WHERE id = $1", row["segment"])
        leaves = [
            leaf(
                {
                    name: json.loads(value)
                    if name in ("metadata", "personal", "anomaly_reasons")
                    else (str(value) if name == "ip_address" else value)
                    for name, value in ((name, one[name]) for name in FIELDS)
                    if value is not None
                }
            )
            for one in await self.connection.fetch(
                "SELECT * FROM audit_events WHERE segment = $1 ORDER BY leaf", row["segment"]
            )
        ]
        await self.execute(
            "UPDATE audit_segments SET root = $2, leaves = $3 WHERE id = $1",
            segment["id"],
            root(leaves),
            b"".join(leaves),
        )
        link = bytes(32)
        for one in await self.rows(
            "audit_segments", f"writer = '{segment['writer']}' AND tenant_id = '{segment['tenant_id']}'"
        ):
            record = {
                "id": str(one["id"]),
                "writer": str(one["writer"]),
                "tenant_id": one["tenant_id"],
                "seq": one["seq"],
                "size": one["size"],
                "root": one["root"].hex(),
                "first_at": micros(one["first_at"]),
                "last_at": micros(one["last_at"]),
            }
            link = hashlib.sha256(link + canonical(record)).digest()
            await self.execute("UPDATE audit_segments SET link = $2 WHERE id = $1", one["id"], link)
            await self.forge_log(one["id"])
        return (
            f"all about {row['id']} forged",
            lambda one: (one.kind, one.tenant_id) == ("checkpoint_mismatch", segment["tenant_id"]),
        )

    async def forge_log(self, segment):
        row = await self.connection.fetchrow(
            f"SELECT {LEAF_COLUMNS} FROM audit_segments WHERE id = $1", segment
        )
        await self.execute("UPDATE audit_log SET leaf = $2 WHERE segment = $1", segment, leaf_hash(row))


ACTS = (
    (Superuser.change_a_field, 8),
    (Superuser.delete_an_event, 3),
    (Superuser.insert_an_event, 3),
    (Superuser.reorder, 2),
    (Superuser.truncate, 2),
    (Superuser.swap_tenants, 2),
    (Superuser.rewind_the_clock, 3),
    (Superuser.change_a_segment, 3),
    (Superuser.delete_a_segment, 2),
    (Superuser.insert_a_segment, 1),
    (Superuser.damage_the_log, 2),
    (Superuser.damage_a_checkpoint, 1),
    (Superuser.roll_back_the_newest_partition, 2),
    (Superuser.forge_everything, 2),
)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_thousand_tamperings_are_found_and_named(connection):
    report = await verify(connection, keys=[KEY.public_key])
    assert report.findings == []
    assert report.events == 2 * 2 * 24
    acts, weights = zip(*ACTS, strict=True)
    done = dict.fromkeys(acts, 0)
    for number in range(TAMPERINGS):
        chance = random.Random(f"{SEED}/{number}")
        act = chance.choices(acts, weights)[0]
        transaction = connection.transaction()
        await transaction.start()
        try:
            await connection.execute("SET LOCAL session_replication_role = replica")
            told, names_it = await act(Superuser(connection, chance))
            report = await verify(connection, keys=[KEY.public_key])
            found = [one.to_dict() for one in report.findings]
            assert not report.ok, f"not found (seed {SEED}/{number}): {told}"
            assert any(map(names_it, report.problems)), f"not named (seed {SEED}/{number}): {told}: {found}"
            assert all(one.text and one.kind for one in report.findings)
        finally:
            await transaction.rollback()
        done[act] += 1
    assert min(done.values()) > 10, done
    report = await verify(connection, keys=[KEY.public_key])
    assert report.findings == []
