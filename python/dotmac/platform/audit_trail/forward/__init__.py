"""Forwarding of events as they are stored, to syslog and webhooks: at least once and in order."""
