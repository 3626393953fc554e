"""Installs the peers into this environment; says which can't be had and goes on without them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def pip(*what: str) -> str:
    """Why an installation failed, or nothing."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()


def main() -> None:
    groups = tomllib.loads(PROJECT.read_text())["dependency-groups"]
    # Together they are resolved to versions that fit; one that spoils it must not keep the others out.
    if pip(*groups["bench"]):
        for requirement in groups["bench"]:
            if failed := pip(requirement):
                print(f"not installed: {requirement}: {failed}", file=sys.stderr)
    for requirement in groups["bench-alone"]:
        if failed := pip("--no-deps", requirement):
            print(f"not installed: {requirement}: {failed}", file=sys.stderr)


if __name__ == "__main__":
    main()
