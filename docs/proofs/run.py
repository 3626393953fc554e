"""Checks the models of this directory with Spin: every case, or those whose names contain the words given.

    python docs/proofs/run.py [word ...] [--show]

`--show` prints the schedule of each counterexample. Ends with 1 when a case does not come out as expected.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 240
MEGABYTES = 3000


@dataclass(frozen=True)
class Case:
    """One run of the model."""

    name: str
    defines: str
    fails: bool = False

    @property
    def hashed(self) -> bool:
        """Whether only hashes of the states are kept: these are too many for the memory."""
        return "FAILOVER" in self.defines


def scenario(name: str, defines: str, **rules: str) -> list[Case]:
    """The model as it is, then without each of the rules, which the define behind it switches off."""
    return [
        Case(name, defines),
        *(
            Case(f"{name} without {rule.replace('_', ' ')}", f"{defines} {off}", fails=True)
            for rule, off in rules.items()
        ),
    ]


CASES = [
    *scenario(
        "queue",
        "REQS=2 ASKS=3",
        base="BASE_ARRIVAL",
        done="NO_DONE",
        the_local_deadline="NO_DEADLINE",
    ),
    *scenario("claims", "T=4 REQS=2 ASKS=3", claim="NO_CLAIM"),
    *scenario("clocks", "REQS=1 STEPS=1 SLOW=1", the_logical_clock="CLOCK_WALL", drift="NO_DRIFT"),
    *scenario("gaps", "REQS=1 STEPS=2", standing_still_over_gaps="ADVANCE", steps_being_gaps="SMALL_STEPS"),
    *scenario("connections", "REQS=1 DROPS=1", generations="NO_GEN", cancelling_what_went_twice="NO_RESENT"),
    *scenario("force", "REQS=1 FORCES=1", revoked="NO_REVOKED"),
    *scenario(
        "failover",
        "REQS=1 FENCES=3 FAILOVER",
        cover="NO_COVER",
        reconciling="NO_RECONCILE",
        a_jump_of_the_counter="FENCES_COUNT",
    ),
    *scenario("restart", "REQS=1 RESTART", grace="NO_GRACE"),
    Case("restart, a lease is asserted (to be found)", "REQS=1 RESTART FIND_ASSERTED", fails=True),
    *scenario("flush", "REQS=1 FLUSH"),
    *scenario("progress, crashes", "PROMPT SWEEP N=3 REQS=1 CRASHES=2 BOUND=4"),
    *scenario("progress, connections", "PROMPT REQS=1 DROPS=2 BOUND=4", sending_again="NO_RESEND"),
    *scenario("progress, restart", "PROMPT RESTART REQS=1 BOUND=4"),
]


@dataclass(frozen=True)
class Found:
    """What Spin says."""

    verdict: str
    states: int
    depth: int
    seconds: float
    schedule: str


def run(*command: str, room: str, seconds: float = SECONDS) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=room, capture_output=True, text=True, timeout=seconds, check=False)
    return done.stdout


def check(case: Case, *, show: bool) -> Found:
    """Runs Spin on a case."""
    with tempfile.TemporaryDirectory() as room:
        for file in HERE.glob("*.pml"):
            shutil.copy(file, room)
        defines = [f"-D{define}" for define in case.defines.split()]
        made = run("spin", "-a", *defines, "locks.pml", room=room)
        if not Path(room, "pan.c").exists():
            return Found(made.strip(), 0, 0, 0, "")
        compiler = shutil.which("cc") or "gcc"
        # Steps are too big for a reduction by partial order to find much.
        options = f"-O1 -w -DSAFETY -DNOREDUCE -DMEMLIM={MEGABYTES}".split()
        if case.hashed:
            options.append("-DHC4")
        subprocess.run([compiler, *options, "-o", "pan", "pan.c"], cwd=room, check=True)
        began = time.monotonic()
        try:
            text = run("./pan", "-w24", "-m100000", "-n", room=room)
        except subprocess.TimeoutExpired:
            return Found("not finished", 0, 0, SECONDS, "")
        seconds = time.monotonic() - began
        states = int(float(found(r"(\S+) states, stored", text) or 0))
        depth = int(found(r"depth reached (\d+)", text) or 0)
        if re.search(r"errors: [1-9]", text):
            verdict = "counterexample found"
        elif "errors: 0" in text and "max search depth too small" not in text and "out of memory" not in text:
            verdict = "no error"
        else:
            verdict = "not finished"
        schedule = ""
        if show and verdict == "counterexample found":
            words = re.compile(r"^(process|server|connection|clock|an operator|a command|the replica|----)")
            lines = [
                line.strip() for line in run("spin", "-t", *defines, "locks.pml", room=room).splitlines()
            ]
            schedule = "\n".join(f"      {line}" for line in lines if words.match(line))
        return Found(verdict, states, depth, seconds, schedule)


def found(pattern: str, text: str) -> str:
    """The first group of the first match."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def main() -> int:
    """Runs the cases and prints a line for each."""
    parser = argparse.ArgumentParser(description="check the models with Spin")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if not shutil.which("spin") or not (shutil.which("cc") or shutil.which("gcc")):
        print("spin or a C compiler is not installed, so nothing is checked (Debian: apt install spin gcc)")
        return 0
    wrong = 0
    print(f"{'model':45} {'states':>10} {'depth':>6} {'time':>7}  verdict")
    for case in CASES:
        if not all(word in case.name for word in options.words):
            continue
        result = check(case, show=options.show)
        expected = result.verdict == ("counterexample found" if case.fails else "no error")
        wrong += not expected
        remark = "" if expected else "  NOT AS EXPECTED"
        figures = f"{result.states:10,} {result.depth:6} {result.seconds:6.1f}s"
        print(f"{case.name:45} {figures}  {result.verdict}{remark}", flush=True)
        if result.schedule:
            print(result.schedule)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
