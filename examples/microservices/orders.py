"""Service A: takes orders, and asks whichever `stock` the registry names."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, HTTPException

from dotmac.platform.errors import NoInstanceAvailable
from dotmac.platform.service_registry import ServiceRegistry

HOST = os.environ.get("HOST", "127.0.0.1")
PORT = int(os.environ.get("PORT", "8002"))

registry = ServiceRegistry()
client = httpx.AsyncClient(timeout=5.0)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Can be found from start to stop."""
    async with registry, client:
        await registry.register_service(name="orders", version="1.0.0", host=HOST, port=PORT)
        yield


app = FastAPI(title="Orders", lifespan=lifespan)


@app.get("/available/{article}")
async def available(article: str) -> dict[str, bool]:
    """Could it be ordered? Chosen by `get_service`, which counts nothing."""
    stock = await registry.get_service("stock")
    if stock is None:
        raise HTTPException(503, "no stock service is registered")
    answer = await client.get(f"http://{stock.host}:{stock.port}/articles/{article}")
    return {"available": answer.raise_for_status().json()["left"] > 0}


@app.post("/orders/{article}")
async def order(article: str, amount: int = 1) -> dict[str, str | int]:
    """Order some. `use_service` counts calls in flight, latency and failures, on which balancing feeds."""
    try:
        async with registry.use_service("stock", tags=["data"]) as stock:
            answer = await client.post(f"{stock.url}/articles/{article}/take", params={"amount": amount})
    except NoInstanceAvailable as error:
        raise HTTPException(503, str(error)) from error
    if answer.status_code == httpx.codes.CONFLICT:
        raise HTTPException(409, answer.json()["detail"])
    return {"article": article, "ordered": amount, "left": answer.raise_for_status().json()["left"]}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host=HOST, port=PORT)
