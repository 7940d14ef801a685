"""The store's own lies, for `tests.soak`: it answers well, and what it keeps or shows is another thing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote

from tests.streaming.fault_proxy import FaultProxy

SETTLED = 0.15  # seconds: rclone keeps what it knows of a folder for 0.1


class LyingStore(FaultProxy):
    """It stands between the server and the proxy of the faults of the way, and passes everything on. Then it lies:

    bit, lost: shares of the uploads that are damaged in one bit, or thrown away, after the server has taken them;
    stale: for so many seconds an overwritten or removed object is read as it was before;
    late: a listing may be as old as so many seconds;
    sums: whether it gives the checksums of uploads back, which clients compare. Not every store does.
    """

    def __init__(self, upstream: int, folder: Path, seed: int):
        self.folder = folder
        self.bit = self.lost = self.stale = self.late = 0.0
        self.sums = bool(seed % 2)
        self.uploads = re.compile("")  # which are damaged or lost: their keys
        self.told: list[str] = []  # every lie: time, what, key
        self._old: dict[str, tuple[float, bytes]] = {}  # key -> when it was replaced, and by then its content
        self._lists: dict[str, tuple[float, bytes]] = {}  # request -> when it was answered, and how
        super().__init__(upstream, seed)

    def honest(self, *what: str) -> None:
        """These lies end."""
        for name in what:
            setattr(self, name, 0.0)
        if "stale" in what:
            self._old.clear()

    async def _answer(self, head, reader, writer):
        method, path = head.split(" ", 2)[:2]
        length = re.search(r"(?im)^content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        writer.write(self._remembered(method, path, head) or await self._asked(method, path, head, body))
        await writer.drain()
        return False  # the answer says that the connection closes

    async def _asked(self, method, path, head, body):
        keys = _changed(method, path, body)
        before = {key: self._content(key) for key in keys}
        answer = await self._pass_on(head, body)
        if answer[9:10] == b"2" and keys:
            harmed = [key for key, old in before.items() if method == "PUT" and self._harm(key, old)]
            self._old.update({key: (time.monotonic(), old) for key, old in before.items() if old is not None})
            await asyncio.sleep(SETTLED if harmed else 0)
        if method == "GET" and "list-type" in path:
            self._lists[path] = time.monotonic(), answer
        return answer

    async def _pass_on(self, head, body):
        there, answer = await asyncio.open_connection("127.0.0.1", self.upstream)
        head = re.sub(r"(?im)^(connection|expect):.*\r\n", "", head)
        answer.write(head.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode("latin-1") + body)
        await answer.drain()
        content = await there.read(-1)
        answer.close()
        head, end, body = content.partition(b"\r\n\r\n")
        return (head if self.sums else re.sub(rb"(?i)\r\nx-amz-checksum-[^\r]*", b"", head)) + end + body

    def _content(self, key):
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def _harm(self, key, old):
        """The server has taken an upload; `old` was there before. -> whether it is lied about."""
        u, path = self.random.random(), self.folder / key
        if not self.uploads.search(key) or u >= self.bit + self.lost or not self._content(key):
            return False
        if u < self.bit:
            self._flip(path)
        elif old is None:
            path.unlink()
        else:
            path.write_bytes(old)
        self._note("one bit of" if u < self.bit else "lost", key)
        return True

    def _flip(self, path):
        """In place, and the file is as old as before."""
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        os.utime(path, ns=times)

    def _remembered(self, method, path, head):
        """An answer of before, where this is the time for one."""
        now, key = time.monotonic(), _key(path)
        since, answer = self._lists.get(path, (0.0, b""))
        if self.late and answer and now - since < self.late:
            self._note("old list", path)
            return answer
        since, content = self._old.get(key, (0.0, b""))
        if method not in ("GET", "HEAD") or "?list-type" in path or not self.stale or now - since > self.stale:
            return None
        self._note(f"old content ({method})", key)
        return _object(content, method, head)

    def _note(self, what, key):
        self.told.append(f"{time.strftime('%H:%M:%S')} {what} {key}")


def _key(path: str) -> str:
    return unquote(path.split("?")[0]).strip("/")


def _changed(method: str, path: str, body: bytes) -> list[str]:
    """Keys that a request writes or removes. Parts of an upload are none; nothing here is so large."""
    if method == "POST" and path.split("?")[-1].startswith("delete"):
        return [f"{_key(path)}/{key}" for key in re.findall(r"<Key>(.*?)</Key>", body.decode(errors="replace"))]
    return [_key(path)] if method in ("PUT", "DELETE") and "uploadId" not in path and "/" in _key(path) else []


def _object(content: bytes, method: str, head: str) -> bytes:
    """What S3 answers when it is asked for an object."""
    lines = [f'ETag: "{hashlib.md5(content).hexdigest()}"', f"Last-Modified: {formatdate(usegmt=True)}"]
    status, size = "200 OK", len(content)
    if sent := re.search(r"(?im)^range: bytes=(\d+)-(\d*)", head):
        start, stop = int(sent[1]), min(size, int(sent[2] or size) + 1)
        if start >= size:
            return b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        content, status = content[start:stop], "206 Partial Content"
        lines.append(f"Content-Range: bytes {start}-{stop - 1}/{size}")
    lines += [f"Content-Length: {len(content)}", "Content-Type: binary/octet-stream", "Connection: close"]
    answer = "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()
    return answer + (content if method == "GET" else b"")
