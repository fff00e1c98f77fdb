"""Programs of a tool that the book itself does not need, each in an environment of its own under _build/tools."""

import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "_build" / "tools"


def program(name: str, version: str) -> Path:
    """The program ``name`` of the package ``name`` in exactly that version, installed now if it is not there yet.

    Exits with one sentence if the package index does not have it or cannot be reached.
    """
    home = FOLDER / f"{name}-{version}"
    path, stamp = home / "bin" / name, home / "installed"
    if not stamp.is_file():
        venv.create(home, with_pip=True, clear=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        environment = dict(os.environ, PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0")
        done = subprocess.run([*pip, "-q", f"{name}=={version}"], capture_output=True, text=True, check=False,
                              env=environment)  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            print(f"{name} {version} could not be installed: {last}", file=sys.stderr)
            sys.exit(2)
        stamp.touch()
    return path
