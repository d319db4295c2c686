"""Files that are never half there."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ['sha256', 'write', 'write_text']


def write(path: Path, fill: Callable[[Path], object], previous: Path | None = None) -> None:
    """Has `fill` write a file beside `path`, brings it to disk and renames it; folders are made where they lack.

    A link stays one, and what it names is written; so is a device or a pipe, as it is.

    Args:
        previous: where the file that was at `path` goes; None replaces it.

    Raises:
        OSError: it cannot be written, such as on a full disk; `path` is then as it was.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        fill(path)
        return
    path = path.resolve()
    beside = path.with_name(f'.{os.getpid()}.{path.name}')  # the suffix tells some writers the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(beside)
        with open(beside, 'rb') as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):  # the reason why it could not be written is the better message
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write`, in UTF-8."""
    write(path, lambda beside: beside.write_text(text, encoding='utf-8'))


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
