"""The events, partitioned by month and append-only, and the places where imports stopped.

There is no default partition: it would stand in the way of every later one. `audit_ensure_partition`
makes the month of any event on demand, with the owner's rights, for whoever may insert.
There are no downgrades: a trail that can be taken back is none.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE audit_events (
        occurred_at timestamptz NOT NULL,
        id uuid NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        recorded_tx bigint NOT NULL DEFAULT (pg_current_xact_id()::text::bigint),
        category text NOT NULL,
        action text NOT NULL,
        level text NOT NULL,
        outcome text NOT NULL,
        user_id text,
        tenant_id text,
        resource_type text,
        resource_id text,
        ip_address inet,
        correlation_id text,
        trace_id text,
        span_id text,
        metadata jsonb NOT NULL DEFAULT '{}',
        anomaly_score double precision,
        anomaly_reasons jsonb,
        PRIMARY KEY (occurred_at, id)
    ) PARTITION BY RANGE (occurred_at)
    """,
    """
    COMMENT ON COLUMN audit_events.recorded_tx IS
        'transaction that stored the event: what a follower reads on from, whatever the order of commits'
    """,
    "CREATE INDEX audit_events_tenant ON audit_events (tenant_id, occurred_at) WHERE tenant_id IS NOT NULL",
    "CREATE INDEX audit_events_user ON audit_events (user_id, occurred_at) WHERE user_id IS NOT NULL",
    "CREATE INDEX audit_events_correlation ON audit_events (correlation_id) WHERE correlation_id IS NOT NULL",
    "CREATE INDEX audit_events_time ON audit_events USING brin (occurred_at)",
    "CREATE INDEX audit_events_tx ON audit_events USING brin (recorded_tx) WITH (autosummarize = on)",
    """
    CREATE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'audit_events is append-only: % is refused', TG_OP
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Retention drops whole partitions; events are never changed or deleted one by one.';
    END $$
    """,
    """
    CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit_events
        FOR EACH ROW EXECUTE FUNCTION audit_refuse_change()
    """,
    """
    CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_events
        FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change()
    """,
    """
    CREATE FUNCTION audit_ensure_partition(moment timestamptz) RETURNS text
        LANGUAGE plpgsql SECURITY DEFINER AS $$
    DECLARE
        first_day timestamp := date_trunc('month', moment AT TIME ZONE 'UTC');
        leaf text := 'audit_events_' || to_char(first_day, 'YYYY_MM');
    BEGIN
        IF NOT has_table_privilege(session_user, 'audit_events', 'INSERT') THEN
            RAISE EXCEPTION 'no right to insert into audit_events' USING ERRCODE = 'insufficient_privilege';
        END IF;
        IF moment < '1970-01-01Z' OR moment > now() + interval '100 days' THEN
            RAISE EXCEPTION 'no partition is made for %', moment USING ERRCODE = 'datetime_field_overflow';
        END IF;
        IF to_regclass(quote_ident(leaf)) IS NULL THEN
            PERFORM pg_advisory_xact_lock(4843917210475301);
            -- A query, which sees what others committed meanwhile; to_regclass may answer from its cache.
            IF NOT EXISTS (
                SELECT FROM pg_catalog.pg_class WHERE relname = leaf AND relnamespace = (
                    SELECT relnamespace FROM pg_catalog.pg_class WHERE oid = 'audit_events'::regclass)
            ) THEN
                -- Attached, not created in place: writers of other months are not held up meanwhile.
                EXECUTE format(
                    'CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS INCLUDING COMMENTS)', leaf);
                EXECUTE format('CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON %I
                    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change()', leaf);
                EXECUTE format(
                    'ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', leaf,
                    first_day AT TIME ZONE 'UTC', (first_day + interval '1 month') AT TIME ZONE 'UTC');
            END IF;
        END IF;
        RETURN leaf;
    END $$
    """,
    # A function with its owner's rights must not look names up where its caller says.
    """
    DO $$ BEGIN
        EXECUTE format(
            'ALTER FUNCTION audit_ensure_partition(timestamptz) SET search_path = %I, pg_temp',
            current_schema());
    END $$
    """,
    """
    SELECT audit_ensure_partition(now() + ahead * interval '1 month') FROM generate_series(0, 2) AS ahead
    """,
    """
    CREATE TABLE audit_imports (
        source text PRIMARY KEY,
        position bigint NOT NULL,
        line bigint NOT NULL,
        state jsonb NOT NULL DEFAULT '{}',
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
