"""Serve the built book on this machine only, on port 8000 or the next free one."""

import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent / "_build" / "html"
HOST = "127.0.0.1"


def bind(folder: Path, first_port: int = 8000, tries: int = 50) -> ThreadingHTTPServer:
    """A server for ``folder`` on the first free port from ``first_port`` on (0: any free port)."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
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
