"""What a commit stores, and that faults leave no trace in it.

Promises:
- each commit stores its events, a segment per tenant and the counts together: after kills, cuts and races,
  roots cover exactly the events there are, chains have no gap, and the counts add up;
- `log_events` takes sync and async iterables, keeps their order, returns ids, tells the place of an event
  that is wrong and stores those before it; ids that are there already are stored once;
- an id that another event has already: a caller's own is stored once, also from two processes at once and
  twice in one batch; one that the library gave is replaced, and both events are stored;
- a clock that is set back, a statement timeout and a pooler in transaction mode lose and double nothing;
- a batch given up in doubt that comes through later leaves no gap in the chain, nor does one that does not;
- integrity may be switched off; counts are summed up; a closed writer says how many segments it has stored.
"""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dotmac.platform._native import leaf_hashes
from dotmac.platform.audit_trail import AuditAggregator, AuditTrailConfig, bulk
from dotmac.platform.audit_trail.entry import make_encoder, make_entry
from dotmac.platform.errors import AuditUnavailable, InvalidEvent
from support.look_through import look_through
from support.postgres import PostgresProxy, TransactionPooler


@pytest.fixture
async def audit(migrated_server):
    async with AuditAggregator(migrated_server.url) as made:
        yield made


@pytest.fixture
async def owner(migrated_server):
    connection = await asyncpg.connect(migrated_server.url)
    yield connection
    await connection.close()


def plain(number, tenant, **more):
    return {"category": "DATA_ACCESS", "action": f"n{number}", "tenant_id": tenant, **more}


async def actions(owner, tenant):
    rows = await owner.fetch("SELECT action FROM audit_events WHERE tenant_id = $1 ORDER BY id", tenant)
    return [row["action"] for row in rows]


async def test_many_tenants_at_once_fit_together(audit, migrated_server, unique):
    ids = await asyncio.gather(
        *(
            audit.log_event("SECURITY", "x", tenant_id=None if n % 7 == 0 else f"{unique}{n % 5}")
            for n in range(500)
        )
    )
    ids.append(await audit.log_event("SECURITY", "alone", tenant_id="'; DROP TABLE audit_events; --\\"))
    found = await look_through(migrated_server.url)
    assert set(ids) <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("kind", ["list", "generator", "async"])
async def test_log_events_keeps_order(audit, migrated_server, owner, unique, kind, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK_EVENTS", 1_000)
    items = [plain(number, unique) for number in range(3_333)]

    async def slowly():
        for item in items:
            yield item

    ids = await audit.log_events({"list": items, "generator": iter(items), "async": slowly()}[kind])
    assert len(set(ids)) == 3_333
    assert ids == sorted(ids)
    assert await actions(owner, unique) == [f"n{number}" for number in range(3_333)]
    assert set(ids) <= set(await look_through(migrated_server.url))


async def test_log_events_tells_the_place_of_what_is_wrong(audit, owner, unique, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK_EVENTS", 100)
    items = [plain(number, unique) for number in range(1_000)]
    for place, wrong, told in (
        (450, plain(450, unique, metadata={"x": float("nan")}), r"event 450: metadata\.x"),
        (3, plain(3, unique, colour="red"), "event 3: colour: not known"),
        (0, "no mapping", "event 0: str"),
        (7, {"action": "x"}, "event 7: category"),
        (8, plain(8, unique, user_id="\ud800"), "event 8: user_id"),
    ):
        tenant = f"{unique}{place}"
        given_items = [{**item, "tenant_id": tenant} for item in items]
        given_items[place] = wrong
        with pytest.raises(InvalidEvent, match=told):
            await audit.log_events(given_items)
        assert await actions(owner, tenant) == [f"n{number}" for number in range(place)]


async def test_log_events_takes_unusual_types_and_stores_own_ids_once(audit, owner, unique):
    ids = [uuid.uuid4() for _ in range(50)]
    moment = datetime(2024, 5, 5, 12, tzinfo=UTC)
    items = [
        plain(number, unique, id=one, occurred_at=moment, user_id=uuid.uuid4(), metadata={"t": (1, 2.0)})
        for number, one in enumerate(ids)
    ]
    assert await audit.log_events(items) == ids
    assert await audit.log_events(items[::-1] + items) == ids[::-1] + ids
    assert len(await actions(owner, unique)) == 50
    assert (await audit.get_event(ids[0])).metadata == {"t": [1, 2.0]}


async def test_own_ids_from_two_writers_at_once(migrated_server, owner, unique):
    ids = [uuid.uuid4() for _ in range(200)]
    moment = datetime.now(UTC)

    async def one(audit):
        return await asyncio.gather(
            *(
                audit.log_event("SECURITY", "x", tenant_id=unique, id=one, occurred_at=moment)
                for one in ids + ids[:50]
            )
        )

    async with AuditAggregator(migrated_server.url) as first, AuditAggregator(migrated_server.url) as second:
        for answers in await asyncio.gather(one(first), one(second)):
            assert answers == ids + ids[:50]
    assert len(await actions(owner, unique)) == 200
    await look_through(migrated_server.url)


async def test_an_id_that_was_given_twice_is_replaced(audit, migrated_server, owner, unique):
    await audit.log_event("SECURITY", "x", tenant_id=unique)
    state = await audit._state()
    encoder = make_encoder(hashed=True)
    entries = [make_entry(encoder, category="SECURITY", action="x", tenant_id=unique) for _ in range(40)]
    first = await asyncio.gather(*(state.writer.put(entry) for entry in entries))
    again = await asyncio.gather(*(state.writer.put(entry) for entry in entries))
    ids = {item.entry.id for item in first + again}
    assert all(item.answer is True for item in first + again)
    assert len(ids) == 80
    assert len(await actions(owner, unique)) == 81
    await look_through(migrated_server.url)


async def test_a_clock_that_is_set_back(audit, migrated_server, unique):
    times = iter([1_700_000_000_000_000 + step for step in (0, 5, -3, -7_200_000_000, 10, 10, 10)])
    audit._here().encoder = make_encoder(hashed=True, clock=lambda: next(times))
    ids = [await audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(7)]
    found = await audit.query_events(tenant_id=unique)
    assert {event.id for event in found} == set(ids)
    assert len({(event.occurred_at, event.id) for event in found}) == 7
    await look_through(migrated_server.url)


async def test_a_statement_timeout_loses_and_doubles_nothing(postgres_database, unique):
    connection = await asyncpg.connect(postgres_database)
    try:
        async with AuditAggregator(postgres_database) as audit:
            await audit.migrate()
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f'ALTER DATABASE "{name}" SET statement_timeout = 300')
        async with AuditAggregator(postgres_database, timeout=3) as audit:
            kept = [await audit.log_event("SECURITY", "x", tenant_id=unique)]
            await connection.execute("SET statement_timeout = 0")
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("LOCK TABLE audit_rollup IN ACCESS EXCLUSIVE MODE")
            calls = [
                asyncio.create_task(audit.log_event("SECURITY", "x", tenant_id=unique)) for _ in range(50)
            ]
            await asyncio.sleep(1)
            await transaction.rollback()
            kept += await asyncio.gather(*calls)
            await transaction_of(connection, audit, unique)
        found = await look_through(postgres_database)
        assert set(kept) <= set(found)
        assert len(found) == len(set(found)) == len(kept)
    finally:
        await connection.close()


async def transaction_of(connection, audit, tenant):
    """While the table is locked for longer than the timeout, callers get an error, and nothing is stored."""
    async with connection.transaction():
        await connection.execute("LOCK TABLE audit_rollup IN ACCESS EXCLUSIVE MODE")
        lost = await asyncio.gather(
            *(audit.log_event("SECURITY", "lost", tenant_id=tenant) for _ in range(20)),
            return_exceptions=True,
        )
    assert all(isinstance(error, AuditUnavailable) for error in lost)


@pytest.mark.parametrize("prepared", [True, False])
async def test_names_that_quotes_and_backslashes_are_in(postgres_database, prepared):
    """Also where a backslash means something in an ordinary literal."""
    names = ["'", "\\", "\\'; --", "$text$", "$text", "$text_$", "$$", "\n", "ä€😀", "$1", "a;b", "%s{}"]
    connection = await asyncpg.connect(postgres_database)
    try:
        async with AuditAggregator(postgres_database) as audit:
            await audit.migrate()
        name = await connection.fetchval("SELECT current_database()")
        for setting in ("standard_conforming_strings = off", "escape_string_warning = off"):
            await connection.execute(f'ALTER DATABASE "{name}" SET {setting}')
        cached = {} if prepared else {"statement_cache_size": 0}
        async with AuditAggregator(postgres_database, **cached) as audit:
            ids = await audit.log_events(plain(number, tenant) for number in range(9) for tenant in names)
        assert set(ids) == set(await look_through(postgres_database))
        rows = await connection.fetch("SELECT tenant_id, sum(events) FROM audit_rollup GROUP BY 1")
        assert dict(map(tuple, rows)) == dict.fromkeys(names, 9)
    finally:
        await connection.close()


async def test_behind_a_pooler_in_transaction_mode(migrated_server, owner, unique):
    async with (
        TransactionPooler(migrated_server.url) as pooler,
        AuditAggregator(pooler.url, statement_cache_size=0) as audit,
    ):
        ids = [await audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(5)]
        ids += await asyncio.gather(*(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(300)))
        ids += await audit.log_events(plain(number, unique) for number in range(500))
        moment = datetime(2001, 1, 1, tzinfo=UTC)
        ids.append(await audit.log_event("SECURITY", "x", tenant_id=unique, occurred_at=moment))
        assert ids[0] == await audit.log_event("SECURITY", "x", tenant_id=unique, id=ids[0])
        assert pooler.switches > 10
    assert len(await actions(owner, unique)) == len(set(ids)) == 806
    await look_through(migrated_server.url)


@pytest.mark.parametrize("comes_through", [True, False])
async def test_a_batch_given_up_in_doubt(migrated_server, owner, unique, comes_through):
    async with PostgresProxy(migrated_server.url) as proxy, AuditAggregator(proxy.url, timeout=1) as audit:
        kept = [await audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(3)]
        blocker = await asyncpg.connect(migrated_server.url)
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE audit_rollup IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(AuditUnavailable, match="may or may not") as told:
            await audit.log_event("SECURITY", "doubtful", tenant_id=unique)
        if not comes_through:
            await owner.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE wait_event_type = 'Lock' AND pid <> pg_backend_pid()"
            )
        late = asyncio.create_task(audit.log_event("SECURITY", "x", tenant_id=unique))
        await asyncio.sleep(0.2)
        await transaction.rollback()
        await blocker.close()
        kept.append(await late)
        kept += await asyncio.gather(*(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(40)))
        stored = set(await look_through(migrated_server.url))
        assert set(kept) <= stored
        # Logged again with the id of the error, it is there once in either case.
        again = await audit.log_event("SECURITY", "doubtful", tenant_id=unique, id=told.value.event_id)
        assert again == told.value.event_id
    assert len(await actions(owner, unique)) == len(kept) + 1
    await look_through(migrated_server.url)


async def test_lost_answers_of_every_kind(migrated_server, owner, unique):
    """The answer to a COPY, to a few events in one statement, to a COMMIT of a batch that was looked up."""
    kept = []
    async with PostgresProxy(migrated_server.url) as proxy, AuditAggregator(proxy.url) as audit:
        kept.append(await audit.log_event("SECURITY", "x", tenant_id=unique))
        for mark, count in ((b"COPY ", 50), (b"INSERT 0 ", 1), (b"COMMIT", 3)):
            lost = proxy.lost
            proxy.lose_answer(mark)
            own = [uuid.uuid4() for _ in range(count)] if mark == b"COMMIT" else [None] * count
            moment = datetime.now(UTC)
            kept += await asyncio.gather(
                *(
                    audit.log_event(
                        "SECURITY", "x", tenant_id=unique, id=one, occurred_at=moment if one else None
                    )
                    for one in own
                )
            )
            assert proxy.lost == lost + 1, mark
    assert len(await actions(owner, unique)) == len(set(kept)) == 55
    await look_through(migrated_server.url)


async def test_integrity_may_be_switched_off(migrated_server, owner, unique):
    config = AuditTrailConfig(integrity_enabled=False)
    async with (
        PostgresProxy(migrated_server.url) as proxy,
        AuditAggregator(proxy.url, config=config) as audit,
    ):
        kept = [await audit.log_event("SECURITY", "x", tenant_id=unique)]
        kept += await asyncio.gather(*(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(40)))
        for mark in (b"INSERT 0 ", b"COPY "):
            lost = proxy.lost
            proxy.lose_answer(mark)
            kept += await asyncio.gather(
                *(
                    audit.log_event("SECURITY", "x", tenant_id=unique)
                    for _ in range(1 if mark[0] == 73 else 40)
                )
            )
            assert proxy.lost == lost + 1
    rows = await owner.fetch("SELECT id, segment FROM audit_events WHERE tenant_id = $1", unique)
    assert sorted(row["id"] for row in rows) == sorted(kept)
    assert {row["segment"] for row in rows} == {None}
    await look_through(migrated_server.url)  # the counts


async def test_counts_are_summed_up(audit, migrated_server, owner, unique):
    for _ in range(5):
        await audit.log_event("SECURITY", "x", tenant_id=unique)
    sql = "SELECT count(*), sum(events)::int FROM audit_rollup WHERE tenant_id = $1"
    assert tuple(await owner.fetchrow(sql, unique)) == (5, 5)
    await (await audit._state()).database.compact()
    assert tuple(await owner.fetchrow(sql, unique)) == (1, 5)
    await audit.log_event("SECURITY", "x", tenant_id=unique)
    assert await owner.fetchval("SELECT audit_compact_rollup()") == 1
    assert tuple(await owner.fetchrow(sql, unique)) == (1, 6)
    await look_through(migrated_server.url)


async def test_a_closed_writer_says_so_and_commits_are_told(migrated_server, owner, unique):
    audit, told = AuditAggregator(migrated_server.url), []
    await audit.log_event("SECURITY", "x", tenant_id=unique)
    (await audit._state()).writer.on_committed = told.append
    await asyncio.gather(*(audit.log_event("SECURITY", "x", tenant_id=unique) for _ in range(30)))
    assert sum(told) == 30
    await audit.aclose()
    ends = await owner.fetch(
        "SELECT ended.segments, count(segment.id) AS found FROM audit_writer_ends AS ended "
        "JOIN audit_writers AS writer ON writer.id = ended.writer "
        "JOIN audit_segments AS segment ON segment.writer = ended.writer "
        "WHERE ended.writer IN (SELECT writer FROM audit_segments WHERE tenant_id = $1) GROUP BY 1",
        unique,
    )
    assert ends
    assert all(row["segments"] == row["found"] for row in ends)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.sampled_from(["a", "b", "ip_address", "é"]), JSON), score=st.booleans())
async def test_what_is_stored_has_the_hash_that_was_taken(audit, owner, metadata, score):
    import io

    from dotmac.platform._native import AUDIT_COLUMNS

    encoder = make_encoder(hashed=True, capacity=100 if score else 0)
    entry = make_entry(encoder, category="SECURITY", action="x", metadata=metadata)
    await (await audit._state()).writer.put(entry)
    copied = io.BytesIO()
    await owner.copy_from_query(
        f"SELECT {', '.join(AUDIT_COLUMNS)} FROM audit_events WHERE id = $1",
        uuid.UUID(int=entry.id),
        output=copied,
        format="binary",
    )
    root = await owner.fetchval(
        "SELECT root FROM audit_segments JOIN audit_events ON segment = audit_segments.id "
        "WHERE audit_events.id = $1",
        uuid.UUID(int=entry.id),
    )
    assert leaf_hashes(copied.getvalue()) == root
