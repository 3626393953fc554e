"""How soon is a deadlock of two processes over?

Each holds one of two locks and then wants the other's. The time counts from the request that closes the
cycle to the moment at which one of them is told, and to that at which the other holds both: with nobody else
waiting, and with 1,000 tasks of a third process in the queue of another lock. A round trip to the server is
told beside it. Libraries that don't detect deadlocks either end with both leases, and both go on, or never.

    python benches/compare/deadlock.py [--rounds 200] [--waiters 1000] [--limit 5] [--only dotmac]
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import holder
from peers import BY_NAME, Aioredlock, Dotmac, RedisFifoLock, RedisPy, chosen, report_missing
from stand import Server, Worker, arguments, hear, load, median, save, say, share, start, table, why

if TYPE_CHECKING:
    from peers import AsyncPeer

PEERS = (Dotmac, RedisPy, Aioredlock, RedisFifoLock)
LEASE = 2.0
# Long enough for the first to be in the queue when the second asks.
APART = 0.02
MILLI = 1e3


# ---- the worker: one of the two


async def _rounds(peer: AsyncPeer, port: int) -> None:
    await peer.start(port)
    async with peer.lock("warm", 10.0):
        say("ready")
    while (asked := await asyncio.to_thread(hear)) is not None:
        told: dict[str, Any] = {}
        try:
            async with peer.renewed(asked["first"], LEASE):
                say("holds")
                await asyncio.to_thread(hear)
                told["asked"] = time.monotonic()
                try:
                    async with peer.renewed(asked["second"], LEASE):
                        told["held"] = time.monotonic()
                except Exception as error:
                    told.setdefault("refused", time.monotonic())
                    told["why"] = type(error).__name__
                    raise
        except Exception as error:  # noqa: BLE001 - who loses, and how, is what is measured
            told.setdefault("why", type(error).__name__)
        say(told)
    await peer.stop()


def work(name: str, port: int) -> None:
    """The whole life of a worker."""
    try:
        asyncio.run(_rounds(BY_NAME[name](), port))  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - the parent reports it
        say({"failed": why(error)})


# ---- the parent


def one_round(pair: list[Worker], number: int, limit: float) -> list[dict[str, Any]]:
    """What both say, in the order in which they asked; raises TimeoutError if they don't in time."""
    names = [f"dead:{number}:{which}" for which in "ab"]
    for worker, first, second in zip(pair, names, reversed(names), strict=True):
        worker.ask(first=first, second=second)
    for worker in pair:
        worker.tell(go=True)
        time.sleep(APART)
    end = time.monotonic() + limit
    return [worker.answer(max(0.0, end - time.monotonic())) for worker in pair]


def detected(server: Server, rounds: int, waiters: int) -> dict[str, list[float]]:
    """Seconds to the refusal, and to the survivor's second lock, of each round."""
    workers = [Worker(__file__, "dotmac", server.port) for _ in range(2)]
    crowd = Worker(holder.__file__, "dotmac", server.port) if waiters else None
    told, over, trips = [], [], []
    try:
        for worker in workers:
            worker.answer(60)
        if crowd is not None:
            crowd.answer(60)
            crowd.ask(do="hold", names=["crowd"], lease=30.0)
            crowd.ask(do="crowd", name="crowd", lease=30.0, count=waiters)
            time.sleep(1.0)
        for number in range(rounds):
            both = one_round(workers, number, 30.0)
            closed = both[1]["asked"]
            told.append(next(one["refused"] for one in both if "refused" in one) - closed)
            over.append(next(one["held"] for one in both if "held" in one) - closed)
            began = time.perf_counter()
            server.client.ping()
            trips.append(time.perf_counter() - began)
    finally:
        for worker in (*workers, *([crowd] if crowd is not None else [])):
            worker.end()
    return {"told": told, "over": over, "round trip": trips}


def undetected(name: str, server: Server, limit: float) -> str:
    """How it ends for a library that does not look."""
    workers = [Worker(__file__, name, server.port) for _ in range(2)]
    try:
        for worker in workers:
            worker.answer(60)
        both = one_round(workers, 0, limit)
    except TimeoutError:
        return f"both still wait after {limit:g} s"
    finally:
        for worker in workers:
            worker.kill()
            worker.end()
    if refused := [one for one in both if "held" not in one]:
        return f"{len(refused)} of 2 given {refused[0].get('why')}"
    last = max(one["held"] for one in both) - both[1]["asked"]
    errors = {one["why"] for one in both if "why" in one}
    return f"both hold both after {last:.1f} s" + (f", then {', '.join(sorted(errors))}" if errors else "")


def main() -> None:
    options = arguments(__doc__, rounds=200, waiters=1000, limit=5.0)
    missing: dict[str, str] = {}
    found: dict[str, Any] = {}
    rows = []
    for peer in chosen(PEERS, options.only):
        try:
            if peer.name != "dotmac":
                with Server() as server:
                    found[peer.name] = undetected(peer.name, server, options.limit)
                continue
            for waiters in (0, options.waiters):
                with Server() as server:
                    samples = detected(server, options.rounds, waiters)
                found[f"dotmac, {waiters:,} waiters"] = samples
                row = [f"{waiters:,}"]
                for values in samples.values():
                    row += [f"{median(values) * MILLI:.2f}", f"{share(values, 0.99) * MILLI:.2f}"]
                rows.append(row)
        except (RuntimeError, TimeoutError) as error:
            missing[peer.name] = str(error) or "nothing was heard of it in time"
    times = [f"{what} {part} ms" for what in ("told", "over", "round trip") for part in ("p50", "p99")]
    table(
        f"dotmac: {options.rounds} deadlocks of two processes ({load()})", ["waiters elsewhere", *times], rows
    )
    others = [[name, how] for name, how in found.items() if isinstance(how, str)]
    table(f"the same with others, under leases of {LEASE:g} s", ["peer", "what happens"], others)
    report_missing(missing)
    save(options.json, found | {"not measured": missing})


if __name__ == "__main__":
    start(main, work)
