"""What ``launch`` starts in each process: run the job, and leave its result or its error in the launch's folder."""

import contextlib
import faulthandler
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from mixprec_lab.scaling_out.launcher import _plain

_RUNPY = runpy.run_path.__code__.co_filename  # '<frozen runpy>'


def main(folder: Path, rank: int) -> None:
    """Run the job that ``folder`` describes."""
    threading.Thread(target=_die_with_the_launcher, daemon=True).start()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    try:
        result = _plain(_run(folder), "the result")
        torch.save(result, folder / f"{rank}.pt")
    except BaseException as error:
        if not (isinstance(error, SystemExit) and not error.code):
            _report(folder / f"{rank}.error.json", error)
        else:
            torch.save(None, folder / f"{rank}.pt")
        raise


def _run(folder: Path) -> Any:
    job = json.loads((folder / "job.json").read_text("utf-8"))
    if "script" in job:
        sys.argv = [job["script"]]
        runpy.run_path(job["script"], run_name="__main__")
        return None
    arguments = torch.load(folder / "arguments.pt", weights_only=True)
    return getattr(importlib.import_module(job["module"]), job["function"])(**arguments)


def _report(path: Path, error: BaseException) -> None:
    trace = error.__traceback__
    while trace.tb_next is not None and trace.tb_frame.f_code.co_filename in (__file__, _RUNPY):
        trace = trace.tb_next  # the job's own frames are what the reader wants to see
    text = {
        "time": getattr(error, "failed_at", time.time()),  # the earliest is the cause of the others
        "error": "".join(traceback.format_exception_only(error)).strip(),
        "traceback": "".join(traceback.format_exception(error.with_traceback(trace))),
    }
    path.write_text(json.dumps(text), "utf-8")


def _die_with_the_launcher() -> None:
    """End this process when the launcher's end of standard input is closed: by its death, in any case."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(70)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
