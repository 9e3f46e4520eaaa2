"""A tiny OpenAI-compatible server on a real socket, with the misbehaviour a test asks for."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class FakeServer:
    """Streams `max_tokens` tokens, `gap_s` apart. `requests` holds the parsed bodies."""

    gap_s: float = 0.0
    status: int = 200
    cut_after: int | None = None
    """Close the connection after so many tokens."""
    usage: bool = True
    fragment: int | None = None
    """Write the answer in pieces of so many bytes, wherever they fall."""
    ids: bool = True
    """Events carry an id before their data."""
    url: str = ""
    requests: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    connections: int = 0
    running: int = 0
    peak: int = 0

    async def handle(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split("\r\n")[0].split(" ")
                headers = dict(
                    line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line
                )
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.headers.append(headers)
                self.running += 1
                self.peak = max(self.peak, self.running)
                try:
                    keep = await self.answer(writer, method, path, body)
                finally:
                    self.running -= 1
                if not keep:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, writer, method, path, body):
        if method == "GET":
            await self.whole(writer, 200, {"object": "list", "data": [{"id": "fake"}]})
            return True
        request = json.loads(body)
        self.requests.append((path, request))
        if self.status != 200:
            await self.whole(writer, self.status, {"error": {"message": "no", "code": "x"}})
            return True
        if not request.get("stream"):
            await self.whole(
                writer, 200, {"choices": [{"text": "a b", "message": {"content": "a b"}}]}
            )
            return True
        return await self.stream(writer, path, request)

    async def whole(self, writer, status, value):
        text = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
        await writer.drain()

    async def stream(self, writer, path, request):
        await self.write(
            writer,
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n",
        )
        chat = path.endswith("/chat/completions")
        count = request.get("max_tokens", 3)
        if chat:
            await self.event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await self.chunk(writer, b": keep-alive\n\n")
        for i in range(count):
            if i == self.cut_after:
                return False
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
            text = f"t{i} é\n"
            choice = {"delta": {"content": text}} if chat else {"text": text}
            await self.event(writer, {"choices": [{"index": 0, **choice}]})
        await self.event(
            writer, {"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]}
        )
        if self.usage:
            prompt = request.get("prompt", "x")
            usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
            await self.event(writer, {"choices": [], "usage": usage})
        await self.chunk(writer, b"data: [DONE]\n\n")
        await self.write(writer, b"0\r\n\r\n")
        return True

    async def event(self, writer, value):
        number = b"id: 1\n" if self.ids else b""
        await self.chunk(writer, number + b"data: " + json.dumps(value).encode() + b"\n\n")

    async def chunk(self, writer, data):
        await self.write(writer, f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def write(self, writer, data):
        for i in range(0, len(data), self.fragment or len(data)):
            writer.write(data[i : i + (self.fragment or len(data))])
            await writer.drain()
            if self.fragment:
                await asyncio.sleep(0)


@asynccontextmanager
async def running(**options):
    """A started server."""
    server = FakeServer(**options)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
