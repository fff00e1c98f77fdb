"""Exhibits that compute again in the kernel, on the reader's tensors and device, when a control moves.

The page answers every move at once, by its own arithmetic.  Where a kernel listens it is also asked, for the newest
state only and one question at a time (``newestOnly`` in ``ui.js``): however fast a slider moves, at most one stale
computation is under way.  The answer carries the texts of ``result()``, what a computation on the device found, and
which device, which cast and how many milliseconds that took.
"""

import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import traitlets as t
from IPython import get_ipython

from mixprec_lab import device as devices
from mixprec_lab.exhibits._base import Exhibit
from mixprec_lab.formats import FloatFormat


@dataclass(frozen=True)
class Measured:
    """What one computation on the device found."""

    said: str  #: a sentence for the page; empty for none
    path: str  #: which arithmetic answered, as "cpu: native float16 cast"
    elements: int  #: how many values it looked at
    texts: Mapping[str, str] = field(default_factory=dict)  #: the texts of ``result()``, if it computed them itself


def place_of(device: torch.device | str | None, tensors: Iterable[torch.Tensor] = ()) -> torch.device:
    """The device to compute on: the one named, else that of the ``tensors`` off the CPU, else ``device.pick()``.

    ValueError for a device that torch does not have here.
    """
    if device is None:
        elsewhere = next((x.device for x in tensors if x.device.type != "cpu"), None)
        return elsewhere or devices.named(devices.pick().device)
    return devices.named(device)


def cast_path(place: torch.device, fmt: FloatFormat) -> str:
    """How ``place`` casts to ``fmt``: "cuda: native float8_e4m3fn cast", "cpu: emulated FP6 E3M2"."""
    if fmt.torch_dtype is None:
        return f"{place.type}: emulated {fmt.title}"
    name = str(fmt.torch_dtype).removeprefix("torch.")
    slow = fmt.bits == 8 and not (place.type == "cuda" and torch.cuda.get_device_capability(place) >= (8, 9))
    return f"{place.type}: {name} cast in software" if slow else f"{place.type}: native {name} cast"


class Tensors:
    """The reader's tensors by key, one of them at a time on ``place``; nothing is copied that is there already.

    TypeError for sparse tensors and for those on the meta device, which have no values.
    """

    def __init__(self, given: Mapping[Hashable, torch.Tensor], place: torch.device) -> None:
        for key, x in given.items():
            if x.layout is not torch.strided or x.is_meta:
                got = "one on the meta device" if x.is_meta else str(x.layout)
                raise TypeError(f"expected {key!r} to be a dense tensor with values, got {got}: give its values")
        self.place = place
        self._given = {key: x.detach() if x.requires_grad else x for key, x in given.items()}
        self._parked: dict[Hashable, tuple[weakref.ref, torch.Tensor]] = {}
        self._copy: tuple[Hashable, torch.Tensor] | None = None  # of which key and version, and the copy

    def __contains__(self, key: Hashable) -> bool:
        return key in self._given or key in self._parked

    def __iter__(self) -> Iterable[Hashable]:
        return iter([*self._given, *self._parked])

    def at(self, key: Hashable) -> torch.Tensor:
        """The tensor on ``place``: the reader's own if it lives there, so that what changes in place is seen."""
        x = self._here(key)
        if x.device == self.place:
            return x
        stamp = key, _version(x)
        if self._copy is None or self._copy[0] != stamp or stamp[1] is None:
            self._copy = None  # frees the last one first
            self._copy = stamp, x.to(self.place)
        return self._copy[1]

    def versions(self) -> list[int | None]:
        """A number for each tensor that grows when it changes in place; None where torch counts nothing."""
        return [_version(self._here(key)) for key in self]

    def _here(self, key: Hashable) -> torch.Tensor:
        if key in self._parked:
            given, kept = self._parked.pop(key)
            self._given[key] = kept if given() is None else given()
        return self._given[key]

    def park(self) -> None:
        """Free the device: drop the copy there, and keep in host memory what only this exhibit may still hold."""
        self._copy = None
        for key in [key for key, x in self._given.items() if x.device.type != "cpu"]:
            x = self._given.pop(key)
            self._parked[key] = weakref.ref(x), x.cpu()

    def clear(self) -> None:
        """Let go of everything."""
        self._given, self._parked, self._copy = {}, {}, None


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version


class LiveExhibit(Exhibit):
    """An exhibit that a kernel computes too.

    ``answer`` is what the last computation found: ``texts``, ``said``, ``device``, ``path``, ``elements``,
    ``milliseconds``; observe it as any trait.  It is no part of the saved state.  While no view is open the device
    holds nothing for the exhibit; ``close()`` lets go of the reader's tensors and model.
    """

    answer = t.Dict(help="what the last computation in the kernel found")

    _controls: tuple[str, ...] = ()  # the traits that a question from the page may set
    _only_between_cells = False  # True where computing beside a running cell would disturb it
    _tensors: Tensors | None = None  # while arguments are refused, there are none to let go of
    _closed = False

    def __init__(self, offered: dict[str, FloatFormat], name: str | None, tensors: Tensors, **state: Any) -> None:
        self._tensors = tensors
        self._views: set[str] = set()
        super().__init__(offered, name, **state)
        self.on_msg(self._heard)

    @abstractmethod
    def _measure(self) -> Measured:
        """One computation on the device for the present state."""

    def _park(self) -> None:
        self._tensors.park()

    def _let_go(self) -> None:
        if self._tensors is not None:
            self._tensors.clear()

    def recompute(self) -> dict[str, Any]:
        """The ``answer`` for the present state, computed now on the device; RuntimeError after ``close()``."""
        if self._closed:
            raise RuntimeError(
                "expected an open exhibit, got one that was closed and has let go of its data: make a new one"
            )
        start = time.perf_counter()
        found = self._measure()
        texts = dict(found.texts) or self.result()
        self.answer = {
            "texts": texts, "said": found.said, "device": said_of(self._tensors.place), "path": found.path,
            "elements": found.elements, "milliseconds": 1000 * (time.perf_counter() - start),
        }  # fmt: skip
        return self.answer

    def close(self) -> None:
        """Close every view and let go of the tensors and models that were given."""
        super().close()
        self._let_go()
        self._closed, self.answer = True, {}

    def _heard(self, _: Any, content: Any, buffers: Any) -> None:
        kind = content.get("kind")
        if kind == "gone":
            self._views.discard(content["view"])
            if not self._views:
                self._park()
        elif kind == "compute":
            self._views.add(content["view"])
            run_now = not self._only_between_cells
            self._reply(content) if run_now else between_cells(lambda: self._reply(content))

    def _reply(self, question: dict[str, Any]) -> None:
        reply = {"kind": "answer", "view": question["view"], "id": question["id"]}
        try:
            self._take(question["state"])
            reply |= self.recompute()
        except Exception as error:  # whatever it is, the reader has to see it where the control is
            self.log.warning("the exhibit could not compute", exc_info=True)
            reply["error"] = f"{type(error).__name__}: {error}"
        self.send(reply)

    def _take(self, state: dict[str, Any]) -> None:
        """Set the controls as the page has them, without telling the page: it may have moved on."""
        if unknown := set(state) - set(self._controls):
            raise KeyError(f"expected controls among {', '.join(self._controls)}, got {', '.join(sorted(unknown))}")
        with self._lock_property(**state), self.hold_trait_notifications():
            for key, value in state.items():
                setattr(self, key, value)


def between_cells(work: Callable[[], None]) -> None:
    """Run ``work`` where the cells run and never beside one: at once on the main thread, else when that is free.

    JupyterLab 4.4 and later hands the messages of widgets to a thread of their own, which goes on during a cell.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    if threading.current_thread() is threading.main_thread() or kernel is None:
        work()
    else:
        kernel.io_loop.add_callback(work)


def said_of(place: torch.device) -> str:
    """A device in words: "cpu", "cuda:0 (NVIDIA H200)"."""
    return f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place)
