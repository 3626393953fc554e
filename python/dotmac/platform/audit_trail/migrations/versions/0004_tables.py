"""Roles and row-level security, legal holds, and the life of a partition from its sealing to its archive.

Nothing changes for roles until `audit_grant` or `audit_enable_tenants` is called: row-level security is off
by default. Where it is on, PostgreSQL refuses COPY through the parent table. So readers have rights on the
parent alone, with its policies, and writers copy into the partitions, on which nobody else has a grant.

Row-level security is not forced upon the owner: retention, sealing, checkpoints and pg_dump work on all
tenants, and an owner could lift it anyway. A service must log in as another role.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE audit_roles (
        role regrole NOT NULL,
        kind text NOT NULL CHECK (kind IN ('writer', 'reader', 'member', 'auditor')),
        tenant_id text CHECK (tenant_id IS NULL OR tenant_id <> '' AND kind IN ('reader', 'member')),
        granted_at timestamptz NOT NULL DEFAULT now(),
        granted_by text NOT NULL DEFAULT session_user,
        PRIMARY KEY (role, kind)
    )
    """,
    # Whoever reads has to know whether it sees one tenant or all; each role sees what is said of itself.
    "GRANT SELECT ON audit_roles TO PUBLIC",
    "ALTER TABLE audit_roles ENABLE ROW LEVEL SECURITY",
    """
    CREATE POLICY audit_own_roles ON audit_roles FOR SELECT
        USING (pg_has_role(current_user, role::oid, 'USAGE'))
    """,
    # Who began a writer may end it, and who noted how far an import is may move that: of rows from before,
    # the owner of the tables.
    "ALTER TABLE audit_writers ADD COLUMN owner_role name NOT NULL DEFAULT current_user",
    "ALTER TABLE audit_imports ADD COLUMN owner_role name NOT NULL DEFAULT current_user",
    """
    CREATE TABLE audit_holds (
        id uuid PRIMARY KEY,
        reason text NOT NULL,
        placed_by text NOT NULL,
        placed_at timestamptz NOT NULL DEFAULT now(),
        from_time timestamptz,
        to_time timestamptz,
        tenant_id text,
        user_id text,
        resource_type text,
        resource_id text,
        released_at timestamptz,
        released_by text,
        release_reason text,
        CHECK (from_time < to_time)
    )
    """,
    """
    CREATE FUNCTION audit_keep_holds() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'UPDATE' AND OLD.released_at IS NULL AND NEW.released_at IS NOT NULL
            AND (to_jsonb(NEW) - '{released_at,released_by,release_reason}'::text[])
              = (to_jsonb(OLD) - '{released_at,released_by,release_reason}'::text[])
        THEN
            RETURN NEW;
        END IF;
        RAISE EXCEPTION 'a legal hold is released, once, and stays on record: % is refused', TG_OP
            USING ERRCODE = 'insufficient_privilege';
    END $$
    """,
    """
    CREATE TRIGGER audit_keep_holds BEFORE UPDATE OR DELETE ON audit_holds
        FOR EACH ROW EXECUTE FUNCTION audit_keep_holds()
    """,
    """
    CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_holds
        FOR EACH STATEMENT EXECUTE FUNCTION audit_keep_holds()
    """,
    """
    CREATE TABLE audit_archives (
        id uuid PRIMARY KEY,
        partition text NOT NULL,
        from_time timestamptz NOT NULL,
        to_time timestamptz NOT NULL,
        state text NOT NULL CHECK (state IN ('sealed', 'archived', 'detaching', 'dropped', 'kept')),
        url text,
        events bigint,
        bytes bigint,
        sha256 bytea,
        started_at timestamptz NOT NULL DEFAULT now(),
        archived_at timestamptz,
        dropped_at timestamptz,
        event_id uuid,
        told_at timestamptz
    )
    """,
    """
    COMMENT ON TABLE audit_archives IS
        'what became of each partition that retention took: sealed (no more inserts), archived (written, '
        'read back, compared), detaching (decided), dropped, or kept after all because of a legal hold'
    """,
    # One run at a time for each partition, and one row to go on with after a crash.
    """
    CREATE UNIQUE INDEX audit_archives_open ON audit_archives (partition)
        WHERE state IN ('sealed', 'archived', 'detaching')
    """,
    """
    CREATE FUNCTION audit_refuse_insert() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'partition % is on its way out: try again when it is gone', TG_TABLE_NAME
            USING ERRCODE = 'lock_not_available';
    END $$
    """,
)

ROLES = (
    # The tables that bear a tenant; those of them that exist are meant.
    """
    CREATE FUNCTION audit_tenant_tables() RETURNS SETOF regclass LANGUAGE sql STABLE AS $$
        SELECT attrelid::regclass FROM pg_catalog.pg_attribute
        WHERE attname = 'tenant_id' AND NOT attisdropped AND attrelid IN (
            SELECT to_regclass(name) FROM unnest('{audit_events,audit_segments,audit_log,audit_checkpoints,
                audit_anchors,audit_rollup,audit_subject_keys,audit_holds}'::text[]) AS name)
        ORDER BY 1
    $$
    """,
    # A writer sees the keys of what it may have stored before, and no more. Importers note where they are.
    """
    CREATE FUNCTION audit_rights() RETURNS TABLE (kind text, relation text, rights text)
        LANGUAGE sql IMMUTABLE AS $$
        SELECT kind, relation, rights FROM (VALUES
            ('{writer}', 'audit_events', 'INSERT, SELECT (occurred_at, id)'),
            ('{member}', 'audit_events', 'INSERT'),
            ('{reader,member,auditor}', 'audit_events', 'SELECT'),
            ('{writer,member}', 'audit_imports', 'INSERT, SELECT, UPDATE'),
            ('{writer,member}', 'audit_writers', 'INSERT, SELECT'),
            ('{writer,member}', 'audit_writer_ends', 'INSERT, SELECT'),
            ('{writer}', 'audit_segments', 'INSERT, SELECT'),
            ('{member}', 'audit_segments', 'INSERT'),
            ('{writer,member}', 'audit_rollup', 'INSERT'),
            ('{reader,member,auditor}', 'audit_segments', 'SELECT'),
            ('{reader,member,auditor}', 'audit_rollup', 'SELECT'),
            ('{reader,member,auditor}', 'audit_log', 'SELECT'),
            ('{reader,member,auditor}', 'audit_checkpoints', 'SELECT'),
            ('{reader,member,auditor}', 'audit_archives', 'SELECT'),
            ('{auditor}', 'audit_holds', 'SELECT'),
            ('{reader,member,auditor}', 'audit_trail', 'SELECT'),
            ('{auditor}', 'audit_anchors', 'SELECT'),
            ('{reader,member,auditor}', 'audit_legacy', 'SELECT'),
            ('{reader,member,auditor}', 'audit_explanations', 'SELECT'),
            ('{reader,member,auditor}', 'audit_writers', 'SELECT'),
            ('{reader,member,auditor}', 'audit_writer_ends', 'SELECT'),
            ('{writer,reader,member,auditor}', 'dotmac_schema_version', 'SELECT')
        ) AS known (kinds, relation, rights), unnest(kinds::text[]) AS kind
    $$
    """,
    """
    CREATE FUNCTION audit_isolated() RETURNS boolean LANGUAGE sql STABLE AS $$
        SELECT relrowsecurity FROM pg_catalog.pg_class WHERE oid = 'audit_events'::regclass
    $$
    """,
    # What the current role sees: every tenant, or the one of the setting app.tenant_id; and to which it is
    # bound, if to any.
    """
    CREATE FUNCTION audit_sight(OUT one_tenant boolean, OUT tenant_id text) LANGUAGE sql STABLE AS $$
        SELECT row_security_active('audit_events'::regclass)
                AND coalesce(bool_and(known.kind <> 'auditor'), true),
            min(known.tenant_id)
        FROM audit_roles AS known WHERE pg_has_role(current_user, known.role::oid, 'USAGE')
    $$
    """,
    # Grants on one partition: writers', and where tenants are kept apart nobody else's, whatever default
    # privileges or GRANT … ON ALL TABLES brought.
    """
    CREATE FUNCTION audit_grant_partition(leaf regclass) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        one regrole;
    BEGIN
        IF audit_isolated() THEN
            FOR one IN
                SELECT DISTINCT given.grantee::regrole
                FROM pg_catalog.pg_class AS class, LATERAL (
                    SELECT grantee FROM aclexplode(class.relacl)
                    UNION SELECT grantee FROM pg_catalog.pg_attribute, aclexplode(attacl)
                        WHERE attrelid = class.oid
                ) AS given
                WHERE class.oid = leaf AND given.grantee <> class.relowner AND NOT EXISTS (
                    SELECT FROM audit_roles WHERE role = given.grantee::regrole AND kind = 'writer')
            LOOP
                EXECUTE format('REVOKE ALL ON %s FROM %s', leaf,
                    CASE WHEN one = 0::regrole THEN 'PUBLIC' ELSE one::text END);
            END LOOP;
        END IF;
        FOR one IN
            SELECT role FROM audit_roles JOIN pg_catalog.pg_roles AS known ON known.oid = role
            WHERE kind = 'writer'
        LOOP
            EXECUTE format('GRANT INSERT, SELECT (occurred_at, id) ON %s TO %s', leaf, one);
        END LOOP;
    END $$
    """,
    """
    CREATE FUNCTION audit_add_policy(name text, relation regclass, terms text) RETURNS void
        LANGUAGE plpgsql AS $$
    BEGIN
        -- Looked up first: CREATE POLICY would hold up everybody on that table.
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_policy WHERE polrelid = relation AND polname = name) THEN
            EXECUTE format('CREATE POLICY %I ON %s %s', name, relation, terms);
        END IF;
    END $$
    """,
    # Tables that bear no tenant, in which a role may nevertheless write where tenants are kept apart: only
    # what is its own. Whoever verifies has to see every writer.
    """
    CREATE FUNCTION audit_owned_tables() RETURNS SETOF regclass LANGUAGE sql STABLE AS $$
        SELECT to_regclass(name)
        FROM unnest('{audit_writers,audit_writer_ends,audit_imports}'::text[]) AS name
    $$
    """,
    """
    CREATE FUNCTION audit_keep_owned() RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        relation regclass;
    BEGIN
        PERFORM audit_add_policy('audit_all_read', 'audit_writers', 'FOR SELECT USING (true)');
        PERFORM audit_add_policy('audit_own_writer', 'audit_writers',
            'FOR INSERT WITH CHECK (owner_role = current_user)');
        PERFORM audit_add_policy('audit_all_read', 'audit_writer_ends', 'FOR SELECT USING (true)');
        PERFORM audit_add_policy('audit_own_writer', 'audit_writer_ends',
            'FOR INSERT WITH CHECK (EXISTS (SELECT FROM audit_writers AS begun
                WHERE begun.id = audit_writer_ends.writer AND begun.owner_role = current_user))');
        PERFORM audit_add_policy('audit_own_import', 'audit_imports',
            'USING (owner_role = current_user) WITH CHECK (owner_role = current_user)');
        FOR relation IN SELECT audit_owned_tables() LOOP
            IF NOT (SELECT relrowsecurity FROM pg_catalog.pg_class WHERE oid = relation) THEN
                EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation);
            END IF;
        END LOOP;
    END $$
    """,
    # Makes grants and policies what audit_roles says; may be run again at any time, as after an upgrade.
    """
    CREATE FUNCTION audit_apply_roles() RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        isolated boolean := audit_isolated();
        own constant text := '(tenant_id = nullif(current_setting(''app.tenant_id'', true), ''''))';
        relation regclass;
        one record;
        given record;
    BEGIN
        FOR relation IN SELECT audit_tenant_tables() LOOP
            CONTINUE WHEN NOT isolated;
            PERFORM audit_add_policy('audit_tenant_read', relation, 'FOR SELECT USING ' || own);
            PERFORM audit_add_policy('audit_tenant_write', relation, 'FOR INSERT WITH CHECK ' || own);
            IF NOT (SELECT relrowsecurity FROM pg_catalog.pg_class WHERE oid = relation) THEN
                EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation);
            END IF;
        END LOOP;
        IF isolated THEN
            PERFORM audit_keep_owned();
        END IF;
        FOR one IN
            SELECT role, role::oid AS number, kind, tenant_id, rolsuper OR rolbypassrls
                OR pg_has_role(known.oid, (SELECT relowner FROM pg_catalog.pg_class
                    WHERE oid = 'audit_events'::regclass), 'USAGE') AS exempt
            FROM audit_roles JOIN pg_catalog.pg_roles AS known ON known.oid = role
        LOOP
            IF isolated AND one.exempt AND one.kind IN ('reader', 'member') THEN
                RAISE EXCEPTION 'row-level security does not bind %: it is a superuser, has BYPASSRLS or '
                    'owns the tables', one.role USING ERRCODE = 'invalid_grant_operation',
                    HINT = 'Let the service log in as another role.';
            END IF;
            IF NOT has_schema_privilege(one.number, current_schema(), 'USAGE') THEN
                EXECUTE format('GRANT USAGE ON SCHEMA %I TO %s', current_schema(), one.role);
            END IF;
            FOR given IN SELECT * FROM audit_rights() AS known
                WHERE known.kind = one.kind AND to_regclass(known.relation) IS NOT NULL
            LOOP
                EXECUTE format('GRANT %s ON %I TO %s', given.rights, given.relation, one.role);
            END LOOP;
            IF isolated AND one.kind = 'writer' THEN  -- of several, one goes on with another's import
                PERFORM audit_add_policy('audit_writer_' || one.number, 'audit_imports',
                    format('TO %s USING (true) WITH CHECK (true)', one.role));
            END IF;
            FOR relation IN SELECT audit_tenant_tables() LOOP
                CONTINUE WHEN NOT isolated;
                IF one.kind = 'writer' THEN
                    PERFORM audit_add_policy('audit_writer_' || one.number, relation,
                        format('FOR INSERT TO %s WITH CHECK (true)', one.role));
                    IF relation = to_regclass('audit_segments') THEN  -- it goes on where its chain ends
                        PERFORM audit_add_policy('audit_writer_reads_' || one.number, relation,
                            format('FOR SELECT TO %s USING (true)', one.role));
                    END IF;
                ELSIF one.kind = 'auditor' THEN
                    PERFORM audit_add_policy('audit_auditor_' || one.number, relation,
                        format('FOR SELECT TO %s USING (true)', one.role));
                ELSIF one.tenant_id IS NOT NULL THEN
                    PERFORM audit_add_policy('audit_bound_' || one.number, relation, format(
                        'AS RESTRICTIVE TO %s USING (tenant_id = %L) WITH CHECK (tenant_id = %L)',
                        one.role, one.tenant_id, one.tenant_id));
                END IF;
            END LOOP;
        END LOOP;
        PERFORM audit_grant_partition(inhrelid::regclass) FROM pg_catalog.pg_inherits
            WHERE inhparent = 'audit_events'::regclass;
    END $$
    """,
    """
    CREATE FUNCTION audit_revoke(kind text, role regrole) RETURNS boolean LANGUAGE plpgsql AS $$
    DECLARE
        one record;
    BEGIN
        DELETE FROM audit_roles AS known WHERE known.role = $2 AND known.kind = $1;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        FOR one IN SELECT polname, polrelid::regclass AS relation FROM pg_catalog.pg_policy
            WHERE polrelid IN (SELECT audit_tenant_tables() UNION ALL SELECT audit_owned_tables())
            AND polname = ANY (CASE
                WHEN $1 IN ('reader', 'member') THEN ARRAY['audit_bound_' || $2::oid]
                ELSE ARRAY['audit_' || $1 || '_' || $2::oid, 'audit_' || $1 || '_reads_' || $2::oid] END)
        LOOP
            EXECUTE format('DROP POLICY %I ON %s', one.polname, one.relation);
        END LOOP;
        FOR one IN SELECT relation FROM audit_rights() AS known
            WHERE known.kind = $1 AND to_regclass(known.relation) IS NOT NULL
        LOOP
            EXECUTE format('REVOKE ALL ON %I FROM %s', one.relation, $2);
        END LOOP;
        FOR one IN SELECT inhrelid::regclass AS leaf FROM pg_catalog.pg_inherits
            WHERE inhparent = 'audit_events'::regclass
        LOOP
            EXECUTE format('REVOKE ALL ON %s FROM %s', one.leaf, $2);
        END LOOP;
        PERFORM audit_apply_roles();  -- what another kind of the same role still allows
        RETURN true;
    END $$
    """,
    """
    CREATE FUNCTION audit_grant(kind text, role regrole, tenant text DEFAULT NULL) RETURNS void
        LANGUAGE plpgsql AS $$
    BEGIN
        IF EXISTS (SELECT FROM audit_roles AS known WHERE known.role = $2 AND known.kind <> $1
            AND ($3 IS NOT NULL AND known.kind IN ('writer', 'auditor')
                OR known.tenant_id IS NOT NULL AND $1 IN ('writer', 'auditor')
                OR $1 IN ('reader', 'member') AND known.kind IN ('reader', 'member')))
        THEN
            RAISE EXCEPTION '% has a role in the audit trail that does not go with %', $2, $1
                USING ERRCODE = 'invalid_grant_operation', HINT = 'Revoke that one first.';
        END IF;
        IF EXISTS (SELECT FROM audit_roles AS known WHERE known.role = $2 AND known.kind = $1
            AND known.tenant_id IS DISTINCT FROM $3)
        THEN
            PERFORM audit_revoke($1, $2);
        END IF;
        INSERT INTO audit_roles AS known (role, kind, tenant_id) VALUES ($2, $1, $3) ON CONFLICT DO NOTHING;
        PERFORM audit_apply_roles();
    END $$
    """,
    """
    CREATE FUNCTION audit_enable_tenants() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        IF NOT audit_isolated() THEN
            ALTER TABLE audit_events ENABLE ROW LEVEL SECURITY;
        END IF;
        PERFORM audit_apply_roles();
    END $$
    """,
    """
    CREATE FUNCTION audit_disable_tenants() RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        relation regclass;
    BEGIN
        FOR relation IN SELECT audit_tenant_tables() UNION ALL SELECT audit_owned_tables() LOOP
            EXECUTE format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', relation);
        END LOOP;
    END $$
    """,
)

PARTITIONS = (
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
        PERFORM audit_grant_partition(leaf::regclass);
        RETURN leaf;
    END $$
    """,
    # Where a writer may send the events of a month: into its partition, or only through the parent; and
    # whether COPY is refused there.
    """
    CREATE FUNCTION audit_target(moment timestamptz) RETURNS TABLE (relation text, copy boolean)
        LANGUAGE plpgsql AS $$
    DECLARE
        leaf text := audit_ensure_partition(moment);
    BEGIN
        IF NOT row_security_active('audit_events'::regclass) THEN
            RETURN QUERY SELECT 'audit_events'::text, true;
        ELSIF has_table_privilege(leaf, 'INSERT') THEN
            RETURN QUERY SELECT leaf, true;
        ELSE
            RETURN QUERY SELECT 'audit_events'::text, false;
        END IF;
    END $$
    """,
)

# Measured on five million rows (benches/RESULTS.md): what happened to one record is found 170 times as fast,
# anomalies 3 times at no cost, and BRIN over time loses against the primary key.
INDEXES = (
    "DROP INDEX audit_events_time",
    # On a table with much in it only the parent's part is made here; `audit.build_indexes()`, which migrate()
    # and `dotmac db upgrade` run afterwards, builds the partitions' parts without holding writers up.
    """
    DO $$
    DECLARE
        large boolean := (SELECT sum(pg_relation_size(inhrelid)) > 64 * 1024 * 1024
            FROM pg_catalog.pg_inherits WHERE inhparent = 'audit_events'::regclass);
        how text := CASE WHEN large THEN 'ON ONLY' ELSE 'ON' END;
    BEGIN
        EXECUTE 'CREATE INDEX audit_events_resource ' || how || ' audit_events
            (resource_id, resource_type, occurred_at) WHERE resource_id IS NOT NULL';
        EXECUTE 'CREATE INDEX audit_events_anomalies ' || how || ' audit_events
            (occurred_at, id) WHERE anomaly_score >= 0.5';
    END $$
    """,
)

# A function must not look names up where its caller says; and what only the owner can do is for it alone.
GUARDS = """
    DO $$
    DECLARE
        one regprocedure;
    BEGIN
        FOR one IN SELECT oid::regprocedure FROM pg_catalog.pg_proc
            WHERE pronamespace = current_schema()::regnamespace AND proname = ANY ('{
                audit_keep_holds,audit_refuse_insert,audit_tenant_tables,audit_owned_tables,audit_keep_owned,audit_rights,audit_isolated,
                audit_sight,audit_grant_partition,audit_add_policy,audit_apply_roles,audit_revoke,
                audit_grant,audit_enable_tenants,audit_disable_tenants,audit_ensure_partition,audit_target
            }'::text[])
        LOOP
            EXECUTE format('ALTER FUNCTION %s SET search_path = %I, pg_temp', one, current_schema());
        END LOOP;
        FOR one IN SELECT oid::regprocedure FROM pg_catalog.pg_proc
            WHERE pronamespace = current_schema()::regnamespace AND proname = ANY ('{
                audit_grant_partition,audit_add_policy,audit_keep_owned,audit_apply_roles,audit_revoke,
                audit_grant,audit_enable_tenants,audit_disable_tenants}'::text[])
        LOOP
            EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one);
        END LOOP;
    END $$
"""


def upgrade() -> None:
    for statement in (*TABLES, *ROLES, *PARTITIONS, GUARDS, *INDEXES):
        op.execute(statement)
