"""Make the environment the book and the tests run in: .venv with the pinned packages, .assets with the browser files.

Nothing is done twice: a stamp in .venv remembers for which path, Python and requirements it was made.  The stamp is
written last, so an interrupted install starts again.  Standard library only; Python 3.6 must be able to parse this
file, so that an old interpreter gets a sentence and not a traceback.

``WHEELHOUSE=folder`` installs from a folder that ``make wheelhouse`` filled, without a network.  ``LOCKED=1`` installs
the versions of requirements.lock and refuses a file whose hash is not in it.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".installed.json"
LOG = ROOT / "_build" / "install.log"
MANIFEST = "wheelhouse.json"
#: What builds the project when it is installed as an editable folder.
BACKEND = "setuptools>=77"
OFFLINE = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|Max retries exceeded"
    "|Failed to establish a new connection|Network is unreachable|Temporary failure in name resolution"
    "|Connection refused|Connection reset"
)


def refuse_old_python():
    """Stop with one sentence where the interpreter is too old."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this very check is for older ones
        have = "{}.{}.{}".format(*sys.version_info[:3])
        sys.exit(
            f"Python 3.11 or newer is needed, and {sys.executable} is Python {have}: "
            "run make with PYTHON=/path/to/a/newer/python3."
        )


def refuse_missing_ensurepip(python):
    """Stop with one sentence where the interpreter cannot make a virtual environment with pip in it."""
    probe = subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False)
    if probe.returncode:
        sys.exit(
            f"{python} cannot make a virtual environment (its venv or ensurepip module is missing): "
            "on Debian or Ubuntu run 'apt-get install python3-venv', then repeat."
        )


def requirements_hash():
    """One hash of what the environment is made from."""
    pins = b"".join((ROOT / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    return hashlib.sha256(pins).hexdigest()


def is_locked():
    """Whether LOCKED asks for the versions and hashes of requirements.lock; stop for a value that is no answer."""
    given = os.environ.get("LOCKED", "")
    if given not in ("", "0", "1"):
        sys.exit(f"expected LOCKED=1 or nothing, got LOCKED={given}: 1 installs requirements.lock by its hashes.")
    return given == "1"


def wheelhouse():
    """The folder that WHEELHOUSE names, or None; stop with one sentence if it does not serve this machine."""
    given = os.environ.get("WHEELHOUSE", "")
    if not given:
        return None
    folder = Path(given).expanduser().resolve()
    if not (folder / MANIFEST).is_file():
        sys.exit(f"expected WHEELHOUSE to name a folder made by 'make wheelhouse', got {folder}: it has no {MANIFEST}.")
    check_wheelhouse(folder, json.loads((folder / MANIFEST).read_text()))
    return folder


def check_wheelhouse(folder, manifest):
    """Stop with one sentence if a wheelhouse was made for another machine or other pins, or lost a byte on its way."""
    here = {"python": "{}.{}".format(*sys.version_info[:2]), "platform": sysconfig.get_platform()}
    for key, value in here.items():
        if manifest[key] != value:
            sys.exit(f"The wheelhouse is for {key} {manifest[key]}, and this is {value}: make one on a like machine.")
    if manifest["requirements"] != requirements_hash():
        sys.exit("The wheelhouse was made for other pins than this checkout has: run 'make wheelhouse' there again.")
    for name, wanted in manifest["files"].items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if found != wanted:
            sys.exit(f"{path}: expected sha256 {wanted}, got {found}: copy the wheelhouse again.")


def wanted_state():
    """Everything that, when it changes, makes the environment a different one."""
    state = {
        "path": str(VENV),
        "python": "{}.{}".format(*sys.version_info[:2]),
        "requirements": requirements_hash(),
    }
    if is_locked():
        state["lock"] = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    return state


def satisfies(found, wanted):
    """Whether an environment in state ``found`` will do; a locked one also does where no lock is asked for."""
    return all(found.get(key) == value for key, value in wanted.items())


def installed_state():
    """The state the stamp remembers; empty if there is no stamp or the environment's Python no longer runs."""
    python = VENV / "bin" / "python"
    if not (STAMP.is_file() and python.is_file()):  # is_file is false for a link to an interpreter that is gone
        return {}
    if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
        return {}
    try:
        return json.loads(STAMP.read_text())
    except json.JSONDecodeError:
        return {}


def run_logged(command, purpose, environment=None):
    """Run a command with its output in the log; on failure say in one sentence what happened and stop."""
    with LOG.open("a") as log:
        log.write("$ {}\n".format(" ".join(map(str, command))))
        log.flush()
        start = log.tell()
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        explain(purpose, LOG.read_text(errors="replace")[start:])


def explain(purpose, output):
    """Stop with the reason a command failed: one sentence for a missing network, else the end of its output."""
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing and os.environ.get("WHEELHOUSE"):
        sys.exit(f"{purpose} failed: the wheelhouse has no {missing[1]}: run 'make wheelhouse' there again.")
    if OFFLINE.search(output):
        sys.exit(
            f"{purpose} needs the network, and the package index cannot be reached: "
            f"connect, then repeat (details: {LOG.relative_to(ROOT)})."
        )
    tail = "\n".join(output.splitlines()[-25:])
    sys.exit(f"{tail}\n{purpose} failed (full output: {LOG.relative_to(ROOT)}).")


def pip_arguments(folder):
    """What to hand to pip install, one list a call: everything at once, or the lock by hash and then the project."""
    source = ["--no-index", "--find-links", str(folder)] if folder else []
    if not is_locked():
        return [[*source, "-r", "requirements.txt"]]
    project = ["--no-deps", "--no-build-isolation", "-e", "."]  # a folder has no hash; its build needs the lock only
    return [[*source, "--require-hashes", "-r", "requirements.lock"], [*source, *project]]


def pip_environment(folder):
    """The variables for pip; with a wheelhouse none of the user's own sources of packages."""
    kept = dict(os.environ)
    if folder:
        kept = {key: value for key, value in kept.items() if not key.startswith("PIP_")}
        kept["PIP_CONFIG_FILE"] = os.devnull
    if is_locked():
        kept.pop("PIP_FIND_LINKS", None)  # a build of the same version from elsewhere has another hash
    return dict(kept, PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0")


def make_environment(python, wanted, found, folder=None):
    """Create or update .venv; the stamp goes first and comes back last."""
    STAMP.unlink(missing_ok=True)
    if any(found.get(key) != wanted[key] for key in ("path", "python")):
        refuse_missing_ensurepip(python)
        if VENV.is_symlink() or VENV.is_file():
            VENV.unlink()
        shutil.rmtree(VENV, ignore_errors=True)
        run_logged([python, "-m", "venv", VENV], "Making .venv")
    print("Installing the pinned packages into .venv (the first time this takes a few minutes) ...", flush=True)
    pip = [VENV / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    for arguments in pip_arguments(folder):
        command = [*pip, "--retries", "2", "--progress-bar", "off", *arguments]
        run_logged(command, "Installing the packages", pip_environment(folder))
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n")


def main():
    """Bring .venv and .assets up to date."""
    refuse_old_python()
    LOG.parent.mkdir(exist_ok=True)
    with (LOG.parent / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second one would take a half-made .venv for a broken one and delete it
        bring_up_to_date()


def bring_up_to_date():
    """Install what differs from the wanted state, and fetch the browser files."""
    wanted, found = wanted_state(), installed_state()
    if not satisfies(found, wanted):
        LOG.write_text("")
        # Called from inside .venv itself, sys.executable would vanish with it: use the interpreter it was made from.
        make_environment(getattr(sys, "_base_executable", sys.executable), wanted, found, wheelhouse())
    fetched = subprocess.run([VENV / "bin" / "python", "tools/fetch_assets.py"], cwd=ROOT, check=False)
    if fetched.returncode:
        sys.exit(fetched.returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted; run the same command again to go on.")
