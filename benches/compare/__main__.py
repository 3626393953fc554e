"""Runs all parts, each in a process of its own, and says how long each took.

python benches/compare [--results FOLDER] [part …]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

PARTS = ("uncontended", "handover", "deadlock", "killed", "blocked", "renewal", "ingestion")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without any")
    parser.add_argument("--results", type=Path, help="folder for what was measured, as JSON")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
    began, times, failed = time.monotonic(), [], []
    for part in options.parts or PARTS:
        print(f"\n## {part}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(f"{part}.py"))]
        if options.results is not None:
            command += ["--json", str(options.results / f"{part}.json")]
        started = time.monotonic()
        status = subprocess.run(command, check=False).returncode
        times.append(f"{part} {time.monotonic() - started:.0f} s")
        if status:
            failed.append(f"{part} (status {status})")
    print(f"\ntook {time.monotonic() - began:.0f} s: {', '.join(times)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
