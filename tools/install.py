"""Make the environment the book and the tests run in: .venv with the pinned packages, .assets with the browser files.

Nothing is done twice: a stamp in .venv remembers for which path, Python and requirements it was made.  The stamp is
written last, so an interrupted install starts again.  Standard library only; Python 3.6 must be able to parse this
file, so that an old interpreter gets a sentence and not a traceback.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".installed.json"
LOG = ROOT / "_build" / "install.log"
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


def wanted_state():
    """Everything that, when it changes, makes the environment a different one."""
    pins = b"".join((ROOT / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    return {
        "path": str(VENV),
        "python": "{}.{}".format(*sys.version_info[:2]),
        "requirements": hashlib.sha256(pins).hexdigest(),
    }


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
    if OFFLINE.search(output):
        sys.exit(
            f"{purpose} needs the network, and the package index cannot be reached: "
            f"connect, then repeat (details: {LOG.relative_to(ROOT)})."
        )
    tail = "\n".join(output.splitlines()[-25:])
    sys.exit(f"{tail}\n{purpose} failed (full output: {LOG.relative_to(ROOT)}).")


def make_environment(python, wanted, found):
    """Create or update .venv; the stamp goes first and comes back last."""
    STAMP.unlink(missing_ok=True)
    if any(found.get(key) != wanted[key] for key in ("path", "python")):
        refuse_missing_ensurepip(python)
        if VENV.is_symlink() or VENV.is_file():
            VENV.unlink()
        shutil.rmtree(VENV, ignore_errors=True)
        run_logged([python, "-m", "venv", VENV], "Making .venv")
    print("Installing the pinned packages into .venv (the first time this takes a few minutes) ...", flush=True)
    run_logged(
        [VENV / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--retries", "2",
         "--progress-bar", "off", "-r", "requirements.txt"],
        "Installing the packages",
        dict(os.environ, PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0"),
    )  # fmt: skip
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n")


def main():
    """Bring .venv and .assets up to date."""
    refuse_old_python()
    LOG.parent.mkdir(exist_ok=True)
    wanted, found = wanted_state(), installed_state()
    if found != wanted:
        LOG.write_text("")
        # Called from inside .venv itself, sys.executable would vanish with it: use the interpreter it was made from.
        make_environment(getattr(sys, "_base_executable", sys.executable), wanted, found)
    fetched = subprocess.run([VENV / "bin" / "python", "tools/fetch_assets.py"], cwd=ROOT, check=False)
    if fetched.returncode:
        sys.exit(fetched.returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted; run the same command again to go on.")
