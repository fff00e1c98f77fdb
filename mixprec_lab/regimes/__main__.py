"""Train the full set on this machine and keep the result: ``python -m mixprec_lab.regimes``, from the project's root.

    --quick          fewer steps and seeds, two minutes; needs --output
    --seeds N        seeds 0 to N-1 (default 5, quick 2)
    --speed          measure the speed section only, in a record that exists
    --folder DIR     where single runs are kept, so that an interrupted set goes on
    --output FILE    default: book/data/regimes_<device>.json
    --device cuda    default: MIXPREC_DEVICE, else CUDA if it answers
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from mixprec_lab.device import named, one_thread, pick
from mixprec_lab.regimes.records import load_record, make_record, provenance, save_record
from mixprec_lab.regimes.regime import REGIMES, VARIANTS
from mixprec_lab.regimes.runs import run_all
from mixprec_lab.regimes.speed import measure_speed
from mixprec_lab.regimes.tasks import TASKS, get_task
from mixprec_lab.speed import describe
from mixprec_lab.speed.provenance import slug


@one_thread()
def main(arguments: list[str] | None = None) -> int:
    """Train or measure, save, and return 0; what cannot be done is an exception or a usage error.

    On a CPU with one thread, which is part of the name of the machine and so of the record's.
    """
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m mixprec_lab.regimes", description=(__doc__ or "").split("\n")[0])
    for name in ("--quick", "--speed"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--seeds", type=int)
    for name in ("--folder", "--output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--device")
    options = parser.parse_args(given)
    if options.quick and not options.output:
        parser.error("expected --output with --quick: its record is not a whole one")
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"expected --seeds of at least 2, got {options.seeds}: one seed makes no interval")
    try:
        device = named(options.device) if options.device else pick().device
    except ValueError:
        parser.error(f"expected --device of this machine (cpu, cuda, cuda:1, ...), got {options.device!r}")
    command = " ".join(["python -m mixprec_lab.regimes", *given])
    path = options.output or _default_output(parser, device)
    regimes = [*REGIMES, *VARIANTS]
    tasks = [get_task(name, options.quick, device) for name in TASKS]
    rounds = 3 if options.quick else 15
    if options.speed:
        if not path.is_file():
            parser.error(f"expected a record in {path}, which --speed completes: train it first, without --speed")
        record = dict(load_record(path))
        if record["device"] != describe(device):
            parser.error(f"expected a record of {describe(device)}, got one of {record['device']}")
        record["speed"] = measure_speed(tasks, regimes, command, rounds=rounds, device=device)
    else:
        record = _full(options, tasks, regimes, device, command, rounds)
    print(f"wrote {save_record(record, path)}")
    return 0


def _full(options, tasks, regimes, device: torch.device, command: str, rounds: int) -> dict:
    started, told = time.perf_counter(), provenance(device, command, options.quick)
    kind = "quick" if options.quick else "full"
    folder = options.folder or Path("_build") / "regimes" / f"{slug(describe(device))}_{kind}"
    seeds = range(options.seeds or (2 if options.quick else 5))
    runs = run_all(tasks, regimes, seeds, quick=options.quick, folder=folder, device=device)
    speed = measure_speed(tasks, regimes, command, rounds=rounds, device=device)
    told["seconds"] = round(time.perf_counter() - started, 3)
    return make_record(runs, tasks, regimes, device, told, speed)


def _default_output(parser: argparse.ArgumentParser, device: torch.device) -> Path:
    folder = Path("book") / "data"
    if not folder.is_dir():
        parser.error("expected to run in the project's root, which has book/data: change there, or pass --output")
    return folder / f"regimes_{slug(describe(device))}.json"


if __name__ == "__main__":
    sys.exit(main())
