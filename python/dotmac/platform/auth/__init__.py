"""Authentication: its settings."""
