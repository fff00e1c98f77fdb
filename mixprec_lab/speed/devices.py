"""Peak rates and memory bandwidths of accelerators, as their makers publish them, and the points they imply.

Rates are dense: what vendors print for "2:4 structured sparsity" is twice these numbers, and needs a matrix in which
two of every four entries are zero.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: bytes of one element of a product's inputs, and of its output
DTYPE_BYTES: Mapping[str, float] = MappingProxyType({"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "fp4": 0.5})

_BEKMAN = "S. Bekman, Machine Learning Engineering, compute/accelerator/README.md, state of 2026-08"


@dataclass(frozen=True)
class Device:
    """An accelerator as its data sheet describes it: dense FLOP/s by dtype, bytes/s of its memory.

    ``transposes`` says that its FP8 products take one layout only, so that training writes two FP8 copies of every
    tensor (Hopper; Transformer Engine documentation, FP8 section).  Raises ValueError for a rate that is not positive.
    """

    name: str
    title: str
    peak: Mapping[str, float]
    bandwidth: float
    transposes: bool = False
    pattern: str = ""  #: regular expression for the names that CUDA reports, lower case
    source: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self.peak) - set(DTYPE_BYTES):
            raise ValueError(f"expected dtypes among {', '.join(DTYPE_BYTES)}, got {', '.join(sorted(unknown))}")
        for what, rate in {**self.peak, "bandwidth": self.bandwidth}.items():
            if not rate > 0:
                raise ValueError(f"expected a positive rate for {what} of {self.name}, got {rate!r}")

    def rate(self, dtype: str) -> float:
        """Dense FLOP/s for products of ``dtype``; KeyError, listing what the device has, where it has none."""
        if dtype not in self.peak:
            raise KeyError(f"expected a dtype that {self.title} multiplies ({', '.join(self.peak)}), got {dtype!r}")
        return self.peak[dtype]

    def ridge(self, dtype: str) -> float:
        """FLOP per byte at which arithmetic and memory take the same time: the ridge point of the roofline."""
        return self.rate(dtype) / self.bandwidth


def _device(
    name: str,
    title: str,
    teraflops: str,
    terabytes: float,
    *,
    pattern: str,
    transposes: bool = False,
    source: str = _BEKMAN,
) -> Device:
    """A device from one line: rates of fp32 tf32 fp16 bf16 fp8 fp4 in TFLOP/s ("-" for none), TB/s."""
    rates = {d: float(x) * 1e12 for d, x in zip(DTYPE_BYTES, teraflops.split(), strict=True) if x != "-"}
    return Device(name, title, MappingProxyType(rates), terabytes * 1e12, transposes, pattern, source)


#: Rates and bandwidths: Bekman's collection of the makers' data sheets.  V100: NVIDIA's data sheet.  H200 NVL: the
#: sparse figures of NVIDIA's H200 page (1671 and 3341 TFLOP/s), halved.
DEVICES: Mapping[str, Device] = MappingProxyType({
    d.name: d
    for d in (
        _device("v100", "V100 SXM2", "15.7 - 125 - - -", 0.9, pattern="v100", source="NVIDIA V100 data sheet"),
        _device("a100", "A100 SXM 80GB", "19.5 156 312 312 - -", 2.0, pattern="a100"),
        _device("h100", "H100 SXM", "67 494.5 989 989 1979 -", 3.35, pattern="h100(?!.*(pcie|nvl))", transposes=True),
        _device("h100_pcie", "H100 PCIe", "51 378 756 756 1513 -", 2.0, pattern="h100.*pcie", transposes=True),
        _device("h200", "H200 SXM", "67 494.5 989 989 1979 -", 4.8, pattern="h200(?!.*nvl)", transposes=True),
        _device("h200_nvl", "H200 NVL", "- - 835.5 835.5 1670.5 -", 4.8, pattern="h200.*nvl", transposes=True,
                source="NVIDIA H200 page, sparse figures halved"),
        _device("l40s", "L40S", "91.6 183 362 362 733 -", 0.86, pattern="l40s", transposes=True),
        _device("mi300x", "MI300X", "163.4 653.7 1307 1307 2610 -", 5.3, pattern="mi300x"),
        _device("b200", "B200", "80 1125 2250 2250 4500 9000", 8.0, pattern="(?<!g)b200"),
    )
})  # fmt: skip


def get_device(x: "str | Device") -> Device:
    """The device that ``x`` names, or ``x`` itself; KeyError, listing the names, for anything else."""
    if isinstance(x, Device):
        return x
    if x not in DEVICES:
        raise KeyError(f"expected a Device or one of {', '.join(DEVICES)}, got {x!r}")
    return DEVICES[x]


def identify(reported: str) -> Device | None:
    """The device whose name a driver reports (``torch.cuda.get_device_name()``); None where it is not in the table."""
    return next((d for d in DEVICES.values() if re.search(d.pattern, reported.lower())), None)
