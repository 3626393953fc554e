"""One aggregator and one real PostgreSQL.

Promises:
- an event logged as the guide does is found again with every field, and its id leads to it;
- metadata["ip_address"] fills ip_address; naive times are local; categories are members or names;
- an event that can't be stored is refused with the field, the value and what is right, and the events
  beside it are stored; the database agrees with the checks (nothing that passes them is refused there);
- the same id is stored once, also when logged at the same time;
- pages follow one another without gap or repetition; cursors of other queries and damaged ones are refused;
- filters give what a filter in Python gives;
- the table refuses UPDATE, DELETE and TRUNCATE, on its partitions too;
- a follower sees every event once although transactions commit out of order;
- events of any month since 1970 find a partition.
"""

# ruff: noqa: E501 (tables read best by the line)

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dotmac.platform.audit_trail import (
    AuditAggregator,
    AuditCategory,
    AuditLevel,
    AuditOutcome,
    AuditTrailConfig,
    audit_context,
    schema,
)
from dotmac.platform.audit_trail.ids import time_of
from dotmac.platform.errors import InvalidArgument, InvalidCursor, InvalidEvent, SchemaOutdated


@pytest.fixture
async def audit(migrated_url):
    async with AuditAggregator(migrated_url) as aggregator:
        yield aggregator


async def test_an_event_is_found_again_with_every_field(audit, unique):
    event_id = await audit.log_event(
        category=AuditCategory.AUTHENTICATION,
        action="user.login",
        level=AuditLevel.INFO,
        user_id=unique,
        tenant_id="tenant456",
        resource_type="session",
        resource_id=7,
        correlation_id="c1",
        metadata={"ip_address": "192.168.1.1", "user_agent": "…", "n": [1, 2.5, None, True, {"ü": "☃"}]},
    )
    (event,) = await audit.query_events(
        start_time=datetime.now() - timedelta(days=7),  # noqa: DTZ005 (naive on purpose, as the guide writes it)
        categories=[AuditCategory.AUTHENTICATION],
        user_id=unique,
    )
    assert event.id == event_id
    assert event_id.version == 7
    assert time_of(event_id) == event.occurred_at
    assert event.tenant_id == "tenant456"
    assert (event.resource_type, event.resource_id, event.correlation_id) == ("session", "7", "c1")
    assert event.ip_address == "192.168.1.1"
    assert event.outcome is AuditOutcome.SUCCESS
    assert event.metadata["n"] == [1, 2.5, None, True, {"ü": "☃"}]
    assert event.anomaly_score is not None
    assert abs(event.recorded_at - event.occurred_at) < timedelta(seconds=10)
    assert await audit.get_event(event_id) == event
    assert await audit.get_event(str(uuid.uuid4())) is None


async def test_names_mean_what_members_mean(audit, unique):
    for category in ("DATA_ACCESS", "data_change", "System_Task"):
        await audit.log_event(category=category, action="x", level="warning", user_id=unique)
    found = await audit.query_events(user_id=unique, order="asc")
    assert [event.category.name for event in found] == ["DATA_ACCESS", "DATA_CHANGE", "SYSTEM_TASK"]
    with pytest.raises(
        InvalidEvent, match=r"category.*AUTHENTICATON.*did you mean 'AUTHENTICATION'.*DATA_ACCESS"
    ):
        await audit.log_event(category="AUTHENTICATON", action="x")
    with pytest.raises(InvalidEvent, match=r"level.*CRITICAL"):
        await audit.log_event(category="SECURITY", action="x", level="fatal")


async def test_a_naive_time_is_local_and_the_outcome_is_read_from_the_action(audit, unique):
    naive = datetime.now() - timedelta(hours=1)  # noqa: DTZ005
    await audit.log_event("AUTHENTICATION", "login.failed", user_id=unique, occurred_at=naive)
    (event,) = await audit.query_events(user_id=unique)
    assert event.occurred_at == naive.astimezone(UTC)
    assert event.outcome is AuditOutcome.FAILURE


DEEP: dict = {}
for _ in range(60):
    DEEP = {"x": DEEP}

BAD = [
    ({"action": ""}, "action"),
    ({"action": 7}, "action"),
    ({"action": "a\x00b"}, "action.*NUL"),
    ({"action": "x" * 513}, "action.*512"),
    ({"user_id": "\ud800"}, "user_id.*surrogate"),
    ({"user_id": 1.5}, "user_id"),
    ({"user_id": True}, "user_id"),
    ({"ip_address": "10.0.0.300"}, "ip_address.*10.0.0.300.*IPv4"),
    ({"metadata": [1]}, "metadata.*mapping"),
    ({"metadata": {"a": {"b": float("nan")}}}, r"metadata\.a\.b.*NaN"),
    ({"metadata": {"a": [float("inf")]}}, r"metadata\.a\[0\].*infinity"),
    ({"metadata": {"a": "\x00"}}, r"metadata\.a.*NUL"),
    ({"metadata": {"\x00": 1}}, "metadata.*NUL"),
    ({"metadata": {"a": "\udfff"}}, "surrogate"),
    ({"metadata": {1: 2}}, "string key"),
    ({"metadata": {"a": object()}}, "not a JSON type"),
    ({"metadata": {"a": {1, 2}}}, "set is not a JSON type"),
    ({"metadata": {"a": 10**4000}}, "too large"),
    ({"metadata": DEEP}, "nested"),
    ({"metadata": {"a": "x" * (1 << 20)}}, "bytes of JSON"),
    ({"occurred_at": "yesterday"}, "occurred_at"),
    ({"occurred_at": datetime.max}, "occurred_at"),  # noqa: DTZ901 (naive on purpose)
    ({"occurred_at": datetime(1969, 12, 31, tzinfo=UTC)}, "1970"),
    ({"occurred_at": datetime.now(UTC) + timedelta(days=2)}, "one day"),
    ({"id": "nonsense"}, "id.*UUID"),
    ({"outcome": "maybe"}, "outcome.*SUCCESS"),
]


@pytest.mark.parametrize(("wrong", "told"), BAD)
async def test_a_bad_event_is_refused_and_hurts_nobody_else(audit, unique, wrong, told):
    good = [audit.log_event("SECURITY", "good", user_id=unique) for _ in range(10)]
    bad = audit.log_event(**{"category": "SECURITY", "action": "bad", **wrong})
    *stored, refused = await asyncio.gather(*good, bad, return_exceptions=True)
    assert isinstance(refused, InvalidEvent)
    assert re.search(told, str(refused)), str(refused)
    assert await audit.count_events(user_id=unique) == len(stored) == 10


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def same(stored, given):
    """Equal, where jsonb may have made an integer of a float's shortest decimal form (1e16)."""
    if isinstance(given, dict):
        return stored.keys() == given.keys() and all(same(stored[key], given[key]) for key in given)
    if isinstance(given, list):
        return len(stored) == len(given) and all(map(same, stored, given))
    if isinstance(given, float):
        return float(stored) == given
    return stored == given and type(stored) is type(given)


anything = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
async def unredacted(migrated_url):
    """Hypothesis tries words of the code under test, which has the names of secrets."""
    async with AuditAggregator(migrated_url, config=AuditTrailConfig(redact_secrets=False)) as aggregator:
        yield aggregator


@anything
@given(
    metadata=st.dictionaries(st.text(), json_values, max_size=4),
    action=st.text(max_size=20),
    user=st.text(max_size=20) | st.integers() | st.uuids(),
    address=st.none() | st.ip_addresses(),
    moment=st.datetimes(datetime(2014, 12, 1), datetime(2015, 3, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
async def test_what_passes_the_checks_is_stored_unchanged(
    unredacted, metadata, action, user, address, moment
):
    try:
        event_id = await unredacted.log_event(
            "SECURITY", action, user_id=user, ip_address=address, metadata=metadata, occurred_at=moment
        )
    except InvalidEvent as error:
        assert "database" not in str(error)
        return
    event = await unredacted.get_event(event_id)
    assert event is not None
    assert same(event.metadata, metadata)
    assert (event.action, event.user_id) == (action, str(user))
    assert event.occurred_at == moment
    if address is not None:
        mapped = address.ipv4_mapped if address.version == 6 else None
        assert ipaddress.ip_address(event.ip_address) == ipaddress.ip_address(
            str(mapped or address).split("%")[0]
        )


async def test_one_id_is_stored_once(audit, unique):
    event_id = uuid.uuid4()
    moment = datetime.now(UTC)
    await asyncio.gather(
        *(
            audit.log_event("SECURITY", "x", user_id=unique, id=event_id, occurred_at=moment)
            for _ in range(20)
        ),
        *(audit.log_event("SECURITY", "x", user_id=unique) for _ in range(20)),
    )
    assert await audit.count_events(user_id=unique) == 21
    again = await audit.log_event("SECURITY", "x", user_id=unique)
    await audit.log_event("SECURITY", "x", user_id=unique, id=again)  # the time is in the id
    assert await audit.count_events(user_id=unique) == 22


async def test_pages_join_without_gap_or_repetition(audit, unique):
    ids = await asyncio.gather(*(audit.log_event("SYSTEM", "x", tenant_id=unique) for _ in range(57)))
    for order in ("asc", "desc"):
        seen, cursor, pages = [], None, 0
        while True:
            page = await audit.query_events(
                datetime.now(UTC) - timedelta(hours=1), tenant_id=unique, limit=10, cursor=cursor, order=order
            )
            assert isinstance(page, list)
            seen += page
            pages += 1
            cursor = page.next_cursor
            if cursor is None:
                break
        assert pages == 6
        assert sorted(event.id for event in seen) == sorted(ids)
        assert seen == sorted(seen, key=lambda e: (e.occurred_at, e.id), reverse=order == "desc")
    assert [event async for event in audit.iter_events(tenant_id=unique, page_size=7)] == seen


async def test_cursors_are_checked(audit, unique):
    await asyncio.gather(*(audit.log_event("SYSTEM", "x", tenant_id=unique) for _ in range(3)))
    cursor = (await audit.query_events(tenant_id=unique, limit=1)).next_cursor
    assert cursor is not None
    for wrong in ("", "x", cursor[:-2], cursor[:5] + ("A" if cursor[5] != "A" else "B") + cursor[6:], "ü", 5):
        with pytest.raises(InvalidCursor):
            await audit.query_events(tenant_id=unique, limit=1, cursor=wrong)
    with pytest.raises(InvalidCursor, match="other filters"):
        await audit.query_events(tenant_id="another", limit=1, cursor=cursor)
    with pytest.raises(InvalidCursor):
        await audit.query_events(tenant_id=unique, limit=1, cursor=cursor, order="asc")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"order": "up"}, "order"),
        ({"categories": ["NOPE"]}, "NOPE"),
        ({"usr_id": "x"}, "usr_id.*user_id"),
        ({"user_id": "\x00"}, "NUL"),
        ({"start_time": "now"}, "start_time"),
        ({"ip_address": "10.0.0"}, "ip_address"),
        ({"min_anomaly_score": 2}, "min_anomaly_score"),
        ({"actions": [1]}, "actions"),
    ],
)
async def test_bad_queries_are_refused(audit, wrong, told):
    with pytest.raises(InvalidArgument, match=told):
        await audit.query_events(**wrong)


@pytest.fixture(scope="module")
def many(migrated_url, run_apart):
    chance = random.Random(11)
    tenant = f"many-{random.random()}"
    start = datetime(2024, 1, 30, tzinfo=UTC)

    async def log():
        async with AuditAggregator(migrated_url) as audit:
            await asyncio.gather(
                *(
                    audit.log_event(
                        chance.choice(list(AuditCategory)),
                        chance.choice(["user.login", "user_login", "userXlogin", "order.read", "100%"]),
                        chance.choice(list(AuditLevel)),
                        outcome=chance.choice(list(AuditOutcome)),
                        user_id=chance.choice([None, "a", "b"]),
                        tenant_id=tenant,
                        resource_type=chance.choice([None, "r"]),
                        ip_address=chance.choice([None, "10.0.0.7", "10.0.1.9", "2001:db8::5"]),
                        occurred_at=start + timedelta(minutes=chance.randrange(60 * 24 * 4)),
                    )
                    for _ in range(300)
                )
            )
            return await audit.query_events(tenant_id=tenant, order="asc", limit=1000)

    return tenant, run_apart(log())


def some(values):
    return st.none() | st.lists(st.sampled_from(list(values)), max_size=3)


@anything
@given(
    start=st.none() | st.integers(0, 96),
    end=st.none() | st.integers(0, 96),
    categories=some(AuditCategory),
    levels=some(AuditLevel),
    outcome=some(AuditOutcome),
    actions=some(["user.login", "user*", "*login", "user_login", "100%", "*", "%", "_"]),
    user=st.none() | st.sampled_from(["a", "b", "c"]),
    network=st.none() | st.sampled_from(["10.0.0.7", "10.0.0.0/24", "10.0.0.0/8", "2001:db8::/32"]),
    score=st.none() | st.floats(0, 1),
    limit=st.integers(1, 400),
    order=st.sampled_from(["asc", "desc"]),
)
async def test_filters_mean_what_they_mean_in_python(
    audit, many, start, end, categories, levels, outcome, actions, user, network, score, limit, order
):
    tenant, events = many
    origin = datetime(2024, 1, 30, tzinfo=UTC)
    first = None if start is None else origin + timedelta(hours=start)
    after = None if end is None else origin + timedelta(hours=end)

    def matches(pattern, action):
        return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), action, re.DOTALL)

    def wanted(event):
        return (
            (first is None or event.occurred_at >= first)
            and (after is None or event.occurred_at < after)
            and (categories is None or event.category in categories)
            and (levels is None or event.level in levels)
            and (outcome is None or event.outcome in outcome)
            and (actions is None or any(matches(pattern, event.action) for pattern in actions))
            and (user is None or event.user_id == user)
            and (score is None or event.anomaly_score >= score)
            and (
                network is None
                or (
                    event.ip_address is not None
                    and ipaddress.ip_address(event.ip_address) in ipaddress.ip_network(network)
                )
            )
        )

    expected = [event for event in events if wanted(event)]
    filters = {
        "start_time": first, "end_time": after, "categories": categories, "levels": levels,
        "outcome": outcome, "actions": actions, "user_id": user, "ip_address": network, "min_anomaly_score": score,
        "tenant_id": tenant,
    }  # fmt: skip
    found = await audit.query_events(**filters, limit=limit, order=order)
    assert found == (expected if order == "asc" else expected[::-1])[:limit]
    assert (found.next_cursor is None) == (len(expected) <= limit)
    assert await audit.count_events(**filters) == len(expected)


async def test_the_table_is_append_only(audit, migrated_url, unique):
    await audit.log_event("SECURITY", "x", user_id=unique)
    connection = await asyncpg.connect(migrated_url)
    try:
        leaf = f"audit_events_{datetime.now(UTC):%Y_%m}"
        for statement in (
            f"UPDATE audit_events SET action = 'y' WHERE user_id = '{unique}'",
            f"DELETE FROM audit_events WHERE user_id = '{unique}'",
            f"UPDATE {leaf} SET action = 'y'",
            f"DELETE FROM {leaf}",
            f"TRUNCATE {leaf}",
            "TRUNCATE audit_events",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
                await connection.execute(statement)
    finally:
        await connection.close()
    assert await audit.count_events(user_id=unique) == 1


async def test_a_follower_misses_nothing_when_commits_are_out_of_order(audit, migrated_url, unique):
    seen: list[str] = []
    opened = asyncio.Event()

    async def follow():
        tail = audit.tail(poll=0.02, tenant_id=unique)
        opened.set()
        async for event in tail:
            seen.append(event.action)
            if event.action == "end":
                return

    follower = asyncio.create_task(follow())
    await opened.wait()
    await asyncio.sleep(0.2)  # the follower takes its starting line
    early, late = [await asyncpg.connect(migrated_url) for _ in range(2)]
    insert = (
        "INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, tenant_id) "
        "VALUES (now(), gen_random_uuid(), 'security', $1, 'info', 'success', $2)"
    )
    transaction = early.transaction()
    await transaction.start()
    await early.execute(insert, "early", unique)
    await late.execute(insert, "late", unique)
    await asyncio.sleep(0.2)  # the follower looks while `early` is not committed
    await transaction.commit()
    await early.close()
    await late.close()
    await audit.log_event("SECURITY", "end", tenant_id=unique)
    await asyncio.wait_for(follower, 20)
    assert sorted(seen[:-1]) == ["early", "late"]


async def test_old_events_find_a_partition(audit, unique):
    for year in (1970, 1999, 2015):
        await audit.log_event(
            "SYSTEM", "x", user_id=unique, occurred_at=datetime(year, 12, 31, 23, 59, tzinfo=UTC)
        )
    found = await audit.query_events(user_id=unique, order="asc")
    assert [event.occurred_at.year for event in found] == [1970, 1999, 2015]


async def test_missing_tables_are_refused_with_the_command(postgres_database):
    async with AuditAggregator(postgres_database) as audit:
        with pytest.raises(SchemaOutdated, match="dotmac db upgrade"):
            await audit.log_event("SECURITY", "x")
        with pytest.raises(SchemaOutdated, match="dotmac db upgrade"):
            await audit.query_events()
        assert (await audit.schema_status()).current is None
        statuses = await asyncio.gather(audit.migrate(), audit.migrate(), audit.migrate())
        assert sorted(status.current or "" for status in statuses) == ["", schema.HEAD, schema.HEAD]
        assert (await audit.schema_status()).up_to_date
        await audit.log_event("SECURITY", "x")
        assert await audit.count_events() == 1


async def test_functions_of_a_context_are_asked_once_for_each_event(audit, unique):
    numbers = iter(range(1, 100))
    with audit_context(user_id=unique, correlation_id=lambda: str(next(numbers))):
        for _ in range(3):
            await audit.log_event("SECURITY", "x")
        await audit.log_events([{"category": "SECURITY", "action": "x"}] * 3)
    found = [event.correlation_id async for event in audit.iter_events(user_id=unique, order="asc")]
    assert found == ["1", "2", "3", "4", "5", "6"]
