"""Build the book into _build/html: every warning is an error, and nothing is done if nothing changed.

The build is keyed by a hash of everything that goes into it.  Pages are always written anew when the hash differs (a
second or two each); notebooks run again only if the library, the data or the pins changed, or the notebook itself,
because their results are cached (see book/_ext/house/execution.py).  A failed build leaves no pages behind, so a later
run cannot take half a book for a whole one.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
HTML = BUILD / "html"
STAMP = BUILD / "book.sha256"
LOG = BUILD / "book.log"
SOURCES = (
    "_config.yml", "_toc.yml", "requirements.txt", "pyproject.toml", "tools/assets.json", "tools/build_book.py",
    "tools/make_anki.py", "tools/make_cheatsheet.py", "book", "mixprec_lab",
)  # fmt: skip
IGNORED = {"__pycache__", ".ipynb_checkpoints"}
SETTINGS = ("REPOSITORY_URL", "MIXPREC_DEVICE")
TOP_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mixed-Precision Training Lab</title>
<link rel="icon" href="_static/favicon.svg" type="image/svg+xml">
<meta http-equiv="refresh" content="0; url=book/index.html">
</head>
<body><p><a href="book/index.html">Mixed-Precision Training Lab</a></p></body>
</html>
"""
OPEN_THIS = "Open _build/html/index.html in a browser, or run 'make serve'."


def source_files() -> list[Path]:
    """Every file the book is made from, in a fixed order."""
    found = []
    for name in SOURCES:
        path = ROOT / name
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        found += [p for p in inside if p.is_file() and not IGNORED & set(p.parts)]
    return found


def source_hash() -> str:
    """One hash of names, contents and settings."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    for name in SETTINGS:
        digest.update(f"{name}={os.environ.get(name, '')}\0".encode())
    return digest.hexdigest()


def build_environment() -> dict[str, str]:
    """The environment of the build: nothing of the user's own Jupyter, IPython or matplotlib settings gets in."""
    environment = {key: value for key, value in os.environ.items() if key not in {"MPLBACKEND", "MATPLOTLIBRC"}}
    environment.setdefault("OMP_NUM_THREADS", "1")  # as many notebooks run at once as there are cores
    return environment | {
        "IPYTHONDIR": str(BUILD / "ipython"),
        "MPLCONFIGDIR": str(BUILD / "matplotlib"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "NO_COLOR": "1",
        "PATH": os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ.get("PATH", os.defpath)]),
    }


def forget_pages() -> None:
    """Delete what Sphinx wrote, and its memory of having written it; the execution cache stays."""
    STAMP.unlink(missing_ok=True)
    for folder in (HTML, BUILD / ".doctrees"):
        shutil.rmtree(folder, ignore_errors=True)


def report_failure(code: int) -> None:
    """Print what matters of the log: the warnings and errors, then the end."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", LOG.read_text(errors="replace"))
    lines = text.splitlines()
    flagged = [line for line in lines if re.search(r"\b(WARNING|ERROR|SEVERE):", line)]
    print(*lines[-45:], "", *dict.fromkeys(flagged), sep="\n", file=sys.stderr)
    print(f"The book was not built (exit code {code}; full output: {LOG.relative_to(ROOT)}).", file=sys.stderr)


def build() -> int:
    """Run Jupyter Book over the whole tree; the exit code."""
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", ".", "--all", "-W", "-n", "--keep-going"]
    with LOG.open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=build_environment(), stdout=log, stderr=log, check=False)
    return done.returncode


def add_downloads() -> None:
    """Write beside the pages what they offer: the cheat sheet as a PDF, and the cards for Anki."""
    import make_anki
    import make_cheatsheet

    make_cheatsheet.write(HTML / "book" / "cheatsheet.pdf")
    make_anki.write(HTML / "book" / "mixprec.apkg")


def main() -> int:
    """Build if anything changed; 0 when the book is there and whole."""
    BUILD.mkdir(exist_ok=True)
    wanted = source_hash()
    if STAMP.is_file() and STAMP.read_text() == wanted and (HTML / "index.html").is_file():
        print(f"The book is up to date. {OPEN_THIS}")
        return 0
    forget_pages()
    print("Building the book (notebooks run when they, the library or the pins changed) ...", flush=True)
    start = time.monotonic()
    code = build()
    if code or not (HTML / "index.html").is_file():
        report_failure(code)
        forget_pages()
        return code or 1
    try:
        add_downloads()
    except Exception:
        forget_pages()
        raise
    (HTML / "index.html").write_text(TOP_PAGE, encoding="utf-8")
    STAMP.write_text(wanted)
    print(f"The book was built in {time.monotonic() - start:.0f} s. {OPEN_THIS}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        forget_pages()
        sys.exit("Interrupted; the next run builds the book from the start.")
