"""OpenSSH's lines in a syslog, as audit events.

Syslog's classic time stamp (RFC 3164, section 4.1.2) bears neither year nor zone. The year is inferred: of a
file that is read in order, a time that jumps back by more than half a year belongs to the next year; the
first line's year is given, or such that the line isn't later than the day after the file's last change. ISO 8601
time stamps (rsyslog's modern form) are read as they are.
"""

# ruff: noqa: E501 (a pattern reads best on its own line)

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

__all__ = ["Parsed", "SshdParser", "YearOf"]

_HEADER = re.compile(
    r"(?P<when>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?)"
    r" (?P<host>\S+) sshd(?:-session)?(?:\[(?P<pid>\d+)\])?: (?P<text>.*)"
)
_MONTHS = {
    name: place
    for place, name in enumerate(
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1
    )
}
_HALF_A_YEAR = timedelta(days=183)
_REPEATED = re.compile(r"message repeated (?P<times>\d+) times: \[ (?P<text>.*)\]$")
_FROM = r"from (?P<address>\S+)"

# What each line means: pattern, action, outcome, level; the first match counts. Other lines repeat what one of
# these says of the same attempt, or are about the connection alone.
_MEANINGS: tuple[tuple[re.Pattern[str], str, str, str], ...] = tuple(
    (re.compile(pattern), action, outcome, level)
    for pattern, action, outcome, level in (
        (rf"Accepted (?P<method>\S+) for (?P<user>.*) {_FROM} port (?P<port>\d+)", "ssh.login", "success", "info"),
        (
            rf"Failed (?P<method>\S+) for (?P<invalid>invalid user )?(?P<user>.*) {_FROM} port (?P<port>\d+)",
            "ssh.login", "failure", "warning",
        ),
        (rf"Invalid user (?P<user>.*) {_FROM}", "ssh.invalid_user", "unknown", "warning"),
        (
            (r"(?:error: )?maximum authentication attempts exceeded for (?P<invalid>invalid user )?(?P<user>.*) "
            rf"{_FROM} port (?P<port>\d+)"),
            "ssh.too_many_attempts", "denied", "error",
        ),
        (
            (r"Disconnecting(?: (?:authenticating|invalid) user (?P<user>.*) (?P<address>\S+) port (?P<port>\d+))?: "
            r"Too many authentication failures(?: for (?P<name>.*?))?(?: \[preauth\])?$"),
            "ssh.too_many_attempts", "denied", "error",
        ),
        (
            r"reverse mapping checking getaddrinfo for (?P<claimed>\S+) \[(?P<address>[^\]]+)\] failed",
            "ssh.reverse_mapping_failed", "unknown", "warning",
        ),
        (
            r"Address (?P<address>\S+) maps to (?P<claimed>\S+), but this does not map back",
            "ssh.reverse_mapping_failed", "unknown", "warning",
        ),
        (rf"Did not receive identification string {_FROM}", "ssh.probe", "unknown", "warning"),
        (rf"Bad protocol version identification .* {_FROM}", "ssh.probe", "unknown", "warning"),
        (r"pam_unix\(sshd:session\): session opened for user (?P<user>[^ (]+)", "ssh.session.open", "success", "info"),
        (r"pam_unix\(sshd:session\): session closed for user (?P<user>\S+)", "ssh.session.close", "success", "info"),
        (r"User (?P<user>\S+) from (?P<address>\S+) not allowed because", "ssh.user_not_allowed", "denied", "warning"),
        (r"Server listening on", "ssh.server.start", "success", "info"),
        (r"Received signal (?P<signal>\d+); terminating", "ssh.server.stop", "success", "info"),
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a line says, as arguments of an event; `times` > 1 where syslog folded repetitions."""

    occurred_at: datetime
    fields: dict[str, Any]
    times: int = 1


class YearOf:
    """Gives each year-less date its year; fed in the order of the file."""

    def __init__(self, first: int | None, latest: datetime) -> None:
        self.year = first
        self.latest = latest
        self.last: datetime | None = None

    def resolve(self, month: int, day: int, clock: str, zone: tzinfo | None) -> datetime:
        """The full time, in UTC.

        Raises: ValueError: there is no such day in that year.
        """
        if self.year is None:
            self.year = self.latest.year
            if self._at(month, day, clock, zone) > self.latest + timedelta(days=1):
                self.year -= 1
        moment = self._at(month, day, clock, zone)
        if self.last is not None and self.last - moment > _HALF_A_YEAR:
            self.year += 1
            moment = self._at(month, day, clock, zone)
        elif self.last is not None and moment - self.last > _HALF_A_YEAR:
            # A straggler of December after the first lines of January.
            return self._at(month, day, clock, zone, self.year - 1)
        self.last = moment
        return moment

    def _at(self, month: int, day: int, clock: str, zone: tzinfo | None, year: int | None = None) -> datetime:
        hour, minute, second = (int(part) for part in clock.split(":"))
        local = datetime(year or self.year or 1970, month, day, hour, minute, min(second, 59), tzinfo=zone)
        return local.astimezone(UTC)  # without a zone: the machine's own


class SshdParser:
    """Reads one line after another.

    Args:
        year: year of the first line; None to infer it.
        latest: no line is later than this (the file's last change); for the inference.
        zone: time zone of the machine that wrote the log; None for this machine's.
    """

    def __init__(self, year: int | None, latest: datetime, zone: tzinfo | None = None) -> None:
        self.years = YearOf(year, latest)
        self._zone = zone

    def parse(self, line: str) -> Parsed | None:
        """What the line says; None for one that says nothing worth an event.

        Raises: ValueError: it is not a line of sshd's; the text says why.
        """
        match = _HEADER.fullmatch(line)
        if match is None:
            raise ValueError("not a syslog line of sshd")
        moment = self._time(match["when"])
        text, times = match["text"], 1
        if folded := _REPEATED.match(text):
            text, times = folded["text"], min(int(folded["times"]), 100)
        meaning = _meaning(text)
        if meaning is None:
            return None
        found, action, outcome, level = meaning
        said = {name: value for name, value in found.groupdict().items() if value is not None}
        user = said.pop("user", None) or said.pop("name", None)
        address = said.pop("address", None)
        metadata: dict[str, Any] = {"host": match["host"], "message": text, **said}
        if "invalid" in metadata or action == "ssh.invalid_user":
            metadata["invalid"] = True
        if match["pid"]:
            metadata["pid"] = int(match["pid"])
        fields = {
            "category": "authentication" if action.startswith(_LOGIN_ACTIONS) else "security",
            "action": action,
            "outcome": outcome,
            "level": level,
            "user_id": user.strip() or None if user else None,
            "ip_address": address,
            "resource_type": "host",
            "resource_id": match["host"],
            "correlation_id": f"{match['host']}:sshd:{match['pid']}" if match["pid"] else None,
            "metadata": metadata,
        }
        return Parsed(moment, fields, times)

    def _time(self, when: str) -> datetime:
        if when[0].isdigit():
            moment = datetime.fromisoformat(when.replace(",", "."))
            return (
                moment if moment.tzinfo or not self._zone else moment.replace(tzinfo=self._zone)
            ).astimezone(UTC)
        month = _MONTHS.get(when[:3])
        if month is None:
            raise ValueError(f"{when[:3]!r} is not a month")
        return self.years.resolve(month, int(when[4:6]), when[7:], self._zone)


_LOGIN_ACTIONS = ("ssh.login", "ssh.too_many", "ssh.session", "ssh.user_not")


def _meaning(text: str) -> tuple[re.Match[str], str, str, str] | None:
    for pattern, action, outcome, level in _MEANINGS:
        if found := pattern.match(text):
            return found, action, outcome, level
    return None
