"""Fill a folder with everything an install needs, for a machine without a network: ``make wheelhouse [TO=folder]``.

It holds the wheels of requirements.txt and of the project itself, the tool that builds it, the browser files of
assets.json, and ``wheelhouse.json``: for which Python, platform and pins, and the sha256 of every file.  There,
``WHEELHOUSE=folder make book`` needs no network.  Same Python version and platform on both machines.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fetch_assets
import install

ROOT = install.ROOT


def fetch_wheels(folder: Path, requirements: list[str]) -> None:
    """Let pip put wheels of ``requirements`` and of all they need into ``folder``; what has no wheel is built here."""
    flags = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *flags, *requirements]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        output = done.stdout + done.stderr
        if install.OFFLINE.search(output):
            sys.exit("Fetching wheels needs the network, and the package index does not answer: connect, then repeat.")
        sys.exit("\n".join(output.splitlines()[-25:]) + "\nThe wheels could not be fetched.")


def source_copy(scratch: Path) -> Path:
    """A copy of what the project's wheel is made of: setuptools leaves its scratch beside the sources it builds."""
    copy = scratch / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "mixprec_lab", copy / "mixprec_lab", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def fetch_browser_files(folder: Path) -> None:
    """Put the tarballs of assets.json into ``folder``; exit if one is not what was pinned."""
    for name, entry in json.loads(fetch_assets.LOCK.read_text(encoding="utf-8")).items():
        path = folder / fetch_assets.tarball_name(name, entry["version"])
        if path.is_file() and fetch_assets.integrity(path) == entry["integrity"]:
            continue
        path = fetch_assets.download(name, entry["version"], folder)
        if (found := fetch_assets.integrity(path)) != entry["integrity"]:
            path.unlink()
            sys.exit(f"{name} {entry['version']}: expected integrity {entry['integrity']}, got {found}.")


def write_manifest(folder: Path) -> dict:
    """Describe what ``folder`` holds and for whom; the description is written last, so half a folder has none."""
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".whl", ".tgz")
    }
    manifest = {"python": "{}.{}".format(*sys.version_info[:2]), "platform": sysconfig.get_platform(),
                "requirements": install.requirements_hash(), "files": files}  # fmt: skip
    (folder / install.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main(argv: list[str] | None = None) -> None:
    """Fill the folder and say what to do with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_build" / "wheelhouse")
    parser.add_argument("--project", action="store_true", help="only the wheel of the project itself")
    options = parser.parse_args(argv)
    folder = options.folder.expanduser().resolve()
    if os.environ.pop("WHEELHOUSE", None):
        sys.exit("expected WHEELHOUSE to be unset: it names a folder to install from; TO=folder names the one to fill.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"expected a folder that can be made or filled, got {folder} ({error.strerror}): name another one.")
    if options.project:
        with tempfile.TemporaryDirectory() as scratch:
            fetch_wheels(folder, ["--no-deps", str(source_copy(Path(scratch)))])
        print(*folder.glob("mixprec_lab-*.whl"), sep="\n")
        return
    (folder / install.MANIFEST).unlink(missing_ok=True)
    print(f"Filling {folder} (hundreds of megabytes; with CUDA several gigabytes) ...", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "pins.txt"
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        pins.write_text("".join(line for line in lines if not line.startswith("-e")), encoding="utf-8")
        fetch_wheels(folder, ["-r", str(pins), install.BACKEND, str(source_copy(Path(scratch)))])
    fetch_browser_files(folder)
    size = sum((folder / name).stat().st_size for name in write_manifest(folder)["files"])
    print(f"{folder} is complete, {size / 1e9:.1f} GB.  Copy it and this checkout to the other machine; there run "
          f"'WHEELHOUSE=/path/to/{folder.name} make book'.")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted; run the same command again to go on.")
