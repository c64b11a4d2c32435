"""The HTTP side: who may come in, how much of a body is read, and which path does what."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from exlstm.serve import asked
from exlstm.serve.answers import Ask, Shape, Stream, answer, refusal, whole
from exlstm.serve.asked import Refused
from exlstm.serve.config import Serve
from exlstm.serve.worker import Worker

# Paths that need no key: they tell nothing about texts.
OPEN = ("/", "/health")
LOCAL = ("localhost", "127.0.0.1", "[::1]")
# Seconds for a body to come, and for an answer to go out behind the time that its request had.
BODY, SLACK = 30.0, 30.0
# Of a body that is too large, bytes and seconds that are read and dropped, so that the client gets to see the answer.
DROPPED, DROPPING = 1 << 25, 2.0


class Gate:
    """What stands before every path: host, key, the time that a request may take, and the count of answers."""

    def __init__(self, app, settings: Serve, worker: Worker):
        self.app, self.settings, self.worker = app, settings, worker
        self.key = settings.secret().encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        status = 0

        async def counted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            async with asyncio.timeout(self.settings.timeout + SLACK):
                refused = self._refused(scope)
                await (self.app if refused is None else refusal(refused))(scope, receive, counted)
        except TimeoutError:
            # The client reads too slowly: uvicorn closes the connection.
            status = 504
        except asyncio.CancelledError:
            # At the end of the server, for a client that takes longer than it waits.
            if self.worker.drained is None:
                raise
        finally:
            self.worker.metrics.statuses[status or 500] += 1

    def _refused(self, scope) -> Refused | None:
        headers = dict(scope["headers"])
        if not self.key:
            # A page elsewhere that gives this machine a name of its own must not be able to ask.
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = re.sub(r":\d*$", "", host)
            if name not in LOCAL and name.strip("[]") != self.settings.host:
                told = (
                    f"host {asked.shown(host)} is not this machine, wanted {', '.join(LOCAL)}, or a server with a key"
                )
                return Refused(403, told)
            return None
        if scope["path"] in OPEN:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if not hmac.compare_digest(given.strip(), self.key) or scheme.lower() != b"bearer":
            return Refused(401, 'wanted the header "Authorization: Bearer KEY" with the key of this server')
        return None


class Api:
    """The paths."""

    def __init__(self, settings: Serve, worker: Worker):
        self.settings, self.worker, self.begun = settings, worker, int(time.time())
        self.page_text = files("exlstm.serve").joinpath("page.html").read_text(encoding="utf-8")
        script, style = (
            re.search(rf"<{tag}>(.*?)</{tag}>", self.page_text, re.DOTALL)[1] for tag in ("script", "style")
        )
        self.page_headers = {
            "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:; script-src {_hash(script)}; "
            f"style-src {_hash(style)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    def routes(self):
        return (
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.one, "GET"),
            ("/health", self.health, "GET"),
            ("/metrics", self.metrics, "GET"),
            ("/", self.page, "GET"),
        )

    async def completions(self, request: Request) -> Response:
        return await self._written(request, False)

    async def chat(self, request: Request) -> Response:
        return await self._written(request, True)

    async def _written(self, request: Request, chat: bool) -> Response:
        body = await _body(request, self.settings.max_body)
        # A long text takes its time to become tokens.
        wanted = await asyncio.to_thread(asked.read, body, chat, self.settings, self.worker.model.tokenizer)
        ask, shape = Ask(self.worker, wanted), Shape(wanted, self.settings.title())
        return Stream(ask, shape) if wanted.stream else await whole(ask, shape, request.receive)

    async def models(self, request: Request) -> Response:
        return answer({"object": "list", "data": [self._model()]})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.title():
            told = f"model is {asked.shown(name)}, wanted {self.settings.title()!r}, which is all that is served here"
            raise Refused(404, told, "model", "model_not_found")
        return answer(self._model())

    def _model(self) -> dict:
        return {"id": self.settings.title(), "object": "model", "created": self.begun, "owned_by": "exlstm"}

    async def health(self, request: Request) -> Response:
        if not self.worker.alive():
            raise Refused(503, "the engine does not run any more")
        if self.worker.drained is not None:
            raise Refused(503, "the server is about to end")
        return answer({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        engine = self.worker.engine
        now = {
            "slots": engine.slots,
            "slots_taken": engine.slots - engine.free,
            "requests_waiting": self.worker.waiting(),
        }
        return Response(self.worker.metrics.text(now), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        return Response(self.page_text, 200, self.page_headers, "text/html")


def application(settings: Serve, worker: Worker):
    """What uvicorn runs."""
    # Without its own pages of documentation, which load from elsewhere.
    app, api = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False), Api(settings, worker)
    for path, call, method in api.routes():
        # A HEAD is a GET whose body the server keeps to itself.
        app.add_api_route(path, call, methods=[method, *["HEAD"] * (method == "GET")], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    gate = Gate(app, settings, worker)
    # In front of the gate: a browser asks for permission without a key.
    if not settings.cors:
        return gate
    words = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
    return CORSMiddleware(gate, allow_origins=list(settings.cors), **words)


async def _refused(_, refused: Refused) -> Response:
    return refusal(refused)


async def _http_error(request: Request, error: HTTPException) -> Response:
    told = {404: "there is no such path", 405: "wanted another method"}.get(error.status_code, error.detail)
    response = refusal(Refused(error.status_code, f"{request.method} {request.url.path[:100]}: {told}"))
    response.headers.update(error.headers or {})
    return response


async def _failed(_, error: Exception) -> Response:
    return refusal(Refused(500, "the server has made a mistake; its standard error says which"))


async def _body(request: Request, most: int) -> bytes:
    """The body of a POST, never more than `most` bytes of it in memory."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Any page may post other kinds to any address without asking first.
    if kind != "application/json":
        raise Refused(415, f"content-type is {asked.shown(kind)}, wanted application/json")
    length = request.headers.get("content-length", "")
    parts, size, stream = [], 0, request.stream()
    try:
        async with asyncio.timeout(BODY):
            if not length.isdigit() or len(length) > 18 or int(length) <= most:
                async for part in stream:
                    size += len(part)
                    if size > most:
                        break
                    parts.append(part)
                else:
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY:g} seconds") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away before its body was there") from None
    parts.clear()
    await _drop(stream)
    raise Refused(413, f"the body has more than {most} bytes, which is the most that is read")


async def _drop(stream):
    size = 0
    try:
        async with asyncio.timeout(DROPPING):
            async for part in stream:
                size += len(part)
                if size > DROPPED:
                    return
    except (TimeoutError, ClientDisconnect):
        return


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
