"""Fencing with several servers: a token per server, since no single number would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["QuorumToken"]


class QuorumToken(tuple[int | None, ...]):
    """The fencing tokens of one holding, one per server in the order of `redis_urls`; None where it has none.

    Each server's tokens grow with its own grants and say nothing about those of another server, so neither
    their maximum nor their sum need grow from one holder to the next, whose majorities may have but one
    server in common. On each server that they do have in common, the later holder's token is the higher one.
    So what the lock guards keeps the highest token that it has seen of each server, and refuses a holder that
    comes with a lower one for any of them.
    """

    __slots__ = ()

    def overtaken(self, seen: Sequence[int | None]) -> bool:
        """True if a later holder has been here.

        Args: seen: the highest token of each server so far, None where none was seen.
        """
        return any(
            mine is not None and theirs is not None and mine < theirs
            for mine, theirs in zip(self, seen, strict=True)
        )

    def merged(self, seen: Sequence[int | None]) -> tuple[int | None, ...]:
        """What to keep as seen, once this holder was let in."""
        return tuple(
            theirs if mine is None else mine if theirs is None else max(mine, theirs)
            for mine, theirs in zip(self, seen, strict=True)
        )
