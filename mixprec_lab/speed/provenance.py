"""Where, when and with what something was measured: what every file of ``book/data`` says of itself."""

import datetime
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mixprec_lab
from mixprec_lab.fp8 import why_not
from mixprec_lab.speed.timing import describe

ROOT = Path(mixprec_lab.__file__).resolve().parent.parent


def provenance(
    device: torch.device, command: str, quick: bool, parts: Sequence[str] = ("mixprec_lab", "tools")
) -> dict[str, Any]:
    """All that a record says of its origin but the seconds, which are known at the end.

    ``parts`` are the paths, from the project's root, on which a result depends: ``commit`` ends in "+changes" if their
    files differ from it, and is "unknown" outside of a checkout.
    """
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = _output_of(*query) if device.type == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(parts),
        "torch": torch.__version__,
        "transformer_engine": _transformer_engine(device),
        "driver": driver.splitlines()[0] if driver else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": describe("cpu"),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "quick": quick,
    }


def slug(device: str) -> str:
    """A device in words as part of a file name: ``'NVIDIA H200'`` -> ``'nvidia_h200'``."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"\([^)]*\)", "", device).lower()).strip("_")


def write_whole(path: Path, content: Any, indent: int | None = None) -> None:
    """Write JSON that appears whole or not at all, whatever interrupts it.  ValueError for NaN and infinity."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=indent, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _commit(parts: Sequence[str]) -> str:
    found = _output_of("git", "rev-parse", "HEAD")
    if found is None:
        return "unknown"
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", "--", *parts)
    return found + ("+changes" if changed else "")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _transformer_engine(device: torch.device) -> str | None:
    if why_not("transformer_engine", device) is not None:
        return None
    import transformer_engine

    return transformer_engine.__version__
