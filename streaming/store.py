"""Bytes of objects through fsspec, whatever the store does meanwhile: retried with backoff and jitter, or one clear error.

A store may also be slow, or silent. Each attempt is limited in time, the call as a whole by `patience`; a read that takes far
longer than others did is asked for again beside the first, and the first to arrive is taken. A whole object is read in pieces,
each retried by itself, and its size is held against what the caller expects before memory is taken.

A write counts when the store has shown that it holds the bytes: by the checksum of the protocol (the ETag of S3 is the MD5 of
what was stored), or, where it shows none, by sending them back. On a disk they are synced and read back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import random
import re
import secrets
import shutil
import stat
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

log = logging.getLogger(__name__)  # to stderr, unless the program says otherwise
FIRST_DELAY, LONGEST_DELAY = 0.05, 10.0  # seconds between attempts
ATTEMPT, SLOWEST = 30.0, 1e6  # seconds that the first attempt may take, beside those for its bytes at so many a second
UNUSUAL, SHORTEST = 10, 2.0  # times as long as is usual, and seconds, after which a read is asked for again
UNKNOWN = 10.0  # seconds instead, beside those for its bytes, until some reads have shown what is usual
SAY, SAY_AGAIN = 2.0, 30.0  # seconds without an answer, after which it is said
SAME = 3  # requests for the same bytes at a time
USER = re.compile(r"://([^/]*|[^/:]*:.*)@")  # who asks, with a password, which may have a slash in it
OVERHEAD = 256 << 10  # bytes that a store could send while it begins to answer
SMALL = 64 << 20  # bytes: no object that is read at once is larger, unless the caller says so
FIRST_PIECE, LEAST_PIECE, LARGEST_PIECE = 1 << 20, 256 << 10, 32 << 20  # bytes, of an object that is read whole
FAST, SLOW = 1.0, 8.0  # seconds for a piece: the next one is larger, or smaller
TEMPORARY = re.compile(r"\.part-[0-9a-f]{8}$")  # of a file in a folder, while it is written
PART = 64 << 20  # bytes of a part of an upload, from twice as many on


class StoreError(OSError):
    """The store cannot be used; the message names the URL, what it answered and what to check."""


class NoStore(StoreError):  # noqa: N818
    """Not a valid store URL."""


# Of libraries by which file systems reach their stores: their other errors are trouble on the way.
NETWORK = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "asyncio",
    "fsspec",
    "httpx",
    "httpx2",
    "httpcore",
    "requests",
    "urllib3",
)


class NoAnswer(StoreError):  # noqa: N818
    """Nothing but trouble that may pass, for as long as patience lasts."""


class Missing(StoreError):  # noqa: N818
    """The object is not there."""


class Denied(StoreError):  # noqa: N818
    """Credentials are missing or refused."""


class Short(StoreError):  # noqa: N818
    """The object ends before the range that was asked for, at byte `size`."""

    size: int = 0


class TooLarge(StoreError):  # noqa: N818
    """The object has more bytes than what it should hold can have."""


def _unheard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody waits for any more. A connection that broke under a request that was given up is told by that request."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


class Store:
    """One folder of a store. Threads may share it; a process makes its own (event loops do not survive a fork)."""

    def __init__(self, url: str, patience: float = 600.0, options: dict[str, Any] | None = None):
        self.address, self.patience, self.options = url.rstrip("/"), patience, dict(options or {})
        self.url = USER.sub("://***@", self.address)  # for people: the address without its password
        self.counts: Counter[str] = Counter()  # requests (retries and hedged are of them), retries, hedged, bytes
        self._pace: deque[float] = deque(maxlen=64)  # seconds for a byte, of the last reads
        self._lock = threading.Lock()
        self._said = float("-inf")  # when a store that does not answer was told of
        if re.fullmatch(r"[\w+.-]+:/*", url):
            raise NoStore(f"{url} names no bucket, expected {url.rstrip('/')}//BUCKET/NAME")
        if re.match(r"[A-Za-z][\w+.-]+:/(?!/)", url):
            raise NoStore(f"{url} is neither a path nor an address, expected {url.replace(':/', '://', 1)}")
        if "::" in url:
            raise NoStore(f"{self.url}: a chain of file systems (::) is not supported, expected one URL or folder")
        protocol = get_protocol(url)
        options = dict(self.options)
        if protocol in ("s3", "s3a"):
            # The retries are ours: one place that counts them, waits, and knows when to give up.
            # So are the checksums: those of the protocol are not the same thing on every store that speaks it.
            client = {
                "retries": {"max_attempts": 0},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "connect_timeout": 5,
                "read_timeout": 20,
                "max_pool_connections": 64,
            }
            options["config_kwargs"] = {**client, **options.get("config_kwargs", {})}
            options.setdefault("skip_instance_cache", True)  # another store may have come with other credentials
            options.setdefault("anon", os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes"))
        try:
            self.fs, self.root = url_to_fs(self.address, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise NoStore(f"{self.url}: {self._clean(error)}") from None
        self._upload_options: dict[str, Any] = {}
        if protocol in ("s3", "s3a"):
            self.fs.retries = 1
            self._upload_options = {"chunksize": PART}
        if (loop := getattr(self.fs, "loop", None)) is not None:
            loop.set_exception_handler(_unheard)
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, start: int = 0, stop: int | None = None, most: int = SMALL) -> bytes:
        """The whole object, which has at most `most` bytes, or bytes start to stop of it: all of them, or an error."""
        if stop is None:
            assert start == 0, "a range has an end"
            return b"".join(self.pieces(name, most))
        content = self._retry(name, lambda limit: self._range(limit, name, start, stop), stop - start)
        with self._lock:
            self.counts["bytes"] += len(content)
        return content

    def pieces(self, name: str, most: int | None = None) -> Iterator[bytes]:
        """The whole object, piece by piece: what has come is not asked for again. Most objects are one piece, and one request."""
        length = FIRST_PIECE
        first = self._retry(name, lambda limit: self._at_most(limit, name, 0, length), length)
        with self._lock:
            self.counts["bytes"] += len(first)
        size = len(first) if len(first) < length else self.size(name)
        if most is not None and size > most:
            raise TooLarge(f"{self.url}/{name} has {size} bytes, expected {most} at most")
        yield first
        start = len(first)
        while start < size:
            begun, stop = time.monotonic(), min(start + length, size)
            yield self.read(name, start, stop)
            start, seconds = stop, time.monotonic() - begun
            if seconds < FAST:
                length = min(2 * length, LARGEST_PIECE)
            elif seconds > SLOW:
                length = max(length // 2, LEAST_PIECE)

    def download(self, name: str, target: Path, moved: Callable[[], None] = lambda: None) -> None:
        """moved: called for each piece that has come."""
        with target.open("wb") as file:
            for piece in self.pieces(name):
                file.write(piece)
                moved()

    def _at_most(self, limit: float, name: str, start: int, stop: int) -> bytes:
        """As many of these bytes as there are."""
        if self.local:
            self._size(limit, name)
        try:
            return self._read(limit, stop - start, self.path(name), start=start, end=stop)
        except OSError as error:
            if _status(error) != 416:  # the object ends before the range begins
                raise
            return b""

    def _range(self, limit: float, name: str, start: int, stop: int) -> bytes:
        content = self._at_most(limit, name, start, stop)
        if len(content) == stop - start:
            return content
        size = self._size(limit, name)
        if size < stop:
            short = Short(f"{self.url}/{name} ends at byte {size}, expected {stop} or more")
            short.size = size
            raise short
        raise OSError(f"short read: {len(content)} of {stop - start} bytes")

    def _read(self, limit: float, size: int, path: str, **part: int) -> bytes:
        """Asks again where it takes unusually long."""
        begun = time.monotonic()
        asked, count, error = {self._begin("cat_file", path, **part): begun}, 1, None
        try:
            while asked and time.monotonic() < begun + limit:
                late = begun + count * self._unusual(size) if count < SAME else begun + limit
                for future in wait(asked, min(late, begun + limit) - time.monotonic(), FIRST_COMPLETED).done:
                    error = future.exception()
                    if error is None:
                        content = future.result()
                        with self._lock:
                            self._pace.append((time.monotonic() - asked[future]) / (len(content) + OVERHEAD))
                        return content
                    del asked[future]
                if asked and count < SAME and time.monotonic() >= late:
                    asked[self._begin("cat_file", path, **part)] = time.monotonic()
                    count += 1
                    with self._lock:
                        self.counts["hedged"] += 1
                        self.counts["requests"] += 1
            raise error or TimeoutError(f"not all of it came within {limit:.3g} s")
        finally:
            for future in asked:
                future.cancel()

    def _unusual(self, size: int) -> float:
        """Seconds after which a read of so many bytes is late."""
        with self._lock:
            if len(self._pace) < 5:
                return UNKNOWN + size / SLOWEST
            return max(SHORTEST, UNUSUAL * statistics.median(self._pace) * (size + OVERHEAD))

    def _begin(self, what: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """A method of the file system, under way. What is cancelled ends, where the file system knows how; elsewhere it is left
        to itself in its thread."""
        if getattr(self.fs, "async_impl", False):
            return asyncio.run_coroutine_threadsafe(getattr(self.fs, f"_{what}")(*args, **kwargs), self.fs.loop)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = getattr(self.fs, what)(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        if self.local:
            run()
        else:
            threading.Thread(target=run, name=f"{what} of {self.url}", daemon=True).start()
        return future

    def _wait(self, limit: float, what: str, *args: Any, **kwargs: Any) -> Any:
        future = self._begin(what, *args, **kwargs)
        try:
            if not wait([future], limit).done:
                raise TimeoutError(f"no answer within {limit:.3g} s")
            return future.result()
        finally:
            future.cancel()

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except Missing:
            return False
        return True

    def size(self, name: str) -> int:
        return self._retry(name, lambda limit: self._size(limit, name))

    def _size(self, limit: float, name: str) -> int:
        path = self.path(name)
        if self.local:  # fsspec says that a link to nowhere has no bytes
            status = os.stat(path)
            size, folder = status.st_size, not stat.S_ISREG(status.st_mode)  # a pipe would be waited for
        else:
            self.fs.invalidate_cache()
            found = self._wait(limit, "info", path)
            size, folder = found["size"], found["type"] == "directory"
        if folder:
            raise IsADirectoryError(errno.EISDIR, "is a directory or a pipe")
        return size

    def list(self, folder: str = "") -> list[str]:
        """Names right in a folder, sorted; none where the folder is absent."""
        path = self.path(folder) if folder else self.root
        try:
            self.fs.invalidate_cache()
            found = self._retry(folder, lambda limit: self._wait(limit, "ls", path, detail=False))
        except Missing:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def write(self, name: str, content: bytes) -> None:
        """All of it becomes visible, and the store has shown that it holds it; or nothing of it."""

        def piece(start: int, stop: int) -> bytes:
            return content[start:stop]

        def put(limit: float, path: str) -> None:
            self._wait(limit, "pipe_file", path, content, **self._upload_options)

        self._publish(name, len(content), put, piece)

    def upload(self, name: str, source: Path) -> None:
        """As `write`, of a file."""

        def piece(start: int, stop: int) -> bytes:
            with source.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)

        def put(limit: float, path: str) -> None:
            self._wait(limit, "put_file", str(source), path, **self._upload_options)

        self._publish(name, source.stat().st_size, put, piece)

    def _publish(
        self, name: str, size: int, put: Callable[[float, str], None], piece: Callable[[int, int], bytes]
    ) -> None:
        path, begun = self.path(name), time.monotonic()

        def put_in_place(limit: float) -> None:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.part-{secrets.token_hex(4)}"  # of this write alone: nodes may write one name
            try:
                put(limit, temporary)
                _sync(temporary)
                if not self._same(limit, temporary, size, piece):
                    raise OSError(errno.EIO, "other bytes were written than those that were sent")
                os.replace(temporary, path)
                _sync(os.path.dirname(path))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise

        if self.local:
            self._retry(name, put_in_place, size)
            return
        while True:
            self._retry(name, lambda limit: put(limit, path), size)
            if self._retry(name, lambda limit: self._holds(limit, path, size, piece), size):
                return
            if time.monotonic() - begun > self.patience:
                raise NoAnswer(
                    f"{self.url}/{name}: the store holds other bytes than were written, again and again for "
                    f"{time.monotonic() - begun:.0f} s (patience)"
                )
            with self._lock:
                self.counts["retries"] += 1
            time.sleep(random.uniform(0.1, 0.5))

    def _holds(self, limit: float, path: str, size: int, piece: Callable[[int, int], bytes]) -> bool:
        return self._vouches(limit, path, size, piece) or self._same(limit, path, size, piece)

    def _vouches(self, limit: float, path: str, size: int, piece: Callable[[int, int], bytes]) -> bool:
        """Whether the store names the checksum of these bytes. One that it does not name says nothing: encrypted objects have
        other ETags."""
        self.fs.invalidate_cache()
        named = str(self._wait(limit, "info", path).get("ETag") or "").strip('"')
        if not re.fullmatch(r"[0-9a-f]{32}(-\d+)?", named):
            return False
        if size < 2 * PART:
            return named == hashlib.md5(piece(0, size), usedforsecurity=False).hexdigest()
        parts = [
            hashlib.md5(piece(start, min(start + PART, size)), usedforsecurity=False).digest()
            for start in range(0, size, PART)
        ]
        return named == f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"

    def _same(self, limit: float, path: str, size: int, piece: Callable[[int, int], bytes]) -> bool:
        """Reads back what was written."""
        if self._wait(limit, "info", path)["size"] != size:
            return False
        return all(
            self._read(limit, stop - start, path, start=start, end=stop) == piece(start, stop)
            for start in range(0, size, LARGEST_PIECE)
            for stop in [min(start + LARGEST_PIECE, size)]
        )

    def remove(self, folder: str) -> None:
        """A folder and all in it, or an object."""
        path = self.path(folder)
        if self.local and os.path.isfile(path):
            os.unlink(path)
        elif self.local:
            shutil.rmtree(path, ignore_errors=True)
        else:
            self.fs.invalidate_cache()
            # Not `rm`: it takes brackets and stars in a name for a pattern.
            try:
                found = self._retry(folder, lambda limit: self._wait(limit, "find", path))
            except Missing:
                return
            for one in found:
                if one == path or one.startswith(f"{path}/"):
                    with contextlib.suppress(Missing):  # an earlier attempt's answer was lost
                        self._retry(folder, lambda limit, one=one: self._wait(limit, "rm_file", one))

    def rename(self, folder: str, new: str) -> None:
        """A folder of objects, copied by the store itself. Interrupted, it may be done again."""
        if self.local:
            os.rename(self.path(folder), self.path(new))
            return
        for name in self.list(folder):
            old, there = self.path(f"{folder}/{name}"), self.path(f"{new}/{name}")
            self._retry(
                f"{folder}/{name}", lambda limit, old=old, there=there: self._wait(limit, "cp_file", old, there)
            )
        self.remove(folder)

    def _retry(self, name: str, attempt: Callable[[float], Any], size: int = 0) -> Any:
        """Until it succeeds, is refused for good, or patience ends. Waits are random: many clients do not return as one."""
        url, begun, delay = f"{self.url}/{name}".rstrip("/"), time.monotonic(), FIRST_DELAY
        limit, left = ATTEMPT + size / SLOWEST, self.patience  # seconds: of an attempt, of the whole
        while True:
            with self._lock:
                self.counts["requests"] += 1
            try:
                return attempt(min(limit, left))
            except StoreError:
                raise
            except Exception as raised:
                error = _hidden(raised)
                self._judge(url, error)
                pause = delay * random.uniform(0.5, 1.0)
                left = begun + self.patience - time.monotonic() - pause
                if left <= 0:
                    raise NoAnswer(
                        f"{url}: no answer for {time.monotonic() - begun:.0f} s (patience); the last was "
                        f"{type(error).__name__}: {self._clean(error)}"
                    ) from None
                self._tell(url, time.monotonic() - begun, error)
            with self._lock:
                self.counts["retries"] += 1
            time.sleep(pause)
            delay, limit = min(2 * delay, LONGEST_DELAY), 2 * limit

    def _tell(self, url: str, seconds: float, error: Exception) -> None:
        """Warns that the store does not answer, at most so often."""
        with self._lock:
            if seconds < SAY or time.monotonic() < self._said + SAY_AGAIN:
                return
            self._said = time.monotonic()
        what = f"{type(error).__name__}: {self._clean(error)}" if str(error) else type(error).__name__
        log.warning(
            "%s: no answer for %.0f s (%s); it is asked again until %.0f s (patience)",
            url,
            seconds,
            what,
            self.patience,
        )

    def _clean(self, error: BaseException) -> str:
        """What a foreign error says, without the password of the address."""
        text = str(error)
        for secret in USER.findall(self.address):
            password = secret.partition(":")[2]
            for part in filter(None, (secret, unquote(secret), password, unquote(password))):
                text = text.replace(part, "***")
        return text

    def _judge(self, url: str, error: Exception) -> None:
        """Raises what will not pass by waiting; returns where it may: the network's trouble or the store's."""
        status, name, said = _status(error), type(error).__name__, self._clean(error)
        if status == 404 or isinstance(error, FileNotFoundError):
            raise Missing(f"{url} does not exist ({said})") from None
        if isinstance(error, IsADirectoryError | NotADirectoryError) or (
            isinstance(error, OSError) and error.errno == errno.ELOOP
        ):
            raise Missing(f"{url} is not a file ({said})") from None
        if "Credentials" in name:
            raise Denied(
                f"{url}: no credentials were found ({said}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a "
                "profile or a service account, or AWS_NO_SIGN_REQUEST=1 for a public bucket"
            ) from None
        if status in (401, 403) or isinstance(error, PermissionError):
            raise Denied(
                f"{url}: access is refused ({said}); check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "a profile or a service account) and what they may do there"
            ) from None
        if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            raise StoreError(f"{url}: the store rejects the request ({said})") from None
        if (
            self.local
            and isinstance(error, OSError)
            and error.errno not in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
        ):
            raise StoreError(f"{url}: {said}") from None
        kind = type(error).__module__.split(".")[0]
        if (
            type(error).__name__ == "ParamValidationError"
        ):  # a name that no bucket can have; its text goes on with the rules
            raise NoStore(f"{url}: {' '.join(said.split()).partition(' must match ')[0]}") from None
        if kind == "botocore" and not isinstance(error, _passing()):
            raise StoreError(f"{url}: the client of the store refuses its settings: {said}") from None
        if isinstance(error, ValueError) and "endpoint" in said.lower():
            raise NoStore(f"{url}: {said}; AWS_ENDPOINT_URL is http://HOST:PORT or https://HOST") from None
        if isinstance(error, OSError) or kind in NETWORK:
            return
        if kind == "builtins":  # a mistake of ours, or of a file system
            raise error
        raise StoreError(f"{url}: {type(error).__name__}: {said}") from None


def _sync(path: str) -> None:
    """Until it is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(error: Exception) -> Exception:
    """What fsspec calls missing, whatever happened on the way there."""
    cause = error.__cause__
    foreign = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if foreign and isinstance(cause, Exception) else error


def _passing() -> tuple[type[Exception], ...]:
    """What botocore raises for trouble on the way; its other errors are about how it was called."""
    from botocore import exceptions, parsers

    return (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        parsers.ResponseParserError,
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, where there is one (s3fs keeps the client's error as the cause; aiohttp's has it)."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status := getattr(error, "status", None), int):
            return status
        error = error.__cause__
    return None
