"""A viewer of the audit trail: lists, counts and live events for people who log in, each for their tenants.

`VIEWERS` names who may look: `name:password:tenant,tenant;name:password:*`.
"""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from dotmac.platform.audit_trail import AuditAggregator
from dotmac.platform.contrib.fastapi import AuditAccess, audit_router
from dotmac.platform.core.unified_config import get_config

PAGE = Path(__file__).with_name("viewer.html")
audit = AuditAggregator(postgres_url=get_config().get_database_url())


def read_viewers(text: str) -> dict[str, tuple[bytes, AuditAccess]]:
    """Who may look, from the text of the setting."""
    found = {}
    for entry in filter(None, text.split(";")):
        name, password, tenants = entry.split(":")
        access = AuditAccess.everything() if tenants == "*" else AuditAccess.of(*tenants.split(","))
        found[name] = (password.encode(), access)
    return found


viewers = read_viewers(os.environ.get("VIEWERS", ""))


def who(login: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> AuditAccess:
    """What the one who logged in may see. Browsers send this login with EventSource, too."""
    password, access = viewers.get(login.username, (secrets.token_bytes(), None))
    if not secrets.compare_digest(login.password.encode(), password) or access is None:
        raise HTTPException(401, "name or password is wrong", {"WWW-Authenticate": "Basic"})
    return access


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with audit:
        yield


app = FastAPI(title="Audit viewer", lifespan=lifespan)
app.include_router(audit_router(audit, who))


@app.get("/", response_class=HTMLResponse, dependencies=[Depends(who)])
async def page() -> str:
    return PAGE.read_text(encoding="utf-8")
