"""Sealing, signing, proving and anchoring on a real PostgreSQL.

Promises:
- sealing passes nothing over, whatever the order of commits; several sealers append each segment once;
- checkpoints are signed when a log grew, and not again; a rotated key signs at once, and the old one's
  checkpoints still verify; a log that was changed under the signer is not signed;
- every proof checks without the database; any change of it is refused; what was changed has none, and is not
  said to have one later;
- what was anchored elsewhere shows a rollback of everything in the database;
- the tables refuse UPDATE, DELETE and TRUNCATE.
"""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.audit_trail.integrity import FindingKind, SigningKey, check_proof, checkpoints
from dotmac.platform.audit_trail.integrity.checkpoints import Signer
from dotmac.platform.audit_trail.integrity.log import seal
from dotmac.platform.audit_trail.integrity.verify import verify
from dotmac.platform.errors import (
    ConfigurationError,
    InvalidCheckpoint,
    InvalidProof,
    LogInconsistent,
    NotProvable,
)
from support.segments import PlainWriter, event
from support.trails import AT_ONCE, KEY, checked, free, kinds, sealed


async def test_sealing_passes_nothing_over(trail_url, connection):
    other = await asyncpg.connect(trail_url)
    early, late = await PlainWriter(other).begin(), await PlainWriter(connection).begin()
    try:
        # It takes its number first and commits last.
        transaction = other.transaction()
        await transaction.start()
        (first,) = await early.store([event(1)])
        (second,) = await late.store([event(2)])
        found = await seal(connection, 0, durably=False)
        assert found.segments == 0
        report = await checked(connection)
        assert report.ok
        assert report.unsealed == 1
        await transaction.commit()
        found = await seal(connection, found.line, durably=False)
        assert (found.segments, found.more) == (2, False)
        rows = await connection.fetch("SELECT segment, position FROM audit_log ORDER BY position")
        assert [tuple(row) for row in rows] == [(first, 0), (second, 1)]
        assert (await seal(connection, found.line, durably=False)).segments == 0
    finally:
        await other.close()


async def test_what_a_restored_dump_brought_does_not_hide_what_comes_next(connection):
    writer = await PlainWriter(connection).begin()
    await writer.store([event(1)])
    await connection.execute("SET session_replication_role = replica")
    for table in ("audit_events", "audit_segments"):
        await connection.execute(f"UPDATE {table} SET recorded_tx = recorded_tx + 1000000000")
    await connection.execute("SET session_replication_role = origin")
    found = await seal(connection, 0, durably=False)
    assert (found.segments, found.more) == (1, False)
    await writer.store([event(2)])
    found = await seal(connection, found.line, durably=False)
    assert found.segments == 1
    assert (await seal(connection, found.line, durably=False)).segments == 0


async def test_sealers_at_once_append_each_segment_once(trail_url, connection):
    stop = asyncio.Event()

    async def store(number):
        mine = await asyncpg.connect(trail_url)
        writer = await PlainWriter(mine).begin()
        for turn in range(30):
            await writer.store([event(number * 100 + turn, tenant=f"t{turn % 3}")])
        await writer.end()
        await mine.close()

    async def work():
        mine, line, times = await asyncpg.connect(trail_url), 0, 0
        while not stop.is_set():
            found = await seal(mine, line, durably=True)
            if found is not None:
                line, times = found.line, times + found.segments
            await asyncio.sleep(0)
        await mine.close()
        return times

    workers = [asyncio.create_task(work()) for _ in range(3)]
    await asyncio.gather(*(store(number) for number in range(4)))
    while await connection.fetchval("SELECT count(*) FROM audit_log") < 120:
        await asyncio.sleep(0.01)
    stop.set()
    assert sum(await asyncio.gather(*workers)) == 120
    await Signer(KEY, None).sign_due(connection, AT_ONCE, durably=False)
    report = await checked(connection)
    assert report.problems == []
    assert report.log_entries == 120
    assert report.origin.startswith("dotmac-audit/")


async def test_a_checkpoint_is_signed_when_the_log_grew(connection):
    signer = Signer(KEY, "example.com/audit")
    signed = await sealed(connection, signer=signer)
    assert [(one.tenant_id, one.checkpoint.size) for one in signed] == [("", 10), ("a", 10), ("b", 10)]
    assert await signer.sign_due(connection, AT_ONCE, durably=True) == ([], [])
    assert await Signer(KEY, None).sign_due(connection, AT_ONCE, durably=False) == ([], [])
    (again,) = await sealed(connection, 4, tenants=("a",), signer=signer)
    assert (again.tenant_id, again.checkpoint.size) == ("a", 11)
    # Not again within the interval, by whichever process.
    await (await PlainWriter(connection).begin()).store([event(1, tenant="a")])
    await seal(connection, 0, durably=False)
    assert await Signer(KEY, None).sign_due(connection, timedelta(hours=1), durably=False) == ([], [])
    with pytest.raises(ConfigurationError, match=r"AUDIT_TRAIL_ORIGIN.*example\.com/audit"):
        await Signer(KEY, "example.com/other").sign_due(connection, AT_ONCE, durably=False)


async def test_a_rotated_key_signs_at_once_and_the_old_one_is_still_known(connection):
    await sealed(connection)
    new = SigningKey.generate()
    signed, _ = await Signer(new, None).sign_due(connection, AT_ONCE, durably=False)
    assert len(signed) == 3
    report = await verify(connection, keys=[new.public_key, KEY.public_key])
    assert report.problems == []
    assert report.checkpoints == 6
    assert kinds(await verify(connection, keys=[new.public_key])) == {"key_unknown"}
    assert kinds(await verify(connection)) == {"keys_not_given"}


async def test_a_long_log_is_read_on_where_a_pass_was_broken_off(connection, monkeypatch):
    monkeypatch.setattr(checkpoints, "_BLOCK", 4)
    await sealed(connection, 40, tenants=("a",))
    await (await PlainWriter(connection).begin()).store([event(number, tenant="a") for number in range(3)])
    await seal(connection, 0, durably=False)

    class Slow:
        """Breaks each pass off after so many pages."""

        def __init__(self):
            self.pages, self.asked = 2, []

        def __getattr__(self, name):
            return getattr(connection, name)

        async def fetch(self, statement, *values):
            if "position >= $2" in statement:
                self.asked.append(values[1])
                if len(self.asked) % (self.pages + 1) == 0:
                    raise TimeoutError
            return await connection.fetch(statement, *values)

    signer, slow = Signer(KEY, None), Slow()
    for _ in range(9):
        try:
            signed, broken = await signer.sign_due(slow, AT_ONCE, durably=False)
        except TimeoutError:
            continue
        break
    assert ([one.checkpoint.size for one in signed], broken) == ([11], [])
    assert sorted(set(slow.asked)) == [0, 4, 8, 10]
    assert slow.asked.count(0) == 1
    assert (await checked(connection)).problems == []


async def test_a_log_that_was_changed_is_not_signed(connection):
    signer = Signer(KEY, None)
    await sealed(connection, signer=signer)
    await (await PlainWriter(connection).begin()).store([event(1, tenant="a"), event(2, tenant="b")])
    await seal(connection, 0, durably=False)
    for change, text in (
        ("UPDATE audit_log SET leaf = sha256('x') WHERE tenant_id = 'a' AND position = 3", "were changed"),
        ("DELETE FROM audit_log WHERE tenant_id = 'a' AND position = 3", "an entry is missing"),
        ("DELETE FROM audit_log WHERE tenant_id = 'a' AND position > 7", "rolled back"),
    ):
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SET LOCAL session_replication_role = replica")
        await connection.execute(change)
        signed, (error,) = await Signer(KEY, None).sign_due(connection, AT_ONCE, durably=False)
        assert isinstance(error, LogInconsistent)
        assert text in str(error)
        assert "'a'" in str(error)
        assert [one.tenant_id for one in signed] == ["b"]  # the others' logs are signed all the same
        await transaction.rollback()
    # Everything was rolled back, checkpoints too: the signer remembers.
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("SET LOCAL session_replication_role = replica")
    await connection.execute("DELETE FROM audit_log WHERE tenant_id = 'a' AND position > 7")
    await connection.execute("DELETE FROM audit_checkpoints WHERE tenant_id = 'a'")
    _, (error,) = await signer.sign_due(connection, AT_ONCE, durably=False)
    assert "was signed here at size 10" in str(error)
    await transaction.rollback()


async def test_the_tables_are_append_only(connection):
    await sealed(connection)
    await connection.execute("INSERT INTO audit_anchors (place, tenant_id, size) VALUES ('x', '', 1)")
    for table, column in (
        ("audit_trail", "origin"),
        ("audit_legacy", "events"),
        ("audit_log", "leaf"),
        ("audit_checkpoints", "note"),
        ("audit_anchors", "place"),
        ("audit_segments", "root"),
        ("audit_writers", "host"),
        ("audit_writer_ends", "segments"),
    ):
        for statement in (
            f"UPDATE {table} SET {column} = {column}",
            f"DELETE FROM {table}",
            f"TRUNCATE {table}",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match=f"{table} is append-only"):
                await connection.execute(statement)


async def test_proofs_check_without_the_database(trail_url, connection):
    await sealed(connection, 41, size=7)
    other = SigningKey.generate()
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        rows = await connection.fetch("SELECT id, tenant_id, action FROM audit_events")
        assert len(rows) == 41
        for row in rows:
            proof = json.loads(json.dumps(await audit.prove(row["id"])))
            found = check_proof(proof, audit.trusted_keys())
            assert found.event["id"] == str(row["id"])
            assert found.event["action"] == row["action"]
            assert found.event.get("tenant_id") == row["tenant_id"]
            assert found.segment["tenant_id"] == (row["tenant_id"] or "")
        with pytest.raises(InvalidCheckpoint, match="not signed with a key"):
            check_proof(proof, [other.public_key])
        for name, change in (
            ("event", lambda value: value.replace("record.read", "record.gone")),
            ("event", lambda value: value.replace("{", "{ ", 1)),
            ("leaf_index", lambda value: value ^ 1),
            ("segment_path", lambda value: value[1:] or ["00" * 32]),
            ("segment", lambda value: {**value, "recorded_at": value["recorded_at"] - 1}),
            ("segment", lambda value: {**value, "tenant_id": "other"}),
            ("segment", lambda value: {**value, "seq": float(value["seq"])}),
            ("segment", lambda value: {**value, "recorded_at": value["recorded_at"] + 0.1}),
            ("segment", lambda value: {**value, "more": None}),
            ("segment", lambda value: {**value, "tenant_id": "\ud800"}),
            ("log_index", lambda value: value ^ 1),
            ("log_path", lambda value: ["00" * 32, *value[1:]]),
            ("log_path", lambda value: "zz"),
            ("log_path", lambda value: ["zz"]),
            ("format", lambda value: "other"),
            ("checkpoint", lambda value: 1),
        ):
            with pytest.raises(InvalidProof):
                check_proof({**proof, name: change(proof[name])}, [KEY.public_key])
            with pytest.raises(InvalidProof):
                check_proof({key: value for key, value in proof.items() if key != name}, [KEY.public_key])
        for text in ("", "[]", "[" * 100_000, b"\xff"):
            with pytest.raises(InvalidProof):
                check_proof(text, [KEY.public_key])


async def test_what_has_no_proof(trail_url, connection):
    writer = await PlainWriter(connection).begin()
    late = event(1)
    await writer.store([late])
    await connection.execute(
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome) "
        "VALUES (now(), '00000000-0000-0000-0000-000000000001', 'system', 'x', 'info', 'success')"
    )
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        with pytest.raises(NotProvable, match="without integrity"):
            await audit.prove("00000000-0000-0000-0000-000000000001")
        with pytest.raises(NotProvable, match="no event"):
            await audit.prove("00000000-0000-0000-0000-000000000002")
        with pytest.raises(NotProvable, match="not sealed yet") as caught:
            await audit.prove(late["id"])
        assert caught.value.later
        await seal(connection, 0, durably=False)
        with pytest.raises(NotProvable, match="no checkpoint covers"):
            await audit.prove(late["id"])
        done = await audit.checkpoint()
        assert (done.segments, len(done.checkpoints), done.errors) == (0, 1, [])
        assert check_proof(await audit.prove(late["id"]), [KEY.public_key]).size == 1


CHANGES = (
    "audit_events SET action = 'other'",
    "audit_events SET leaf = NULL",
    "audit_events SET leaf = 7",
    "audit_events SET leaf = -1",
    "audit_segments SET last_at = 'infinity'",
    "audit_segments SET recorded_at = '20000-01-01Z'",
    "audit_segments SET writer = NULL",
    "audit_segments SET size = 7, leaves = NULL",
    "audit_segments SET leaves = '\\x01'",
    "audit_log SET leaf = NULL",
    "audit_log SET leaf = '\\x01'",
    "audit_log SET position = 5",
    "audit_log SET position = -1",
    "audit_log SET position = NULL",
    "audit_checkpoints SET size = NULL",
    "audit_checkpoints SET note = ''",
    "audit_checkpoints SET note = NULL",
)


async def test_what_was_changed_has_no_proof(trail_url, connection):
    """Rather than one that whoever gets it finds to be wrong. Each change is made to a tenant of its own."""
    writer = await PlainWriter(connection).begin()
    stored = [event(number, tenant=f"t{number}") for number in range(len(CHANGES))]
    for one in stored:
        await writer.store([one])
    await seal(connection, 0, durably=False)
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        await audit.checkpoint()
        await free(connection, "audit_segments", "writer")
        await free(connection, "audit_log", "leaf", "position")
        await free(connection, "audit_checkpoints", "note", "size")
        await connection.execute("SET session_replication_role = replica")
        for one, change in zip(stored, CHANGES, strict=True):
            proof = await audit.prove(one["id"])
            assert check_proof(proof, [KEY.public_key]).size == 1, change
            await connection.execute(f"UPDATE {change} WHERE tenant_id = $1", one["tenant_id"])
            with pytest.raises(NotProvable) as caught:
                await audit.prove(one["id"])
            assert not caught.value.later, change


@pytest.mark.parametrize("state", ["unsealed", "sealed", "signed"])
async def test_what_can_never_be_proved_is_not_for_later(trail_url, connection, state):
    changes = {
        "unsealed": ["audit_events SET action = 'other'", "audit_events SET resource_id = 'other'"],
        "sealed": [
            "audit_events SET action = 'other'",
            "audit_log SET leaf = '\\x01'",
            "audit_log SET position = 3",
            "audit_segments SET last_at = 'infinity'",
        ],
        "signed": [None, "audit_events SET action = 'other'"],
    }[state]
    writer = await PlainWriter(connection).begin()
    stored = [event(number, tenant=f"t{number}") for number in range(len(changes) + 1)]
    for one in stored:
        await writer.store([one])
    if state != "unsealed":
        await seal(connection, 0, durably=False)
    await free(connection, "audit_log", "leaf")
    await connection.execute("SET session_replication_role = replica")
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        if state == "signed":
            await audit.checkpoint()
        else:
            with pytest.raises(NotProvable) as caught:
                await audit.prove(stored[-1]["id"])
            assert caught.value.later, "an honest one"
        for one, change in zip(stored, changes, strict=False):
            tenant = one["tenant_id"]
            if change is None:
                await connection.execute("DELETE FROM audit_log WHERE tenant_id = $1", tenant)
            else:
                await connection.execute(f"UPDATE {change} WHERE tenant_id = $1", tenant)
            with pytest.raises(NotProvable) as caught:
                await audit.prove(one["id"])
            assert not caught.value.later, change


async def test_a_row_of_the_same_id_takes_no_proof_away(trail_url, connection):
    stored = event(1)
    await (await PlainWriter(connection).begin()).store([stored])
    await seal(connection, 0, durably=False)
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        await audit.checkpoint()
        for segment in (None, UUID(int=7)):
            for days in (-40, 1, 40):
                moment = stored["occurred_at"] + timedelta(days=days)
                await connection.execute("SELECT audit_ensure_partition($1)", moment)
                await connection.execute(
                    "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, "
                    "segment, leaf) VALUES ($1, $2, 'system', 'x', 'info', 'success', $3, 0)",
                    moment + timedelta(seconds=segment is None),
                    stored["id"],
                    segment,
                )
            assert check_proof(await audit.prove(stored["id"]), [KEY.public_key]).size == 1


async def test_a_line_that_no_database_could_have_ends_no_verification(trail_url, connection, tmp_path):
    path = tmp_path / "checkpoints"
    config = AuditTrailConfig(postgres_url=trail_url, origin="example.com/audit", anchors=path.as_uri())
    async with AuditAggregator(config=config, signing_key=KEY, sealing=False) as audit:
        await sealed(connection)
        await audit.checkpoint()
        honest = json.loads(path.read_text().splitlines()[0])
        for old, new in (("audit", "audit\ud800"), ("audit", "audit\0"), ("audit", "audit/%00")):
            note = honest["note"].replace(old, new, 1)
            with path.open("a") as file:
                file.write(json.dumps({**honest, "note": note}) + "\n")
        report = await audit.verify_integrity()
        assert report.ok
        assert report.counts[FindingKind.ANCHOR_UNREADABLE] >= 2
        assert json.dumps(report.to_dict())


async def test_an_id_that_two_events_have_has_no_proof_but_at_its_place(trail_url, connection):
    stored = event(1)
    again = {**stored, "occurred_at": stored["occurred_at"] + timedelta(seconds=1)}
    await (await PlainWriter(connection).begin()).store([stored, again])
    await seal(connection, 0, durably=False)
    async with AuditAggregator(trail_url, signing_key=KEY, sealing=False) as audit:
        await audit.checkpoint()
        assert check_proof(await audit.prove(stored["id"]), [KEY.public_key]).size == 1
        await connection.execute("SET session_replication_role = replica")
        await connection.execute("UPDATE audit_events SET leaf = 0")
        with pytest.raises(NotProvable, match="2 events have its place"):
            await audit.prove(stored["id"])


async def test_the_aggregator_seals_and_signs_in_the_background(trail_url, connection):
    config = AuditTrailConfig(postgres_url=trail_url, checkpoint_interval=0.1)
    async with AuditAggregator(config=config, signing_key=KEY) as audit:
        assert await audit.count_events() == 0
        await (await PlainWriter(connection).begin()).store([event(1)])
        async with asyncio.timeout(20):
            while not (report := await audit.verify_integrity()).checkpoints:
                await asyncio.sleep(0.1)
        assert report.problems == []
        assert report.log_entries == 1
    config = AuditTrailConfig(postgres_url=trail_url)
    async with AuditAggregator(config=config) as audit:
        await audit.count_events()
        assert (await audit._state()).sealer is None


async def test_anchors_show_a_rollback_of_everything(trail_url, connection, tmp_path):
    anchor = (tmp_path / "checkpoints").as_uri()
    config = AuditTrailConfig(postgres_url=trail_url, origin="example.com/audit", anchors=anchor)
    async with AuditAggregator(config=config, signing_key=KEY, sealing=False) as audit:
        await sealed(connection)
        done = await audit.checkpoint()
        assert done.errors == []
        report = await audit.verify_integrity()
        assert report.problems == []
        assert (report.anchored, report.checkpoints) == (3, 3)
        # As if a backup had been restored: nothing in the database knows of what came later.
        await connection.execute("SET session_replication_role = replica")
        gone = await connection.fetchval(
            "SELECT segment FROM audit_log WHERE tenant_id = 'a' AND position = 9"
        )
        for table, column in (
            ("audit_events", "segment"),
            ("audit_segments", "id"),
            ("audit_log", "segment"),
        ):
            await connection.execute(f"DELETE FROM {table} WHERE {column} = $1", gone)
        await connection.execute("DELETE FROM audit_checkpoints WHERE tenant_id = 'a'")
        await connection.execute("UPDATE audit_writer_ends SET segments = segments - 1")
        await connection.execute("DELETE FROM audit_anchors")
        report = await audit.verify_integrity()
        assert kinds(report) == {"checkpoint_missing", "log_truncated"}
        assert {one.tenant_id for one in report.problems} == {"a"}
        assert kinds(await audit.verify_integrity(anchors=[])) == set()
        # All of it is gone.
        for table in ("audit_events", "audit_segments", "audit_log", "audit_checkpoints", "audit_trail"):
            await connection.execute(f"DELETE FROM {table}")
        report = await audit.verify_integrity()
        assert report.counts[FindingKind.LOG_TRUNCATED] == 3


async def test_a_checkpoint_signed_while_anchors_are_read_is_not_missing(trail_url, connection):
    other = await asyncpg.connect(trail_url)
    signer = Signer(KEY, "example.com/audit")
    await sealed(connection, 4, tenants=("a",), signer=signer)

    class Busy:
        place = "busy"

        async def notes(self, _):
            for (note,) in await other.fetch("SELECT note FROM audit_checkpoints"):
                yield note
            (one,) = await sealed(other, 4, tenants=("a",), signer=signer)
            yield one.note

    try:
        report = await checked(connection, anchors=[Busy()])
    finally:
        await other.close()
    assert (report.findings, report.anchored, report.checkpoints) == ([], 2, 2)


async def test_signing_is_not_switched_off_by_a_time_that_lies_ahead(connection):
    signer = Signer(KEY, "example.com/audit")
    await sealed(connection, 4, tenants=("a",), signer=signer)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("UPDATE audit_checkpoints SET signed_at = now() + interval '10 years'")
    await (await PlainWriter(connection).begin()).store([event(1, tenant="a")])
    await seal(connection, 0, durably=False)
    signed, broken = await signer.sign_due(connection, timedelta(hours=1), durably=False)
    assert (len(signed), broken) == (1, [])


async def test_what_was_sealed_and_never_signed_is_told(connection):
    await sealed(connection, 4, tenants=("a",))
    await (await PlainWriter(connection).begin()).store([event(1, tenant="a")])
    await (await PlainWriter(connection).begin()).store([event(2, tenant="b")])
    await seal(connection, 0, durably=False)
    assert (await checked(connection)).problems == []
    late = await checked(connection, overdue=AT_ONCE)
    assert [(one.kind.value, one.tenant_id) for one in late.problems] == [
        ("checkpoint_overdue", "a"),
        ("checkpoint_overdue", "b"),
    ]
    # Without a key nobody has to sign what never was.
    assert [one.tenant_id for one in (await verify(connection, overdue=AT_ONCE)).problems] == ["a"]


async def test_anchoring_is_not_switched_off_by_a_row(trail_url, connection, tmp_path):
    kept = tmp_path / "checkpoints"
    config = AuditTrailConfig(
        postgres_url=trail_url, origin="example.com/audit", anchors=kept.as_uri(), checkpoint_interval=0.1
    )
    await connection.execute(
        "INSERT INTO audit_anchors (place, tenant_id, size) SELECT $1, '', size "
        "FROM generate_series(1, 9) AS size UNION ALL SELECT $1, '', 1 << 30",
        kept.as_uri(),
    )
    async with AuditAggregator(config=config, signing_key=KEY) as audit:
        for wanted in (1, 2, 3):
            await audit.log_event("SYSTEM", "x")
            async with asyncio.timeout(20):
                while not kept.exists() or len(kept.read_text().splitlines()) < wanted:
                    await asyncio.sleep(0.05)
    async with AuditAggregator(config=config, signing_key=KEY, sealing=False) as audit:
        assert (await audit.verify_integrity()).findings == []
        kept.unlink()
        report = await audit.verify_integrity()
        assert kinds(report) == {"anchor_behind"}
        assert not report.ok
        # After a start the newest is sent, whatever the database says was.
        assert (await audit.checkpoint()).errors == []
        report = await audit.verify_integrity()
        assert (report.findings, report.anchored) == ([], 1)


async def test_a_place_that_lost_its_newest_checkpoints_is_told(connection):
    signer = Signer(KEY, "example.com/audit")
    (first,) = await sealed(connection, 4, tenants=("a",), signer=signer)
    (second,) = await sealed(connection, 4, tenants=("a",), signer=signer)

    class Place:
        place = "place"

        def __init__(self, *signed):
            self.kept = signed

        async def notes(self, _):
            for one in self.kept:
                yield one.note

    assert (await checked(connection, anchors=[Place(first)])).problems == []
    assert (await checked(connection, anchors=[Place(first, second)], overdue=AT_ONCE)).problems == []
    for signed in ((), (first,)):
        (found,) = (await checked(connection, anchors=[Place(*signed)], overdue=AT_ONCE)).problems
        assert (found.kind.value, found.tenant_id) == ("anchor_behind", "a")
