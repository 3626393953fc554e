"""Queries over a real trail, against the same worked out in Python.

Promises:
- for random filters, orders and page sizes: the pages joined are what Python selects, forward and, from the
  last page, backward; the count, a histogram by any unit in any zone and by fields, and facets agree too;
- counts by the rollup are those of the events, to the microsecond of a bound, in whichever zone, also while
  events are being stored and the rollup is being compacted;
- an empty page at either end leads back; a page before the first is none;
- conditions on metadata written as text mean what the mapping means; filters that are wrong are refused with
  the name, the value and what is right;
- a timeline has every event of its id in order, with durations, the longest gap and the first failure;
- a tenant's facet does not show other tenants;
- a query that runs out of time, or whose caller is cancelled, stops on the server too.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime, time, timedelta
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dotmac.platform.audit_trail import AuditAggregator, AuditCategory, AuditLevel, AuditOutcome
from dotmac.platform.audit_trail.filter_text import exclusions_of, metadata_of
from dotmac.platform.audit_trail.time_units import begins
from dotmac.platform.errors import AuditUnavailable, InvalidArgument, InvalidCursor
from support import random_events as trail
from support.look_through import TOTALS_THAT_DIFFER

ZONES = ["UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Pacific/Apia"]


@pytest.fixture(scope="module")
def events(migrated_server, run_apart):
    """400 events of a database of their own, oldest first."""

    async def make():
        connection = await asyncpg.connect(migrated_server.url)
        rows = list(trail.random_rows(random.Random(7), 400))
        await trail.store(connection, rows[:300])
        # So that totals answer, together with what came since.
        await connection.execute("SELECT audit_compact_rollup()")
        await trail.store(connection, rows[300:])
        rows = await connection.fetch("SELECT id, metadata::text AS metadata, subject_id FROM audit_events")
        stored = {row["id"]: trail.Stored(row["metadata"], row["subject_id"]) for row in rows}
        await connection.close()
        async with AuditAggregator(migrated_server.url) as audit:
            found = await audit.query_events(order="asc", limit=1000)
        assert len(found) == 400
        assert found.previous_cursor is found.next_cursor is None
        return trail.Events((event, stored[event.id]) for event in found)

    return run_apart(make())


@pytest.fixture
async def audit(migrated_server, events):
    async with AuditAggregator(migrated_server.url) as aggregator:
        yield aggregator


def some(values, least=0):
    return st.lists(st.sampled_from(list(values)), min_size=least, max_size=3)


moments = st.integers(-600, 60 * 24 * trail.DAYS + 600).map(lambda n: trail.ORIGIN + timedelta(minutes=n)) | (
    st.integers(-1, trail.DAYS + 1).map(lambda n: trail.ORIGIN + timedelta(days=n))
)
leaves = st.sampled_from(trail.LEAVES)
ordered = st.sampled_from([0, 1, 2, -3.5, 10**19, "paid", "P", ""])
paths = st.sampled_from(
    ["order.total", r"order.a\.b", "order", "tags", "tags.0", "tags.-1", "items.1.sku", "1", "nothing"]
)
metadata = st.dictionaries(
    paths,
    st.fixed_dictionaries(
        {},
        optional={
            "eq": leaves, "ne": leaves, "gt": ordered, "lte": ordered, "exists": st.booleans(),
            "in": st.lists(leaves, max_size=3), "like": st.sampled_from(["*", "p*", "A-*", "*i*", "a*b"]),
            "contains": leaves,
        },
    ).filter(lambda one: 0 < len(one) < 3),
    min_size=1,
    max_size=2,
)  # fmt: skip
one_or_several = {
    "categories": some(AuditCategory), "levels": some(AuditLevel), "outcome": some(AuditOutcome),
    "actions": some(["user.login", "user*", "*login", "user_login", "100%", "*", "%", "_", "a\\*", "*ä*"]),
    "user_id": some(["ada", "bob", "100%", "nobody"]) | st.sampled_from(["ada", "bob"]),
    "tenant_id": some(["t1", "t2", "t3"]) | st.sampled_from(["t1", "t2"]),
    "resource_type": st.sampled_from(["order", "user"]), "resource_id": some(["1", "2"]),
    "correlation_id": some(["c1", "c2"]), "trace_id": st.just("f" * 32), "subject_id": st.just("s1"),
    "ip_address": some(["10.0.0.7", "10.0.0.0/24", "10.0.0.0/8", "2001:db8::/32", "::/0"], 1),
    "text": st.sampled_from(["LOGIN", "paid", '"', "\\", "GRÖSSE", "größe", "É", "%", "_", "a.b", "sku"]),
    "metadata": metadata, "min_anomaly_score": st.sampled_from([0, 0.25, 0.5, 1]),
    "missing": some(["user_id", "tenant_id", "ip_address", "anomaly_score"], 1),
}  # fmt: skip
times = {"start_time": moments, "end_time": moments}


def few(optional, most):
    names = st.lists(st.sampled_from(sorted(optional)), max_size=most, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: optional[name] for name in chosen}))


filters = st.builds(
    lambda base, exclude, when: {**base, **when, **({"exclude": exclude} if exclude else {})},
    few(one_or_several, 3),
    few(one_or_several, 2),
    few(times, 2),
)
by_days = {name: one_or_several[name] for name in ("categories", "levels", "outcome", "tenant_id")}
rollup_filters = st.builds(
    lambda base, exclude, when: {**base, **when, **({"exclude": exclude} if exclude else {})},
    few(by_days, 2),
    few(by_days, 1),
    few({**times, "start_time": moments | moments.map(lambda m: m + timedelta(microseconds=1))}, 2),
)
anything = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(chosen=filters, order=st.sampled_from(["asc", "desc"]), limit=st.integers(1, 60) | st.just(400))
async def test_pages_joined_are_what_python_selects(events, audit, chosen, order, limit):
    expected = trail.select(events, chosen)
    if order == "desc":
        expected.reverse()
    pages, cursor = [], None
    while True:
        pages.append(await audit.query_events(**chosen, order=order, limit=limit, cursor=cursor))
        cursor = pages[-1].next_cursor
        if cursor is None:
            break
    assert [event for page in pages for event in page] == expected
    assert all(len(page) == limit for page in pages[:-1])
    assert pages[0].previous_cursor is None
    back, cursor = [], pages[-1].previous_cursor
    while cursor is not None:
        page = await audit.query_events(**chosen, order=order, limit=limit, cursor=cursor)
        back.append(page)
        cursor = page.previous_cursor
    assert back == pages[-2::-1]
    assert [page.next_cursor for page in back] == [page.next_cursor for page in pages[-2::-1]]
    assert await audit.count_events(**chosen) == len(expected)
    assert [event async for event in audit.iter_events(**chosen, order=order, page_size=limit)] == expected


def begin(unit, moment, zone):
    """When the unit began, by the wall clock of the zone; not by the code under test."""
    local = moment.astimezone(zone)
    if unit == "hour":
        return moment - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)
    day = local.date()
    first = {
        "day": day,
        "week": day - timedelta(days=day.weekday()),
        "month": day.replace(day=1),
        "quarter": day.replace(month=(day.month - 1) // 3 * 3 + 1, day=1),
        "year": day.replace(month=1, day=1),
    }[unit]
    return datetime.combine(first, time(), zone).astimezone(UTC)


@anything
@given(
    chosen=filters | rollup_filters,
    unit=st.sampled_from(["hour", "day", "week", "month", "quarter", "year"]),
    zone=st.sampled_from(ZONES),
    field=st.none()
    | st.sampled_from(["category", "outcome", "tenant_id", "user_id", "ip_address", "action"]),
    fill=st.booleans(),
)
async def test_histograms_are_what_python_counts(events, audit, chosen, unit, zone, field, fill):
    where = ZoneInfo(zone)
    by = (unit,) if field is None else (field, unit)
    expected = Counter(
        (begin(unit, event.occurred_at, where), *(() if field is None else (getattr(event, field),)))
        for event in trail.select(events, chosen)
    )
    found = await audit.histogram(by=by, time_zone=zone, fill=fill, **chosen)
    counts = {
        ((key[0] if field is None else key[1]).astimezone(UTC), *key[: len(by) - 1]): count
        for key, count in ((bucket.key, bucket.count) for bucket in found)
    }
    assert len(counts) == len(found), "a key is there twice"
    assert {key: count for key, count in counts.items() if count} == expected
    assert found.total == sum(expected.values())
    assert fill or all(counts.values())
    if fill and {"start_time", "end_time"} <= chosen.keys() and field is None:
        start, end = chosen["start_time"], chosen["end_time"]
        assert set(counts) >= {
            (begin(unit, start + n * timedelta(minutes=7), where),)
            for n in range(max(0, (end - start) // timedelta(minutes=7)))
        }


@anything
@given(
    chosen=rollup_filters, unit=st.sampled_from([None, "day", "week", "month"]), zone=st.sampled_from(ZONES)
)
async def test_the_rollup_counts_what_the_events_count(events, audit, chosen, unit, zone):
    by = tuple(name for name in (unit, "category", "tenant_id") if name is not None)
    fast = await audit.histogram(by=by, time_zone=zone, **chosen)
    # A filter that always holds, of which the rollup knows nothing.
    slow = await audit.histogram(by=by, time_zone=zone, actions="*", **chosen)
    assert slow.source == "events"
    assert fast == slow
    if zone == "UTC" and ("start_time" not in chosen or "end_time" not in chosen):
        assert fast.source == "rollup"


@anything
@given(chosen=filters, fields=some(["category", "level", "user_id", "tenant_id", "action", "ip_address"], 1))
async def test_facets_are_what_python_counts(events, audit, chosen, fields):
    own = {"category": "categories", "level": "levels", "action": "actions", "tenant_id": None}
    found = await audit.facets(**chosen, fields=fields, limit=2)
    assert list(found) == list(dict.fromkeys(fields))
    for field, facet in found.items():
        others = {name: value for name, value in chosen.items() if name != own.get(field, field)}
        counts = Counter(getattr(event, field) for event in trail.select(events, others))
        ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0] is None, (one[0] or "").encode()))
        assert [(one.value, one.count) for one in facet.values] == ranked[:2]
        assert (facet.distinct, facet.other) == (len(counts), sum(count for _, count in ranked[2:]))


async def test_a_tenants_facet_does_not_show_other_tenants(audit):
    found = await audit.facets(fields=["tenant_id", "user_id"], tenant_id="t1")
    assert [one.value for one in found["tenant_id"].values] == ["t1"]


async def test_a_query_that_is_given_up_stops_on_the_server_too(migrated_server):
    connection = await asyncpg.connect(migrated_server.url)
    sleeping = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(3_)' AND state = 'active'"
    )

    async def asleep():
        return await connection.fetchval(sleeping)

    async with AuditAggregator(migrated_server.url, timeout=0.5) as audit:
        with pytest.raises(AuditUnavailable):
            await audit._read(lambda c: c.fetchval("SELECT pg_sleep(31)"))
        cancelled = asyncio.create_task(audit._read(lambda c: c.fetchval("SELECT pg_sleep(32)"), 30))
        while not await asleep():
            await asyncio.sleep(0.01)
        cancelled.cancel()
        async with asyncio.timeout(5):
            while await asleep():
                await asyncio.sleep(0.05)
        assert await audit.count_events() >= 0
    await connection.close()


async def test_empty_pages_lead_back(audit, events):
    page = await audit.query_events(order="asc", limit=10)
    last = await audit.query_events(order="asc", limit=390, cursor=page.next_cursor)
    assert (len(last), last.next_cursor) == (390, None)
    # The cursor of a page that later turns out to be the last one: nothing is behind it, all is before it.
    tight = await audit.query_events(
        end_time=page[-1].occurred_at, order="asc", limit=10, cursor=page.next_cursor
    )
    assert (tight, tight.next_cursor) == ([], None)
    again = await audit.query_events(order="asc", limit=10, cursor=tight.previous_cursor)
    assert again == page
    before = await audit.query_events(
        start_time=last[0].occurred_at + timedelta(1), order="asc", limit=5, cursor=last.previous_cursor
    )
    assert (before, before.previous_cursor) == ([], None)
    assert (await audit.query_events(order="asc", limit=1, cursor=before.next_cursor))[0] == last[0]


async def test_cursors_belong_to_filters(audit):
    cursor = (await audit.query_events(metadata={"order.total": {"gt": 0}}, limit=1)).next_cursor
    assert await audit.query_events(metadata={"order.total": {"gt": 0}}, limit=1, cursor=cursor)
    for other in ({"metadata": {"order.total": {"gt": 1}}}, {"text": "a"}, {}):
        with pytest.raises(InvalidCursor):
            await audit.query_events(**other, limit=1, cursor=cursor)


async def test_the_rollup_is_exact_while_events_are_stored_and_it_is_compacted(postgres_database):
    chance = random.Random(3)
    async with AuditAggregator(postgres_database) as audit:
        await audit.migrate()
        going = True

        async def write():
            connection = await asyncpg.connect(postgres_database)
            while going:
                await trail.store(connection, trail.random_rows(chance, 20))
            await connection.close()

        async def compact():
            connection = await asyncpg.connect(postgres_database)
            while going:
                await connection.execute("SELECT audit_compact_rollup()")
                await asyncio.sleep(0.01)
            await connection.close()

        jobs = [asyncio.create_task(work()) for work in (write, write, compact)]
        await asyncio.sleep(0.2)
        cut = trail.ORIGIN + timedelta(days=2, hours=5)
        connection = await asyncpg.connect(postgres_database)
        for _ in range(40):
            # Both in one snapshot of the database.
            async with connection.transaction(isolation="repeatable_read"):
                wanted = await connection.fetchval(
                    "SELECT count(*) FROM audit_events WHERE occurred_at < $1", cut
                )
                from dotmac.platform.audit_trail.arguments import filters_of
                from dotmac.platform.audit_trail.histogram import count_sql

                sql, values = count_sql(filters_of(None, cut, {}), ZoneInfo("UTC"))
                assert "audit_rollup_totals" in sql
                assert await connection.fetchval(sql, *values) == wanted
        assert wanted > 0
        going = False
        await asyncio.gather(*jobs)
        assert await connection.fetchval("SELECT sum(events) FROM audit_rollup_totals") > 0
        assert await connection.fetch(TOTALS_THAT_DIFFER) == []
        await connection.close()
        assert await audit.count_events() == await audit.count_events(actions="*")


TEXTS = {
    "order.total>=100": {"order.total": {"gte": 100}},
    "order.total <= 1.5": {"order.total": {"lte": 1.5}},
    "order.total>x": {"order.total": {"gt": "x"}},
    "status=paid": {"status": {"eq": "paid"}},
    'status="5"': {"status": {"eq": "5"}},
    "status=": {"status": {"eq": ""}},
    "status!=null": {"status": {"ne": None}},
    'status in ["new", "paid"]': {"status": {"in": ["new", "paid"]}},
    r"a\.b.c~A-*": {r"a\.b.c": {"like": "A-*"}},
    "order": {"order": {"exists": True}},
    "!order-in.x": {"order-in.x": {"exists": False}},
    r"a\ b=1": {r"a\ b": {"eq": 1}},
}


@pytest.mark.parametrize(("text", "mapping"), TEXTS.items())
def test_text_means_what_the_mapping_means(text, mapping):
    assert metadata_of([text]) == mapping


def test_several_texts_join():
    assert metadata_of(["a>1", "a<5", "b"]) == {"a": {"gt": 1, "lt": 5}, "b": {"exists": True}}
    assert exclusions_of(["action=health.*", "action=x=y", "metadata=a>1"]) == {
        "actions": ["health.*", "x=y"],
        "metadata": {"a": {"gt": 1}},
    }


@pytest.mark.parametrize("wrong", [["="], ["!a=1"], [">5"], [""], ["a>1", "a>2"], ["a b c"]], ids=repr)
def test_bad_conditions_are_refused(wrong):
    with pytest.raises(InvalidArgument, match="metadata"):
        metadata_of(wrong)


@pytest.mark.parametrize("wrong", ["action", "start_time=2020", "nope=1", "=x"])
def test_bad_exclusions_are_refused(wrong):
    with pytest.raises(InvalidArgument, match="exclude.*the filters are category"):
        exclusions_of([wrong])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"metadata": {"a": {"above": 1}}}, r"metadata\['a'\].*the operators are eq, ne"),
        ({"metadata": {"a": {}}}, "operators"),
        ({"metadata": {"a": {"gt": True}}}, "number or a string"),
        ({"metadata": {"a": {"exists": 1}}}, "True or False"),
        ({"metadata": {"a": {"in": "x"}}}, "list"),
        ({"metadata": {"a": float("nan")}}, "NaN"),
        ({"metadata": {"a": "\x00"}}, "NUL"),
        ({"metadata": {"a": "\ud800"}}, "Unicode"),
        ({"metadata": {"a..b": 1}}, "keys separated by dots"),
        ({"metadata": {1: 1}}, "path such as"),
        ({"metadata": "a=1"}, "mapping"),
        ({"exclude": {"start_time": 1}}, r"exclude\['start_time'\]"),
        ({"exclude": {"levels": "nope"}}, r"exclude\['levels'\].*DEBUG"),
        ({"exclude": ["x"]}, "mapping of filters"),
        ({"missing": "action"}, "missing.*user_id"),
        ({"text": 5}, "text.*string"),
        ({"ip_address": 5}, "ip_address"),
        ({"ip_address": ["10.0.0.1", "x"]}, "ip_address"),
        ({"user_id": [1.5]}, "user_id"),
        ({"min_anomaly_score": "1"}, "min_anomaly_score"),
    ],
)
async def test_bad_filters_are_refused(audit, wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        await audit.query_events(**wrong)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"by": "dey"}, "by.*minute.*category"),
        ({"by": ("day", "hour")}, "only one"),
        ({"by": ("level", "level")}, "by"),
        ({"by": ()}, "by"),
        ({"time_zone": "Mars/Base"}, "time_zone.*IANA"),
        ({"time_zone": ""}, "time_zone"),
        ({"by": "minute", "fill": True}, "more than 100000 buckets"),
    ],
)
async def test_bad_histograms_are_refused(audit, wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        await audit.histogram(datetime(2020, 1, 1, tzinfo=UTC), datetime(2024, 6, 1, tzinfo=UTC), **wrong)


async def test_bad_facets_and_timelines_are_refused(audit):
    for wrong in ({"fields": "metadata"}, {"fields": []}, {"limit": 0}, {"limit": True}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            await audit.facets(**wrong)
    with pytest.raises(InvalidArgument, match="limit"):
        await audit.timeline("c1", limit=0)


async def test_values_that_only_look_the_same(audit, events):
    """What jsonb tells apart and Python does not, or the other way about."""
    for value, others in ((1, ["1", True]), (True, [1]), (None, []), ("", [])):
        found = {event.id for event in await audit.query_events(metadata={"order.total": value})}
        wanted = {e.id for e, _ in events if trail.same(trail.at(e.metadata, ("order", "total")), value)}
        assert found == wanted
        assert found
        assert not found & {
            event.id
            for other in others
            for event in await audit.query_events(metadata={"order.total": other})
        }


async def test_a_timeline_is_ordered_and_measured(migrated_server, audit):
    connection = await asyncpg.connect(migrated_server.url)
    key = f"work-{uuid4()}"
    moments = [trail.ORIGIN + timedelta(milliseconds=n) for n in (5, 0, 2_000, 2_001)]
    outcomes = ["failure", "success", "success", "denied"]
    try:
        for moment, outcome in zip(moments, outcomes, strict=True):
            await connection.execute(
                "INSERT INTO audit_events "
                "(occurred_at, id, category, action, level, outcome, correlation_id) "
                "VALUES ($1, gen_random_uuid(), 'business', 'step', 'info', $2, $3)",
                moment, outcome, key,
            )  # fmt: skip
        found = await audit.timeline(key)
        assert [step.since_start.total_seconds() for step in found] == [0, 0.005, 2, 2.001]
        assert [step.since_previous.total_seconds() for step in found] == [0, 0.005, 1.995, 0.001]
        assert found.duration == timedelta(seconds=2.001)
        assert found.longest_gap is found[2]
        assert found.first_failure is found[1]
        assert (found.start, found.end, found.truncated) == (min(moments), max(moments), False)
        told = found.to_dict()
        assert (told["duration"], told["longest_gap"]) == (2.001, 1.995)
        assert told["first_failure"] == str(found[1].event.id)
        short = await audit.timeline(key, limit=2)
        assert (len(short), short.truncated) == (2, True)
        none = await audit.timeline("nothing")
        assert (none, none.duration, none.longest_gap, none.to_dict()["steps"]) == ([], timedelta(), None, [])
    finally:
        await connection.execute("ALTER TABLE audit_events DISABLE TRIGGER audit_append_only")
        await connection.execute("DELETE FROM audit_events WHERE correlation_id = $1", key)
        await connection.execute("ALTER TABLE audit_events ENABLE TRIGGER audit_append_only")
        await connection.close()


async def test_one_event_is_found_by_id_tenant_and_time(audit, events):
    event = next(event for event, _ in events if event.tenant_id == "t1")
    assert await audit.get_event(event.id) == event
    assert await audit.get_event(event.id, tenant_id=["t1", "t2"]) == event
    assert await audit.get_event(event.id, tenant_id="t2") is None
    assert await audit.get_event(event.id, occurred_at=event.occurred_at) == event
    assert await audit.get_event(event.id, occurred_at=event.occurred_at + timedelta(microseconds=1)) is None
    assert await audit.get_event(UUID(int=5)) is None


@pytest.mark.parametrize("zone", [*ZONES, "Australia/Lord_Howe", "America/Sao_Paulo"])
@pytest.mark.parametrize("unit", ["hour", "day", "week", "month"])
async def test_units_begin_where_postgresql_lets_them_begin(audit, migrated_server, zone, unit):
    where = ZoneInfo(zone)
    connection = await asyncpg.connect(migrated_server.url)
    try:
        for start, days in (
            (datetime(2018, 10, 30, tzinfo=UTC), 12),
            (datetime(2024, 3, 25, tzinfo=UTC), 14),
        ):
            end = start + timedelta(days=days)
            ours = [begin.astimezone(UTC) for begin in begins(unit, start, end, where)]
            theirs = await connection.fetch(
                "SELECT DISTINCT date_trunc($1, m, $2) AS b FROM "
                "generate_series($3::timestamptz, $4::timestamptz - interval '1 us', interval '10 min') AS m "
                "ORDER BY 1",
                unit, zone, start, end,
            )  # fmt: skip
            assert ours == [row["b"] for row in theirs]
    finally:
        await connection.close()
