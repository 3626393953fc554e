"""OpenSSH's syslog lines.

Promises: each kind of line becomes the event that it says; a user name chosen by the attacker can't fake the
address; lines that aren't sshd's are refused with why; the year of year-less dates is inferred over the turn
of the year and before the 29th of February; times take their zone.
"""

# ruff: noqa: E501 (a line of the log is a line)

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from dotmac.platform.audit_trail.sshd import SshdParser

LATEST = datetime(2015, 12, 10, 12, tzinfo=UTC)


def parse(text, **options):
    parser = SshdParser(options.pop("year", None), LATEST, options.pop("zone", UTC))
    return parser.parse(f"Dec 10 06:55:46 LabSZ sshd[24200]: {text}")


@pytest.mark.parametrize(
    ("text", "action", "outcome", "user", "address"),
    [
        ("Accepted password for fztu from 119.137.62.142 port 49116 ssh2", "ssh.login", "success", "fztu", "119.137.62.142"),
        ("Failed password for root from 183.62.140.253 port 22 ssh2", "ssh.login", "failure", "root", "183.62.140.253"),
        ("Failed password for invalid user a b from 1.2.3.4 port 22 ssh2", "ssh.login", "failure", "a b", "1.2.3.4"),
        ("Failed none for invalid user  0 from 1.2.3.4 port 22 ssh2", "ssh.login", "failure", "0", "1.2.3.4"),
        ("Failed password for invalid user x from 9.9.9.9 port 1 ssh2 from 1.2.3.4 port 22 ssh2", "ssh.login", "failure",
         "x from 9.9.9.9 port 1 ssh2", "1.2.3.4"),
        ("Invalid user webmaster from 173.234.31.186", "ssh.invalid_user", "unknown", "webmaster", "173.234.31.186"),
        ("Disconnecting: Too many authentication failures for root [preauth]", "ssh.too_many_attempts", "denied", "root", None),
        ("reverse mapping checking getaddrinfo for ns.x.com [1.2.3.4] failed - POSSIBLE BREAK-IN ATTEMPT!",
         "ssh.reverse_mapping_failed", "unknown", None, "1.2.3.4"),
        ("Did not receive identification string from 1.2.3.4", "ssh.probe", "unknown", None, "1.2.3.4"),
        ("pam_unix(sshd:session): session opened for user fztu by (uid=0)", "ssh.session.open", "success", "fztu", None),
    ],
)  # fmt: skip
def test_a_line_becomes_the_event_that_it_says(text, action, outcome, user, address):
    parsed = parse(text)
    assert parsed is not None
    said = parsed.fields
    assert (said["action"], said["outcome"], said["user_id"], said["ip_address"]) == (
        action,
        outcome,
        user,
        address,
    )
    assert said["metadata"]["pid"] == 24200
    assert said["resource_id"] == "LabSZ"
    assert parsed.occurred_at == datetime(2015, 12, 10, 6, 55, 46, tzinfo=UTC)


def test_folded_repetitions_count():
    parsed = parse("message repeated 5 times: [ Failed password for root from 5.36.59.76 port 42393 ssh2]")
    assert parsed is not None
    assert parsed.times == 5
    assert parsed.fields["ip_address"] == "5.36.59.76"


@pytest.mark.parametrize(
    "text", ["pam_unix(sshd:auth): check pass; user unknown", "Connection closed by 1.2.3.4 [preauth]"]
)
def test_lines_that_repeat_others_are_no_events(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    "line", ["", "nonsense", "Dec 10 06:55:46 h cron[1]: x", "Foo 10 06:55:46 h sshd[1]: x", "Feb 30 06:55:46 h sshd[1]: x"]
)  # fmt: skip
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError, match=r"."):
        SshdParser(2015, LATEST).parse(line)


def times(*stamps, **options):
    parser = SshdParser(options.pop("year", None), options.pop("latest", LATEST), UTC)
    parsed = [parser.parse(f"{stamp} h sshd[1]: Invalid user a from 1.2.3.4") for stamp in stamps]
    return [one.occurred_at.date().isoformat() for one in parsed if one is not None]


def test_the_year_turns_with_the_file():
    found = times("Dec 31 23:59:59", "Jan  1 00:00:01", "Dec 31 23:59:58", "Jan  2 00:00:00", year=2014)
    assert found == ["2014-12-31", "2015-01-01", "2014-12-31", "2015-01-02"]


def test_the_first_year_is_not_in_the_future():
    assert times("Dec 11 00:00:00") == ["2015-12-11"]
    assert times("Dec 12 00:00:00") == ["2014-12-12"]
    assert times("Dec 12 00:00:00", "Jan  3 00:00:00", year=2009) == ["2009-12-12", "2010-01-03"]


def test_the_zone_is_taken():
    parsed = parse("Invalid user a from 1.2.3.4", zone=ZoneInfo("Asia/Shanghai"))
    assert parsed is not None
    assert parsed.occurred_at.hour == 22
    iso = SshdParser(None, LATEST, UTC).parse(
        "2024-03-01T10:00:00+02:00 h sshd-session[1]: Invalid user a from 1.2.3.4"
    )
    assert iso is not None
    assert iso.occurred_at == datetime(2024, 3, 1, 8, tzinfo=UTC)
