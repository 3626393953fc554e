"""The documents.

Promises: every Python block in README and docs runs as it stands, a document's blocks one after another in
one program, on real servers; every relative link points to a file that exists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")

# Documents may use `await` at the top level, as the Python shell of asyncio allows.
RUNNER = """
import ast, asyncio, sys
code = compile(sys.stdin.read(), sys.argv[1], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
async def main():
    result = eval(code, {"__name__": "__main__"})
    if result is not None:
        await result
asyncio.run(main())
"""


def blocks(page: Path) -> str:
    """The page's Python blocks, each at its own line number."""
    text = page.read_text(encoding="utf-8")
    program, line = "", 1
    for match in BLOCK.finditer(text):
        start = text.count("\n", 0, match.start(1)) + 1
        program += "\n" * (start - line) + match[1]
        line = start + match[1].count("\n")
    return program


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_block_runs(page: Path, valkey_url: str, postgres_database: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(page)],
        input=blocks(page),
        env={**os.environ, "REDIS_URL": valkey_url, "DATABASE_URL": postgres_database},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_points_to_a_file(page: Path) -> None:
    missing = [
        link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()
    ]
    assert not missing
