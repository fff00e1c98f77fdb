"""JupyterLab with a real kernel in a real browser: a control moves, and Python's numbers stand in the exhibit."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from widget_page import SAID

from mixprec_lab.exhibits import LossScaleLab
from mixprec_lab.formats import classify

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install jupyterlab")
psutil = pytest.importorskip("psutil")

PATIENCE = 60  # seconds, on a busy machine
MAKE = """
import torch
from mixprec_lab.exhibits import LossScaleLab
x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2e-6
lab = LossScaleLab({"x": x}, device="cpu", name="lab")
lab
"""
# A training loop that runs until the reader moves the slider: what the kernel hears of it, it hears beside the cell.
LOOP = f"""
import time
deadline = time.monotonic() + {PATIENCE}
while lab.log2_scale != 40 and time.monotonic() < deadline:
    time.sleep(0.01)
print("loop saw", lab.log2_scale)
"""
VIEWS = 'print("views:", len(lab._views), "moves:", lab.log2_scale)'
SHOWN = "document.querySelector('[data-live=said]')?.textContent.includes({!r})"
RUN = "async () => { await jupyterapp.commands.execute('notebook:run-cell'); }"
PICK = """at => { const notebook = jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = at; notebook.deselectAll(); }"""


def sample() -> torch.Tensor:
    return torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2e-6


def until(done: Callable[[], object], what: str) -> object:
    """The first true value of ``done``; fails after the patience."""
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.05)
    return found


def prepared(folder: Path) -> dict[str, str]:
    """A notebook in ``folder`` and the environment of a JupyterLab that knows nothing of its user's settings."""
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [blank | {"id": f"c{i}", "source": source.strip()} for i, source in enumerate((MAKE, LOOP, VIEWS))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "work").mkdir()
    (folder / "work" / "live.ipynb").write_text(json.dumps(notebook), "utf-8")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces")}
    return (
        os.environ | places | {"IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1", "MIXPREC_DEVICE": "cpu"}
    )


def stop(server: subprocess.Popen, address: str | None, token: str) -> list[psutil.Process]:
    """End the server and its kernels, by request if it listens; the processes that had to be killed."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    if address is not None:
        urlopen(Request(f"{address}/api/shutdown", b"", {"Authorization": f"token {token}"}), timeout=PATIENCE).close()
        server.wait(PATIENCE)
    _, left = psutil.wait_procs(family, timeout=PATIENCE if address else 0)
    for process in left:
        process.kill()
    server.wait()
    return left


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory) -> Iterator[str]:
    """The address, token included, of a notebook in a JupyterLab on a free port."""
    folder, token = tmp_path_factory.mktemp("jupyterlab"), secrets.token_hex(16)
    environment = prepared(folder)
    options = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--ServerApp.allow_root=True"]
    options += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'work'}"]
    command = [sys.executable, "-m", "jupyterlab", *options, "--LabApp.expose_app_in_browser=True"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    address = None
    try:
        started = lambda: list((folder / "runtime").glob("jpserver-*.json"))  # noqa: E731
        written = until(lambda: server.poll() is not None or started(), "the server")
        assert server.poll() is None, (folder / "log").read_text()
        address = json.loads(written[0].read_text())["url"].rstrip("/")
        yield f"{address}/doc/tree/live.ipynb?token={token}"
    finally:
        left = stop(server, address, token) if server.poll() is None else []
    assert not left, left


@pytest.fixture(scope="module")
def notebook(browser, jupyterlab):
    """The notebook, opened, its kernel idle and its first cell run."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(jupyterlab)
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    run(page, 0)
    page.wait_for_function(SHOWN.format("Cast for real"))
    yield page
    assert errors == []
    page.close()


def run(page, cell: int, wait: bool = True) -> None:
    page.evaluate(PICK, cell)
    page.evaluate(RUN if wait else "() => { jupyterapp.commands.execute('notebook:run-cell'); }")


def output(page, cell: int) -> str:
    return page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea-output").all_inner_texts()[-1]


def expected_cast(fmt: str, k: int) -> str:
    shares, n = classify(sample(), fmt, 2.0**k), 5000
    return f"{round(shares.flushed * n)} of {n} elements become zero, {round(shares.overflowed * n)} overflow"


def test_a_moved_control_shows_what_python_computes(notebook):
    slider = notebook.get_by_label("Loss scale S")
    for fmt, k in (("fp16", 4), ("fp8_e4m3", 31), ("bf16", -8)):
        notebook.get_by_label("Format").select_option(fmt)
        for step in range(k - 3, k + 1):  # a slider passes other values on its way
            slider.fill(str(max(step, -8)))
        notebook.wait_for_function(SHOWN.format(expected_cast(fmt, k)))
        assert notebook.locator("[data-live=said]").inner_text().endswith("as predicted.")
        assert notebook.locator("[data-live=line]").inner_text().startswith("Computed by the kernel on cpu, ")
        twin = LossScaleLab({"x": sample()}, format=fmt, log2_scale=k)
        assert notebook.locator(".mpl-exhibit").evaluate(SAID) == twin.result()


def test_a_running_cell_sees_the_slider_and_the_exhibit_answers_beside_it(notebook):
    run(notebook, 1, wait=False)
    notebook.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'busy'")
    notebook.get_by_label("Format").select_option("fp16")
    notebook.get_by_label("Loss scale S").fill("39")
    notebook.wait_for_function(SHOWN.format(expected_cast("fp16", 39)))
    assert notebook.locator(".jp-CodeCell").nth(1).locator(".jp-InputPrompt").inner_text() == "[*]:"
    notebook.get_by_label("Loss scale S").fill("40")
    notebook.wait_for_function("document.body.textContent.includes('loop saw 40')")


def test_a_program_moves_the_control(notebook):
    notebook.evaluate("""async () => { const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
        await kernel.requestExecute({ code: "lab.log2_scale = 7" }).done; }""")
    notebook.wait_for_function(SHOWN.format(expected_cast("fp16", 7)))
    assert notebook.get_by_label("Loss scale S").input_value() == "7"


def test_clearing_the_output_tells_the_kernel(notebook):
    run(notebook, 2)
    assert output(notebook, 2).startswith("views: 1 ")
    notebook.evaluate(PICK, 0)
    notebook.evaluate("() => jupyterapp.commands.execute('notebook:clear-cell-output')")
    notebook.wait_for_function("!document.querySelector('.mpl-exhibit')")
    run(notebook, 2)
    assert output(notebook, 2).startswith("views: 0 ")
