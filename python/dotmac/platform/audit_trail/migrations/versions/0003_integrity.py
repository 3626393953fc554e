"""The tenants' logs of segments, their signed checkpoints, and what was anchored outside the database.

Nothing here is ever changed or deleted, retention included: what a log says must outlive the events that it
covers, or the log could not be checked any more.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

APPEND_ONLY = (
    "audit_trail",
    "audit_legacy",
    "audit_log",
    "audit_checkpoints",
    "audit_anchors",
    "audit_explanations",
)

STATEMENTS = (
    """
    CREATE TABLE audit_trail (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        origin text NOT NULL CHECK (origin ~ '^[!-*,-~]{1,200}$'),
        begun_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "COMMENT ON COLUMN audit_trail.origin IS 'the name under which checkpoints of this trail are signed'",
    """
    CREATE TABLE audit_log (
        tenant_id text COLLATE "C" NOT NULL,
        position bigint NOT NULL CHECK (position >= 0),
        segment uuid NOT NULL UNIQUE,
        leaf bytea NOT NULL CHECK (octet_length(leaf) = 32),
        recorded_tx bigint NOT NULL,
        sealed_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, position)
    )
    """,
    "COMMENT ON COLUMN audit_log.recorded_tx IS 'the segment''s: from where on the sealer looks for more'",
    "CREATE INDEX audit_log_tx ON audit_log (recorded_tx)",
    """
    CREATE TABLE audit_checkpoints (
        tenant_id text COLLATE "C" NOT NULL,
        size bigint NOT NULL CHECK (size > 0),
        root bytea NOT NULL CHECK (octet_length(root) = 32),
        key bytea NOT NULL CHECK (octet_length(key) = 32),
        note text NOT NULL,
        signed_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (tenant_id, size, key)
    )
    """,
    "COMMENT ON COLUMN audit_checkpoints.key IS 'the public key whose owner signed the note'",
    """
    CREATE TABLE audit_anchors (
        place text NOT NULL,
        tenant_id text COLLATE "C" NOT NULL,
        size bigint NOT NULL,
        anchored_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (place, tenant_id, size)
    )
    """,
    """
    ALTER TABLE audit_segments ADD COLUMN leaves bytea CHECK (length(leaves) = 32 * size),
        ALTER COLUMN leaves SET STORAGE EXTERNAL
    """,
    """
    COMMENT ON COLUMN audit_segments.leaves IS
        'leaf hashes of its events, one after another: they say which event disagrees with the root'
    """,
    # The sealer reads on from where it was, and finds all that is not in a log when it begins.
    "DROP INDEX audit_segments_tx",
    "CREATE INDEX audit_segments_tx ON audit_segments (recorded_tx, id)",
    # What was stored before there were segments, which no proof covers: counted, so that nothing joins it.
    """
    CREATE TABLE audit_legacy (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        events bigint NOT NULL,
        before timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Why writers ended without their closing record.
    """
    CREATE TABLE audit_explanations (
        writer uuid PRIMARY KEY,
        reason text NOT NULL,
        segments bigint NOT NULL,
        explained_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "LOCK TABLE audit_events IN SHARE ROW EXCLUSIVE MODE",
    "INSERT INTO audit_legacy (events) SELECT count(*) FROM audit_events WHERE segment IS NULL",
    # Ids grow with time as the table does, so that a few pages hold the events of any stretch of segments.
    """
    CREATE INDEX audit_events_segment ON audit_events USING brin (segment)
        WITH (pages_per_range = 16, autosummarize = on)
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
    for table in APPEND_ONLY:
        op.execute(f"""
            CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON {table}
                FOR EACH ROW EXECUTE FUNCTION audit_refuse_change()
        """)
        op.execute(f"""
            CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON {table}
                FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse_change()
        """)
