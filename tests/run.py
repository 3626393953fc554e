"""All Python tests, in three processes side by side: most of them wait for something most of the time.

What each part says is shown as a whole, since lines of several would tell nothing, and those that failed are
shown once more at the end, where they are looked for. Arguments go to each pytest. The last line sums up; the
exit code is 0 only if every part passed.

    python tests/run.py [pytest's arguments]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ["tests/integration/test_locks*.py", "tests/integration/test_cluster*.py"]
AUDIT = ["tests/integration/test_*audit*.py", "tests/acceptance/test_*audit*.py", "tests/migration/test_*.py"]


def found(patterns: list[str]) -> list[str]:
    """The files that fit, relative to the project."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def parts() -> dict[str, list[str]]:
    """Names of the parts and what each gives pytest; every file is in one of them."""
    locks, audit = found(LOCKS), found(AUDIT)
    rest = [f"--ignore={path}" for path in locks + audit]
    return {"locks": locks, "audit trail": audit, "all others": ["tests", *rest]}


def main(arguments: list[str]) -> int:
    """Run the parts, show each as it ends. Returns the exit code."""
    began = time.monotonic()
    running = {}
    for name, some in parts().items():
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        # Without pytest's cache, which all three would write.
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *some, *arguments]
        running[name] = (
            subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT),
            output,
        )
    counts: Counter[str] = Counter()
    failed: list[str] = []
    worst = 0
    while running:
        for name, (process, output) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            output.seek(0)
            said = output.read().decode(errors="replace")
            print(f"##### {name}", said, sep="\n", flush=True)
            if process.returncode:
                failed.append(f"##### {name}, once more\n{said}")
            for number, what in re.findall(
                r"(\d+) (\w+)", said.rstrip().rsplit("\n", 1)[-1].partition(" in ")[0]
            ):
                counts[what] += int(number)
            worst = max(worst, abs(process.returncode))
        time.sleep(0.2)
    print(*failed, sep="\n")
    summed = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    print(f"===== {summed} in {time.monotonic() - began:.0f}s =====")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
