"""Files that are written by a command: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def temporary_sibling(path: Path) -> Path:
    """A new file of the same ending, to be written first."""
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}.", dir=path.absolute().parent)
    os.close(handle)
    os.chmod(name, 0o644)
    return Path(name)
