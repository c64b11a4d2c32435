"""`exlstm serve`: loads the model, listens, and ends in good order."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from exlstm import runs
from exlstm.serve.config import KEY, Serve
from exlstm.serve.worker import Worker

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from exlstm.serve.app import application
except ImportError as error:
    raise ValueError(f"serve needs the packages fastapi and uvicorn ({error}): pip install 'exlstm[serve]'") from None

# Seconds that a connection may take for the head of a request, or leave an answer untaken; up to twice that.
PATIENCE = 10.0
# Connections beside those of requests that run and wait: open ones that ask nothing, and those for /health.
SPARE = 256


def run(command: Serve) -> int:
    """Serves until a signal comes; 128 and its number, as a process that it ends has."""
    command.check()
    model = runs.load(Path(command.model), command.device, command.int8)
    wrong = next((token for token in command.eos if not 0 <= token < model.config.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"eos holds token {wrong}, wanted 0 to {model.config.vocab_size - 1}")
    with listening(command.host, command.port) as listener:
        server = Server(command, Worker(model, command))
        server.worker.start()
        print(greeting(command, listener.getsockname()[1]), flush=True)
        try:
            server.run([listener])
        finally:
            server.worker.stop()
    return 128 + server.signal if server.signal else 0


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError: it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    # A name that is too long for any host is no OSError.
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise ValueError(f"{host} port {port} cannot be listened at: {told}") from None


def greeting(command: Serve, port: int) -> str:
    """One line: where the server is, and how to ask it."""
    host = f"[{command.host}]" if ":" in command.host else command.host
    place, key = f"http://{host}:{port}", f' -H "Authorization: Bearer ${KEY}"' if command.secret() else ""
    asked = json.dumps({"prompt": "Once", "max_tokens": 50})
    curl = f"curl {place}/v1/completions{key} -H 'Content-Type: application/json' -d '{asked}'"
    return f"serves {command.title()} at {place}, as in: {curl}"


class Patient(H11Protocol):
    """A connection that does not wait for ever for the head of a request, or for a client to take its answer."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self._stuck = None
        self._timer = self.loop.call_later(PATIENCE, self._watch)

    def connection_lost(self, exc):
        self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self):
        stuck = self.transport.is_closing() or self.cycle is None or self.cycle.response_complete
        now = (self.cycle,) if stuck else None
        if stuck and now == self._stuck:
            self.transport.abort()
            return
        self._stuck = now
        self._timer = self.loop.call_later(PATIENCE, self._watch)


class Server(uvicorn.Server):
    """uvicorn around the application; a signal drains it, a second one ends what runs, a third one leaves it at that."""

    def __init__(self, command: Serve, worker: Worker):
        self.worker, self.seconds, self.signal = worker, command.drain, 0
        config = uvicorn.Config(
            application(command, worker),
            http=Patient,
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            # Warnings are about what clients send: anybody could fill a disk with them.
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=command.slots + command.queue + SPARE,
            timeout_graceful_shutdown=int(command.drain) + 2,
        )
        super().__init__(config)

    def handle_exit(self, sig, frame):
        self.force_exit = self.worker.drained is not None and self.seconds == 0
        self.worker.drain(self.seconds)
        self.should_exit, self.signal, self.seconds = True, sig, 0.0
