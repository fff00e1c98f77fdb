"""A headless Firefox driven over WebDriver BiDi, the protocol that the browser itself speaks; no driver program."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from websocket import create_connection

NAMES = ("firefox-esr", "firefox")
LISTENS = re.compile(r"WebDriver BiDi listening on (ws://127\.0\.0\.1:\d+)")
ABANDONED = "NS_BINDING_ABORTED"  # a page that was left while it fetched the next one ahead
PREFERENCES = {
    "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "toolkit.telemetry.reportingpolicy.firstRun": False,
}


def find_firefox() -> str | None:
    """The Firefox to test with: $FIREFOX, else the first known name on the PATH."""
    return os.environ.get("FIREFOX") or next(filter(None, map(shutil.which, NAMES)), None)


class Firefox:
    """One tab: go to a page, evaluate in it, press keys; ``errors`` is what the page complained of since ``go``."""

    def __init__(self, address: str) -> None:
        self._socket = create_connection(f"{address}/session", timeout=60, suppress_origin=True)
        self._sent = 0
        self.errors: list[str] = []
        self.command("session.new", capabilities={})
        self.command("session.subscribe", events=["log.entryAdded", "network.fetchError", "network.responseCompleted"])
        self._tab = self.command("browsingContext.getTree")["contexts"][0]["context"]

    def command(self, method: str, **params) -> dict:
        """The result of a command; RuntimeError if the browser refuses it."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message["type"] == "event":
                self._hear(message["method"], message["params"])
            elif message["id"] == self._sent:
                if message["type"] == "error":
                    raise RuntimeError(f"{method}: {message['error']}: {message['message']}")
                return message["result"]

    def _hear(self, event: str, params: dict) -> None:
        if event == "log.entryAdded" and params["level"] == "error":
            self.errors.append(f"{params['type']}: {params['text']}")
        elif event == "network.fetchError" and params["errorText"] != ABANDONED:
            self.errors.append(f"{params['request']['url']}: {params['errorText']}")
        elif event == "network.responseCompleted" and params["response"]["status"] >= 400:
            self.errors.append(f"{params['request']['url']}: {params['response']['status']}")

    def close(self) -> None:
        """Hang up; the browser runs on."""
        self._socket.close()

    def watch(self, function: str) -> None:
        """Call ``function`` in every page before its own scripts."""
        self.command("script.addPreloadScript", functionDeclaration=function)

    def go(self, url: str) -> None:
        """Open a page and wait until it has loaded."""
        self.errors.clear()
        self.command("browsingContext.navigate", context=self._tab, url=url, wait="complete")

    def resize(self, width: int, height: int = 900) -> None:
        """Make the page that large."""
        self.command("browsingContext.setViewport", context=self._tab, viewport={"width": width, "height": height})

    def evaluate(self, function: str):
        """What the function returns in the page, by way of JSON; RuntimeError if it throws."""
        expression = f"(async () => JSON.stringify(await ({function})()))()"
        target = {"context": self._tab}
        found = self.command("script.evaluate", expression=expression, target=target, awaitPromise=True)
        if found["type"] == "exception":
            raise RuntimeError(found["exceptionDetails"]["text"])
        return json.loads(found["result"].get("value", "null"))

    def until(self, function: str, seconds: float = 30) -> None:
        """Return when the function holds in the page; TimeoutError if it does not in time."""
        end = time.monotonic() + seconds
        while not self.evaluate(function):
            if time.monotonic() > end:
                raise TimeoutError(f"expected this within {seconds} s: {function}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        strokes = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        actions = [{"type": "key", "id": "keys", "actions": strokes}]
        self.command("input.performActions", context=self._tab, actions=actions)


@contextmanager
def running(executable: str, folder: Path) -> Iterator[Firefox]:
    """A Firefox with a profile of its own in ``folder``, while the block runs."""
    profile, log = folder / "profile", folder / "firefox.log"
    profile.mkdir()
    lines = (f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in PREFERENCES.items())
    profile.joinpath("user.js").write_text("".join(lines), "utf-8")
    command = [executable, "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "HOME": str(folder)})
    try:
        with closing(Firefox(_address(process, log))) as browser:
            yield browser
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(process: subprocess.Popen, log: Path, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while not (found := LISTENS.search(log.read_text(errors="replace"))):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"expected Firefox to listen, got: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)
    return found[1]
