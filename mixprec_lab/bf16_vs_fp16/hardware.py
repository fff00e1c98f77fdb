"""What each accelerator multiplies natively, as data, and which of them this process runs on."""

import difflib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

#: What a feature says; the rules ask for features, never for names.
FEATURES: Mapping[str, str] = MappingProxyType({
    "cuda": "an NVIDIA GPU",
    "rocm": "an AMD GPU",
    "fp16": "FP16 arithmetic at a higher rate than FP32",
    "fp16_matrix": "matrix units that take FP16",
    "bf16": "matrix units that take BF16",
    "tf32": "matrix units that read FP32 as TF32",
    "tf32_emulated": "TF32 products made of several BF16 products",
    "fp8": "matrix units that take FP8, E4M3 and E5M2",
    "fp8_fnuz": "matrix units that take FP8 with the FNUZ encodings",
    "fp8_blocks": "Transformer Engine's 128-element FP8 blocks run natively",
    "mxfp8": "MXFP8 training in Transformer Engine",
    "nvfp4": "NVFP4 training in Transformer Engine, stochastic rounding included",
    "grad_scaler": "torch.amp.GradScaler works on it",
    "half_rate_fp32_accumulation": "FP16 products accumulate in FP32 at half the peak rate",
    "flushes_subnormals": "16-bit matrix instructions flush subnormal inputs and outputs to zero",
    "tpu": "a Google TPU",
    "gaudi": "an Intel Gaudi",
    "cpu": "a CPU",
    "apple": "the GPU of an Apple chip",
})  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """One accelerator: its features, the pattern that its device names match, and where that was read."""

    name: str
    title: str
    features: frozenset[str]
    pattern: str  #: regular expression, searched in lower-case device names
    source: str  #: a key of ``SOURCES``
    capability: tuple[tuple[int, int], ...] = ()  #: CUDA compute capabilities this entry stands for


def _hardware(
    name: str, title: str, features: str, pattern: str, source: str, *capability: tuple[int, int]
) -> Hardware:
    return Hardware(name, title, frozenset(features.split()), pattern, source, capability)


_VOLTA = "cuda fp16 fp16_matrix grad_scaler"
_AMPERE = _VOLTA + " bf16 tf32"
_ADA = _AMPERE + " fp8"
_HOPPER = _ADA + " fp8_blocks"
_BLACKWELL = _ADA + " mxfp8 nvfp4"
_CDNA2 = "rocm fp16 fp16_matrix bf16 grad_scaler"
_PEAKS = "ml-engineering-accelerators"

HARDWARE: Mapping[str, Hardware] = MappingProxyType({
    entry.name: entry
    for entry in (
        _hardware("p100", "NVIDIA P100", "cuda fp16 grad_scaler", r"\bp100\b", "nvidia-p100", (6, 0)),
        _hardware("v100", "NVIDIA V100", _VOLTA, r"\bv100s?\b", "nvidia-v100", (7, 0)),
        _hardware("t4", "NVIDIA T4", _VOLTA, r"\bt4\b", "nvidia-t4", (7, 5)),
        _hardware("a100", "NVIDIA A100", _AMPERE, r"\ba[18]00\b", _PEAKS, (8, 0)),
        _hardware("a10", "NVIDIA A10", _AMPERE, r"\ba10g?\b", "te-matrix", (8, 6)),
        _hardware("rtx30", "NVIDIA RTX 30 series", _AMPERE, r"\brtx\s?30([5-9]0|\b)", "te-matrix"),
        _hardware("rtx40", "NVIDIA RTX 40 series", _ADA + " half_rate_fp32_accumulation",
                  r"\brtx\s?40([5-9]0|\b)", "te-matrix"),
        _hardware("l4", "NVIDIA L4", _ADA, r"\bl4\b", "te-matrix"),
        _hardware("l40s", "NVIDIA L40S", _ADA, r"\bl40s?\b", _PEAKS, (8, 9)),
        _hardware("h100", "NVIDIA H100", _HOPPER, r"\bg?h[18]00\b", _PEAKS, (9, 0)),
        _hardware("h200", "NVIDIA H200", _HOPPER, r"\bg?h200\b", _PEAKS),
        _hardware("b200", "NVIDIA B200", _BLACKWELL, r"\bb[12]00\b", _PEAKS, (10, 0)),
        _hardware("gb200", "NVIDIA GB200", _BLACKWELL, r"\bgb200\b", _PEAKS),
        _hardware("b300", "NVIDIA B300", _BLACKWELL, r"\bg?b300\b", "te-matrix", (10, 3)),
        _hardware("rtx50", "NVIDIA RTX 50 series", _ADA + " fp8_blocks",
                  r"\brtx\s?50([5-9]0|\b)", "te-matrix", (12, 0)),
        _hardware("mi250", "AMD MI250", _CDNA2 + " flushes_subnormals", r"\bmi2[15]0x?\b", "pytorch-accuracy"),
        _hardware("mi300x", "AMD MI300X", _CDNA2 + " tf32 fp8_fnuz", r"\bmi3(00[ax]?|25x?)\b", "rocm-precision"),
        _hardware("mi355x", "AMD MI355X", _CDNA2 + " tf32_emulated fp8", r"\bmi35[05]x?\b", "rocm-precision"),
        _hardware("tpu_v3", "Google TPU v3", "tpu bf16", r"\btpu[\s_]?v3\b", "google-tpu-bf16"),
        _hardware("tpu_v4", "Google TPU v4", "tpu bf16", r"\btpu[\s_]?v4\b", _PEAKS),
        _hardware("tpu_v5e", "Google TPU v5e", "tpu bf16", r"\btpu[\s_]?v5(e|\s?lite)\b", _PEAKS),
        _hardware("tpu_v5p", "Google TPU v5p", "tpu bf16", r"\btpu[\s_]?v5p?\b", _PEAKS),
        _hardware("tpu_v6e", "Google TPU v6e (Trillium)", "tpu bf16",
                  r"\btpu[\s_]?v6e?\b|\btrillium\b", "google-tpu-bf16"),
        _hardware("gaudi2", "Intel Gaudi 2", "gaudi fp16_matrix bf16 tf32 fp8", r"\bgaudi[\s_]?2\b", _PEAKS),
        _hardware("gaudi3", "Intel Gaudi 3", "gaudi bf16 fp8", r"\bgaudi[\s_]?3\b", "gaudi-fp8"),
        _hardware("cpu_amx", "CPU with AMX or AVX512-BF16", "cpu bf16 grad_scaler",
                  r"\bcpu\b.*\b(amx|avx512)|\bamx\b", "onednn-types"),
        _hardware("cpu", "CPU without BF16 instructions", "cpu grad_scaler", r"^cpu$", "onednn-types"),
        _hardware("apple", "Apple silicon (MPS)", "apple grad_scaler", r"\bapple\b|\bmps\b", "accelerate-3373"),
    )
})  # fmt: skip


def get_hardware(name: str) -> Hardware:
    """The entry that ``name`` means: a key of ``HARDWARE``, a title, or a device name such as torch reports.

    ``"A100"``, ``"NVIDIA A100-SXM4-80GB"`` and ``"a100"`` are the same.  Raises KeyError, with close matches and all
    known names, where nothing matches, and TypeError for anything but a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of an accelerator, got {type(name).__name__}")
    wanted = name.strip().lower()
    if wanted in HARDWARE:
        return HARDWARE[wanted]
    plain = re.sub(r"[-/(),]", " ", wanted)
    for entry in HARDWARE.values():
        if wanted == entry.title.lower() or re.search(entry.pattern, plain):
            return entry
    raise KeyError(unknown("hardware", name, HARDWARE))


def unknown(kind: str, name: str, known: Mapping[str, object]) -> str:
    """The message for a name that is not in a table: close matches first, then every name there is."""
    close = difflib.get_close_matches(name.strip().lower().replace("-", "_").replace(" ", "_"), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


@dataclass(frozen=True)
class Detected:
    """The entry this machine stands for, and how it was found."""

    hardware: Hardware
    reason: str

    def __str__(self) -> str:
        return f"{self.hardware.title}: {self.reason}"


def detect_hardware() -> Detected:
    """The entry of the device this process would compute on: CUDA or ROCm, else Apple's MPS, else the CPU.

    A GPU whose name is not in the table stands under the entry of its compute capability, and the reason says so.
    Raises KeyError where neither name nor capability is known.
    """
    if torch.cuda.is_available():
        return _detect_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    if torch.backends.mps.is_available():
        return Detected(HARDWARE["apple"], "torch.backends.mps is available")
    flags = sorted(cpu_flags() & {"amx_bf16", "avx512_bf16"})
    if flags:
        return Detected(HARDWARE["cpu_amx"], f"no GPU; the CPU has {' and '.join(flags)}")
    return Detected(HARDWARE["cpu"], f"no GPU; {_flags_origin()} lists neither amx_bf16 nor avx512_bf16")


def _detect_gpu(name: str, capability: tuple[int, int]) -> Detected:
    try:
        return Detected(get_hardware(name), f"torch reports {name!r}")
    except KeyError as error:
        for entry in HARDWARE.values():
            if torch.version.hip is None and capability in entry.capability:
                number = ".".join(map(str, capability))
                why = f"{name!r} is not in the table; compute capability {number} is that of the {entry.title}"
                return Detected(entry, why)
        raise KeyError(f"{error.args[0]} (compute capability {capability}): name one of them yourself") from None


def cpu_flags(path: str | Path = "/proc/cpuinfo") -> frozenset[str]:
    """The instruction-set flags that Linux lists for the first CPU; empty where ``path`` does not exist."""
    path = Path(path)
    if not path.exists():
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _flags_origin() -> str:
    return "/proc/cpuinfo" if platform.system() == "Linux" else f"{platform.system()} has no /proc/cpuinfo and so"


def bf16_support() -> Literal["native", "emulated", "unknown"]:
    """How BF16 runs on the device this process would compute on: on its own units, or widened to FP32.

    ``torch.cuda.is_bf16_supported()`` answers True for both, because it counts emulation unless told not to; V100 and
    T4 therefore claim support.  On a CPU every BF16 operator exists, and is native with AMX or AVX512-BF16.
    For Apple's GPUs, which do not say, it is unknown.
    """
    if torch.cuda.is_available():
        return "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
    features = detect_hardware().hardware.features
    return "unknown" if "apple" in features else "native" if "bf16" in features else "emulated"
