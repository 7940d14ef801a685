"""Bytes of objects through fsspec, whatever the store does meanwhile: retried with backoff and jitter, or one clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

FIRST_DELAY, LONGEST_DELAY = 0.05, 10.0  # seconds between attempts


class StoreError(OSError):
    """The store cannot be used; the message names the URL, what it answered and what to check."""


class Missing(StoreError):  # noqa: N818
    """The object is not there."""


class Denied(StoreError):  # noqa: N818
    """The store knows who asks, or does not, and refuses."""


class Short(StoreError):  # noqa: N818
    """The object ends before the range that was asked for, at byte `size`."""

    size: int = 0


class Store:
    """One folder of a store. Threads may share it; a process makes its own (event loops do not survive a fork)."""

    def __init__(self, url: str, patience: float = 600.0, options: dict[str, Any] | None = None):
        self.url, self.patience, self.options = url.rstrip("/"), patience, dict(options or {})
        self.counts: Counter[str] = Counter()  # requests, retries, bytes
        self._lock = threading.Lock()
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
            self.fs, self.root = url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{url}: {error}") from None
        if protocol in ("s3", "s3a"):
            self.fs.retries = 1
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The whole object, or bytes start to stop of it: all of them, or an error."""
        if stop is None:
            assert start == 0, "a range has an end"
            content = self._retry(name, lambda: self.fs.cat_file(self.path(name)))
        else:
            content = self._retry(name, lambda: self._range(name, start, stop))
        with self._lock:
            self.counts["bytes"] += len(content)
        return content

    def _range(self, name: str, start: int, stop: int) -> bytes:
        try:
            content = self.fs.cat_file(self.path(name), start=start, end=stop)
        except OSError as error:
            if _status(error) != 416:  # the object ends before the range begins
                raise
            content = b""
        if len(content) == stop - start:
            return content
        size = self._size(name)
        if size < stop:
            short = Short(f"{self.url}/{name} ends at byte {size}, expected {stop} or more")
            short.size = size
            raise short
        raise OSError(f"short read: {len(content)} of {stop - start} bytes")

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except Missing:
            return False
        return True

    def size(self, name: str) -> int:
        return self._retry(name, lambda: self._size(name))

    def _size(self, name: str) -> int:
        self.fs.invalidate_cache()
        return self.fs.info(self.path(name))["size"]

    def list(self, folder: str = "") -> list[str]:
        """Names right in a folder, sorted; none where the folder is absent."""
        path = self.path(folder) if folder else self.root
        try:
            self.fs.invalidate_cache()
            found = self._retry(folder, lambda: self.fs.ls(path, detail=False))
        except Missing:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing of it becomes visible."""
        self._publish(name, lambda path: self.fs.pipe_file(path, content))

    def upload(self, name: str, source: Path) -> None:
        self._publish(name, lambda path: self.fs.put_file(str(source), path))

    def _publish(self, name: str, put: Callable[[str], None]) -> None:
        path = self.path(name)

        def put_in_place() -> None:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.part"
            try:
                put(temporary)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise

        self._retry(name, put_in_place if self.local else lambda: put(path))

    def remove(self, folder: str) -> None:
        """A folder and all in it, or an object."""
        if self.local and os.path.isfile(self.path(folder)):
            os.unlink(self.path(folder))
        elif self.local:
            shutil.rmtree(self.path(folder), ignore_errors=True)
        elif self.list(folder):
            with contextlib.suppress(Missing):  # an earlier attempt's answer was lost
                self._retry(folder, lambda: self.fs.rm(self.path(folder), recursive=True))

    def _retry(self, name: str, attempt: Any) -> Any:
        """Until it succeeds, is refused for good, or patience ends. Waits are random: many clients do not return as one."""
        url, begun, delay = f"{self.url}/{name}".rstrip("/"), time.monotonic(), FIRST_DELAY
        while True:
            with self._lock:
                self.counts["requests"] += 1
            try:
                return attempt()
            except StoreError:
                raise
            except Exception as error:
                self._judge(url, error)
                waited = time.monotonic() - begun
                if waited > self.patience:
                    raise StoreError(
                        f"{url}: no answer for {waited:.0f} s (patience); the last was {type(error).__name__}: {error}"
                    ) from error
                with self._lock:
                    self.counts["retries"] += 1
                time.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, LONGEST_DELAY)

    def _judge(self, url: str, error: Exception) -> None:
        """Raises what will not pass by waiting; returns where it may: the network's trouble or the store's."""
        status, name = _status(error), type(error).__name__
        if status == 404 or isinstance(error, FileNotFoundError | NotADirectoryError):
            raise Missing(f"{url} does not exist ({error})") from None
        if "Credentials" in name:
            raise Denied(
                f"{url}: no credentials were found ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a "
                "profile or a service account, or AWS_NO_SIGN_REQUEST=1 for a public bucket"
            ) from None
        if status in (401, 403) or isinstance(error, PermissionError):
            raise Denied(
                f"{url}: access is refused ({error}); check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "a profile or a service account) and what they may do there"
            ) from None
        if status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            raise StoreError(f"{url}: the store rejects the request ({error})") from error
        if (
            self.local
            and isinstance(error, OSError)
            and error.errno not in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
        ):
            raise StoreError(f"{url}: {error}") from error
        kind = type(error).__module__.split(".")[0]
        if kind == "botocore" and not isinstance(error, _passing()):
            raise StoreError(f"{url}: the client of the store refuses its settings: {error}") from error
        if not isinstance(error, OSError) and kind not in ("botocore", "aiobotocore", "aiohttp", "asyncio", "fsspec"):
            raise error


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
    """The HTTP status behind an error, where there is one (s3fs keeps the client's error as the cause)."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        error = error.__cause__
    return None
