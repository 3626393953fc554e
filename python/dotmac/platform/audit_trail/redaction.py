"""What is left out of events before anything is scored, stored, spooled, logged or hashed.

Rules are compiled once and used by all threads. They are applied in order; of the rules that name a key the
first one counts. What was redacted is told in the event's metadata under `_redacted`: path → action and rule.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dotmac.platform._native import AuditScreen, AuditScreens
from dotmac.platform.audit_trail.models import AuditCategory
from dotmac.platform.audit_trail.patterns import BUILT_IN, SECRETS, Pattern, own_pattern
from dotmac.platform.errors import InvalidArgument, InvalidEvent

__all__ = ["NOTE", "SECRET_KEYS", "RedactionRule", "Redactor", "rules_from_json"]

NOTE = "_redacted"
PERSONAL = "personal"
MASK = "***"
_ACTIONS = ("mask", "drop", "hash", "truncate")
_CATEGORIES = frozenset(member.value for member in AuditCategory)
_IDENTITIES = frozenset({"user_id", "tenant_id", "subject_id"})
_MOST_NOTES = 100
_LONGEST_PATH = 200
MOST_BITS = 256  # a longer number is no card, and no account
_MAX_DEPTH = 40  # more than an event may have; what is deeper is refused later
_CACHED = 4_096
_LONGEST_CACHED = 64
_SHORTEST_KEY = 16
_hashed = re.compile(r"hmac:[0-9a-f]{32}")
_told = re.compile(r"(mask|drop|hash|truncate):[\w .*+|,:()\[\]-]{1,200}|more than are listed")

SECRET_KEYS = (
    *("*password", "*passwd", "passwort", "pwd", "*passphrase", "*secret", "*secret_key", "*private_key"),
    *("*api_key", "*access_key", "*token", "token", "authorization", "proxy_authorization", "cookie"),
    *("set_cookie", "*credentials", "credential", "otp", "totp", "pin", "cvv", "cvv2", "cvc", "csc"),
    *("pass", "secret_access_key", "signing_key", "encryption_key", "recovery_codes"),
)
_NO_SECRETS = ("fencing_token",)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactionRule:
    """One thing that is not to be stored as it is.

    Args:
        keys: keys of metadata and personal data, whatever their case and whether they are written
            `accessToken`, `access-token` or `access_token`. A single name (`ssn`, `*_token`) is meant at any
            depth, a dotted path (`customer.*.iban`) from the top; `*` stands for any part of a name, `**` for
            any number of names. Lists are passed through. The whole value under such a key is redacted.
        patterns: built-in patterns for parts of texts: `card`, `email`, `iban`, `ip_address`, `jwt`,
            `bearer`, `basic`, `authorization`, `url_password`, `assignment`, `private_key`.
        regexes: regular expressions of your own, in RE2's syntax; with groups, the first is redacted.
        action: `mask` (`***`), `drop`, `hash` (HMAC-SHA-256 under the redaction key, so that equal values
            stay comparable), or `truncate`.
        categories: only in events of these; None for all.
        identities: patterns also look at `user_id`, `tenant_id` and `subject_id`, which they change then.
        keep: characters that `mask` leaves at the end, `truncate` at the beginning, 0 to 64; a value of fewer
            than twice as many is redacted whole.
        name: what reports call the rule; default: what it looks for.

    Raises: InvalidArgument, MissingExtra: regexes without the extra `privacy`.
    """

    keys: Iterable[str] = ()
    patterns: Iterable[str] = ()
    regexes: Iterable[str] = ()
    action: str = "mask"
    categories: Iterable[AuditCategory | str] | None = None
    identities: bool = False
    keep: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("keys", "patterns", "regexes", "categories"):
            value = getattr(self, field)
            if isinstance(value, str):
                value = (value,)
            if value is not None:
                value = tuple(value)
                if not all(isinstance(one, str) and one for one in value):
                    raise InvalidArgument(field, value, "give texts that are not empty")
                object.__setattr__(self, field, value)
        if not (self.keys or self.patterns or self.regexes):
            raise InvalidArgument("keys", self.keys, "say what to redact: keys, patterns or regexes")
        for pattern in self.patterns:
            if pattern not in BUILT_IN:
                raise InvalidArgument("patterns", pattern, f"the patterns are {', '.join(BUILT_IN)}")
        if self.action not in _ACTIONS:
            raise InvalidArgument("action", self.action, f"it must be one of {', '.join(_ACTIONS)}")
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or not 0 <= self.keep <= 64:  # noqa: PLR2004
            raise InvalidArgument("keep", self.keep, "give a whole number from 0 to 64")
        known = {member.value for member in AuditCategory}
        for category in self.categories or ():
            if _category(category) not in known:
                raise InvalidArgument(
                    "categories", category, f"the categories are {', '.join(sorted(known))}"
                )

    def covers(self, category: str) -> bool:
        """Is it meant for that category? What is no category gets all rules: its error is to tell nothing."""
        if self.categories is None or category not in _CATEGORIES:
            return True
        return category in {_category(one) for one in self.categories}


def rules_from_json(text: str) -> tuple[RedactionRule, ...]:
    """Rules as a setting holds them: `[{"keys": ["ssn"], "action": "hash"}, …]`.

    Raises: InvalidArgument: says what is wrong with which of them; never shows the text.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InvalidArgument("redact_rules", "***", 'give a JSON list of objects such as {"keys": ["ssn"]}')
    rules = []
    for place, one in enumerate(found):
        unknown = sorted(set(one) - set(RedactionRule.__dataclass_fields__))
        if unknown:
            known = ", ".join(RedactionRule.__dataclass_fields__)
            raise InvalidArgument(f"redact_rules[{place}]", unknown[0], f"the fields are {known}")
        try:
            rules.append(RedactionRule(**one))
        except TypeError:
            raise InvalidArgument(f"redact_rules[{place}]", "***", "a field is of a wrong type") from None
    return tuple(rules)


def _category(value: object) -> str:
    return value.lower() if isinstance(value, str) else ""


def _folded(key: str) -> str:
    """The same for `accessToken`, `access-token`, `ACCESS_TOKEN` and full-width letters."""
    return re.sub(r"[^\w*]|_", "", unicodedata.normalize("NFKC", key)).casefold()


class Redactor:
    """Rules, compiled.

    Attributes: screens: tell at a glance that nothing of an event is to be redacted.

    Args:
        rules: besides those for secrets, and before them.
        secrets: have rules for passwords, tokens, keys and the like.
        keep: keys that the rules for secrets leave alone.
        hash_key: key of the action `hash`, at least 16 bytes.

    Raises: InvalidArgument: a rule hashes, and there is no key, or a short one.
    """

    def __init__(
        self,
        rules: Iterable[RedactionRule] = (),
        *,
        secrets: bool = True,
        keep: Iterable[str] = (),
        hash_key: bytes | None = None,
    ) -> None:
        self._rules = list(rules)
        if any(rule.action == "hash" for rule in self._rules) and hash_key is None:
            raise InvalidArgument(
                "redact_hash_key", None, "a rule hashes, so set AUDIT_TRAIL_REDACT_HASH_KEY"
            )
        if hash_key is not None and len(hash_key) < _SHORTEST_KEY:
            raise InvalidArgument("redact_hash_key", "***", f"give at least {_SHORTEST_KEY} bytes")
        self._hash_key = hash_key
        if secrets:
            self._rules.append(
                RedactionRule(keys=SECRET_KEYS, patterns=SECRETS, identities=True, name="secret")
            )
        self._kept = frozenset(_folded(key) for key in (*_NO_SECRETS, *keep))
        self._compiled: dict[str, CompiledRules] = {}
        self.screens = AuditScreens(
            [found.screen if (found := self.of(member.value)) else None for member in AuditCategory]
        )

    def of(self, category: object) -> CompiledRules | None:
        """The rules for a category, whatever stands in its place; None where there are none."""
        name = _category(category)
        found = self._compiled.get(name)
        if found is None:
            rules = [rule for rule in self._rules if rule.covers(name)]
            # Categories with the same rules share what is learnt of keys.
            alike = (one for one in self._compiled.values() if one.rules == rules)
            found = next(alike, None) or CompiledRules(rules, self._kept, self._hash_key)
            if len(self._compiled) < _LONGEST_CACHED:
                self._compiled[name] = found
        return found if found.rules else None


class CompiledRules:
    """The rules of one category."""

    def __init__(self, rules: list[RedactionRule], kept: frozenset[str], hash_key: bytes | None) -> None:
        self.rules = rules
        self._kept = kept
        self._hash_key = hash_key
        self._exact: dict[str, tuple[int, RedactionRule]] = {}
        self._globs: list[tuple[int, re.Pattern[str], RedactionRule]] = []
        self._paths: list[tuple[int, tuple[re.Pattern[str] | None, ...], RedactionRule]] = []
        self._patterns: list[tuple[Pattern, RedactionRule]] = []
        for place, rule in enumerate(rules):
            for key in rule.keys:
                self._add_key(place, key, rule)
            self._patterns += [(BUILT_IN[name], rule) for name in rule.patterns]
            self._patterns += [(own_pattern(text), rule) for text in rule.regexes]
        self._hints = _fewest([hint for pattern, _ in self._patterns for hint in pattern.hints])
        self._all_hinted = all(pattern.hints for pattern, _ in self._patterns)
        self._identity = [one for one in self._patterns if one[1].identities]
        self._numbers = [one for one in self._patterns if one[0].digits]
        self._by_key: dict[str, tuple[int, RedactionRule] | None] = {}
        self._plain_keys: set[str] = set()
        # What has no hint, and what depends on more than one key, can't be told at a glance.
        quick = self._all_hinted and not self._paths and not self._numbers
        self.screen = AuditScreen(self._hints if quick else None)
        self._folded: dict[str, tuple[str, ...]] = {}

    def _add_key(self, place: int, key: str, rule: RedactionRule) -> None:
        names = [name for name in key.split(".") if name]
        if not names:
            raise InvalidArgument("keys", key, "give names, or paths of names with dots between")
        if len(names) == 1 and names[0] != "**":
            folded = _folded(names[0])
            if "*" in folded:
                self._globs.append((place, re.compile(fnmatch.translate(folded)), rule))
            else:
                self._exact.setdefault(folded, (place, rule))
        else:
            path = [None if name == "**" else re.compile(fnmatch.translate(_folded(name))) for name in names]
            self._paths.append((place, tuple(path), rule))

    # --- texts

    def text(self, field: str, value: str, notes: dict[str, str]) -> str | None:
        """One of the event's own texts, redacted; None where all of it was dropped."""
        patterns = self._identity if field in _IDENTITIES else self._patterns
        return self._searched(value, patterns, field, notes)

    def _searched(
        self, text: str, patterns: list[tuple[Pattern, RedactionRule]], where: Any, notes: dict[str, str]
    ) -> str | None:
        if type(text) is not str:
            text = str.__str__(text)  # what a subclass makes of slices and sums (Markup escapes) is its own
        hinted = False
        for hint in self._hints:
            if hint in text:
                hinted = True
                break
        if not hinted and self._all_hinted:
            return text
        for pattern, rule in patterns:
            if pattern.hints and not (hinted and _has_one(text, pattern.hints)):
                continue
            parts: list[str] = []
            last = 0
            for start, end in pattern.find(text):
                found = text[start:end]
                if found == MASK or _hashed.fullmatch(found):
                    continue
                parts += (text[last:start], self._instead(found, rule))
                last = end
            if parts:
                text = "".join(parts) + text[last:]
                _note(notes, where, f"{rule.action}:{rule.name or pattern.name}")
                if not text:
                    return None
        return text

    def _instead(self, text: str, rule: RedactionRule) -> str:
        enough = len(text) >= 2 * rule.keep
        if rule.action == "mask":
            return MASK + (text[-rule.keep :] if rule.keep and enough else "")
        if rule.action == "truncate":
            return (text[: rule.keep] if enough else "") + "…"
        if rule.action == "hash":
            return self._digest(text)
        return ""

    def _digest(self, text: str) -> str:
        key = self._hash_key or b""
        return "hmac:" + hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]

    # --- trees

    def mapping(self, value: Mapping[Any, Any], root: str, notes: dict[str, str]) -> Mapping[Any, Any]:
        """Metadata or personal data, redacted: the same object where nothing was to be redacted."""
        return self._mapping(value, (None, root), (), 0, notes)

    def _mapping(
        self, value: Mapping[Any, Any], where: Any, path: tuple[str, ...], depth: int, notes: dict[str, str]
    ) -> Mapping[Any, Any]:
        fresh: dict[Any, Any] | None = None
        for place, (key, item) in enumerate(value.items()):
            kept, new = key, item
            if isinstance(key, str) and not (key == NOTE and depth == 0):
                if key not in self._plain_keys:
                    kept = self._key(key, where, notes)
                here = (where, kept)
                below = path + self._names(key) if self._paths else path
                rule = self._rule_for(key, below)
                if rule is not None and item is not None and item is not True and item is not False:
                    new = self._whole(item, rule)
                    if new is not item:
                        _note(notes, here, f"{rule.action}:{rule.name or 'key'}")
                else:
                    new = self._value(item, here, below, depth, notes)
                    if rule is None and kept is key and len(key) <= _LONGEST_CACHED:
                        self._learn(key)
            if fresh is None and (new is not item or kept is not key):
                fresh = dict(list(value.items())[:place])
            if fresh is not None and new is not _DROPPED:
                fresh[_free(fresh, kept)] = new
        return value if fresh is None else fresh

    def _value(self, item: Any, where: Any, path: tuple[str, ...], depth: int, notes: dict[str, str]) -> Any:
        if isinstance(item, str):
            found = self._searched(item, self._patterns, where, notes)
            return item if found == item else _DROPPED if found is None else found
        if isinstance(item, dict | list | tuple | Mapping):
            if depth >= _MAX_DEPTH:
                return item
            step: Any = self._list if isinstance(item, list | tuple) else self._mapping
            return step(item, where, path, depth + 1, notes)
        if self._numbers and isinstance(item, int | float) and not isinstance(item, bool):
            return self._number(item, where, notes)
        return item

    def _number(self, item: float, where: Any, notes: dict[str, str]) -> Any:
        if isinstance(item, int):
            text = str(int(item)) if item.bit_length() <= MOST_BITS else ""
        else:
            text = str(int(item)) if item.is_integer() and abs(item) < 2.0**MOST_BITS else repr(item)
        found = self._searched(text, self._numbers, where, notes)
        return item if found == text else _DROPPED if found is None else found

    def _list(self, items: Any, where: Any, path: tuple[str, ...], depth: int, notes: dict[str, str]) -> Any:
        fresh: list[Any] | None = None
        for place, item in enumerate(items):
            new = self._value(item, (where, place), path, depth, notes)
            if fresh is None and new is not item:
                fresh = list(items[:place])
            if fresh is not None and new is not _DROPPED:
                fresh.append(new)
        return items if fresh is None else fresh

    def _whole(self, item: Any, rule: RedactionRule) -> Any:
        if rule.action == "drop":
            return _DROPPED
        if isinstance(item, str):
            return item if item in ("", MASK) or _hashed.fullmatch(item) else self._instead(item, rule)
        if rule.action == "hash":
            return self._digest(_canonical(item))
        return self._instead(str(item), rule) if rule.keep and isinstance(item, int | float) else MASK

    # --- keys

    def _learn(self, key: str) -> None:
        if key != NOTE:  # at the top it is the trail's own
            self.screen.learn(key)

    def _key(self, key: str, where: Any, notes: dict[str, str]) -> str:
        """The key, or what stands in its place where a secret is used as one."""
        found = self._searched(key, self._patterns, where, notes)
        if found != key:
            return found or MASK
        if len(key) <= _LONGEST_CACHED and len(self._plain_keys) < _CACHED:
            self._plain_keys.add(key)
        return key

    def _names(self, key: str) -> tuple[str, ...]:
        found = self._folded.get(key)
        if found is None:
            found = tuple(map(_folded, key.split(".")))
            if len(key) <= _LONGEST_CACHED and len(self._folded) < _CACHED:
                self._folded[key] = found
        return found

    def _rule_for(self, key: str, path: tuple[str, ...]) -> RedactionRule | None:
        try:
            best = self._by_key[key]
        except KeyError:
            best = self._look_up(key)
            if len(key) <= _LONGEST_CACHED and len(self._by_key) < _CACHED:
                self._by_key[key] = best
        for place, wanted, rule in self._paths:
            if (best is None or place < best[0]) and _fits(wanted, path):
                best = (place, rule)
        return None if best is None else best[1]

    def _look_up(self, key: str) -> tuple[int, RedactionRule] | None:
        name = _folded(key.rpartition(".")[2] or key)
        found = [self._exact[name]] if name in self._exact else []
        found += [(place, rule) for place, glob, rule in self._globs if glob.match(name)]
        best = min(found, key=lambda one: one[0], default=None)
        return None if best is not None and best[1].name == "secret" and name in self._kept else best


def _fewest(hints: list[str]) -> list[str]:
    """Those without which none of them occurs."""
    return [hint for hint in dict.fromkeys(hints) if not any(one in hint and one != hint for one in hints)]


def _has_one(text: str, hints: tuple[str, ...]) -> bool:
    for hint in hints:  # noqa: SIM110 (any() over a generator takes three times as long)
        if hint in text:
            return True
    return False


def _canonical(item: Any) -> str:
    """Equal text for equal values; for what is no JSON, which is refused later, its type's name."""
    try:
        return json.dumps(item, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        return type(item).__name__


class _Dropped:
    """Stands for what is left out."""


_DROPPED = _Dropped()


def _free(taken: Mapping[Any, Any], key: Any) -> Any:
    """The key; where redaction made two keys the same, with a number."""
    if key not in taken:
        return key
    number = 2
    while f"{key} {number}" in taken:
        number += 1
    return f"{key} {number}"


def _fits(wanted: tuple[re.Pattern[str] | None, ...], path: tuple[str, ...]) -> bool:
    if not wanted:
        return not path
    if wanted[0] is None:
        return any(_fits(wanted[1:], path[skipped:]) for skipped in range(len(path) + 1))
    return bool(path) and wanted[0].match(path[0]) is not None and _fits(wanted[1:], path[1:])


def _note(notes: dict[str, str], where: Any, what: str) -> None:
    if len(notes) > _MOST_NOTES:
        return
    names: list[str] = []
    while isinstance(where, tuple):
        where, last = where
        names.append(f"[{last}]" if isinstance(last, int) else f".{last}")
    names.reverse()
    if names[:1] == [f".{PERSONAL}"]:
        del names[2:]  # keys below a field are personal data as well: notes are in clear, beyond an erasure
    path = ("".join(names).removeprefix(".") if names else str(where))[:_LONGEST_PATH]
    known = notes.get(path)
    if known is None and len(notes) == _MOST_NOTES:
        notes["…"] = "more than are listed"
    elif known is None:
        notes[path] = what
    elif what not in known.split(", ") and len(known) + len(what) < _LONGEST_PATH:
        notes[path] = f"{known}, {what}"


def with_notes(metadata: Mapping[str, Any] | None, notes: dict[str, str]) -> Mapping[str, Any]:
    """Metadata that tell what was redacted. Notes of an earlier redaction, as an import brings them, stay.

    Raises: InvalidEvent: something else stands in the place of the notes.
    """
    if not metadata or NOTE not in metadata:
        if notes:
            return {**(metadata or {}), NOTE: notes}
        return {} if metadata is None else metadata
    before = metadata[NOTE]
    if not isinstance(before, Mapping) or not all(
        isinstance(path, str) and isinstance(what, str) and _told.fullmatch(what)
        for path, what in before.items()
    ):
        raise InvalidEvent(f"metadata.{NOTE}: this key is the trail's own; give another name")
    return {**metadata, NOTE: {**before, **notes}}
