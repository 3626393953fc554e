"""Service B: knows how much there is of each article, and takes some away, one order at a time."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException

from dotmac.platform.distributed_locks import DistributedLockManager
from dotmac.platform.service_registry import ServiceRegistry

HOST = os.environ.get("HOST", "127.0.0.1")
PORT = int(os.environ.get("PORT", "8001"))

registry = ServiceRegistry()
locks = DistributedLockManager()
shelf = {"apple": 100, "pear": 3}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Can be found from start to stop: closing the registry takes out what it registered."""
    async with registry, locks:
        await registry.register_service(
            name="stock", version="1.0.0", host=HOST, port=PORT, tags=["data", "processing"]
        )
        yield


app = FastAPI(title="Stock", lifespan=lifespan)


@app.get("/articles/{article}")
async def count(article: str) -> dict[str, int]:
    """How many there are."""
    return {"left": shelf.get(article, 0)}


@app.post("/articles/{article}/take")
@locks.with_lock("stock:{article}")
async def take(article: str, amount: int) -> dict[str, int]:
    """Take some away, or refuse."""
    left = shelf.get(article, 0)
    if amount > left:
        raise HTTPException(409, f"only {left} left")
    shelf[article] = left - amount
    return {"left": shelf[article]}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host=HOST, port=PORT)
