"""How far each destination of forwarding is, and what it refused."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE audit_forward_positions (
        destination text PRIMARY KEY,
        line bigint NOT NULL,
        recorded_tx bigint,
        occurred_at timestamptz,
        id uuid,
        pending_tx bigint,
        pending_at timestamptz,
        pending_id uuid,
        attempts integer NOT NULL DEFAULT 0,
        epoch bigint NOT NULL DEFAULT 0,
        events bigint NOT NULL DEFAULT 0,
        dead_letters bigint NOT NULL DEFAULT 0,
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    """
    COMMENT ON COLUMN audit_forward_positions.line IS
        'all events of earlier transactions are confirmed; recorded_tx, occurred_at, id: the last one'
    """,
    """
    COMMENT ON COLUMN audit_forward_positions.pending_tx IS
        'with pending_at, pending_id: last event of the batch under way, which is cut alike again'
    """,
    """
    COMMENT ON COLUMN audit_forward_positions.epoch IS
        'counts those who took the destination over: an earlier one can move nothing any more'
    """,
    """
    CREATE TABLE audit_forward_dead_letters (
        destination text NOT NULL,
        occurred_at timestamptz NOT NULL,
        id uuid NOT NULL,
        reason text NOT NULL,
        attempts integer NOT NULL,
        put_aside_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (destination, occurred_at, id)
    )
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
