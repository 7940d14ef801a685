"""An HTTP proxy between client and store that misbehaves on request, and remembers what was asked of it."""

import asyncio
import random
import re
import threading
from typing import NamedTuple


class Request(NamedTuple):
    method: str
    path: str
    start: int  # of the range that was sent, where one was
    stop: int
    answer: str  # what the client was given: "whole", or the fault


REFUSALS = {"503": b"SlowDown", "404": b"NoSuchKey"}


class FaultProxy:
    """Faults: 503, 404, reset, truncate (the connection ends within the body), short (a body that is whole by its header, and
    half), flip (its bytes are), stall (no answer), slow (1 kB/s). `next`: those of the next requests, in order; then `shares` of
    them. `down`: connections are closed at once."""

    def __init__(self, upstream: int, seed: int = 0):
        self.upstream, self.random = upstream, random.Random(seed)
        self.shares: dict[str, float] = {}
        self.next: list[str] = []
        self.only = re.compile("")  # faults hit only these: METHOD path?query
        self.down = False
        self.flips: re.Pattern[str] | None = None  # of these requests, one bit of what they send
        self.flips_left = 1 << 30
        self.log: list[Request] = []
        started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def _run(self, started):
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def options(self):
        return {"endpoint_url": f"http://127.0.0.1:{self.port}"}

    async def _serve(self, reader, writer):
        try:
            while not self.down and (head := await self._head(reader)):
                if not await self._answer(head, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            writer.close()

    async def _head(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        return head.decode("latin-1")

    async def _answer(self, head, reader, writer):
        method, path = head.split(" ", 2)[:2]
        sent = re.search(r"(?im)^range: bytes=(\d+)-(\d+)", head)
        start, stop = (int(sent[1]), int(sent[2]) + 1) if sent else (0, -1)
        fault = self._draw() if self.only.search(f"{method} {path}") else "whole"
        self.log.append(Request(method, path.split("?")[0], start, stop, fault))
        body = b""
        if length := re.search(r"(?im)^content-length: (\d+)", head):
            if "100-continue" in head.lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(length[1]))
        if self.flips and self.flips_left and body and self.flips.search(f"{method} {path}"):
            self.flips_left -= 1
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault in REFUSALS:
            text = b"<Error><Code>%s</Code><Message>injected</Message></Error>" % REFUSALS[fault]
            writer.write(
                b"HTTP/1.1 %s Injected\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n"
                % (fault.encode(), len(text))
            )
            writer.write(text if method != "HEAD" else b"")
            await writer.drain()
            return True
        if fault == "reset":
            return False
        if fault == "stall":
            await asyncio.sleep(3600)
        there, answer = await asyncio.open_connection("127.0.0.1", self.upstream)
        head = re.sub(r"(?im)^(connection|expect):.*\r\n", "", head).replace(
            "\r\n\r\n", "\r\nConnection: close\r\n\r\n"
        )
        answer.write(head.encode("latin-1") + body)
        await answer.drain()
        content = await there.read(-1)
        answer.close()
        begin = content.find(b"\r\n\r\n") + 4
        header, body = content[:begin], content[begin:]
        if fault in ("truncate", "short"):
            body = body[: len(body) // 2]
        if fault == "short":
            header = re.sub(
                rb"(?im)^(content-length: )(\d+)", lambda found: found[1] + b"%d" % (int(found[2]) // 2), header
            )
        if fault == "flip":
            body = bytes(255 - byte for byte in body)
        writer.write(header)
        while fault == "slow" and body:
            writer.write(body[:100])
            body = body[100:]
            await writer.drain()
            await asyncio.sleep(0.1)
        writer.write(body)
        await writer.drain()
        return False  # the answer says that the connection closes

    def _draw(self):
        if self.next:
            return self.next.pop(0)
        u = self.random.random()
        for fault, share in self.shares.items():
            if u < share:
                return fault
            u -= share
        return "whole"
