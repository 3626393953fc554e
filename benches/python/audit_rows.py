"""Millions of audit events, made by the server itself: a trail of 180 days with heavy and light users.

User `u0` has about 8 % of all events, most have a few; a user belongs to one of 20 tenants; nearly all events
are successes of level info; five events share a correlation id. The same seed gives the same trail.
"""

from __future__ import annotations

from datetime import timedelta

DAYS = 180

_EVENTS = """
INSERT INTO audit_events (occurred_at, id, recorded_tx, category, action, level, outcome, user_id,
    tenant_id, resource_type, resource_id, ip_address, correlation_id, metadata, anomaly_score)
SELECT moment,
    -- version 7: the time, then chance
    (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || '7'
        || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid,
    n / 5000,
    category,
    category || '.' || (ARRAY['read', 'read', 'read', 'list', 'update', 'delete'])[1 + floor(a * 6)],
    CASE WHEN outcome = 'success' THEN 'info' WHEN b < 0.1 THEN 'error' ELSE 'warning' END,
    outcome, 'u' || who, 't' || who % 20,
    (ARRAY['order', 'user', 'file', 'report'])[1 + floor(b * 4)], floor(c * 100000)::text,
    ('10.' || who % 7 || '.' || who % 250 || '.' || floor(c * 250))::inet, 'c' || n / 5,
    jsonb_build_object('path', '/v1/' || category || '/' || floor(c * 100000),
        'user_agent', 'Mozilla/5.0 (X11; Linux x86_64)', 'ms', floor(a * 500),
        'order', jsonb_build_object('total', floor(b * 100000) / 100, 'currency', 'EUR')),
    CASE WHEN a < 0.01 THEN 0.5 + b / 2 ELSE b / 4 END
FROM (
    SELECT n, $1::timestamptz + n * $3::interval + random() * interval '50 ms' AS moment,
        floor(20000 * power(random(), 4))::int AS who, random() AS a, random() AS b, random() AS c,
        (ARRAY['authentication', 'data_access', 'data_access', 'data_access', 'data_access', 'data_change',
            'data_change', 'business', 'business', 'system_task', 'configuration', 'security'])
            [1 + floor(random() * 12)] AS category,
        CASE WHEN random() < 0.96 THEN 'success' WHEN random() < 0.7 THEN 'failure' ELSE 'denied' END
            AS outcome
    FROM generate_series($2::bigint, $2::bigint + $4::bigint - 1) AS n
) AS made
"""

_ROLLUP = """
INSERT INTO audit_rollup (tenant_id, day, category, outcome, level, events, batch)
SELECT coalesce(tenant_id, ''), (occurred_at AT TIME ZONE 'UTC')::date, category, outcome, level, count(*),
    gen_random_uuid()
FROM audit_events GROUP BY 1, 2, 3, 4, 5
"""


async def fill(connection, rows, end, *, block=250_000):
    """Store `rows` events that end at `end`, evenly over 180 days, but for those that are there already."""
    start, step = end - timedelta(days=DAYS), timedelta(days=DAYS) / rows
    await connection.execute("SELECT setseed(0.5)")
    await connection.execute(
        "SELECT audit_ensure_partition($1::timestamptz + n * interval '25 days') "
        "FROM generate_series(0, 7) AS n",
        start,
    )
    found = await connection.fetchval("SELECT count(*) FROM audit_events")
    for first in range(found, rows, block):
        await connection.execute(_EVENTS, start, first, step, min(block, rows - first))
    if found < rows:
        await connection.execute("DELETE FROM audit_rollup")
        await connection.execute(_ROLLUP)
        await connection.execute("SELECT audit_compact_rollup()")
        await connection.execute("VACUUM (ANALYZE) audit_events, audit_rollup")
