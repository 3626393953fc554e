"""Alembic revisions of the audit tables; `dotmac db upgrade` runs them."""
