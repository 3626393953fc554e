"""A wall clock that tests may step, for processes of their own; the monotonic clocks stay as they are.

It needs libfaketime (in Debian the package `libfaketime`), which the loader puts between a program and its
clock.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from glob import glob
from typing import TYPE_CHECKING

from dotmac.platform.connection.embedded import EmbeddedValkey

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_PLACES = (
    "/usr/lib/*/faketime/libfaketime.so.1",
    "/usr/lib*/faketime/libfaketime.so.1",
    "/usr/local/lib/faketime/libfaketime.so.1",
)
LIBRARY = next((found for place in _PLACES for found in glob(place)), None)  # noqa: PTH207 - three patterns from the root
MISSING = "libfaketime is not installed (Debian: apt-get install libfaketime)"


class WallClock:
    """By how much the wall clock of some processes is off.

    Args: file: where that is written down.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.step(0)

    @property
    def environment(self) -> dict[str, str]:
        """What the processes have to be started with."""
        if LIBRARY is None:
            return {}
        return {
            "LD_PRELOAD": LIBRARY,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def step(self, seconds: int) -> None:
        """From now on the clock is off by this much."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self._file)

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Processes that are started meanwhile have this clock."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name in self.environment:
                del os.environ[name]
            os.environ.update(before)


class ClockedValkey(EmbeddedValkey):
    """A server under a clock that may be stepped.

    Args:
        directory: where its files lie; made here.
        args: as in `EmbeddedValkey`.
    """

    def __init__(self, directory: Path, *, args: Sequence[str] = ()) -> None:
        directory.mkdir()
        self.clock = WallClock(directory / "clock")
        super().__init__(directory, args=args)

    def _launch(self) -> None:
        with self.clock.inherited():
            super()._launch()
