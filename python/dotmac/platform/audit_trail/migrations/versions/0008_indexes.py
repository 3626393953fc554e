"""Indexes by storing transaction and by segment that serve fast writers, and leave the server's log alone.

Both were BRIN with `autosummarize`, which asks autovacuum for the summary of each range of pages that is
full. The queue for that takes 256 requests a minute. A writer of some hundred events per second fills it;
from then on the server logs each request that it refuses together with the statement that was running, which
is a whole batch: a million events made 465 MB of log. And what has no summary yet is read at each look.

By transaction there is a b-tree now: followers look ten times a second, and one that lags reads the next
events, not all that it has to catch up with. By segment BRIN stays, since only verification reads by it, but
without requests: vacuum makes summaries as well. For that a month is vacuumed when it has 10,000 new events
and a fiftieth of those it had, instead of a fifth.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

VACUUM = "autovacuum_vacuum_insert_scale_factor = 0.02, autovacuum_vacuum_insert_threshold = 10000"

STATEMENTS = (
    # The terms of a partitioned table's index can't be changed, so each partition's are.
    f"""
    CREATE FUNCTION audit_summarise_by_vacuum(leaf regclass) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        part regclass;
    BEGIN
        EXECUTE format('ALTER TABLE %s SET ({VACUUM})', leaf);
        FOR part IN SELECT oid FROM pg_catalog.pg_class JOIN pg_catalog.pg_index ON indexrelid = oid
            WHERE indrelid = leaf AND 'autosummarize=on' = ANY (reloptions)
        LOOP
            EXECUTE format('ALTER INDEX %s RESET (autosummarize)', part);
        END LOOP;
    END $$
    """,  # noqa: S608 (a constant)
    # As before, but for that.
    """
    CREATE OR REPLACE FUNCTION audit_ensure_partition(moment timestamptz) RETURNS text
        LANGUAGE plpgsql SECURITY DEFINER AS $$
    DECLARE
        first_day timestamp := date_trunc('month', moment AT TIME ZONE 'UTC');
        leaf text := 'audit_events_' || to_char(first_day, 'YYYY_MM');
        attached boolean;
    BEGIN
        IF NOT has_table_privilege(session_user, 'audit_events', 'INSERT') THEN
            RAISE EXCEPTION 'no right to insert into audit_events' USING ERRCODE = 'insufficient_privilege';
        END IF;
        IF moment < '1970-01-01Z' OR moment > now() + interval '100 days' THEN
            RAISE EXCEPTION 'no partition is made for %', moment USING ERRCODE = 'datetime_field_overflow';
        END IF;
        FOR attempt IN 1..2 LOOP
            -- A query, which sees what others committed meanwhile; to_regclass may answer from its cache.
            SELECT inhrelid IS NOT NULL INTO attached FROM pg_catalog.pg_class
                LEFT JOIN pg_catalog.pg_inherits ON inhrelid = pg_class.oid
                    AND inhparent = 'audit_events'::regclass AND NOT inhdetachpending
                WHERE relname = leaf AND relnamespace = (
                    SELECT relnamespace FROM pg_catalog.pg_class WHERE oid = 'audit_events'::regclass);
            IF attached THEN
                RETURN leaf;
            ELSIF NOT attached THEN
                RAISE EXCEPTION 'partition % is on its way out: try again when it is gone', leaf
                    USING ERRCODE = 'lock_not_available',
                        HINT = 'Where retention was interrupted, run `dotmac audit retention` again.';
            END IF;
            IF attempt = 1 THEN
                PERFORM pg_advisory_xact_lock(4843917210475301);
            END IF;
        END LOOP;
        -- Attached, not created in place: writers of other months are not held up meanwhile.
        EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS INCLUDING COMMENTS)', leaf);
        EXECUTE format('CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON %I
            FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change()', leaf);
        EXECUTE format('ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', leaf,
            first_day AT TIME ZONE 'UTC', (first_day + interval '1 month') AT TIME ZONE 'UTC');
        PERFORM audit_summarise_by_vacuum(leaf::regclass);
        PERFORM audit_grant_partition(leaf::regclass);
        RETURN leaf;
    END $$
    """,
    # A function must not look names up where its caller says; one that is replaced forgets its settings.
    """
    DO $$
    DECLARE
        one regprocedure;
    BEGIN
        FOR one IN SELECT oid::regprocedure FROM pg_catalog.pg_proc
            WHERE pronamespace = current_schema()::regnamespace
            AND proname IN ('audit_ensure_partition', 'audit_summarise_by_vacuum')
        LOOP
            EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', one, current_schema());
        END LOOP;
    END $$
    """,
    "REVOKE ALL ON FUNCTION audit_summarise_by_vacuum(regclass) FROM PUBLIC",
    # On a table with much in it only the parent's part is made here; `audit.build_indexes()`, which migrate()
    # and `dotmac db upgrade` run afterwards, builds the partitions' parts without holding writers up, and
    # drops what was used until then.
    """
    DO $$
    DECLARE
        large boolean := (SELECT sum(pg_relation_size(inhrelid)) > 64 * 1024 * 1024
            FROM pg_catalog.pg_inherits WHERE inhparent = 'audit_events'::regclass);
    BEGIN
        IF large THEN
            CREATE INDEX audit_events_stored ON ONLY audit_events (recorded_tx);
        ELSE
            CREATE INDEX audit_events_stored ON audit_events (recorded_tx);
            DROP INDEX audit_events_tx;
        END IF;
    END $$
    """,
    # Last, when no transaction can add one any more; one that is being detached takes no terms.
    """
    SELECT audit_summarise_by_vacuum(inhrelid::regclass) FROM pg_catalog.pg_inherits
    WHERE inhparent = 'audit_events'::regclass AND NOT inhdetachpending
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
