"""Run a function or a script in several processes, as ``torchrun`` would, and hear of it when one fails.

The processes get what ``torchrun`` gives them (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
``MASTER_PORT`` and a store that is already listening), so the same job runs under either.  ``torchrun`` itself is not
used, because a notebook needs what it does not offer: results that come back, output in an order that does not change
from run to run, a deadline, and one process fewer that has to import torch.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import TCPStore

Show = Literal["by rank", "live", "nothing"]
_POLL = 0.02  #: seconds between two looks at the processes
_LAST_WORDS = 1.0  #: seconds that the other ranks get to say why they fail, once one has failed


class RankFailed(RuntimeError):
    """One of the processes failed; the message holds its rank and its traceback."""

    def __init__(self, message: str, rank: int, code: int) -> None:
        super().__init__(message)
        self.rank = rank  #: the first that failed
        self.code = code  #: its exit status; below 0 the number of the signal that ended it


class LaunchTimeout(TimeoutError):
    """The processes did not end in time; the message says where each of them stood."""


@dataclass(frozen=True)
class Launched:
    """What the processes returned and wrote, each list by rank."""

    results: list[Any]  #: what the function returned; None for a script
    outputs: list[str] = field(repr=False)  #: standard output
    errors: list[str] = field(repr=False)  #: standard error


def launch(
    target: Callable[..., Any] | str | Path,
    processes: int = 2,
    *,
    arguments: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    show: Show = "by rank",
) -> Launched:
    """Run ``target`` in ``processes`` processes and return what each of them returned and printed.

    ``target`` is a function that another process can import, or the path of a Python script; ``arguments`` are the
    keyword arguments of the function.  Arguments and results may be None, numbers, strings, tensors, and lists, tuples
    and dictionaries of these.  Every line of output is printed with its rank in front: when all is over and rank after
    rank (``by rank``), as it comes (``live``), or not at all (``nothing``).

    RankFailed if a process fails: the others are killed, and the message is the traceback of the first that failed.
    LaunchTimeout after ``timeout`` seconds, with the stack of every process.  In any case, and when this process itself
    dies, no process stays behind, but for one that a rank has put into another session.  ValueError for a count below
    1, a timeout that is not above 0, a function of ``__main__`` (a notebook's cell), one that its module does not hold
    under its name, and a word that ``show`` does not know; TypeError for what cannot be sent; FileNotFoundError for a
    script that is not there.
    """
    _check_numbers(processes, timeout, show)
    if not isinstance(arguments, Mapping | None):
        raise TypeError(f"expected arguments by name, got a {type(arguments).__name__}: arguments={{'steps': 3}}")
    job, sent = _described(target, arguments is not None), _plain(dict(arguments or {}), "arguments")
    with tempfile.TemporaryDirectory(prefix="mixprec_launch_") as name:
        folder = Path(name)
        torch.save(sent, folder / "arguments.pt")
        (folder / "job.json").write_text(json.dumps(job), "utf-8")
        run = _Run(folder, processes, show)
        try:
            with _started(folder, processes) as ranks:
                run.wait(ranks, timeout)
        finally:
            run.tell()
        return Launched([run.result(r) for r in range(processes)], run.texts("out"), run.texts("err"))


def _check_numbers(processes: int, timeout: float, show: Show) -> None:
    whole = isinstance(processes, int) and not isinstance(processes, bool)
    seconds = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not (whole and processes >= 1 and seconds and timeout > 0 and show in ("by rank", "live", "nothing")):
        raise ValueError(
            f"expected at least one process, a timeout above 0, and show to be 'by rank', 'live' or 'nothing', "
            f"got {processes!r}, {timeout!r} and {show!r}"
        )


def _described(target: Callable[..., Any] | str | Path, with_arguments: bool) -> dict[str, str]:
    """Where the processes find ``target``."""
    if isinstance(target, str | Path):
        path = Path(target).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"expected a Python script, found no file {path}: write it first (%%writefile)")
        if with_arguments:
            raise ValueError("expected no arguments for a script, which has none: launch a function of it instead")
        return {"script": str(path)}
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    known = getattr(sys.modules.get(module), name, None)  # what the processes will find under this name
    if module in (None, "__main__") or known is not target:
        raise ValueError(
            f"expected a function at the top level of a module that other processes can import, got {target!r}: write "
            f"it to a file with %%writefile and launch the file, or import it from there"
        )
    return {"module": module, "function": name}


_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype)


def _plain(value: Any, what: str) -> Any:
    """``value`` itself; TypeError, naming the place, if it holds anything that does not travel."""
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _plain(key, f"a key of {what}")
            _plain(inner, f"{what}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _plain(inner, f"{what}[{i}]")
    elif not (type(value) in _ATOMS or isinstance(value, torch.Tensor)):
        raise TypeError(
            f"expected numbers, strings, tensors, and lists, tuples and dictionaries of them, got a "
            f"{type(value).__name__} as {what}"
        )
    return value


@contextlib.contextmanager
def _started(folder: Path, processes: int) -> Iterator[list[subprocess.Popen]]:
    """The processes, running; killed and reaped when the block ends, however it ends."""
    # The store listens here, on a port that the system chose: nobody can take it between the choice and its use.
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(processes):
            with (folder / f"{rank}.out").open("wb") as out, (folder / f"{rank}.err").open("wb") as err:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "mixprec_lab.scaling_out._worker", str(folder)],
                        stdin=subprocess.PIPE,  # never written to: its end tells the process that this one is gone
                        stdout=out, stderr=err, env=_environment(rank, processes, store.port), start_new_session=True,
                    )
                )  # fmt: skip
        yield ranks
    finally:
        for process in ranks:
            _kill(process)


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """This process's environment and what ``torchrun`` adds to it."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, **os.environ, "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _kill(process: subprocess.Popen) -> None:
    """End ``process`` and all that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already; macOS says so by EPERM
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    process.stdin.close()


class _Run:
    """What the processes of one launch leave in their folder."""

    def __init__(self, folder: Path, processes: int, show: Show) -> None:
        self.folder, self.processes, self.show = folder, processes, show
        self._shown = dict.fromkeys(range(processes), 0)

    def wait(self, ranks: list[subprocess.Popen], timeout: float) -> None:
        """Return when all ranks have ended well; RankFailed or LaunchTimeout otherwise."""
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in ranks]
            if self.show == "live":
                self._print(complete=True)
            if any(codes):  # neither running (None) nor ended well (0)
                self._let_others_speak(ranks)
                raise self._failure([process.poll() for process in ranks])
            if None not in codes:
                self._check_results()
                return
            if time.monotonic() > deadline:
                raise self._too_late(ranks, timeout)
            time.sleep(_POLL)

    def _check_results(self) -> None:
        """RankFailed for a rank that ended with status 0 before its function returned, as ``os._exit(0)`` does."""
        silent = [rank for rank in range(self.processes) if not (self.folder / f"{rank}.pt").is_file()]
        if silent:
            raise RankFailed(
                f"rank {silent[0]} of {self.processes} left with exit status 0 before it had returned: return from the "
                f"function instead of calling os._exit\n{self._last_words(silent[0], 4000)}", silent[0], 0
            )  # fmt: skip

    def _last_words(self, rank: int, length: int) -> str:
        return self._text(rank, "err").strip()[-length:] or "It wrote nothing to standard error."

    def _let_others_speak(self, ranks: list[subprocess.Popen]) -> None:
        """Wait until all have ended, or a second: which of them failed first is in what they write."""
        deadline = time.monotonic() + _LAST_WORDS
        while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
            time.sleep(_POLL)

    def _failure(self, codes: list[int | None]) -> RankFailed:
        """The error of the rank that failed first: one that died without a word, else the earliest to raise."""
        reports = {rank: self._report(rank) for rank, code in enumerate(codes) if code}
        rank = min(reports, key=lambda r: (reports[r] is not None, reports[r]["time"] if reports[r] else 0, r))
        report, code = reports[rank], codes[rank]
        if report is None:
            how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
            said = self._last_words(rank, 4000)
            return RankFailed(f"rank {rank} of {self.processes} {how} and raised nothing.\n{said}", rank, code)
        others = [f"then rank {r}: {reports[r]['error']}" for r in reports if r != rank and reports[r]]
        message = f"rank {rank} of {self.processes} failed first: {report['error']}\n\n{report['traceback']}"
        return RankFailed("\n".join([message.rstrip(), *others]), rank, code)

    def _report(self, rank: int) -> dict | None:
        path = self.folder / f"{rank}.error.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def _too_late(self, ranks: list[subprocess.Popen], timeout: float) -> LaunchTimeout:
        late = [rank for rank, process in enumerate(ranks) if process.poll() is None]
        if hasattr(signal, "SIGUSR1"):
            for rank in late:
                ranks[rank].send_signal(signal.SIGUSR1)  # the process answers with its stack (_worker)
            time.sleep(0.3)
        stacks = "\n".join(f"rank {rank}:\n{self._last_words(rank, 2000)}" for rank in late)
        return LaunchTimeout(
            f"expected {self.processes} processes to end within {timeout:g} s, rank {', '.join(map(str, late))} did "
            f"not: is there a collective that not every rank calls? Give more time if there is none.\n{stacks}"
        )

    def tell(self) -> None:
        """Print what was not printed yet."""
        if self.show != "nothing":
            self._print(complete=False)

    def _print(self, complete: bool) -> None:
        """New output, rank after rank; with ``complete`` up to the last end of a line."""
        for rank in range(self.processes):
            new = self._text(rank, "out")[self._shown[rank] :]
            if complete:
                new = new[: new.rfind("\n") + 1]
            self._shown[rank] += len(new)
            for line in new.splitlines():
                print(f"[rank {rank}] {line}", flush=True)

    def texts(self, kind: str) -> list[str]:
        """Everything that was written, by rank."""
        return [self._text(rank, kind) for rank in range(self.processes)]

    def _text(self, rank: int, kind: str) -> str:
        path = self.folder / f"{rank}.{kind}"
        return path.read_text("utf-8", errors="replace") if path.is_file() else ""

    def result(self, rank: int) -> Any:
        """What the function of this rank returned."""
        return torch.load(self.folder / f"{rank}.pt", map_location="cpu", weights_only=True)
