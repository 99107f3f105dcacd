"""Files that are written whole or not at all, and text that is read in pieces."""

import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it. A failure leaves the old file as it was.

    Args:
        path: of the file; its folder must exist.
        content: the bytes, or a function that writes them to an open file.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def open_binary(path: Path) -> Any:
    """A file's bytes, unpacked for .xz and .gz."""
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def plain_suffix(path: Path) -> str:
    """The suffix without a packing: ".tokens" of wiki.test.tokens.xz."""
    return Path(path.stem).suffix if path.suffix in (".xz", ".gz") else path.suffix
