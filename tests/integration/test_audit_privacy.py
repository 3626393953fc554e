"""Personal data on one real PostgreSQL.

Promises: nothing of them is in the database in clear, nor in errors and logs; a reader who may gets them back as
they were given, others see `sealed`; they belong to a subject, the same name in another tenant being another
one; without a key-encryption key nothing is stored; many tasks, loops, processes and a forked child that log
about new subjects at once make one key each; after an erasure nobody reads them, in other processes with a warm
cache either, and the proofs' input stays to the byte; an erasure is certified once, whatever step it was
cancelled at; a legal hold forbids it; keys can be wrapped anew, by a KMS too, whatever is erased meanwhile; the
table of keys takes no other change.
"""

# ruff: noqa: E501 (tables read best by the line)

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import time
import uuid

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dotmac.platform.audit_trail import AuditAggregator, PersonalState, RedactionRule, audit_context
from dotmac.platform.audit_trail.config import AuditTrailConfig
from dotmac.platform.audit_trail.personal_key import new_personal_key
from dotmac.platform.errors import (
    AuditUnavailable,
    ErasureRefused,
    InvalidArgument,
    InvalidEvent,
    KeyServiceUnavailable,
    PersonalKeyMissing,
)
from support.postgres import PostgresProxy

KEY = base64.b64encode(bytes(range(32))).decode()  # the same in processes that import this anew


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url, personal_key=KEY, decrypt_personal=True) as aggregator:
        yield aggregator


@pytest.fixture
async def connection(migrated_url):
    connection = await asyncpg.connect(migrated_url)
    yield connection
    await connection.close()


def log(audit, subject, personal=None, **more):
    return audit.log_event(
        "DATA_CHANGE",
        "user.update",
        user_id=subject,
        personal=personal or {"email": "ada@example.com"},
        **more,
    )


async def everything(connection):
    """All that the tables hold, as text."""
    found = []
    for table in ("audit_events", "audit_subject_keys"):
        found += [str(row[0]) for row in await connection.fetch(f"SELECT t::text FROM {table} AS t")]
    return "\n".join(found)


# --- sealed and opened


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(
    st.dictionaries(
        st.from_regex(r"[a-zäö][a-z_. äö]{0,20}", fullmatch=True), json_values, min_size=1, max_size=5
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_given_comes_back(migrated_url, unique, personal):
    async def run():
        # Hypothesis tries words of the code under test, which has the names of secrets.
        config = AuditTrailConfig(redact_secrets=False)
        async with AuditAggregator(migrated_url, config=config, personal_key=KEY) as audit:
            event_id = await log(audit, unique, personal)
            sealed = await audit.get_event(event_id)
            assert sealed.personal is PersonalState.SEALED
            assert set(sealed.sealed["fields"]) == set(personal)
            opened = await audit.get_event(event_id, decrypt_personal=True)
            assert opened.personal == personal
            assert (await audit.open_personal([sealed])) == [opened]

    asyncio.run(run())


async def test_nothing_is_stored_told_or_logged_in_clear(audit, connection, unique, caplog):
    caplog.set_level(logging.DEBUG)
    clear = f"clear{os.urandom(8).hex()}"
    for name, personal in (
        ("stored", {"email": clear, "list": [clear, {"k": clear}]}),
        ("not JSON", {"x": {clear}}),
        ("NaN", {"x": [clear, float("nan")]}),
        ("no mapping", [clear]),
        ("surrogate", {"x": clear + "\ud800"}),
        ("large", {"x": clear * 20_000}),
    ):
        if name == "stored":
            await log(audit, unique, personal)
        else:
            with pytest.raises(InvalidEvent, match="personal") as caught:
                await log(audit, unique, personal)
            assert clear not in repr(caught.value)
    stored = await everything(connection)
    assert unique in stored
    assert clear not in stored
    assert clear not in caplog.text
    assert base64.b64decode(KEY).hex() not in stored


async def test_they_belong_to_somebody(audit, unique):
    with pytest.raises(InvalidEvent, match="subject_id.*give subject_id or user_id"):
        await audit.log_event("PRIVACY", "x", personal={"a": 1})
    event_id = await audit.log_event("PRIVACY", "x", user_id="clerk", subject_id=unique, personal={"a": 1})
    event = await audit.get_event(event_id)
    assert (event.user_id, event.subject_id, event.personal) == ("clerk", unique, {"a": 1})
    with audit_context(user_id=unique):
        event = await audit.get_event(await audit.log_event("PRIVACY", "x", personal={"a": 1}))
    assert event.subject_id == unique
    empty = await audit.log_event("PRIVACY", "x", personal={})
    assert (await audit.get_event(empty)).personal is None


async def test_without_a_key_nothing_is_stored(migrated_url, unique):
    async with AuditAggregator(migrated_url) as audit:
        with pytest.raises(PersonalKeyMissing, match="AUDIT_TRAIL_PERSONAL_KEY"):
            await log(audit, unique)
        assert await audit.count_events(user_id=unique) == 0
    async with AuditAggregator(migrated_url, personal_key=KEY) as audit:
        event_id = await log(audit, unique)
    async with AuditAggregator(migrated_url, decrypt_personal=True) as audit:
        with pytest.raises(PersonalKeyMissing):
            await audit.get_event(event_id)
    async with AuditAggregator(migrated_url, personal_key=new_personal_key()) as audit:
        assert (await audit.get_event(event_id, decrypt_personal=True)).personal is PersonalState.SEALED
        with pytest.raises(PersonalKeyMissing, match="AUDIT_TRAIL_PERSONAL_OLD_KEYS"):
            await log(audit, unique)
    for wrong in ("short", "x" * 44, b"0" * 31, 7):
        with pytest.raises(InvalidArgument, match="personal_key") as caught:
            async with AuditAggregator(migrated_url, personal_key=wrong) as audit:
                await log(audit, unique)
        assert str(wrong) not in str(caught.value) or wrong == 7


async def test_the_configurations_key(migrated_url, unique, tmp_path):
    config = AuditTrailConfig(
        personal_key=base64.b64decode(KEY).hex(), personal_old_keys=f"{new_personal_key()},"
    )
    assert KEY not in repr(config)
    async with AuditAggregator(migrated_url, config=config) as audit:
        event_id = await log(audit, unique)
    async with AuditAggregator(migrated_url, personal_key=base64.b64decode(KEY)) as audit:
        assert (await audit.get_event(event_id, decrypt_personal=True)).personal == {
            "email": "ada@example.com"
        }


def test_wrong_settings_are_told_at_once_and_not_shown():
    for wrong, told in (
        ({"personal_key": "hunter2"}, "32 random bytes"),
        ({"personal_old_keys": f"{KEY},hunter2"}, "32 random bytes"),
        ({"redact_rules": "hunter2"}, "JSON list"),
        ({"redact_rules": '[{"patterns": ["hunter2s"]}]'}, "the patterns are"),
    ):
        with pytest.raises(ValidationError, match=told):
            AuditTrailConfig(**wrong)


async def test_a_ciphertext_opens_nowhere_else(audit, connection, unique):
    mine = await audit.get_event(await log(audit, unique))
    other = await audit.get_event(await log(audit, unique, {"email": "b", "name": "c"}))
    fields = other.sealed["fields"]
    swapped = {"key": other.sealed["key"], "fields": {"email": fields["name"], "name": fields["email"]}}
    moved = mine.sealed
    flipped = bytearray(base64.b64decode(fields["email"]))
    flipped[20] ^= 1
    for sealed in (
        swapped, moved, {"key": other.sealed["key"], "fields": {"email": base64.b64encode(flipped).decode()}},
        {"key": other.sealed["key"], "fields": {"email": "AA=="}}, {"key": other.sealed["key"], "fields": 7},
        {"key": 7}, {"fields": {}}, {"key": other.sealed["key"], "fields": {"email": None}},
    ):  # fmt: skip
        (found,) = await audit.open_personal([dataclasses.replace(other, sealed=sealed)])
        assert found.personal is PersonalState.UNREADABLE, sealed


# --- keys


async def test_one_key_each_however_many_come_at_once(migrated_url, connection, unique):
    names = [f"{unique}-{number}" for number in range(30)]
    many = [AuditAggregator(migrated_url, personal_key=KEY) for _ in range(4)]
    ids = await asyncio.gather(*(log(one, name) for name in names for one in many for _ in range(3)))
    keys = await connection.fetch("SELECT * FROM audit_subject_keys WHERE subject_id LIKE $1", f"{unique}-%")
    assert len(keys) == len(names)
    async with many[0] as audit:
        for event_id in random.sample(ids, 20):
            event = await audit.get_event(event_id, decrypt_personal=True)
            assert event.personal == {"email": "ada@example.com"}
    for one in many:
        await one.aclose()


def _log_in_a_process(url, subject, start, count):
    async def run():
        async with AuditAggregator(url, personal_key=KEY) as audit:
            start.wait()
            await asyncio.gather(*(log(audit, f"{subject}-{number % 7}") for number in range(count)))

    asyncio.run(run())


def test_processes_and_a_forked_child(migrated_url, unique, run_apart):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    processes = [
        context.Process(target=_log_in_a_process, args=(migrated_url, unique, start, 40)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0

    audit = AuditAggregator(migrated_url, personal_key=KEY, decrypt_personal=True)
    asyncio.run(log(audit, f"{unique}-0"))  # keys are in the parent's cache
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(log(audit, f"{unique}-0"))
            asyncio.run(log(audit, f"{unique}-child"))
        except BaseException:  # noqa: BLE001 (the child must not go on into pytest)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    async def look():
        async with AuditAggregator(migrated_url, personal_key=KEY, decrypt_personal=True) as reader:
            found = [
                event async for event in reader.iter_events(actions="user.update") if unique in event.user_id
            ]
            connection = await asyncpg.connect(migrated_url)
            keys = await connection.fetchval(
                "SELECT count(*) FROM audit_subject_keys WHERE subject_id LIKE $1", f"{unique}-%"
            )
            await connection.close()
            return found, keys

    found, keys = asyncio.run(look())
    assert len(found) == 3 * 40 + 3
    assert all(event.personal == {"email": "ada@example.com"} for event in found)
    assert keys == 8


def test_loops_one_after_another(migrated_url, unique):
    audit = AuditAggregator(migrated_url, personal_key=KEY)
    for _ in range(3):
        asyncio.run(log(audit, unique))


async def test_a_cancelled_caller_takes_no_key_from_others(audit, unique):
    for turn in range(10):
        first = asyncio.create_task(log(audit, f"{unique}{turn}"))
        second = asyncio.create_task(log(audit, f"{unique}{turn}"))
        for _ in range(turn):
            await asyncio.sleep(0)
        first.cancel()
        event = await audit.get_event(await second)
        assert event.personal == {"email": "ada@example.com"}
        await asyncio.wait([first])


async def test_an_unreachable_database_stores_nothing(migrated_url, unique):
    async with (
        PostgresProxy(migrated_url) as proxy,
        AuditAggregator(proxy.url, personal_key=KEY, timeout=2.0) as audit,
    ):
        await log(audit, unique)
        proxy.lose_answer(b"INSERT 0 1")
        await log(audit, f"{unique}-new")  # the key was made, its answer lost: found the next time
        assert proxy.lost == 1
        proxy._server.close()
        for task in list(proxy._tasks):
            task.cancel()
        with pytest.raises(AuditUnavailable):
            await log(audit, f"{unique}-other")
    async with AuditAggregator(migrated_url) as audit:
        assert await audit.count_events(user_id=f"{unique}-new") == 1
        assert await audit.count_events(user_id=f"{unique}-other") == 0


# --- erasure


async def test_erased_data_are_unreadable_everywhere(audit, migrated_url, connection, unique):
    others = [AuditAggregator(migrated_url, personal_key=KEY, decrypt_personal=True) for _ in range(2)]
    ids = [await log(audit, unique, {"email": "a", "name": "b"}) for _ in range(3)]
    kept = await log(audit, f"{unique}-other")
    for one in others:
        assert (await one.get_event(ids[0])).personal == {"email": "a", "name": "b"}
        await log(one, unique)
    before = await connection.fetch("SELECT * FROM audit_events WHERE subject_id = $1 ORDER BY id", unique)
    done = await audit.erase_subject(unique, reason="asked on 2026-11-02", by="dpo")
    assert (done.events, done.fields, done.new, done.erased_by) == (5, 8, True, "dpo")
    after = await connection.fetch(
        "SELECT * FROM audit_events WHERE subject_id = $1 AND personal IS NOT NULL ORDER BY id", unique
    )
    assert after == before, "what the proofs go over is as it was"
    for one in (audit, *others):
        page = await one.query_events(user_id=unique)
        assert [event.personal for event in page] == [PersonalState.ERASED] * 5
        assert (await one.get_event(kept)).personal == {"email": "ada@example.com"}
    key = await connection.fetchrow("SELECT * FROM audit_subject_keys WHERE subject_id = $1", unique)
    assert (key["wrapped"], key["erased_by"], key["reason"]) == (None, "dpo", "asked on 2026-11-02")

    certificate = await audit.get_event(done.certificate)
    assert (certificate.category, certificate.action, certificate.user_id) == (
        "privacy",
        "subject.erased",
        "dpo",
    )
    said = certificate.metadata
    assert (said["events"], said["fields"], said["key_fingerprint"]) == (5, 8, done.fingerprint)
    assert said["justification"] == "asked on 2026-11-02"
    for one in (audit, *others):
        again = await one.erase_subject(unique, reason="again", by="x")
        assert (again.new, again.certificate, again.erased_by, again.key_id) == (
            False, done.certificate, "dpo", done.key_id,
        )  # fmt: skip
    assert await audit.count_events(actions="subject.erased", resource_id=unique) == 1

    # Who comes back gets a new key; what was erased stays so.
    new = await log(audit, unique, {"email": "new"})
    assert (await audit.get_event(new)).personal == {"email": "new"}
    assert (await others[0].get_event(ids[0])).personal is PersonalState.ERASED
    second = await audit.erase_subject(unique, reason="again", by="dpo")
    assert (second.new, second.events) == (True, 1)
    assert second.certificate != done.certificate
    for one in others:
        await one.aclose()


async def test_an_old_key_is_used_for_its_lifetime_only(migrated_url, unique):
    short = AuditTrailConfig(personal_cache_seconds=1.0)
    async with (
        AuditAggregator(migrated_url, personal_key=KEY, config=short, decrypt_personal=True) as late,
        AuditAggregator(migrated_url, personal_key=KEY) as audit,
    ):
        await log(late, unique)
        await audit.erase_subject(unique, reason="x", by="dpo")
        meanwhile = await log(late, unique)
        assert (await late.get_event(meanwhile)).personal is PersonalState.ERASED
        await asyncio.sleep(1.1)
        assert (await late.get_event(await log(late, unique))).personal == {"email": "ada@example.com"}


async def test_a_tenants_subject_is_another_one(audit, unique):
    a = await log(audit, unique, tenant_id=f"{unique}-a")
    b = await log(audit, unique, tenant_id=f"{unique}-b")
    with pytest.raises(InvalidArgument, match="one of a tenant: say which"):
        await audit.erase_subject(unique, reason="x", by="dpo")
    with audit_context(tenant_id=f"{unique}-a"):
        done = await audit.erase_subject(unique, reason="x", by="dpo")
    assert done.tenant_id == f"{unique}-a"
    assert (await audit.get_event(a)).personal is PersonalState.ERASED
    assert (await audit.get_event(b)).personal == {"email": "ada@example.com"}


async def test_nothing_to_erase_and_wrong_arguments(audit, unique):
    done = await audit.erase_subject(unique, reason="x", by="dpo")
    assert (done.key_id, done.new, done.certificate) == (None, False, None)
    for wrong in ({"reason": ""}, {"reason": "x" * 513}, {"by": None}, {"by": True}, {"tenant_id": ""}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            await audit.erase_subject(unique, **{"reason": "x", "by": "dpo", **wrong})
    await log(audit, unique)
    done = await audit.erase_subject(unique, reason="password=hunter2", by="dpo")
    assert done.reason == "password=***"


async def test_certified_once_whatever_step_it_was_cancelled_at(migrated_url, connection, unique):
    async with AuditAggregator(migrated_url, personal_key=KEY) as audit:
        for turn in range(60):
            subject = f"{unique}-{turn}"
            await log(audit, subject)
            erasing = asyncio.create_task(audit.erase_subject(subject, reason="x", by="dpo"))
            for _ in range(turn):
                await asyncio.sleep(0)
            if turn % 3 == 0:
                await asyncio.sleep(random.random() * 0.02)
            erasing.cancel()
            await asyncio.wait([erasing])
            done = await audit.erase_subject(subject, reason="y", by="dpo")
            assert (done.events, done.fields) == (1, 1)
            assert await audit.count_events(actions="subject.erased", resource_id=subject) == 1
    uncertified = (
        "SELECT count(*) FROM audit_subject_keys WHERE erased_at IS NOT NULL AND certified_at IS NULL"
    )
    assert await connection.fetchval(f"{uncertified} AND subject_id LIKE $1", f"{unique}-%") == 0


async def test_an_older_erasure_without_certificate_is_certified_too(audit, connection, unique):
    await log(audit, unique)
    sql = (
        "UPDATE audit_subject_keys SET wrapped = NULL, erased_at = now(), erased_by = 'x', reason = 'y', "
        "certificate = $2 WHERE subject_id = $1"
    )
    certificate = audit._new_id()
    await connection.execute(sql, unique, certificate)
    audit._vault().cache._writing.clear()
    await log(audit, unique)
    done = await audit.erase_subject(unique, reason="again", by="dpo")
    assert done.new
    assert {event.id for event in await audit.query_events(actions="subject.erased", resource_id=unique)} == {
        certificate, done.certificate,
    }  # fmt: skip


# --- the keys above the keys


class Kms:
    """A key service in memory, which may be slow or out of order."""

    def __init__(self, name):
        self.name, self.kept, self.fails, self.contexts = name, {}, False, set()

    async def wrap(self, key, context):
        await asyncio.sleep(0)
        if self.fails:
            raise TimeoutError("the service does not answer")
        handle = os.urandom(16)
        self.kept[handle] = (key, dict(context))
        return handle

    def unwrap(self, wrapped, context):
        if self.fails:
            raise TimeoutError("the service does not answer")
        key, meant = self.kept[wrapped]
        assert meant == context
        return key


async def test_a_key_service(migrated_url, unique):
    kms = Kms("arn:key/1")
    async with AuditAggregator(migrated_url, personal_key=kms, decrypt_personal=True) as audit:
        event_id = await log(audit, unique)
        assert (await audit.get_event(event_id)).personal == {"email": "ada@example.com"}
        kms.fails = True
        await log(audit, unique)  # from the cache
        with pytest.raises(KeyServiceUnavailable, match=r"arn:key/1.*wrap.*TimeoutError"):
            await log(audit, f"{unique}-2")
        assert await audit.count_events(user_id=f"{unique}-2") == 0


class StuckKms(Kms):
    """Does not answer for one call, or at all, and can't be cancelled at once."""

    stuck_at = None
    calls = 0

    async def wrap(self, key, context):
        self.calls += 1
        if self.stuck_at in (0, self.calls):
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                await asyncio.sleep(5)
        return await super().wrap(key, context)


async def test_a_key_service_that_is_stuck(migrated_url, unique):
    kms = StuckKms("arn:key/2")
    kms.stuck_at = 2
    async with AuditAggregator(migrated_url, personal_key=kms, timeout=2) as audit:
        async with asyncio.timeout(10):
            answers = await asyncio.gather(
                *(log(audit, f"{unique}-{number}") for number in range(5)), return_exceptions=True
            )
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        assert [type(error) for error in failed] == [KeyServiceUnavailable]
        assert "no answer within 1 s" in str(failed[0])
        kms.stuck_at = 0
        async with asyncio.timeout(10):
            with pytest.raises(KeyServiceUnavailable):
                await log(audit, f"{unique}-6")
        kms.stuck_at = None
        await log(audit, f"{unique}-6")
        assert await audit.count_events(actions="user.update", user_id=f"{unique}-6") == 1


class WaitingKms(Kms):
    """Not async, as most clients of such services are."""

    seconds = 0.2

    def wrap(self, key, context):
        time.sleep(self.seconds)
        handle = os.urandom(16)
        self.kept[handle] = (key, dict(context))
        return handle

    def unwrap(self, wrapped, context):
        time.sleep(self.seconds)
        return super().unwrap(wrapped, context)


async def test_a_key_service_that_waits_blocks_no_loop(migrated_url, unique):
    kms = WaitingKms("arn:key/3")
    loop = asyncio.get_running_loop()

    async def longest_gap():
        gap, before = 0.0, loop.time()
        try:
            while True:
                await asyncio.sleep(0.01)
                gap, before = max(gap, loop.time() - before), loop.time()
        except asyncio.CancelledError:
            return gap

    config = AuditTrailConfig(personal_cache_size=1)
    async with AuditAggregator(
        migrated_url, config=config, personal_key=kms, timeout=2, decrypt_personal=True
    ) as audit:
        watch = asyncio.create_task(longest_gap())
        ids = [await log(audit, f"{unique}-{number}") for number in range(3)]
        for event_id in ids:
            assert (await audit.get_event(event_id)).personal == {"email": "ada@example.com"}
        watch.cancel()
        assert await watch < kms.seconds
        kms.seconds = 1.5
        with pytest.raises(KeyServiceUnavailable, match="no answer within 1 s"):
            await log(audit, f"{unique}-9")


async def test_rotation(migrated_url, postgres_database, unique):
    async with AuditAggregator(postgres_database, personal_key=KEY) as audit:
        await audit.migrate()
        ids = [await log(audit, f"{unique}-{number}") for number in range(25)]
        await audit.erase_subject(f"{unique}-3", reason="x", by="dpo")
    new = new_personal_key()
    both = AuditTrailConfig(personal_key=new, personal_old_keys=KEY)
    told = []
    async with AuditAggregator(postgres_database, config=both, decrypt_personal=True) as audit:
        await log(audit, f"{unique}-4")
        assert await audit.rotate_personal_key(batch_size=10, progress=told.append) == 24
        assert told == [10, 20, 24]
        assert await audit.rotate_personal_key() == 0
    async with AuditAggregator(postgres_database, personal_key=new, decrypt_personal=True) as audit:
        found = [(await audit.get_event(one)).personal for one in ids]
    assert found.pop(3) is PersonalState.ERASED
    assert found == [{"email": "ada@example.com"}] * 24
    async with AuditAggregator(postgres_database, personal_key=KEY) as audit:
        opened = await audit.get_event(ids[0], decrypt_personal=True)
        assert opened.personal is PersonalState.SEALED
        with pytest.raises(PersonalKeyMissing, match="not configured"):
            await audit.rotate_personal_key()
        with pytest.raises(InvalidArgument):
            await audit.rotate_personal_key(batch_size=0)


async def test_the_table_of_keys_takes_no_other_change(audit, connection, unique):
    await log(audit, unique)
    await log(audit, f"{unique}-2")
    await audit.erase_subject(unique, reason="x", by="dpo")
    for change in (
        "SET wrapped = 'x', erased_at = NULL, certificate = NULL", "SET reason = 'other'", "SET certified_at = NULL",
        "SET subject_id = 'x'", "SET erased_at = now()", "SET wrapped = 'x'",
    ):  # fmt: skip
        with pytest.raises(asyncpg.PostgresError):
            await connection.execute(f"UPDATE audit_subject_keys {change} WHERE subject_id = $1", unique)
    for change in ("SET subject_id = 'x'", "SET fingerprint = 'x'", "SET id = gen_random_uuid()"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(
                f"UPDATE audit_subject_keys {change} WHERE subject_id = $1", f"{unique}-2"
            )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("DELETE FROM audit_subject_keys WHERE subject_id = $1", unique)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("TRUNCATE audit_subject_keys")


# --- holds and redaction, on the way in


async def test_a_legal_hold_forbids_it(audit, connection, unique):
    if not await connection.fetchval("SELECT to_regclass('audit_holds') IS NOT NULL"):
        pytest.skip("these tables know no holds")
    event_id = await log(audit, unique, resource_type="order", resource_id=unique)
    place = "INSERT INTO audit_holds (id, reason, placed_by, {}) VALUES ($1, 'litigation', 'counsel', $2)"
    release = (
        "UPDATE audit_holds SET released_at = now(), released_by = 'c', release_reason = 'x' WHERE id = $1"
    )
    for column in ("user_id", "resource_id"):
        hold = uuid.uuid4()
        await connection.execute(place.format(column), hold, unique)
        with pytest.raises(ErasureRefused, match=rf"{hold}.*litigation"):
            await audit.erase_subject(unique, reason="x", by="dpo")
        await connection.execute(release, hold)
    assert (await audit.get_event(event_id)).personal == {"email": "ada@example.com"}
    refused = await audit.query_events(actions="subject.erasure_refused", resource_id=unique)
    assert [event.outcome.value for event in refused] == ["denied"] * 2
    assert (await audit.erase_subject(unique, reason="x", by="dpo")).new


async def test_secrets_are_redacted_before_they_are_stored_or_scored(migrated_url, connection, unique):
    clear, told = f"s3cret{os.urandom(8).hex()}", []
    rules = [RedactionRule(patterns=["email"], identities=True, action="hash")]
    config = AuditTrailConfig(
        redact_hash_key="k" * 16, anomaly_threshold=0.01, redact_rules='[{"keys": ["ssn"], "action": "drop"}]'
    )
    async with AuditAggregator(migrated_url, config=config, redaction=rules, on_anomaly=told.append) as audit:
        with audit_context(metadata={"token": clear}):
            for number in range(30):
                await audit.log_event(
                    "AUTHENTICATION",
                    f"login password={clear}",
                    outcome="failure",
                    user_id=f"{clear}@example.com",
                    tenant_id=unique,
                    correlation_id=f"Bearer {clear}{number}",
                    metadata={"headers": {"Authorization": clear}, "ssn": clear, "n": number},
                )
        page = await audit.query_events(tenant_id=unique)
    assert clear not in await everything(connection)
    assert told
    assert clear not in repr(told)
    assert len({event.user_id for event in page}) == 1
    assert page[0].user_id.startswith("hmac:")
    assert page[0].metadata["_redacted"]["metadata.token"] == "mask:secret"
    assert "ssn" not in page[0].metadata


async def test_imports_are_redacted_and_not_filled_in(migrated_url, unique, tmp_path):
    from dotmac.platform.audit_trail import import_events

    file = tmp_path / "events.ndjson"
    event = {
        "occurred_at": "2026-01-01T00:00:00Z", "category": "security", "action": unique,
        "metadata": {"password": "hunter2", "n": 1},
    }  # fmt: skip
    file.write_text(json.dumps(event) + "\n")
    async with AuditAggregator(migrated_url) as audit:
        with audit_context(user_id="importer"):
            await import_events(audit, file, format="ndjson")
        (found,) = await audit.query_events(actions=unique)
    assert found.user_id is None
    assert found.metadata["password"] == "***"


async def test_trace_and_span_are_the_current_ones(audit, unique):
    from opentelemetry import context, trace

    parent = trace.SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, is_remote=False)
    token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(parent)))
    try:
        event_id = await log(audit, unique)
    finally:
        context.detach(token)
    event = await audit.get_event(event_id)
    assert (event.trace_id, event.span_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert (await audit.get_event(await log(audit, unique))).trace_id is None


async def test_many_at_once_and_by_the_spool(migrated_url, connection, unique, tmp_path):
    clear = f"clear{os.urandom(8).hex()}"
    config = AuditTrailConfig(spool_path=tmp_path)
    async with AuditAggregator(migrated_url, personal_key=KEY, config=config, decrypt_personal=True) as audit:
        events = [
            {"category": "DATA_CHANGE", "action": "x", "subject_id": f"{unique}-{number % 20}", "metadata": {"token": clear},
             "personal": {"n": number, "c": clear}}
            for number in range(600)
        ]  # fmt: skip
        with audit_context(tenant_id=unique):
            ids = await audit.log_events(events)
            spooled = [
                await audit.log_event(
                    "DATA_CHANGE", "y", subject_id=unique, personal={"c": clear}, wait=False
                )
                for _ in range(10)
            ]
            with pytest.raises(InvalidEvent, match=r"event 2: subject_id"):
                await audit.log_events(
                    [events[0], events[1], {"category": "SYSTEM", "action": "x", "personal": {"a": 1}}]
                )
            with pytest.raises(InvalidEvent, match=r"event 1: personal\.a"):
                await audit.log_events([events[0], {**events[1], "personal": {"a": {1}}}, events[2]])
        written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        assert clear.encode() not in written
        while await audit.count_events(tenant_id=unique, actions="y") < len(spooled):
            await asyncio.sleep(0.05)
        found = {event.id: event async for event in audit.iter_events(tenant_id=unique)}
    assert [found[one].personal["n"] for one in ids] == list(range(600))
    assert all(found[one].personal == {"c": clear} for one in spooled)
    assert len(found) == 600 + 10 + 2 + 1
    assert clear not in await everything(connection)
    keys = await connection.fetchval("SELECT count(*) FROM audit_subject_keys WHERE tenant_id = $1", unique)
    assert keys == 21


async def test_an_id_and_a_time_of_ones_own(audit, unique):
    from datetime import UTC, datetime

    given = {"id": uuid.uuid4(), "occurred_at": datetime(2026, 3, 4, tzinfo=UTC)}
    for _ in range(2):
        assert await log(audit, unique, **given) == given["id"]
    (event,) = await audit.query_events(user_id=unique)
    assert (event.occurred_at, event.personal) == (given["occurred_at"], {"email": "ada@example.com"})
    late = await log(audit, unique, occurred_at=given["occurred_at"])
    assert (await audit.get_event(late)).personal == {"email": "ada@example.com"}
