"""Three ways to run an FP8 product, and in one sentence each why one of them does not run here."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch

Backend = Literal["emulated", "scaled_mm", "transformer_engine"]
BACKENDS: tuple[Backend, ...] = ("transformer_engine", "scaled_mm", "emulated")  # in the order of preference
_FIRST_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Chosen:
    """A backend and the reason it was taken."""

    name: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class TransformerEngine(NamedTuple):
    """The two modules of Transformer Engine that are used."""

    pytorch: ModuleType
    recipe: ModuleType


def choose_backend(wanted: str = "auto", device: torch.device | str = "cpu") -> Chosen:
    """``wanted``, or for "auto" the best backend that runs on ``device``, with the reason.

    "auto" takes Transformer Engine, else ``torch._scaled_mm`` on a GPU with FP8 matrix units, else emulation.
    ``scaled_mm`` on a CPU is a slow reference loop: it runs if asked for and is never chosen.
    Raises ValueError for an unknown name, RuntimeError where the backend asked for does not run.
    """
    device = torch.device(device)
    if wanted == "auto":
        reasons = {name: why_not(name, device) for name in BACKENDS[:2]}
        for name, reason in reasons.items():
            if reason is None and device.type == "cuda":
                return Chosen(name, f"{torch.cuda.get_device_name(device)} has FP8 matrix units")
        missing = reasons["scaled_mm"] or reasons["transformer_engine"] or f"{device} has no FP8 matrix units"
        return Chosen("emulated", f"{missing}; products are emulated with exact FP8 operands")
    reason = why_not(wanted, device)
    if reason is not None:
        raise RuntimeError(f"expected a backend that runs on {device}, got {wanted!r}: {reason}")
    return Chosen(wanted, "asked for")


def available_backends(device: torch.device | str = "cpu") -> list[Backend]:
    """The backends that run on ``device``, the best first."""
    return [name for name in BACKENDS if why_not(name, device) is None]


def why_not(backend: str, device: torch.device | str = "cpu") -> str | None:
    """None if ``backend`` runs on ``device``, else one sentence that says what is missing and what to do.

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    device = torch.device(device)
    if backend == "emulated" or (backend == "scaled_mm" and device.type == "cpu"):
        return None
    hardware = _missing_hardware(device)
    if hardware is not None or backend == "scaled_mm":
        return hardware
    loaded = transformer_engine()
    return loaded if isinstance(loaded, str) else None


def _missing_hardware(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"{device} is no CUDA device" if device.type != "cuda" else "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "AMD's FNUZ encodings are not supported here"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FIRST_CAPABILITY:
        has = ".".join(map(str, capability))
        return f"{torch.cuda.get_device_name(device)} has compute capability {has}, FP8 matrix units begin at 8.9"
    return None


@cache
def transformer_engine() -> TransformerEngine | str:
    """Transformer Engine's modules, or the sentence that says why they do not load.

    The import fails in many ways that are no ImportError: a meta package without its core, a CUDA library that lacks a
    symbol, an extension built for another torch.  Each of them is the answer to the question, not an accident.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed: see requirements-gpu.txt"
    try:
        import transformer_engine.common.recipe as recipe
        import transformer_engine.pytorch as pytorch
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"Transformer Engine is installed and does not load ({type(error).__name__}: {first:.160}): its wheel, "
            f"torch and CUDA must fit together, see requirements-gpu.txt"
        )
    return TransformerEngine(pytorch, recipe)
