"""Where checkpoints are kept: in memory, or as files that are whole or not there.

A process may die at any instruction, and a disk may be full at any byte.  So a file is written under another name,
flushed to the disk, and only then renamed over its place: a rename is atomic.  It carries a checksum over everything
in it, and it is read with ``torch.load(weights_only=True)``, which runs no code of the file.
"""

import contextlib
import hashlib
import io
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mixprec_lab.nan_debugging.checkpoint import tensor_bytes

FORMAT = "mixprec_lab checkpoint"
_NAME = re.compile(r"checkpoint-(\d{8,})\.pt")


class MemoryStore:
    """States by step, as they are given."""

    def __init__(self) -> None:
        self._states: dict[int, dict[str, Any]] = {}

    def steps(self) -> list[int]:
        """The steps there are, growing."""
        return sorted(self._states)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep ``state``, in place of an earlier one of this step."""
        self._states[step] = state

    def load(self, step: int) -> dict[str, Any]:
        """The state of ``step``; KeyError if there is none."""
        return self._states[step]

    def drop(self, step: int) -> None:
        """Forget the state of ``step``."""
        del self._states[step]


class DiskStore:
    """States as files ``checkpoint-<step>.pt`` of a directory, which is made if it is not there."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        """The file of ``step``."""
        return self.directory / f"checkpoint-{step:08d}.pt"

    def steps(self) -> list[int]:
        """The steps there are files of, growing."""
        matches = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state`` in place of an earlier file of this step.

        After an exception (disk full, no permission, Ctrl-C) the earlier file is what it was, and no other is left.
        """
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "sha256": digest(state), "state": state}, buffer)
        write_atomically(self.path(step), buffer.getbuffer())

    def load(self, step: int) -> dict[str, Any]:
        """The state of ``step``, on the CPU.

        OSError if the file cannot be read, ValueError if it is no checkpoint, truncated, or not what was written.
        """
        return read(self.path(step))

    def drop(self, step: int) -> None:
        """Remove the file of ``step``."""
        self.path(step).unlink()


def write_atomically(path: Path, data: Any) -> None:
    """Nothing; ``path`` then holds ``data``, or after an exception while writing what it held before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The state in a file, on the CPU; errors as in ``DiskStore.load``."""
    remedy = "restore another checkpoint by its step, or remove this file"
    with open(path, "rb") as file:
        data = file.read()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle or archive may raise anything
        what = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"expected a whole checkpoint in {path}, got {len(data)} bytes that torch cannot read "
            f"({type(error).__name__}: {what}): it is truncated, corrupted or of another kind; {remedy}"
        ) from error
    if not isinstance(content, Mapping) or set(content) != {"format", "sha256", "state"} or content["format"] != FORMAT:
        raise ValueError(f"expected a {FORMAT} in {path}, got another kind of file; {remedy}")
    found = digest(content["state"])
    if found != content["sha256"]:
        raise ValueError(
            f"expected content with the checksum {content['sha256']} in {path}, got {found}: it is corrupted; {remedy}"
        )
    return content["state"]


def digest(value: Any) -> str:
    """SHA-256 over nested dicts, lists, tuples, scalars and tensors: types, shapes, order and every bit; as hex."""
    total = hashlib.sha256()
    _feed(total, value)
    return total.hexdigest()


def _feed(total: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        total.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        total.update(tensor_bytes(value).numpy())
    elif isinstance(value, Mapping):
        total.update(f"{type(value).__name__} {len(value)}:".encode())
        for key, item in value.items():
            _feed(total, key)
            _feed(total, item)
    elif isinstance(value, list | tuple):
        total.update(f"{type(value).__name__} {len(value)}:".encode())
        for item in value:
            _feed(total, item)
    else:
        text = repr(value).encode()  # of a float: the shortest text that reads back as the same bits
        total.update(f"{type(value).__name__} {len(text)}:".encode() + text)


def _sync_directory(directory: Path) -> None:
    """The rename, too, reaches the disk."""
    if os.name != "posix":  # a directory cannot be opened elsewhere
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
