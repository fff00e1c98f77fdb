"""What a format is: the descriptor, the formats everybody uses, and the lookup by name or torch dtype."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch

Specials = Literal["ieee", "nan_all_ones", "nan_negative_zero", "none"]


class CodeCounts(NamedTuple):
    """How the ``2**bits`` codes of a format are spent; ``distinct_finite`` counts +0 and -0 once."""

    total: int
    finite: int
    distinct_finite: int
    infinite: int
    nan: int


@dataclass(frozen=True)
class FloatFormat:
    """One binary floating-point format, at most as wide as FP32.

    A code is ``sign | exponent field | fraction field``.  With exponent field ``E > 0`` it means
    ``(-1)**sign * 2**(E - bias) * (1 + fraction / 2**mantissa_bits)``; with ``E == 0`` it is zero or subnormal:
    ``(-1)**sign * 2**(1 - bias) * fraction / 2**mantissa_bits``.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int  #: stored fraction bits; the leading one is implied
    bias: int | None = None  #: None means the IEEE choice, 2**(exponent_bits - 1) - 1
    specials: Specials = "ieee"
    #: ieee: top exponent field is inf and NaN.  nan_all_ones: one NaN magnitude, no inf (E4M3, E8M0).
    #: nan_negative_zero: the code of -0 is the only NaN, no inf (FNUZ).  none: every code is a number (FP6, FP4).
    signed: bool = True  #: False for E8M0, a pure scale: no sign, no zero, no subnormals
    title: str = ""  #: the name to print, e.g. "FP8 E4M3"
    storage_bits: int | None = None  #: bits a value occupies in memory; None means ``bits``

    def __post_init__(self) -> None:
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 23):
            raise ValueError(
                f"expected 1 to 8 exponent bits and 0 to 23 mantissa bits, got "
                f"{self.exponent_bits} and {self.mantissa_bits}: formats wider than FP32 are not supported"
            )
        if self.specials not in ("ieee", "nan_all_ones", "nan_negative_zero", "none"):
            raise ValueError(
                f"expected specials 'ieee', 'nan_all_ones', 'nan_negative_zero' or 'none', got {self.specials!r}"
            )
        if self.specials == "ieee" and (self.exponent_bits < 2 or self.mantissa_bits < 1):
            raise ValueError(
                "specials='ieee' spends the top exponent field on inf and NaN, so it needs 2 exponent bits and 1 "
                "mantissa bit at least: use specials='none' for a smaller format"
            )
        if not self.signed and (self.mantissa_bits or self.specials != "nan_all_ones"):
            raise ValueError("an unsigned format is a power-of-two scale: mantissa_bits=0, specials='nan_all_ones'")
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
        object.__setattr__(self, "title", self.title or self.name)
        object.__setattr__(self, "storage_bits", self.storage_bits or self.bits)
        if self.max_exponent > 127 or self.min_exponent - self.mantissa_bits < -149:
            raise ValueError(
                f"bias {self.bias} puts values of {self.name} outside the range of FP32: choose a bias that keeps "
                f"largest below 2**128 and the smallest value at or above 2**-149"
            )

    @property
    def bits(self) -> int:
        """Number of bits of a code, sign included."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def has_inf(self) -> bool:
        """Whether a code means infinity."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether a code means NaN."""
        return self.specials != "none"

    @property
    def has_zero(self) -> bool:
        """Whether a code means zero (all formats but E8M0)."""
        return self.signed

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return self.signed and self.specials != "nan_negative_zero"

    @property
    def largest_code(self) -> int:
        """The code of ``largest``."""
        top = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        if self.specials == "ieee":
            return top - 2**self.mantissa_bits
        return top - 1 if self.specials == "nan_all_ones" else top

    @property
    def inf_code(self) -> int | None:
        """The code of +inf, or None."""
        return self.largest_code + 1 if self.has_inf else None

    @property
    def nan_code(self) -> int | None:
        """The code written for NaN (the quiet one in IEEE formats), or None."""
        if self.specials == "nan_negative_zero":
            return 2 ** (self.bits - 1)
        if self.specials == "ieee":
            return self.largest_code + 1 + 2 ** (self.mantissa_bits - 1)
        return self.largest_code + 1 if self.has_nan else None

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return (1 if self.signed else 0) - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the binade that holds ``largest``."""
        return max(self.largest_code >> self.mantissa_bits, 1 if self.signed else 0) - self.bias

    @property
    def largest(self) -> float:
        """Largest finite value."""
        field, fraction = divmod(self.largest_code, 2**self.mantissa_bits)
        lead = 1.0 if field or not self.signed else 0.0
        return (lead + fraction * self.eps) * 2.0**self.max_exponent

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with an implied leading one."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float | None:
        """Smallest positive value; None for formats that have no subnormals."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits) if self.mantissa_bits else None

    @property
    def smallest(self) -> float:
        """Smallest positive value of any kind."""
        return self.smallest_subnormal or self.smallest_normal

    @property
    def eps(self) -> float:
        """Gap between 1 and the next value."""
        return 2.0**-self.mantissa_bits

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding a value of the normal range to nearest: ``eps / 2``."""
        return self.eps / 2

    @property
    def decimal_digits(self) -> float:
        """Precision in decimal digits: ``(mantissa_bits + 1) * log10(2)``."""
        return (self.mantissa_bits + 1) * math.log10(2)

    @property
    def binades(self) -> int:
        """Number of powers of two between the smallest and the largest value, subnormals included."""
        return self.max_exponent - round(math.log2(self.smallest)) + 1

    @property
    def overflow_threshold(self) -> float:
        """Midpoint between ``largest`` and the value that would follow it: above it, nearest rounding overflows.

        The midpoint itself overflows too where ``largest_code`` is odd (ties go to the even code).
        """
        return self.largest + 2.0 ** (self.max_exponent - self.mantissa_bits - 1)

    @property
    def nearest_edges(self) -> tuple[tuple[float, bool], ...]:
        """Magnitudes where nearest-even rounding starts to give a subnormal, a normal value, and overflow.

        Beside each stands whether the edge itself belongs to the upper side: a tie goes to the even code.  Without
        subnormals the first two coincide.
        """
        half_step = self.smallest / 2
        first = (half_step, False)
        normal = (self.smallest_normal - half_step, True) if self.mantissa_bits else first
        return first, normal, (self.overflow_threshold, self.largest_code % 2 == 1)

    @property
    def counts(self) -> CodeCounts:
        """How the codes are spent."""
        finite = (self.largest_code + 1) * (2 if self.signed else 1) - (self.specials == "nan_negative_zero")
        infinite = 2 * self.has_inf
        distinct = finite - self.has_negative_zero
        return CodeCounts(2**self.bits, finite, distinct, infinite, 2**self.bits - finite - infinite)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype that stores one value of this format an element, or None (TF32, FP6, FP4, your own)."""
        return _TORCH_DTYPES[self.name] if FORMATS.get(self.name) == self and self.name in _TORCH_DTYPES else None

    def as_dict(self) -> dict:
        """The fields and derived values as JSON-ready numbers and strings (what the exhibits read)."""
        derived = ("bits", "has_inf", "has_nan", "has_zero", "has_negative_zero", "largest_code", "inf_code",
                   "nan_code", "min_exponent", "max_exponent", "largest", "smallest_normal", "smallest",
                   "overflow_threshold", "binades")  # fmt: skip
        return asdict(self) | {key: getattr(self, key) for key in derived}


FORMATS: Mapping[str, FloatFormat] = MappingProxyType({
    fmt.name: fmt
    for fmt in (
        FloatFormat("fp32", 8, 23, title="FP32"),
        FloatFormat("tf32", 8, 10, title="TF32", storage_bits=32),
        FloatFormat("fp16", 5, 10, title="FP16"),
        FloatFormat("bf16", 8, 7, title="BF16"),
        FloatFormat("fp8_e4m3", 4, 3, specials="nan_all_ones", title="FP8 E4M3"),
        FloatFormat("fp8_e5m2", 5, 2, title="FP8 E5M2"),
        FloatFormat("fp8_e4m3fnuz", 4, 3, bias=8, specials="nan_negative_zero", title="FP8 E4M3 FNUZ"),
        FloatFormat("fp8_e5m2fnuz", 5, 2, bias=16, specials="nan_negative_zero", title="FP8 E5M2 FNUZ"),
        FloatFormat("fp6_e3m2", 3, 2, specials="none", title="FP6 E3M2"),
        FloatFormat("fp6_e2m3", 2, 3, specials="none", title="FP6 E2M3"),
        FloatFormat("fp4_e2m1", 2, 1, specials="none", title="FP4 E2M1"),
        FloatFormat("e8m0", 8, 0, specials="nan_all_ones", signed=False, title="E8M0"),
    )
})  # fmt: skip

_TORCH_DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz, "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
} | ({"e8m0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {})  # fmt: skip
_BY_DTYPE = {dtype: FORMATS[name] for name, dtype in _TORCH_DTYPES.items()}


FormatLike = str | torch.dtype | FloatFormat


def get_format(x: FormatLike) -> FloatFormat:
    """The format that ``x`` names: a key of ``FORMATS``, a torch dtype, or a ``FloatFormat`` (returned as it is).

    Raises KeyError, listing the names, for anything else.
    """
    if isinstance(x, FloatFormat):
        return x
    found = _BY_DTYPE.get(x) if isinstance(x, torch.dtype) else FORMATS.get(x) if isinstance(x, str) else None
    if found is None:
        raise KeyError(
            f"expected a format name, a torch dtype or a FloatFormat, got {x!r}; the names are {', '.join(FORMATS)}"
        )
    return found
