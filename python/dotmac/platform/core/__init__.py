"""The configuration root."""
