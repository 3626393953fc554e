"""A service that takes forwarded audit events, each exactly once, and keeps them as JSON lines.

AUDIT_SECRET='a secret of your own' uvicorn receiver:app --port 8099
AUDIT_TRAIL_FORWARD_SECRET='a secret of your own' \\
    dotmac audit forward http://localhost:8099/audit --from-start
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from dotmac.platform.audit_trail import verify_webhook
from dotmac.platform.errors import InvalidArgument

SECRET = os.environ["AUDIT_SECRET"]
STORE = Path(os.environ.get("AUDIT_STORE", "received.ndjson"))

app = FastAPI()


def known() -> set[str]:
    """The ids of the events that are there: what comes again after a lost answer is left out by them."""
    if not STORE.exists():
        return set()
    return {json.loads(line)["id"] for line in STORE.read_text(encoding="utf-8").splitlines()}


seen = known()


def keep(events: list[dict[str, Any]]) -> None:
    """Append events; they are on the disk when this returns."""
    with STORE.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        out.flush()
        os.fsync(out.fileno())


@app.post("/audit")
async def take(request: Request) -> dict[str, int]:
    """Take a batch. Events are on the disk before the answer says so."""
    body = await request.body()
    try:
        verify_webhook(request.headers, body, SECRET)
    except InvalidArgument as error:
        raise HTTPException(401, str(error)) from error
    fresh = [event for event in json.loads(body)["events"] if event["id"] not in seen]
    await run_in_threadpool(keep, fresh)
    seen.update(event["id"] for event in fresh)
    return {"taken": len(fresh)}
