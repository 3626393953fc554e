"""Indexes of `audit_events` on five million rows: what each gains a query, what it costs a writer, its size.

The rows are made by the server (`generate_series`), spread over 180 days in monthly partitions, with skewed
tenants, users and resources. Each candidate is built beside the primary key alone, its queries are run with
and without it (median over random arguments, warm cache), and it is dropped again. What it costs a writer is
the time of inserting rows into one partition that holds a month already, with the index against without it,
in turns. Run it as a script:

    python benches/python/bench_indexes.py [--rows 5000000] [--turns 5]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from datetime import UTC, datetime, timedelta

import asyncpg

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.connection.embedded import EmbeddedPostgres

DAYS = 180
LOAD = """
    INSERT INTO audit_events (occurred_at, id, category, action, level, outcome, user_id, tenant_id,
        resource_type, resource_id, ip_address, correlation_id, metadata, anomaly_score)
    SELECT moment,
        (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0')
            || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
        (ARRAY['authentication', 'data_access', 'data_access', 'data_access', 'data_change', 'authorization',
            'configuration', 'administration', 'security', 'system', 'business', 'data_export'])
            [1 + place % 12],
        (ARRAY['user.login', 'record.read', 'record.list', 'file.read', 'record.update', 'role.grant',
            'setting.change', 'user.create', 'key.rotate', 'job.run', 'order.placed', 'report.export'])
            [1 + place % 12],
        CASE WHEN place % 50 = 0 THEN 'warning' ELSE 'info' END,
        CASE WHEN place % 33 = 0 THEN 'failure' ELSE 'success' END,
        CASE WHEN place % 20 <> 0 THEN 'user-' || (power(random(), 3) * 50000)::int END,
        CASE WHEN place % 40 <> 0 THEN 'tenant-' || (power(random(), 2) * 200)::int END,
        CASE WHEN place % 3 <> 0 THEN 'record' END,
        CASE WHEN place % 3 <> 0 THEN (power(random(), 2) * 100000)::int::text END,
        ('10.' || (place % 4) || '.' || (random() * 255)::int || '.' || (random() * 20)::int)::inet,
        CASE WHEN place % 4 <> 0 THEN md5((place / 3)::text) END,
        jsonb_build_object('path', '/records/' || (random() * 100000)::int, 'method', 'GET',
            'user_agent', 'Mozilla/5.0 (X11; Linux x86_64)', 'session', substr(noise, 1, 12)),
        CASE WHEN random() < 0.001 THEN 0.5 + random() / 2 ELSE random() / 10 END
    FROM (
        SELECT place, md5(place::text || random()::text) AS noise,
            $1::timestamptz + (place - $2::bigint) * $4::interval + random() * interval '1 second' AS moment
        FROM generate_series($2::bigint, $3::bigint - 1) AS place
    ) AS made
"""
# name → (how the index is made, which queries it is for)
CANDIDATES = {
    "user, time": ("(user_id, occurred_at) WHERE user_id IS NOT NULL", ("user, 7 days", "user, deep page")),
    "user, time, id": (
        "(user_id, occurred_at, id) WHERE user_id IS NOT NULL", ("user, 7 days", "user, deep page"),
    ),
    "user (BRIN)": ("USING brin (user_id)", ("user, 7 days",)),
    "tenant, time": (
        "(tenant_id, occurred_at) WHERE tenant_id IS NOT NULL", ("tenant, 7 days", "small tenant, all"),
    ),
    "time (BRIN)": ("USING brin (occurred_at)", ("one hour, count", "one day, count")),
    "correlation": ("(correlation_id) WHERE correlation_id IS NOT NULL", ("correlation",)),
    "correlation (hash)": (
        "USING hash (correlation_id) WHERE correlation_id IS NOT NULL", ("correlation",),
    ),
    "resource, time": (
        "(resource_id, resource_type, occurred_at) WHERE resource_id IS NOT NULL", ("resource, all",),
    ),
    "resource (hash)": ("USING hash (resource_id) WHERE resource_id IS NOT NULL", ("resource, all",)),
    "address, time": ("(ip_address, occurred_at)", ("address, 30 days", "network, 30 days")),
    "address (GiST)": ("USING gist (ip_address inet_ops)", ("address, 30 days", "network, 30 days")),
    "action, time": ("(action text_pattern_ops, occurred_at)", ("rare action, 180 days",)),
    "anomalies": ("(occurred_at, id) WHERE anomaly_score >= 0.5", ("anomalies, 180 days",)),
    "metadata (GIN, paths)": ("USING gin (metadata jsonb_path_ops)", ("metadata contains",)),
    "metadata (GIN, keys)": ("USING gin (metadata)", ("metadata contains",)),
}  # fmt: skip
PAGE = "SELECT * FROM audit_events WHERE {} ORDER BY occurred_at DESC, id DESC LIMIT 100"
WEEK = "occurred_at >= '{now}'::timestamptz - interval '7 days'"
MONTH = "occurred_at >= '{now}'::timestamptz - interval '30 days'"
QUERIES = {
    "user, 7 days": PAGE.format("user_id = 'user-{user}' AND " + WEEK),
    "user, deep page": PAGE.format(
        "user_id = 'user-{busy}' AND (occurred_at, id) < ('{now}'::timestamptz - interval '60 days', "
        "'00000000-0000-7000-8000-000000000000')"
    ),
    "tenant, 7 days": PAGE.format("tenant_id = 'tenant-{tenant}' AND " + WEEK),
    "small tenant, all": PAGE.format("tenant_id = 'tenant-200'"),
    "one hour, count": "SELECT count(*) FROM audit_events WHERE occurred_at >= '{moment}' "
    "AND occurred_at < '{moment}'::timestamptz + interval '1 hour'",
    "one day, count": "SELECT count(*) FROM audit_events WHERE occurred_at >= '{moment}' "
    "AND occurred_at < '{moment}'::timestamptz + interval '1 day'",
    "correlation": PAGE.format("correlation_id = md5('{trace}')"),
    "resource, all": PAGE.format("resource_type = 'record' AND resource_id = '{resource}'"),
    "address, 30 days": PAGE.format("ip_address <<= '10.1.{octet}.7' AND " + MONTH),
    "network, 30 days": PAGE.format("ip_address <<= '10.1.{octet}.0/28' AND " + MONTH),
    "rare action, 180 days": PAGE.format("action LIKE 'user.%' AND user_id = 'user-{user}'"),
    "anomalies, 180 days": PAGE.format("anomaly_score >= 0.5"),
    "metadata contains": PAGE.format("""metadata @> '{{"path": "/records/{resource}"}}'"""),
}


async def load(connection, rows, first):
    """Five million rows in blocks, the newest last."""
    step = timedelta(days=DAYS) / rows
    block = 250_000
    for start in range(0, rows, block):
        end = min(rows, start + block)
        await connection.execute(LOAD, first + start * step, start, end, step)


async def fill(connection, rows, first):
    """Months for all rows, the rows, and what the planner knows of them."""
    for month in range(DAYS // 30 + 2):
        await connection.execute("SELECT audit_ensure_partition($1)", first + month * timedelta(days=29))
    began = time.perf_counter()
    await load(connection, rows, first)
    await connection.execute("VACUUM ANALYZE audit_events")
    print(f"{rows:,} rows loaded in {time.perf_counter() - began:.0f} s", flush=True)


async def ask(connection, name, now, turns, rows):
    """Median milliseconds of one query over random arguments, the first runs left out."""
    chance = random.Random(7)
    took = []
    for turn in range(turns + 2):
        sql = QUERIES[name].format(
            now=now,
            user=int(chance.random() ** 3 * 50_000),
            busy=chance.randrange(5, 50),
            tenant=int(chance.random() ** 2 * 200),
            resource=chance.randrange(100_000),
            octet=chance.randrange(256),
            trace=chance.randrange(rows // 3),
            moment=now - timedelta(days=chance.uniform(1, DAYS - 2)),
        )
        began = time.perf_counter()
        await connection.fetch(sql)
        if turn > 1:
            took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)


async def writer_cost(connection, definitions, turns):
    """name → time of an insert into a month's partition with the index, over that without it."""
    found = {}
    await connection.execute("CREATE TABLE block AS SELECT * FROM audit_events ORDER BY random() LIMIT 20000")
    (month,) = await connection.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
        "WHERE inhparent = 'audit_events'::regclass ORDER BY relpages DESC LIMIT 1"
    )
    await connection.execute(
        f"CREATE TABLE month (LIKE audit_events); INSERT INTO month SELECT * FROM {month['name']}"
    )
    await connection.execute("ALTER TABLE month ADD PRIMARY KEY (occurred_at, id)")

    # The block's rows are of all months; those of this one would collide.
    await connection.execute("DELETE FROM month USING block WHERE month.id = block.id")

    async def insert():
        began = time.perf_counter()
        await connection.execute("BEGIN")
        await connection.execute("INSERT INTO month SELECT * FROM block")
        took = time.perf_counter() - began
        await connection.execute("ROLLBACK")
        await connection.execute("VACUUM month")
        return took

    for name, (definition, _) in definitions.items():
        bare, with_index = [], []
        for _turn in range(turns):
            bare.append(await insert())
            await connection.execute(f"CREATE INDEX candidate ON month {definition}")
            with_index.append(await insert())
            await connection.execute("DROP INDEX candidate")
        found[name] = statistics.median(with_index) / statistics.median(bare)
    await connection.execute("DROP TABLE month, block")
    return found


async def run(url, rows, turns):
    async with AuditAggregator(url) as audit:
        await audit.migrate()
    connection = await asyncpg.connect(url, statement_cache_size=0)
    now = datetime.now(UTC)
    first = now - timedelta(days=DAYS)
    for name in await connection.fetch(
        "SELECT indexrelid::regclass::text AS name FROM pg_index "
        "WHERE indrelid = 'audit_events'::regclass AND NOT indisprimary"
    ):
        await connection.execute(f"DROP INDEX {name['name']}")
    await fill(connection, rows, first)
    size = await connection.fetchval(
        "SELECT sum(pg_table_size(inhrelid)) FROM pg_inherits WHERE inhparent = 'audit_events'::regclass"
    )
    key = await connection.fetchval(
        "SELECT sum(pg_indexes_size(inhrelid)) FROM pg_inherits WHERE inhparent = 'audit_events'::regclass"
    )
    print(f"table {size / 2**20:,.0f} MiB, primary key {key / 2**20:,.0f} MiB\n", flush=True)
    cost = await writer_cost(connection, CANDIDATES, turns)
    without = {}
    print("| index | built in s | MiB | cost of an insert | query | without ms | with ms |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, (definition, queries) in CANDIDATES.items():
        for query in queries:
            if query not in without:
                without[query] = await ask(connection, query, now, turns, rows)
        began = time.perf_counter()
        await connection.execute(f"CREATE INDEX candidate ON audit_events {definition}")
        built = time.perf_counter() - began
        await connection.execute("ANALYZE audit_events")
        size = await connection.fetchval(
            "SELECT sum(pg_relation_size(inhrelid)) FROM pg_inherits WHERE inhparent = 'candidate'::regclass"
        )
        for query in queries:
            took = await ask(connection, query, now, 4 * turns, rows)
            print(
                f"| {name} | {built:.1f} | {size / 2**20:,.1f} | × {cost[name]:.2f} | {query} "
                f"| {without[query]:,.2f} | {took:,.2f} |",
                flush=True,
            )
        await connection.execute("DROP INDEX candidate")
    await connection.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    settings = {"shared_buffers": "1GB", "max_wal_size": "4GB", "maintenance_work_mem": "512MB"}
    with EmbeddedPostgres(settings=settings) as server:
        asyncio.run(run(server.url, asked.rows, asked.turns))


if __name__ == "__main__":
    main()
