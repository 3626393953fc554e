"""The demo.

Promises: it runs every part on servers of its own, imports a log, finds every claim true, leaves a report as
JSON and Markdown and no process behind, and exits 0; a claim that does not hold is named and the exit code is
1; so is an error; a signal ends all processes; percentiles are those of the nearest rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from dotmac.platform.cli.demo import command
from dotmac.platform.cli.demo.report import Report, percentile
from dotmac.platform.cli.main import build

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

DOTMAC = Path(sys.executable).parent / "dotmac"
LOG = """\
Dec 10 06:55:46 host sshd[24200]: Invalid user web from 173.234.31.186
Dec 10 06:55:48 host sshd[24200]: Failed password for invalid user web from 173.234.31.186 port 38926 ssh2
Dec 10 07:07:38 host sshd[24206]: Failed password for root from 52.80.34.196 port 36060 ssh2
Dec 10 09:32:20 host sshd[24680]: Accepted password for fztu from 119.137.62.142 port 49116 ssh2
this line is no log
"""


@pytest.mark.slow
def test_the_demo_holds_what_it_claims(tmp_path: Path) -> None:
    log = tmp_path / "sshd.log"
    log.write_text(LOG)
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [DOTMAC, "demo", "--json", "--report", tmp_path / "report", "--events", log],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["holds"]
    assert "every claim holds" in done.stderr
    assert "BROKEN" not in done.stderr
    claims = [line["text"] for section in told["sections"] for line in section["lines"] if line["holds"]]
    for sentence in (
        "none of the",  # requests after the kill
        "no update was lost",
        "got it 0 times",
        "flagged as anomalies",
        "5 lines of sshd.log imported",
        "failures of each of the 2 addresses",
    ):
        assert any(sentence in claim for claim in claims), sentence
    for operation in ("HTTP GET /users/{id}", "lock acquire, uncontended", "registry get_service"):
        assert 0 < told["operations"][operation]["p50"] <= told["operations"][operation]["p99"]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == told
    assert "| 52.80.34.196 | 1 |" in (tmp_path / "report" / "report.md").read_text()
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["pid", "cmdline", "status"])
        if process.info["pid"] not in before
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and any("cli.demo" in part for part in process.info["cmdline"] or [])
    ]
    assert left == []


def test_a_broken_claim_is_named_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def parts(found: Report, events: Path | None, logs: Path, stack: AsyncExitStack) -> None:
        found.section("Arithmetic")
        found.claim(True, "two and two is four")
        found.claim(False, "two and two is [five]")

    monkeypatch.setattr(command, "_parts", parts)
    done = CliRunner().invoke(build(), ["demo", "--report", str(tmp_path)])
    assert done.exit_code == 1
    assert "broken: two and two is [five]" in done.output
    assert "every claim holds" not in done.output
    told = json.loads((tmp_path / "report.json").read_text())
    assert (told["holds"], [line["holds"] for line in told["sections"][0]["lines"]]) == (False, [True, False])
    assert "**broken:** two and two is [five]" in (tmp_path / "report.md").read_text()


def test_an_error_is_a_broken_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def parts(found: Report, events: Path | None, logs: Path, stack: AsyncExitStack) -> None:
        raise ExceptionGroup(
            "traffic", [TimeoutError("the killed process leaves the rotation: not within 60 s")]
        )

    monkeypatch.setattr(command, "_parts", parts)
    done = CliRunner().invoke(build(), ["demo", "--report", str(tmp_path)])
    assert done.exit_code == 1
    assert "every part ran to its end (TimeoutError: the killed process leaves the rotation" in done.output
    assert not json.loads((tmp_path / "report.json").read_text())["holds"]


def test_ended_by_a_signal_it_leaves_no_process_behind(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [DOTMAC, "demo", "--report", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in demo.stdout:
        if "registered themselves" in line:
            break
    children = psutil.Process(demo.pid).children(recursive=True)
    assert len(children) >= 3
    demo.terminate()
    output, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1, errors
    assert "broken: the demo was not interrupted" in output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_percentiles() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile([7.0], 0.99)) == (50.0, 99.0, 7.0)
    report = Report(Console(quiet=True))
    for value in values:
        report.timed("walk", value)
    assert report.to_dict()["operations"] == {"walk": {"calls": 100, "p50": 50.0, "p99": 99.0}}
