"""Serve the built book on this machine only, on port 8000 or the next free one.

Only files of the book go out: no listing of a folder, nothing that a link or a path with dots reaches outside of it.
Each page is sent under its own Content-Security-Policy (see book/_ext/house/policy.py), and may not be framed.
"""

import functools
import re
import sys
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent / "_build" / "html"
HOST = "127.0.0.1"
POLICY = re.compile(rb'<meta http-equiv="Content-Security-Policy" content="([ !#-~]*)">')
HEAD = 8192  # bytes: the policy is ahead of everything that loads
NO_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # for what is no page, an SVG drawing for example
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def policy_of(path: Path) -> str:
    """The policy written in the page, ``NO_POLICY`` for a file without one; either way with no frame around it.

    A PDF has none: browsers show it in a page of their own, which it would hit.
    """
    if path.suffix == ".pdf":
        return "frame-ancestors 'none'"
    found = None
    if path.suffix == ".html" and path.is_file():
        with path.open("rb") as file:
            found = POLICY.search(file.read(HEAD))
    return f"{found[1].decode() if found else NO_POLICY}; frame-ancestors 'none'"


class BookHandler(SimpleHTTPRequestHandler):
    """Answers GET and HEAD with files of ``directory``, and with 404 for everything else."""

    def file_asked_for(self) -> Path | None:
        """The file, links followed; None if there is none inside the folder."""
        try:
            path = Path(self.translate_path(self.path))
            path = (path / "index.html" if path.is_dir() else path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # not there or too long, a circle of links, a null byte
            return None
        return path if path.is_file() and path.is_relative_to(Path(self.directory).resolve()) else None

    def send_head(self):
        """The open file, after its headers; None after a 404."""
        if self.file_asked_for() is None:
            self.send_error(HTTPStatus.NOT_FOUND, "No such page in the book")
            return None
        return super().send_head()

    def end_headers(self) -> None:
        """Add the headers that every answer carries."""
        path = self.file_asked_for() if hasattr(self, "path") else None  # no path in a line that is no request
        self.send_header("Content-Security-Policy", policy_of(path or Path()))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        """No version of Python to a stranger."""
        return "book"


def bind(folder: Path, first_port: int = 8000, tries: int = 50) -> ThreadingHTTPServer:
    """A server for ``folder`` on the first free port from ``first_port`` on (0: any free port)."""
    handler = functools.partial(BookHandler, directory=str(folder))
    for port in range(first_port, first_port + tries):
        try:
            return ThreadingHTTPServer((HOST, port), handler)
        except OSError:  # taken: try the next
            continue
    sys.exit(f"No free port between {first_port} and {first_port + tries - 1}.")


def main() -> None:
    """Serve until Ctrl-C."""
    if not (SITE / "index.html").is_file():
        sys.exit("There is no built book yet: run 'make book' first.")
    with bind(SITE) as server:
        print(f"The book is at http://{HOST}:{server.server_port}/ (Ctrl-C stops the server).", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
