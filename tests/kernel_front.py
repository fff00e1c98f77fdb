"""A front end that is the test: what a page sends to an exhibit in a kernel, and what it is sent."""

from collections.abc import Callable
from types import SimpleNamespace

import comm
from comm.base_comm import BaseComm


class RecordingComm(BaseComm):
    """A comm that keeps what is sent."""

    def __init__(self, *args, **kwargs):
        self.sent = []
        super().__init__(*args, **kwargs)

    def publish_msg(self, msg_type, data=None, metadata=None, buffers=None, **keys):
        self.sent.append((msg_type, data))

    def custom(self) -> list[dict]:
        """The custom messages since the last call."""
        found = [data["content"] for kind, data in self.sent if kind == "comm_msg" and data["method"] == "custom"]
        self.sent.clear()
        return found


def opened(monkeypatch, make: Callable):
    """``make()``, and the front end of it: ``line``, ``tell(content)`` and ``ask(state, id, view)`` -> the answer."""
    monkeypatch.setattr(comm, "create_comm", RecordingComm)
    exhibit = make()
    line = exhibit.comm
    line.sent.clear()

    def tell(content: dict) -> list[dict]:
        line.handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})
        return line.custom()

    def ask(state: dict, number: int = 1, view: str = "v") -> dict:
        (answer,) = tell({"kind": "compute", "view": view, "id": number, "state": state})
        return answer

    return exhibit, SimpleNamespace(line=line, tell=tell, ask=ask)


def state_of(exhibit, **changes) -> dict:
    """The state that a page sends with its question."""
    return {key: getattr(exhibit, key) for key in exhibit._controls} | changes


# Renders the module of a widget once more in the page, as #live, with a model that keeps what it sends.
FAKE_KERNEL = """async (entry) => {
  const handlers = new Map(), sent = [], model = {
    get: (k) => entry[k], save_changes() {}, send: (content) => sent.push(content),
    set(k, v) {
      if (entry[k] === v) return;
      entry[k] = v;
      for (const f of [...(handlers.get("change:" + k) || [])]) f();
    },
    on(n, f) { if (!handlers.has(n)) handlers.set(n, new Set()); handlers.get(n).add(f); },
    off(n, f) { handlers.get(n)?.delete(f); },
  };
  const answer = (content) => { for (const f of [...(handlers.get("msg:custom") || [])]) f(content, []); };
  const url = URL.createObjectURL(new Blob([entry._esm], { type: "text/javascript" }));
  const widget = (await import(url)).default, el = document.createElement("div");
  document.querySelector("#live")?.remove();
  el.id = "live"; document.body.append(el);
  const end = widget.render({ model, el });
  window.live = { sent, answer, end, el, model, held: () => [...handlers.values()].reduce((n, s) => n + s.size, 0) };
}"""


def entry_of(exhibit) -> dict:
    """What ``FAKE_KERNEL`` renders: the traits that the page reads, and the module."""
    state = {key: getattr(exhibit, key) for key in exhibit.keys if not key.startswith("_") and key != "layout"}
    return {k: v for k, v in state.items() if isinstance(v, str | int | dict)} | {"_esm": exhibit._esm}
