"""What secrets and personal data look like in text: the patterns that redaction rules can name.

Each takes time in proportion to the text, whatever stands in it: repetitions that could begin anywhere are
bounded or possessive, and what has to be counted or summed up is looked at in Python.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator  # noqa: TC003 (a NamedTuple's annotations are looked up)
from functools import cache
from typing import NamedTuple

from dotmac.platform.errors import InvalidArgument, MissingExtra

__all__ = ["BUILT_IN", "SECRETS", "Pattern", "own_pattern"]

Span = tuple[int, int]


class Pattern(NamedTuple):
    """One kind of text.

    Args:
        name: what rules call it.
        find: the places in a text that are to be redacted, from left to right, none overlapping another.
        hints: a text without any of these holds no such place; empty where it has to be searched.
        digits: what `find` needs are digits, so that numbers have to be looked at as well.
    """

    name: str
    find: Callable[[str], Iterator[Span]]
    hints: tuple[str, ...] = ()
    digits: bool = False


def own_pattern(expression: str) -> Pattern:
    """A pattern from a regular expression of a user's. RE2 runs it, in linear time, so that no text can hold
    up the event loop; it knows neither backreferences nor look-around. With groups, the first is redacted.

    Raises: InvalidArgument: no expression of RE2's, or one that matches the empty text. MissingExtra.
    Source: https://github.com/google/re2/wiki/Syntax
    """
    try:
        import re2  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra(
            "regular expressions of your own need google-re2: pip install 'dotmac-platform[privacy]'"
        ) from None
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(expression, options)
    except (re2.error, TypeError) as error:
        raise InvalidArgument(
            "regexes", expression, f"give a regular expression of RE2's ({_reason(error)})"
        ) from None
    if compiled.search("") is not None:
        raise InvalidArgument("regexes", expression, "give one that does not match the empty text")
    group = 1 if compiled.groups else 0

    def find(text: str) -> Iterator[Span]:
        for found in compiled.finditer(text):
            start, end = found.span(group)
            if 0 <= start < end:
                yield start, end

    return Pattern(expression[:60], find, digits=True)


def _reason(error: Exception) -> str:
    text = error.args[0] if error.args else str(error)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _by(
    expression: str, group: int = 0, check: Callable[[str], bool] | None = None
) -> Callable[[str], Iterator[Span]]:
    compiled = re.compile(expression)

    def find(text: str) -> Iterator[Span]:
        for found in compiled.finditer(text):
            if found.start(group) >= 0 and (check is None or check(found[group])):
                yield found.span(group)

    return find


# --- secrets


def _is_jwt(text: str) -> bool:
    return text.count(".") >= 2 and text.index(".") > 4  # noqa: PLR2004 (header, claims, signature)


def _is_bearer(text: str) -> bool:
    """Not an ordinary word, as in "bearer authentication"."""
    return len(text) >= 20 or not text.isalpha()  # noqa: PLR2004 (longer than English words)


def _is_basic(text: str) -> bool:
    try:
        return b":" in base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False


_NAMES = (
    r"(?i:password|passwd|passphrase|passwort|secret|(?:api|access|private|secret|signing)[_-]?key|token|"
    r"(?<![A-Za-z0-9])(?:pass|pwd|otp|pin|cvv2?|cvc))"
)
_AFTER_NAME = r"\\{0,3}[\"']?\s{0,4}[=:]\s{0,4}"
_assignment = re.compile(
    rf"{_NAMES}{_AFTER_NAME}"
    r"(?:\\{0,3}(?P<quote>[\"'])(?P<quoted>(?:\\.|(?!(?P=quote))[^\\])++)|(?P<plain>[^\s\"'&,;\\]++))",
    re.DOTALL,
)
_header = re.compile(
    rf"(?i:(?:proxy-)?authorization|(?<![A-Za-z0-9])(?:set-)?cookie){_AFTER_NAME}"
    r"\\{0,3}[\"']?(?P<value>[^\r\n\"'\\]++)"
)


def _assigned(text: str) -> Iterator[Span]:
    for found in _assignment.finditer(text):
        yield found.span("quoted" if found["quoted"] is not None else "plain")


# --- personal data

_digits = re.compile(r"[0-9]++(?:[ .\-\u00a0]{1,2}[0-9]++)*+")
_enough_digits = re.compile(r"(?:[0-9][ .\-\u00a0]{0,2}){12}[0-9]")
_uuid = re.compile(r"[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}")
_group = re.compile(r"[0-9]+")
_CARD = range(13, 20)  # ISO/IEC 7812-1: length of a card number, digits


def _cards(text: str) -> Iterator[Span]:
    """Card numbers: 13 to 19 digits in groups, of a payment network, with a right check digit."""
    if _enough_digits.search(text) is None:
        return
    uuids: list[Span] | None = None
    for run in _digits.finditer(text):
        if run.end() - run.start() < _CARD.start:
            continue
        groups = [found.span() for found in _group.finditer(text, run.start(), run.end())]
        place = 0
        while place < len(groups):
            end = _card_from(text, groups, place)
            if end is None:
                place += 1
                continue
            span = groups[place][0], groups[end][1]
            if uuids is None:
                uuids = [found.span() for found in _uuid.finditer(text)] if "-" in text else []
            if not any(start < span[1] and span[0] < stop for start, stop in uuids):
                yield span
            place = end + 1


def _card_from(text: str, groups: list[Span], first: int) -> int | None:
    """Where the longest card number that begins with that group ends."""
    if text[groups[first][0]] not in "23456":
        return None
    number, end = "", None
    for place in range(first, len(groups)):
        number += text[slice(*groups[place])]
        if len(number) >= _CARD.stop:
            break
        if len(number) in _CARD and _luhn(number):
            end = place
    return end


def _luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value  # noqa: PLR2004 (sum of its two digits)
    return total % 10 == 0


_after_at = re.compile(r"@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}")
_NOT_LOCAL = frozenset(' \t\r\n\f\v@<>"(),:;[]\\|=&?/{}')
_LONGEST_LOCAL = 64  # RFC 5321, section 4.5.3.1.1


def _emails(text: str) -> Iterator[Span]:
    last = 0
    for found in _after_at.finditer(text):
        start = found.start()
        first = max(last, start - _LONGEST_LOCAL)
        while start > first and text[start - 1] not in _NOT_LOCAL:
            start -= 1
        if start < found.start():
            last = found.end()
            yield start, last


# ISO 13616, registry of April 2025: country and length of its account numbers.
_IBAN_LENGTHS = {
    text[:2]: int(text[2:])
    for line in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28",
        "EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26",
        "IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28",
        "NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25",
        "SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30",
    )
    for text in line.split()
}
_iban_start = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ \-]?[A-Za-z0-9])")
_as_digits = {ord(letter): str(int(letter, 36)) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_as_digits |= {code + 32: digits for code, digits in _as_digits.items()} | {ord(" "): "", ord("-"): ""}


@cache
def _letters(count: int) -> re.Pattern[str]:
    return re.compile(rf"(?:[ \-]?[A-Za-z0-9]){{{count}}}")


def _ibans(text: str) -> Iterator[Span]:
    """Account numbers of ISO 13616, checked by their country's length and by ISO 7064 mod 97-10."""
    last = 0
    for found in _iban_start.finditer(text):
        wanted = _IBAN_LENGTHS.get(found[0][:2].upper())
        if wanted is None or found.start() < last:
            continue
        rest = _letters(wanted - 4).match(text, found.end())
        if rest is not None and int((rest[0] + found[0]).translate(_as_digits)) % 97 == 1:
            last = rest.end()
            yield found.start(), last


_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})"
_ADDRESS = rf"(?<![0-9.])(?:{_BYTE}\.){{3}}{_BYTE}(?![0-9]|\.[0-9])"

BUILT_IN = {
    pattern.name: pattern
    for pattern in (
        Pattern(
            "private_key",
            _by(
                r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?s:.*?)"
                r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)"
            ),
            ("-----BEGIN ",),
        ),
        # One match per run of these letters, so that no run is read twice.
        Pattern("jwt", _by(r"eyJ[A-Za-z0-9_.\-]*", check=_is_jwt), ("eyJ",)),
        Pattern("url_password", _by(r"[A-Za-z][A-Za-z0-9+.\-]{0,20}://[^\s/@:]*+:([^\s/]+)@", 1), ("://",)),
        Pattern(
            "authorization",
            lambda text: (found.span("value") for found in _header.finditer(text)),
            ("=", ":"),
        ),
        Pattern(
            "bearer",
            _by(r"(?i:bearer)[ \t]{1,8}([A-Za-z0-9._~+/=\-]{6,}+)", 1, _is_bearer),
            ("earer", "EARER"),
        ),
        Pattern(
            "basic",
            _by(r"(?i:basic)[ \t]{1,8}([A-Za-z0-9+/]{4,}+={0,2})", 1, _is_basic),
            ("asic", "ASIC"),
        ),
        Pattern("assignment", _assigned, ("=", ":")),
        Pattern("card", _cards, digits=True),
        Pattern("email", _emails, ("@",)),
        Pattern("iban", _ibans),
        Pattern("ip_address", _by(_ADDRESS), (".",)),
    )
}  # fmt: skip
# Those that are looked for unless a setting says otherwise, in the order in which they are looked for.
SECRETS = ("private_key", "jwt", "url_password", "authorization", "bearer", "basic", "assignment")
