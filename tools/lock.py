"""Write requirements.lock: every package of the book build in one version, with the hashes of its files.

``make lock`` after a change of requirements.txt.  ``LOCKED=1 make install`` then installs these versions only, and pip
refuses a file whose hash is not in the list.  The lock serves Linux, macOS and Windows from Python 3.11 on; on Linux
its torch is the build with CUDA, because that is the one the package index has.  uv resolves; versions that the lock
already has stay unless the pins forbid them (``--upgrade`` takes the newest).
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from install import BACKEND
from pinned_program import program

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
UV = "0.13.9"
HEADER = """\
# Made by `make lock`; do not edit.  Installed by `LOCKED=1 make install`.
# Pins: sha256 {pins}
"""


def wanted(root: Path = ROOT) -> list[str]:
    """What the lock must satisfy: the pins, the project's own dependencies, and the tool that builds it; sorted."""
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(" #")[0].strip() for line in lines if line.strip() and line[0] not in "#-"]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sorted({*pins, *project["dependencies"], BACKEND})


def pins_hash(root: Path = ROOT) -> str:
    """The hash in the second line of a lock that is up to date."""
    return hashlib.sha256("\n".join(wanted(root)).encode()).hexdigest()


def resolve(uv: Path, upgrade: bool) -> str:
    """The body of the lock; exits with uv's own words if there is no solution or no network."""
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "requirements.in", Path(scratch) / "requirements.lock"
        source.write_text("\n".join(wanted()) + "\n", encoding="utf-8")
        if LOCK.is_file() and not upgrade:
            output.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
        flags = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        command = [str(uv), "pip", "compile", "--no-config", "--quiet", *flags, "-o", str(output), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode:
            sys.exit(f"{done.stderr.strip()}\nThe lock was not written.")
        return output.read_text(encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the lock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the pins allow")
    options = parser.parse_args(argv)
    body = resolve(program("uv", UV), options.upgrade)
    LOCK.write_text(HEADER.format(pins=pins_hash()) + body, encoding="utf-8")
    print(f"wrote {LOCK.relative_to(ROOT)}: {sum('==' in line for line in body.splitlines())} packages")


if __name__ == "__main__":
    main()
