"""A balance in PostgreSQL that only the holder of the account's lock changes, even one that wakes up late.

    python ledger.py ada 100 --think 5

Stop it with Ctrl-Z while it thinks, run another `python ledger.py ada 5`, which gets the lock when the lease
of the first has ended, and let the first go on with `fg`: its write is refused, because the row has seen a
newer fencing token.
"""

import argparse
import asyncio
import os
import time

import asyncpg

from dotmac.platform.connection.embedded import aresolve_database
from dotmac.platform.connection.urls import postgres_dsn
from dotmac.platform.core.unified_config import get_config
from dotmac.platform.distributed_locks import DistributedLockManager

TABLE = """
    CREATE TABLE IF NOT EXISTS accounts (
        id text PRIMARY KEY, balance bigint NOT NULL DEFAULT 0, fence bigint NOT NULL DEFAULT 0)
"""
# Reading raises the fence: from here on, whoever held the lock before can't change what was read.
READ = """
    INSERT INTO accounts (id, fence) VALUES ($1, $2)
    ON CONFLICT (id) DO UPDATE SET fence = $2 WHERE accounts.fence < $2
    RETURNING balance
"""
WRITE = "UPDATE accounts SET balance = $3 WHERE id = $1 AND fence = $2"


class OvertakenError(Exception):
    """A later holder of the lock has been here."""


async def deposit(
    connection: asyncpg.Connection, locks: DistributedLockManager, account: str, amount: int, think: float
) -> int:
    """Adds to a balance; the new one. Raises OvertakenError, having changed nothing."""
    # "flag", to get as far as the write: by default the body is cancelled when the lock is lost, which
    # prevents most late writes, but never one that is already on its way.
    async with locks.acquire_lock(f"account:{account}", timeout=2.0, on_lost="flag") as lock:
        token = lock.fencing_token
        balance = await connection.fetchval(READ, account, token)
        if balance is None:
            raise OvertakenError
        print(f"{os.getpid()} read {balance} with token {token}", flush=True)
        time.sleep(think)  # noqa: ASYNC251 - a computation, a pause of the machine, a swapped-out process
        written = await connection.execute(WRITE, account, token, balance + amount)
        if written == "UPDATE 0":
            raise OvertakenError
        return int(balance) + amount


async def main() -> None:
    """Reads the command line, deposits, says what became of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("account")
    parser.add_argument("amount", type=int)
    parser.add_argument("--think", type=float, default=0.0, help="seconds between reading and writing")
    given = parser.parse_args()
    connection = await asyncpg.connect(postgres_dsn(await aresolve_database(get_config().get_database_url())))
    try:
        async with DistributedLockManager() as locks:
            async with locks.acquire_lock("accounts:table"):
                await connection.execute(TABLE)
            balance = await deposit(connection, locks, given.account, given.amount, given.think)
            print(f"{os.getpid()} wrote {balance}")
    except OvertakenError:
        raise SystemExit(f"{os.getpid()} refused: a later holder of the lock has been here") from None
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
