"""Everything that only a GPU can tell, in one command of under ten minutes: ``make gpu``.

Three stages: the tests marked ``gpu``; ``make measure``, which leaves book/data/<device>.json; every notebook on the
GPU, with that record in its figures.  Outputs of cells are not compared, because a GPU sums in another order: a cell
must run.  A stage that fails does not stop the next one.  Exit status: 0 all passed, 1 not, or no CUDA device.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "book" / "data"
LIMIT = 600.0
GRACE = 10.0  #: between asking a stage to stop and making it


@dataclass(frozen=True)
class Stage:
    """A command with a name."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    name: str
    status: str  #: "passed", "failed with ...", "stopped after ...", "not started ..."
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}: {self.status}, {self.seconds:.0f} s"


def stages(root: Path = ROOT) -> tuple[Stage, ...]:
    """The three stages.  Tests and measurements run alone on the GPU; notebooks four at a time."""
    python = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    notebooks = sorted(str(path.relative_to(root)) for path in (root / "book").glob("*.ipynb"))
    lax = ("--nbval-lax", "--nbval-current-env", "-n", "4", "--dist", "loadfile", "--no-loadscope-reorder")
    return (
        Stage("tests", (*python, "-m", "gpu", "-rs", "tests")),
        Stage("measure", (sys.executable, "tools/measure.py", "--device", "cuda")),
        Stage("notebooks", (*python, *lax, *notebooks)),
    )


def run(stage: Stage, limit: float) -> Result:
    """Run one stage for at most ``limit`` seconds; its output goes to the terminal."""
    if limit <= 0:
        return Result(stage.name, "not started, the time was used up", 0.0)
    print(f"== {stage.name} ==", flush=True)
    start = time.monotonic()
    environment = os.environ | {"MIXPREC_DEVICE": "cuda", "IPYTHONDIR": str(ROOT / "_build" / "ipython")}
    # a session of its own, so that the kernels and workers of a stage that is stopped are stopped with it
    process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        status = "passed" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after its {limit:.0f} s"
    finally:
        _stop(process)
    return Result(stage.name, status, time.monotonic() - start)


def _stop(process: subprocess.Popen) -> None:
    """End what is left of a stage, politely first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:  # nothing is left
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_all(todo: Sequence[Stage], limit: float = LIMIT) -> list[Result]:
    """Run the stages one after another within ``limit`` seconds altogether."""
    end, results = time.monotonic() + limit, []
    for stage in todo:
        results.append(run(stage, end - time.monotonic()))
    return results


def written(since: float, folder: Path = DATA) -> list[Path]:
    """The valid records of a GPU that appeared in ``folder`` after the time ``since``."""
    from mixprec_lab.speed import load_all

    found = [folder / f"{name}.json" for name, r in load_all(folder).items() if r["device_type"] == "cuda"]
    return [path for path in found if path.stat().st_mtime >= since]


def summary(results: Sequence[Result], records: Sequence[Path]) -> tuple[str, int]:
    """The closing lines and the exit status."""
    lines = ["", *map(str, results)]
    lines += [f"record: {path}" for path in records] or ["record: none was written"]
    good = bool(records) and all(r.status == "passed" for r in results)
    if good:
        lines.append("Commit it with the pages that print it: make notebooks, then git add book.")
    return "\n".join(lines), 0 if good else 1


def no_gpu() -> str | None:
    """Why there is nothing to do here, in one sentence; None where a CUDA device answers."""
    import torch

    if torch.cuda.is_available():
        return None
    return (f"make gpu expected a CUDA device, and torch {torch.__version__} sees none: "
            "make test checks here everything that a CPU can check.")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the stages and say how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything (default: %(default)g)")
    options = parser.parse_args(argv)
    if reason := no_gpu():
        print(reason, file=sys.stderr)
        return 1
    start = time.time()
    text, status = summary(run_all(stages(), options.limit), written(start))
    print(text)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
