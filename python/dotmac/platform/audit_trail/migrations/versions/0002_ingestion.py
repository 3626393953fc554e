"""What each commit stores beside its events: segments for the proofs of integrity, counts per day.

A segment is the events of one tenant that one commit of one writer stored; it holds their Merkle root and
is chained to the writer's segment before it. `audit_rollup` gets a few delta rows per commit, so that
writers never meet on one hot row; `audit_compact_rollup()` sums them up later.
Whoever may insert events may insert these too, as before this revision.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    ALTER TABLE audit_events
        ADD COLUMN segment uuid,
        ADD COLUMN leaf integer,
        ADD COLUMN subject_id text,
        ADD COLUMN personal jsonb
    """,
    "COMMENT ON COLUMN audit_events.segment IS 'row of audit_segments that covers the event'",
    "COMMENT ON COLUMN audit_events.leaf IS 'place of the event in its segment, from 0'",
    "COMMENT ON COLUMN audit_events.subject_id IS 'whom the personal data is about'",
    """
    COMMENT ON COLUMN audit_events.personal IS
        'encrypted fields: {"key": id of the key, "fields": {name: ciphertext in base64}}'
    """,
    """
    CREATE TABLE audit_writers (
        id uuid PRIMARY KEY,
        started_at timestamptz NOT NULL DEFAULT now(),
        host text,
        pid integer
    )
    """,
    """
    CREATE TABLE audit_writer_ends (
        writer uuid PRIMARY KEY,
        ended_at timestamptz NOT NULL DEFAULT now(),
        segments bigint NOT NULL
    )
    """,
    """
    CREATE TABLE audit_segments (
        id uuid PRIMARY KEY,
        writer uuid NOT NULL,
        tenant_id text NOT NULL,
        seq bigint NOT NULL CHECK (seq > 0),
        size integer NOT NULL CHECK (size > 0),
        root bytea NOT NULL CHECK (length(root) = 32),
        link bytea NOT NULL CHECK (length(link) = 32),
        first_at timestamptz NOT NULL,
        last_at timestamptz NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        recorded_tx bigint NOT NULL DEFAULT (pg_current_xact_id()::text::bigint),
        UNIQUE (writer, tenant_id, seq)
    )
    """,
    """
    COMMENT ON COLUMN audit_segments.root IS
        'RFC 6962 Merkle tree hash over the leaf hashes of its events, in the order of audit_events.leaf'
    """,
    """
    COMMENT ON COLUMN audit_segments.link IS
        'SHA-256(link of the segment before || canonical JSON of this record); 32 zero bytes before the first'
    """,
    "CREATE INDEX audit_segments_tx ON audit_segments USING brin (recorded_tx) WITH (autosummarize = on)",
    """
    CREATE OR REPLACE FUNCTION audit_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Retention drops whole partitions; events are never changed or deleted one by one.';
    END $$
    """,
    *(
        f"""
        CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON {table}
            FOR EACH ROW EXECUTE FUNCTION audit_refuse_change()
        """
        for table in ("audit_writers", "audit_writer_ends", "audit_segments")
    ),
    *(
        f"""
        CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON {table}
            FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change()
        """
        for table in ("audit_writers", "audit_writer_ends", "audit_segments")
    ),
    """
    CREATE TABLE audit_rollup (
        tenant_id text NOT NULL DEFAULT '',
        day date NOT NULL,
        category text NOT NULL,
        outcome text NOT NULL,
        level text NOT NULL,
        events bigint NOT NULL,
        batch uuid
    )
    """,
    """
    COMMENT ON TABLE audit_rollup IS
        'events per tenant, UTC day, category, outcome and level: the sum over all rows of a group'
    """,
    "COMMENT ON COLUMN audit_rollup.batch IS 'commit that added the row; null for a sum of several'",
    "CREATE INDEX audit_rollup_day ON audit_rollup (day, tenant_id)",
    "CREATE INDEX audit_rollup_deltas ON audit_rollup (day) WHERE batch IS NOT NULL",
    # As every later sum: what lies in a month's partition when this runs, and nothing twice.
    "LOCK TABLE audit_events IN SHARE ROW EXCLUSIVE MODE",
    """
    INSERT INTO audit_rollup (tenant_id, day, category, outcome, level, events)
    SELECT coalesce(tenant_id, ''), (occurred_at AT TIME ZONE 'UTC')::date, category, outcome, level, count(*)
    FROM audit_events GROUP BY 1, 2, 3, 4, 5
    """,
    """
    CREATE FUNCTION audit_compact_rollup() RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER AS $$
    DECLARE
        gone bigint;
    BEGIN
        IF NOT has_table_privilege(session_user, 'audit_rollup', 'INSERT') THEN
            RAISE EXCEPTION 'no right to insert into audit_rollup' USING ERRCODE = 'insufficient_privilege';
        END IF;
        -- One at a time, and nobody waits for it.
        IF NOT pg_try_advisory_xact_lock(4843917210475302) THEN
            RETURN 0;
        END IF;
        WITH summed AS (
            DELETE FROM audit_rollup WHERE day IN (SELECT day FROM audit_rollup WHERE batch IS NOT NULL)
            RETURNING tenant_id, day, category, outcome, level, events
        ), added AS (
            INSERT INTO audit_rollup (tenant_id, day, category, outcome, level, events)
            SELECT tenant_id, day, category, outcome, level, sum(events) FROM summed GROUP BY 1, 2, 3, 4, 5
            RETURNING 1
        )
        SELECT (SELECT count(*) FROM summed) - (SELECT count(*) FROM added) INTO gone;
        RETURN gone;
    END $$
    """,
    # A function with its owner's rights must not look names up where its caller says.
    """
    DO $$ BEGIN
        EXECUTE format(
            'ALTER FUNCTION audit_compact_rollup() SET search_path = %I, pg_temp', current_schema());
    END $$
    """,
    # Roles that log events go on doing so.
    """
    DO $$
    DECLARE
        who record;
    BEGIN
        FOR who IN
            SELECT DISTINCT grantee, privilege_type FROM information_schema.role_table_grants
            WHERE table_schema = current_schema() AND table_name = 'audit_events'
                AND privilege_type IN ('INSERT', 'SELECT') AND grantee <> current_user
        LOOP
            EXECUTE format(
                'GRANT %s ON audit_writers, audit_writer_ends, audit_segments, audit_rollup TO %s',
                who.privilege_type,
                CASE WHEN who.grantee = 'PUBLIC' THEN 'PUBLIC' ELSE quote_ident(who.grantee) END);
        END LOOP;
    END $$
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
