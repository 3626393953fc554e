"""The record of processing activities. Promises: every form that is accepted gives the same records, and the
same digest whatever their order; what is wrong names the record, the field and what is right."""

from __future__ import annotations

import csv
import json

import pytest

from dotmac.platform.audit_trail.reports.registry import ProcessingRecord, load_records, records_digest
from dotmac.platform.errors import InvalidArgument

CARE = {
    "name": "Care",
    "controller": "Clinic",
    "purposes": ["treatment", "billing"],
    "data_categories": ["health"],
    "time_limits": "10 years",
}
NEWS = {"name": "News", "controller": "Clinic", "purposes": ["marketing"], "officer": "D. Officer"}


def test_every_form_gives_the_same(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([NEWS, CARE]), encoding="utf-8-sig")
    (tmp_path / "r.toml").write_text(
        '[[processing]]\nname = "Care"\ncontroller = "Clinic"\npurposes = ["treatment", "billing"]\n'
        'data_categories = ["health"]\ntime_limits = "10 years"\n'
        '[[processing]]\nname = "News"\ncontroller = "Clinic"\npurposes = "marketing"\n'
        'officer = "D. Officer"\n'
    )
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted(set(CARE) | set(NEWS)))
        writer.writeheader()
        for one in (CARE, NEWS):
            writer.writerow({name: "; ".join(v) if isinstance(v, list) else v for name, v in one.items()})
    wanted = load_records([CARE, NEWS])
    assert wanted is not None
    assert [one.name for one in wanted] == ["Care", "News"]
    objects = [ProcessingRecord.of(NEWS), ProcessingRecord.of(CARE)]
    for given in (objects, str(tmp_path / "r.json"), tmp_path / "r.toml", tmp_path / "r.csv", (NEWS, CARE)):
        found = load_records(given)
        assert found == wanted
        assert records_digest(found) == records_digest(wanted)
    assert records_digest(load_records([CARE])) != records_digest(wanted)
    assert load_records(None) is None
    assert wanted[0].matches("TREATMENT")
    assert not wanted[0].matches("marketing")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{**CARE, "officr": "x"}], r"processing_records\[0\].officr.*officer"),
        ([NEWS, {"name": "x", "purposes": ["y"]}], r"processing_records\[1\].controller"),
        ([{**CARE, "purposes": []}], "purposes"),
        ([{**CARE, "purposes": [1]}], "purposes.*list"),
        ([{**CARE, "officer": 7}], "officer.*text"),
        ([5], r"processing_records\[0\]"),
        (CARE, "processing_records"),
        (7, "processing_records"),
        ("/no/such/file.json", "file.json"),
    ],
)
def test_what_is_wrong_is_told(given, says):
    with pytest.raises(InvalidArgument, match=says):
        load_records(given)


@pytest.mark.parametrize(
    ("name", "text"),
    [("r.json", "{"), ("r.json", "{}"), ("r.toml", "x = 1"), ("r.toml", "["), ("r.xml", "<x/>")],
)
def test_bad_files_are_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgument, match="processing_records"):
        load_records(tmp_path / name)
