"""Files that are there in full or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from potluck.errors import StorageError


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or leave what was there, even if two processes write it or one is killed.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error})", "free some space or choose another place") from None
