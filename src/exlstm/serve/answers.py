"""Answers in the API's shape: whole, or as a stream of events; and the end of a job whose client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator

from fastapi import Response

from exlstm.serve.asked import Asked, Refused
from exlstm.serve.worker import Job, Piece, Worker


def as_json(value) -> bytes:
    """JSON in UTF-8, whatever texts hold."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def answer(value, status: int = 200, headers: dict | None = None) -> Response:
    return Response(as_json(value), status, headers, "application/json")


def refusal(refused: Refused) -> Response:
    headers = {"Retry-After": str(refused.wait)} if refused.wait else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return answer(refused.body(), refused.status, headers)


class Ask:
    """A job as the event loop sees it: its events, until it has ended or its client has gone."""

    def __init__(self, worker: Worker, asked: Asked):
        self.worker, self.events = worker, asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event):
            # Nobody is there any more when the loop has ended.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.job = Job(asked, tell)
        self.left = self.job.left
        worker.submit(self.job)

    async def pieces(self, receive) -> AsyncIterator[Piece]:
        """What is written; ends early where the client has gone. Refused: the job failed."""
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self.events.put_nowait(None))
        try:
            while self.left:
                event = await self.events.get()
                if event is None:
                    return
                if isinstance(event, Refused):
                    raise event
                yield event
                self.left -= event.reason is not None
        finally:
            gone.cancel()
            if self.left:
                self.worker.cancel(self.job)


async def _disconnected(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class Shape:
    """The objects of one answer: completions or chat, whole or in chunks."""

    def __init__(self, asked: Asked, model: str):
        self.asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        name = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self.counts = [0] * (len(asked.prompts) * asked.n)
        self._blank = [asked.chat] * len(self.counts)

    def text(self, piece: Piece) -> str:
        """What a piece says: a chat's answer begins with its first visible character."""
        self.counts[piece.index] = piece.tokens
        if not self._blank[piece.index]:
            return piece.text
        text = piece.text.lstrip()
        self._blank[piece.index] = not text
        return text

    def echo(self, index: int) -> str:
        return self.asked.echo[index // self.asked.n] if self.asked.echo else ""

    def whole(self, texts: list[str], reasons: list[str], found: int) -> dict:
        choices = []
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": reason})
        return {**self.head, "choices": choices, "usage": self.usage(found)}

    def chunk(self, index: int, text: str, reason: str | None = None, first: bool = False) -> dict:
        delta = {"role": "assistant", "content": text} if first else {"content": text} if text else {}
        said = {"delta": delta} if self.asked.chat else {"text": text}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return self._chunk([choice], None)

    def last(self, found: int) -> dict:
        return self._chunk([], self.usage(found))

    def _chunk(self, choices, usage) -> dict:
        head = {**self.head, "object": "chat.completion.chunk"} if self.asked.chat else self.head
        return {**head, "choices": choices, **({"usage": usage} if self.asked.usage else {})}

    def usage(self, found: int) -> dict:
        """Every prompt counts once, whatever n; `found` of their tokens did not have to be read."""
        prompt, written = sum(map(len, self.asked.prompts)), sum(self.counts)
        used = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        return {**used, "prompt_tokens_details": {"cached_tokens": found}}


async def whole(ask: Ask, shape: Shape, receive) -> Response:
    """The answer when all of it is there; of a client that has gone nobody reads it."""
    texts, reasons = [shape.echo(i) for i in range(len(shape.counts))], [None] * len(shape.counts)
    async with contextlib.aclosing(ask.pieces(receive)) as pieces:
        async for piece in pieces:
            texts[piece.index] += shape.text(piece)
            reasons[piece.index] = piece.reason
    if ask.left:
        return Response(status_code=499)
    return answer(shape.whole(texts, reasons, ask.job.found))


class Stream(Response):
    """The answer as server-sent events, each as soon as it is there."""

    def __init__(self, ask: Ask, shape: Shape):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self.ask, self.shape = ask, shape

    async def __call__(self, scope, receive, send):
        begun = False
        async with contextlib.aclosing(self._events(receive)) as events:
            # A job that fails before its first event is an error with its own status.
            try:
                async for data in events:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        begun = True
                    await send(_body(data))
            except Refused as refused:
                if not begun:
                    await refusal(refused)(scope, receive, send)
                    return
                await send(_body(as_json(refused.body())))
        if begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await Response(status_code=499)(scope, receive, send)

    async def _events(self, receive) -> AsyncIterator[bytes]:
        shape, fresh = self.shape, set(range(len(self.shape.counts)))
        async with contextlib.aclosing(self.ask.pieces(receive)) as pieces:
            async for piece in pieces:
                index, text = piece.index, shape.text(piece)
                first = index in fresh
                if first:
                    fresh.discard(index)
                    text = shape.echo(index) + text
                # A chat ends with a chunk of its own.
                if text or first or not shape.asked.chat:
                    reason = None if shape.asked.chat else piece.reason
                    yield as_json(shape.chunk(index, text, reason, first))
                if piece.reason and shape.asked.chat:
                    yield as_json(shape.chunk(index, "", piece.reason))
        if self.ask.left:
            return
        if shape.asked.usage:
            yield as_json(shape.last(self.ask.job.found))
        yield b"[DONE]"


def _body(data: bytes) -> dict:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
