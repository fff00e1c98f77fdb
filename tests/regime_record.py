"""A record of ``mixprec_lab.regimes`` that is small, the same every time, and holds what a real one seldom does."""

import random
from functools import cache

from mixprec_lab.regimes import validate_record
from mixprec_lab.regimes.training import KINDS

STEPS = {"text": [0, 5, 10], "images": [0, 50, 100]}
TITLES = {"fp32": "FP32", "fp16_unscaled": "FP16, unscaled", "bf16_nearest": "BF16 weights, nearest", "mxfp8": "MXFP8"}
PROVENANCE = {
    "date": "2026-11-26T11:00:00+00:00", "command": "a test", "commit": "unknown", "torch": "2.13.0",
    "transformer_engine": None, "driver": None, "python": "3.11.0", "platform": "a test", "cpu": "a CPU", "threads": 1,
    "load": [0.0, 0.0, 0.0], "quick": True, "seconds": 1.0,
}  # fmt: skip


@cache
def small_record() -> dict:
    """Two tasks, four regimes, four seeds; one regime equals the baseline, one loses two runs and takes no step."""
    return _record(TITLES, STEPS, range(4))


@cache
def wide_record() -> dict:
    """Twenty regimes, twelve seeds, forty evaluations: more than a page of the book shows."""
    titles = TITLES | {f"own_{i}": f"a regime of one's own, {i}" for i in range(16)}
    return _record(titles, {task: list(range(0, 400, 10)) for task in STEPS}, range(12))


def _record(titles: dict[str, str], every: dict[str, list[int]], seeds: range) -> dict:
    draw, runs, rows = random.Random(0), [], []
    for task, steps in every.items():
        for seed in seeds:
            curve = [round(4 / (1 + i) + draw.random(), 4) for i in range(len(steps))]
            for name in titles:
                runs.append(_run(task, name, seed, steps, curve, draw))
        for name in titles:
            ratio = 1.0 if name == "fp32" else round(draw.uniform(0.1, 1.5), 3)
            spread = {"low": ratio * 0.9, "median": ratio, "high": ratio * 1.1} if name != "fp32" else dict.fromkeys(
                ("low", "median", "high"), 1.0)  # fmt: skip
            rows.append({"task": task, "regime": name, "backend": "emulated" if name == "mxfp8" else "native",
                         "ratio": spread, "steps_per_second": spread})  # fmt: skip
    record = {
        "kind": "regimes", "schema": 1, "device": "A CPU of the tests", "device_type": "cpu", "provenance": PROVENANCE,
        "tasks": {t: {"name": t, "steps": s[-1], "title": f"a model on {t}", "metric_title": f"loss of {t}",
                      "parameters": 1000} for t, s in every.items()},
        "regimes": [{"name": n, "title": title, "emulated": ""} for n, title in titles.items()],
        "runs": runs, "speed": {"provenance": PROVENANCE, "rows": rows},
    }  # fmt: skip
    return dict(validate_record(record))


def _run(task: str, name: str, seed: int, steps: list[int], curve: list[float], draw: random.Random) -> dict:
    same = name == "fp32" or (name == "fp16_unscaled" and task == "text")
    held_out = curve if same else [max(round(x + draw.gauss(0.01, 0.01), 6), 0.0) for x in curve]
    if name == "mxfp8" and task == "images" and seed > 1:
        held_out = [held_out[0], *[None] * (len(steps) - 1)]
    sizes = dict(zip(KINDS, (0, 0, 0, 0) if name == "mxfp8" else (2000, 4000, 0, 4000), strict=True))
    return {"task": task, "regime": name, "seed": seed, "steps": steps, "held_out": held_out,
            "training": [None, *held_out[1:]], "skipped": 0, "bytes": sizes, "pair": f"{task}{seed}",
            "backend": "native"}  # fmt: skip
