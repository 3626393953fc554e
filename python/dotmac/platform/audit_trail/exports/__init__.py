"""Exports of the trail to files and streams, and reading them back."""
