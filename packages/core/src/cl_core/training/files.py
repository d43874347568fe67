"""Files are written whole or not at all, and what goes wrong is said in one sentence."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
}


def write_atomically(path: str | Path, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write a file under a temporary name in its folder, flush it to the disk, then put it in place.

    Args:
        path: file to write; missing folders are made.
        content: bytes, text, or a function that writes to the path it is given.

    Returns:
        The path.

    Raises:
        OSError: in one sentence, if the file cannot be written; the file that was there before is untouched.
    """
    path = Path(path)
    with _said_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file a second name: a hard link where the file system has them, else a copy."""

    def duplicate(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            temporary.write_bytes(source.read_bytes())

    write_atomically(target, duplicate)


def make_folder(path: str | Path, *, exist_ok: bool = True) -> Path:
    """Make a folder and those above it, or say in one sentence why not."""
    path = Path(path)
    with _said_plainly(path):
        path.mkdir(parents=True, exist_ok=exist_ok)
    return path


def to_json(value: Any) -> str:
    """Readable JSON text that ends in a newline; NaN and infinity become null, which JSON can hold."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: in one sentence, if it is not JSON.
        OSError: if it cannot be read.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not readable JSON: it is truncated or corrupt.") from None


def sentence(error: BaseException) -> str:
    """What an error says, on one line; of one that a loader's worker process raised, without its traceback."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if text.startswith("Caught ") and "worker process" in text.partition("\n")[0]:
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return f"{error.filename}: {text}" if isinstance(error, OSError) and error.filename else text


def text_of(write: Callable[[io.StringIO], None]) -> str:
    """What a function writes to a text file."""
    buffer = io.StringIO()
    write(buffer)
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, _reason(path, error)) from error
    except Exception as error:
        # torch and safetensors report a full disk as an error of their own.
        if any(sign in str(error) for sign in ("No space left", "unexpected pos", "write failed")):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise OSError(errno.ENOSPC, _reason(path, full)) from error
        raise


def _reason(path: Path, error: OSError) -> str:
    reason = _REASONS.get(error.errno or 0, (error.strerror or str(error)).lower())
    return f"cannot write {path}: {reason}; what was written before is untouched"
