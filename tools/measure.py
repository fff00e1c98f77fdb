"""Measure the machine this runs on and keep the result: ``make measure``, or

    .venv/bin/python tools/measure.py [--output book/data/NAME.json] [--device cuda] [--quick] [--only copy,matmul]

Writes ``book/data/<device>.json`` with device, driver, versions, date, command, commit and load.  A section that fails
is recorded with its reason, the record then goes to ``<device>.partial.json``, and the exit status is 1.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from measure_sections import SECTIONS, Plan, Rows, Skipped

from mixprec_lab.device import pick
from mixprec_lab.speed import describe
from mixprec_lab.speed.provenance import provenance, slug
from mixprec_lab.speed.records import SCHEMA, failures, save

ROOT = Path(__file__).resolve().parent.parent


def run_section(function: Callable[[Plan], Rows], plan: Plan) -> dict[str, Any]:
    """One section of a record; a failure is its answer, with the place it happened."""
    start = time.perf_counter()
    try:
        rows = function(plan)
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # any error of one section must not cost the others: it is recorded and exits with 1
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"status": "failed", "reason": f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"}
    return {"status": "ok", "seconds": round(time.perf_counter() - start, 6), "rows": rows}


def measure(plan: Plan, sections: Mapping[str, Callable[[Plan], Rows]], command: str) -> dict[str, Any]:
    """The record of ``sections`` on the device of ``plan``, printing a line for each."""
    start, told = time.perf_counter(), provenance(plan.device, command, plan.quick)
    record = {"kind": "measured", "schema": SCHEMA, "device": describe(plan.device), "device_type": plan.device.type,
              "provenance": told, "sections": {}}  # fmt: skip
    for name, function in sections.items():
        record["sections"][name] = found = run_section(function, plan)
        detail = f"{len(found['rows'])} rows in {found['seconds']:.1f} s" if "rows" in found else found["reason"]
        print(f"{name}: {found['status']}, {detail}", flush=True)
    told["seconds"] = round(time.perf_counter() - start, 6)
    told["load_after"] = [round(x, 2) for x in os.getloadavg()]
    return record


def main(arguments: list[str] | None = None) -> int:
    """Measure, save, and return the exit status: 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="where to write (default: book/data/<device>.json)")
    parser.add_argument("--device", help="cpu or cuda (default: MIXPREC_DEVICE, else CUDA if it answers)")
    parser.add_argument("--quick", action="store_true", help="small sizes: try the path; needs --output")
    parser.add_argument("--only", help=f"sections, separated by commas, of {', '.join(SECTIONS)}; needs --output")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"expected sections among {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if (options.quick or options.only) and not options.output:
        parser.error("expected --output with --quick or --only: their records are not whole ones")
    device = torch.device(options.device) if options.device else pick().device
    command = " ".join(["python", "tools/measure.py", *(sys.argv[1:] if arguments is None else arguments)])
    record = measure(Plan(device, options.quick), {name: SECTIONS[name] for name in names}, command)
    path = save(record, options.output or ROOT / "book" / "data" / f"{slug(record['device'])}.json")
    print(f"wrote {path}")
    failed = failures(record)
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
