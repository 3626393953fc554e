"""Types as users see them.

Promises: decorated functions keep their parameters and results, checked by mypy in strict mode with every
`type: ignore` needed; the package says that it is typed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(HERE.glob("types_of_*.py")), ids=lambda path: path.stem)
def test_mypy_agrees(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", str(file)],
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
