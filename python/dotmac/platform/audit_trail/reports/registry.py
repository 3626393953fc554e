"""The record of processing activities (GDPR Art. 30), which a controller keeps beside the log."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dotmac.platform.errors import InvalidArgument

__all__ = ["ProcessingRecord", "load_records", "records_digest"]

_KINDS = ".json, .toml or .csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessingRecord:
    """One processing activity, with what Art. 30(1) asks for.

    Attributes:
        name: of the activity.
        controller: name and contact of the controller, and of joint controllers (a).
        officer: data protection officer, or the representative (a).
        purposes: why (b); an event belongs to the activity whose purposes name its `purpose`.
        subject_categories: whose data (c).
        data_categories: which data (c).
        recipients: to whom they are disclosed (d).
        transfers: third countries or international organisations (e).
        safeguards: on which ground they are transferred there (e).
        time_limits: when they are erased (f).
        security_measures: how they are protected (g).
        contact: who answers for a breach, Art. 33(3)(b); default: the officer.
    """

    name: str
    controller: str
    purposes: tuple[str, ...]
    officer: str = ""
    subject_categories: tuple[str, ...] = ()
    data_categories: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()
    transfers: tuple[str, ...] = ()
    safeguards: tuple[str, ...] = ()
    time_limits: str = ""
    security_measures: tuple[str, ...] = ()
    contact: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str = "processing_records") -> ProcessingRecord:
        """A record from a mapping; lists may be texts parted by semicolons.

        Raises: InvalidArgument: a field is unknown, missing or of the wrong kind.
        """
        known = {one.name for one in fields(cls)}
        unknown = sorted(str(name) for name in set(given) - known)
        if unknown:
            raise InvalidArgument(
                f"{where}.{unknown[0]}", given[unknown[0]], f"the fields are {', '.join(sorted(known))}"
            )
        made: dict[str, Any] = {}
        for one in fields(cls):
            value = given.get(one.name)
            if value is None or value == "":
                continue
            made[one.name] = (
                _texts(value, f"{where}.{one.name}")
                if "tuple" in str(one.type)
                else _text(value, f"{where}.{one.name}")
            )
        for name in ("name", "controller", "purposes"):
            if not made.get(name):
                raise InvalidArgument(f"{where}.{name}", given.get(name), "give it: Art. 30(1) asks for it")
        return cls(**made)

    def matches(self, purpose: str) -> bool:
        """Is that one of the purposes? Capitals do not matter."""
        return purpose.casefold() in {one.casefold() for one in self.purposes}


def load_records(
    given: str | os.PathLike[str] | Iterable[ProcessingRecord | Mapping[str, Any]] | None,
) -> tuple[ProcessingRecord, ...] | None:
    """The records: as they are, from mappings, or from a file (.json, .toml with [[processing]], .csv).

    Raises: InvalidArgument: names the file or the record, the field, and what is right.
    """
    if given is None:
        return None
    if isinstance(given, str | os.PathLike):
        given = _from_file(Path(given))
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise InvalidArgument("processing_records", given, f"give records, or the path of a file ({_KINDS})")
    found = []
    for number, one in enumerate(given):
        if isinstance(one, ProcessingRecord):
            found.append(one)
        elif isinstance(one, Mapping):
            found.append(ProcessingRecord.of(one, f"processing_records[{number}]"))
        else:
            raise InvalidArgument(
                f"processing_records[{number}]", one, "give a ProcessingRecord or a mapping"
            )
    return tuple(sorted(found, key=lambda one: (one.name, one.controller)))


def records_digest(records: tuple[ProcessingRecord, ...] | None) -> str | None:
    """SHA-256 of the records: a parameter of the report."""
    if records is None:
        return None
    return hashlib.sha256(json.dumps([asdict(one) for one in records], sort_keys=True).encode()).hexdigest()


def _from_file(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            found = json.loads(text)
        elif path.suffix == ".toml":
            found = tomllib.loads(text).get("processing")
        elif path.suffix == ".csv":
            found = list(csv.DictReader(text.splitlines()))
        else:
            raise InvalidArgument("processing_records", str(path), f"give a file that ends in {_KINDS}")
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            "processing_records", str(path), f"give a readable {_KINDS} file: {error}"
        ) from error
    if not isinstance(found, list):
        raise InvalidArgument(
            "processing_records", str(path), "give a list of records (TOML: [[processing]])"
        )
    return found


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(where, value, "give a text")
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise InvalidArgument(where, value, "give texts in a list, or one text parted by semicolons")
