"""The locks under random faults, for a short while; `make chaos` does it for longer.

Promises: whatever goes wrong with processes, connections, the server, its data and its clock, no two hold
together what excludes them, tokens only grow, nobody pushes in or starves, no lease ends early, every request
ends, and nothing is left behind; and if locks did not exclude, the same run would say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos.faults import BY_TOPOLOGY, STANDALONE
from chaos.run import Run

if TYPE_CHECKING:
    from pathlib import Path

SEED = 1


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_short_storm(tmp_path: Path) -> None:
    verdict = await Run(tmp_path, SEED, 10).run()
    assert verdict.violations == [], "said above; the files are in the test's directory"
    assert verdict.counts["grants"] > 50
    assert verdict.counts["writes accepted"] > 50
    assert verdict.counts["waits after the faults"] > 0
    server, worker, _ = BY_TOPOLOGY[STANDALONE]
    assert verdict.counts["faults"] >= len(server) + len(worker)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_without_exclusion_it_says_so(tmp_path: Path) -> None:
    verdict = await Run(tmp_path, SEED, 3, faulty=False, apart=True).run()
    assert {"overlap", "refused while held"} <= {violation.rule for violation in verdict.violations}
