"""Keys of the persons whose data events hold, wrapped by a key that the database does not have.

Erasing a person destroys the key, and the row stays as a tombstone that says when, by whom and why: the
events keep their ciphertext, over which the proofs of integrity go, and nobody can read it any more.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE audit_subject_keys (
        id uuid PRIMARY KEY,
        tenant_id text NOT NULL DEFAULT '',
        subject_id text NOT NULL,
        kek text NOT NULL,
        wrapped bytea,
        fingerprint text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now(),
        rewrapped_at timestamptz,
        erased_at timestamptz,
        erased_by text,
        reason text,
        certificate uuid,
        certified_at timestamptz,
        CHECK ((wrapped IS NULL) = (erased_at IS NOT NULL)),
        CHECK ((erased_at IS NULL) = (certificate IS NULL))
    )
    """,
    "COMMENT ON COLUMN audit_subject_keys.kek IS 'name of the key-encryption key that wrapped the key'",
    "COMMENT ON COLUMN audit_subject_keys.fingerprint IS 'of the key itself: proves which one was destroyed'",
    "COMMENT ON COLUMN audit_subject_keys.certificate IS 'id of the event that certifies the erasure'",
    # The first of two processes that make a subject's key at once wins.
    """
    CREATE UNIQUE INDEX audit_subject_keys_living ON audit_subject_keys (tenant_id, subject_id)
        WHERE erased_at IS NULL
    """,
    "CREATE INDEX audit_subject_keys_subject ON audit_subject_keys (subject_id, tenant_id)",
    # Where there is much, the partitions' parts are built later, as those of the revision before.
    """
    DO $$
    DECLARE
        large boolean := (SELECT sum(pg_relation_size(inhrelid)) > 64 * 1024 * 1024
            FROM pg_catalog.pg_inherits WHERE inhparent = 'audit_events'::regclass);
    BEGIN
        EXECUTE 'CREATE INDEX audit_events_subject ' || CASE WHEN large THEN 'ON ONLY' ELSE 'ON' END
            || ' audit_events (subject_id, occurred_at) WHERE subject_id IS NOT NULL';
    END $$
    """,
    """
    CREATE FUNCTION audit_keep_tombstones() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        changed text[] := '{}';
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            SELECT coalesce(array_agg(after.key), '{}') INTO changed
            FROM jsonb_each(to_jsonb(NEW)) AS after JOIN jsonb_each(to_jsonb(OLD)) AS before USING (key)
            WHERE after.value IS DISTINCT FROM before.value;
            -- Erased, wrapped anew, or certified: there is no other change, and no way back.
            IF (OLD.erased_at IS NULL AND NEW.wrapped IS NULL
                    AND changed <@ '{certificate,erased_at,erased_by,reason,wrapped}'::text[])
                OR (OLD.erased_at IS NULL AND NEW.erased_at IS NULL
                    AND changed <@ '{kek,rewrapped_at,wrapped}'::text[])
                OR (OLD.erased_at IS NOT NULL AND OLD.certified_at IS NULL
                    AND changed = '{certified_at}'::text[])
            THEN
                RETURN NEW;
            END IF;
        END IF;
        RAISE EXCEPTION
            'keys of subjects are erased, wrapped anew or certified, nothing else: % of % is refused',
            TG_OP, changed USING ERRCODE = 'insufficient_privilege';
    END $$
    """,
    """
    CREATE TRIGGER audit_keep_tombstones BEFORE UPDATE OR DELETE ON audit_subject_keys
        FOR EACH ROW EXECUTE FUNCTION audit_keep_tombstones()
    """,
    """
    CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_subject_keys
        FOR EACH STATEMENT EXECUTE FUNCTION audit_keep_tombstones()
    """,
    # Writers need a subject's key, and so do readers who decrypt: what they see is of use with the
    # key-encryption key only. Members of a tenant are held to its keys by the policies of that tenant.
    """
    ALTER FUNCTION audit_rights() RENAME TO audit_rights_before_keys
    """,
    """
    CREATE FUNCTION audit_rights() RETURNS TABLE (kind text, relation text, rights text)
        LANGUAGE sql IMMUTABLE AS $$
        SELECT kind, relation, rights FROM audit_rights_before_keys()
        UNION ALL
        SELECT kind, relation, rights FROM (VALUES
            ('writer', 'audit_subject_keys', 'INSERT, SELECT'),
            ('member', 'audit_subject_keys', 'INSERT, SELECT'),
            ('reader', 'audit_subject_keys', 'SELECT'),
            ('auditor', 'audit_subject_keys', 'SELECT')
        ) AS known (kind, relation, rights)
    $$
    """,
    # Names are not to be looked up where a caller says.
    """
    DO $$ BEGIN
        EXECUTE format('ALTER FUNCTION audit_rights() SET search_path = %I, pg_temp', current_schema());
    END $$
    """,
    # Writers of many tenants have to find the keys that there are.
    """
    CREATE POLICY audit_writer_keys ON audit_subject_keys FOR SELECT USING (EXISTS (
        SELECT FROM audit_roles AS known
        WHERE known.kind = 'writer' AND pg_has_role(current_user, known.role::oid, 'USAGE')))
    """,
    # Roles that were granted before, and tenants that are kept apart already.
    "SELECT audit_apply_roles()",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
