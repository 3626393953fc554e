"""Time of `import dotmac.platform` in a fresh interpreter, beside that of an interpreter that imports
nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.benchmark(group="import", min_rounds=10, warmup=True)
@pytest.mark.parametrize("statement", ["pass", "import dotmac.platform"])
def test_import(benchmark, statement: str) -> None:
    benchmark(subprocess.run, [sys.executable, "-c", statement], check=True)
