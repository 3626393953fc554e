"""Alembic's entry: runs on the connection that `schema.upgrade` hands over, or prints SQL."""

from __future__ import annotations

from alembic import context

from dotmac.platform.audit_trail.schema import VERSION_TABLE

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # else every per cent sign would come out doubled
        version_table=VERSION_TABLE,
        output_buffer=context.config.output_buffer,
    )
    with context.begin_transaction():
        context.run_migrations()
else:
    context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
    # The caller's transaction holds the advisory lock and commits all revisions together.
    context.run_migrations()
