"""How long a live exhibit takes to answer, by the size of the tensor: kernel compute, and the whole round trip.

    .venv/bin/python benchmarks/bench_live.py [--device cuda] [--largest 8]

Kernel compute is ``recompute()``.  The round trip starts a real ipykernel, sends the message that a moved slider sends
and waits for the answer; a browser adds its drawing.  Medians of 15 moves.  Prints, gates nothing.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import ipykernel
import ipywidgets
import torch
from jupyter_client.manager import start_new_kernel

from mixprec_lab import device as devices
from mixprec_lab.exhibits import LossScaleLab, LostUpdateMap, OneTensorEveryScheme, ScaleHistory, Windows
from mixprec_lab.exhibits._live import said_of

MOVES = 15
MAKE = {
    "LossScaleLab": lambda x: LossScaleLab({"x": x}),
    "Windows": lambda x: Windows.from_tensors({"x": x}),
    "OneTensorEveryScheme": lambda x: OneTensorEveryScheme(tensor=x.view(100, -1)),
    "LostUpdateMap": lambda x: LostUpdateMap(weights=x),
    "ScaleHistory": lambda x: ScaleHistory(tensor=x),
}
CONTROL = {
    "LossScaleLab": ("log2_scale", list(range(MOVES))),
    "Windows": ("scale", list(range(MOVES))),
    "OneTensorEveryScheme": ("outlier", [i % 7 for i in range(MOVES)]),
    "LostUpdateMap": ("rate", [("1e-3", "2e-3", "5e-3")[i % 3] for i in range(MOVES)]),
    "ScaleHistory": ("level", [-i for i in range(MOVES)]),
}
SETUP = """
import torch
from mixprec_lab.exhibits import LossScaleLab
x = torch.randn({n}, generator=torch.Generator().manual_seed(0)) * 1e-4
lab = LossScaleLab({{"x": x.to("{device}")}}, device="{device}")
print(lab.comm.comm_id)
"""


def tensor(n: int, device: torch.device) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 1e-4).to(device)


def compute(device: torch.device, sizes: list[int]) -> None:
    print(f"\nkernel compute, ms, median of {MOVES} moves (first answer)")
    print(f"{'exhibit':24}" + "".join(f"{n:>22,}" for n in sizes))
    for name, make in MAKE.items():
        row, (control, values) = "", CONTROL[name]
        for n in sizes:
            exhibit, times = make(tensor(n, device)), []
            for value in values:
                setattr(exhibit, control, value)
                start = time.perf_counter()
                exhibit.recompute()
                times.append(1000 * (time.perf_counter() - start))
            row += f"{statistics.median(times[1:]):>12.1f} ({times[0]:6.1f})"
            exhibit.close()
        print(f"{name:24}{row}")


def until(client: Any, wanted: Callable[[dict], Any]) -> Any:
    while True:
        message = client.get_iopub_msg(timeout=120)
        if message["msg_type"] == "error":
            raise RuntimeError("\n".join(message["content"]["traceback"]))
        if (found := wanted(message)) is not None:
            return found


def printed(message: dict) -> str | None:
    return message["content"]["text"].strip() if message["msg_type"] == "stream" else None


def answer_to(client: Any, comm_id: str, number: int) -> dict:
    """Move the slider as the page does, and wait for the kernel's answer."""
    content = {"kind": "compute", "view": "bench", "id": number, "state": {"log2_scale": number % 40}}
    data = {"comm_id": comm_id, "data": {"method": "custom", "content": content}}
    client.shell_channel.send(client.session.msg("comm_msg", data))

    def answered(message: dict) -> dict | None:
        found = message["content"].get("data", {}).get("content", {}) if message["msg_type"] == "comm_msg" else {}
        return found if found.get("id") == number else None

    return until(client, answered)


def round_trip(device: torch.device, sizes: list[int]) -> None:
    print(f"\nround trip of LossScaleLab through ipykernel, ms, median of {MOVES} moves (of it compute)")
    manager, client = start_new_kernel()
    try:
        for n in sizes:
            client.execute(SETUP.format(n=n, device=device))
            comm_id = until(client, printed)
            times, inside = [], []
            for number in range(1, MOVES + 1):
                start = time.perf_counter()
                found = answer_to(client, comm_id, number)
                times.append(1000 * (time.perf_counter() - start))
                inside.append(found["milliseconds"])
            print(f"{n:>12,}: {statistics.median(times):7.1f} ({statistics.median(inside):.1f})")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: device.pick()")
    parser.add_argument("--largest", type=int, default=None, help="log10 of the largest size; 7 on a CPU, 8 elsewhere")
    arguments = parser.parse_args()
    device = torch.empty(0, device=arguments.device or devices.pick().device).device
    sizes = [10**k for k in range(5, (arguments.largest or (7 if device.type == "cpu" else 8)) + 1)]
    versions = f"torch {torch.__version__}, ipykernel {ipykernel.__version__}, ipywidgets {ipywidgets.__version__}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{said_of(device)}, {machine}; {versions}")
    compute(device, sizes)
    round_trip(device, sizes)


if __name__ == "__main__":
    main()
