"""Counts of all tenants together, so that a question about all of them does not read each one's.

`audit_rollup_totals` sums up, over tenants, those rows of `audit_rollup` that are sums themselves. Such rows
come and go where others are deleted: by `audit_compact_rollup()`, which puts one sum in the place of several,
and by retention. So a trigger on that deletion makes the totals of the days concerned anew, in the same
transaction and whatever version of the library asked for it; to writers, who only insert, it costs nothing.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE audit_rollup_totals (
        day date NOT NULL,
        category text NOT NULL,
        outcome text NOT NULL,
        level text NOT NULL,
        events bigint NOT NULL,
        PRIMARY KEY (day, category, outcome, level)
    )
    """,
    """
    COMMENT ON TABLE audit_rollup_totals IS
        'events per UTC day, category, outcome and level: the sum over all tenants of those rows of '
        'audit_rollup whose batch is null; kept by a trigger there'
    """,
    # Of a role that has both an auditor's sight and a bond to one tenant, the bond counts.
    """
    CREATE FUNCTION audit_sees_all() RETURNS boolean LANGUAGE sql STABLE AS $$
        SELECT NOT row_security_active('audit_events'::regclass) OR NOT one_tenant AND tenant_id IS NULL
        FROM audit_sight()
    $$
    """,
    # Whoever may read audit_rollup, and sees all tenants there, may read the totals; others see nothing here.
    "GRANT SELECT ON audit_rollup_totals TO PUBLIC",
    "ALTER TABLE audit_rollup_totals ENABLE ROW LEVEL SECURITY",
    """
    CREATE POLICY audit_all_tenants ON audit_rollup_totals FOR SELECT USING (
        (SELECT has_table_privilege('audit_rollup'::regclass, 'SELECT') AND audit_sees_all()))
    """,
    # What those others read instead. A function, so that the plan of a question about all tenants is not made
    # for the rows of each: with many, that would bring compilation and parallel workers for nothing.
    """
    CREATE FUNCTION audit_rollup_of_tenant(first_day date, after_day date) RETURNS SETOF audit_rollup
        LANGUAGE plpgsql STABLE AS $$
    BEGIN
        IF NOT audit_sees_all() THEN
            RETURN QUERY SELECT * FROM audit_rollup WHERE batch IS NULL
                AND day >= coalesce(first_day, '-infinity') AND day < coalesce(after_day, 'infinity');
        END IF;
    END $$
    """,
    # At the end of the statement that deletes, and thus after the sums that the same statement inserts.
    """
    CREATE FUNCTION audit_total() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    DECLARE
        days constant date[] := ARRAY(SELECT DISTINCT day FROM gone);  -- for which an index is used
    BEGIN
        DELETE FROM audit_rollup_totals WHERE day = ANY (days);
        INSERT INTO audit_rollup_totals (day, category, outcome, level, events)
            SELECT day, category, outcome, level, sum(events) FROM audit_rollup
            WHERE batch IS NULL AND day = ANY (days) GROUP BY 1, 2, 3, 4;
        RETURN NULL;
    END $$
    """,
    """
    CREATE FUNCTION audit_no_totals() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        TRUNCATE audit_rollup_totals;
        RETURN NULL;
    END $$
    """,
    # A function must not look names up where its caller says.
    """
    DO $$
    DECLARE
        one regprocedure;
    BEGIN
        FOR one IN SELECT oid::regprocedure FROM pg_catalog.pg_proc
            WHERE pronamespace = current_schema()::regnamespace
            AND proname IN ('audit_sees_all', 'audit_rollup_of_tenant', 'audit_total', 'audit_no_totals')
        LOOP
            EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', one, current_schema());
        END LOOP;
    END $$
    """,
    # It runs with its owner's rights, whoever's table it stands on: nobody else may put it on one.
    "REVOKE ALL ON FUNCTION audit_total() FROM PUBLIC",
    """
    CREATE TRIGGER audit_total AFTER DELETE ON audit_rollup REFERENCING OLD TABLE AS gone
        FOR EACH STATEMENT EXECUTE FUNCTION audit_total()
    """,
    """
    CREATE TRIGGER audit_no_totals AFTER TRUNCATE ON audit_rollup
        FOR EACH STATEMENT EXECUTE FUNCTION audit_no_totals()
    """,
    # The trigger holds the table until this is committed, so nothing is summed up meanwhile.
    """
    INSERT INTO audit_rollup_totals (day, category, outcome, level, events)
    SELECT day, category, outcome, level, sum(events) FROM audit_rollup
    WHERE batch IS NULL GROUP BY 1, 2, 3, 4
    """,
    # The one by day reads all tenants of a time to find one.
    "CREATE INDEX audit_rollup_tenant ON audit_rollup (tenant_id, day)",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
