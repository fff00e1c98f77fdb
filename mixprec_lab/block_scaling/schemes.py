"""A scheme is a value: element format, block, scale format and rule; and the scales that a scheme gives to blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from mixprec_lab.formats import FloatFormat, FormatLike, get_format
from mixprec_lab.rounding import quantize

ScaleRule = Literal["nearest", "floor", "round_up", "even"]
SCALE_RULES: tuple[str, ...] = ("nearest", "floor", "round_up", "even")

#: Symmetric INT8, -127 to 127: a float format whose values all lie in one binade or below it has one step, here 1.
#: Its codes are sign and magnitude, so -0 keeps its sign, which two's complement does not have.
INT8 = FloatFormat("int8", 1, 6, bias=-5, specials="none", title="INT8")


@dataclass(frozen=True)
class BlockScheme:
    """How a tensor is cut into blocks, and what a block stores: elements of one format and a scale.

    ``dataclasses.replace`` makes variants, and formats may be given by name:
    ``replace(get_scheme("mxfp8"), name="mxfp8_e5m2", element="fp8_e5m2")``.  Raises ValueError for a block, rule or
    pair of formats that make no sense, KeyError for an unknown format name.
    """

    name: str
    element: FormatLike  #: format of the elements; a FloatFormat after construction
    #: rows and columns that share a scale; columns lie along the axis given to ``quantize_blocks``, None is all of
    #: them.  (1, k) is k values of one row, (1, None) a row, (r, k) a block of the last two dimensions, (None, None)
    #: the whole tensor.
    block: tuple[int | None, int | None]
    scale: FormatLike = "fp32"  #: format of the scales; a FloatFormat after construction
    rule: ScaleRule = "nearest"  #: how a scale is made from the largest magnitude of its block; see ``block_scales``
    second_level: bool = False  #: whether an FP32 scale of the whole tensor brings the block scales into range
    title: str = ""  #: the name to print
    source: str = ""  #: where the scheme is specified

    def __post_init__(self) -> None:
        object.__setattr__(self, "element", get_format(self.element))
        object.__setattr__(self, "scale", get_format(self.scale))
        object.__setattr__(self, "title", self.title or self.name)
        rows, columns = self.block
        sizes = [n for n in (rows, columns) if n is not None]
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
            raise ValueError(f"expected a block of positive integers or None, got {self.block!r}")
        if rows != 1 and columns is None and rows is not None:
            raise ValueError(f"expected (1, None), (None, None) or two integers as block, got {self.block!r}")
        if rows is None and columns is not None:
            raise ValueError(f"a block over all rows is not supported, got {self.block!r}: give the number of rows")
        if self.rule not in SCALE_RULES:
            raise ValueError(f"expected rule to be one of {', '.join(SCALE_RULES)}, got {self.rule!r}")
        if self.second_level and (self.rule != "nearest" or not self.scale.has_zero or self.scale.bits >= 32):
            raise ValueError(
                f"a second-level scale serves block scales of narrow range and rule 'nearest', as in NVFP4; got "
                f"{self.scale.title} scales with rule {self.rule!r}: leave second_level=False"
            )
        if not self.element.signed:
            raise ValueError(f"expected elements with a sign and a zero, got {self.element.title}")

    @property
    def powers_of_two(self) -> bool:
        """Whether every scale is a power of two, so that dividing by it and multiplying are exact."""
        return self.rule != "nearest" or self.scale.mantissa_bits == 0

    @property
    def block_size(self) -> int | None:
        """Number of values in a full block, or None where that depends on the tensor."""
        rows, columns = self.block
        return None if rows is None or columns is None else rows * columns

    @property
    def bits_per_value(self) -> float:
        """Bits a value occupies in a large tensor of full blocks, scales included; rows count as infinitely long."""
        return self.element.bits + (self.scale.bits / self.block_size if self.block_size else 0.0)


SchemeLike = str | BlockScheme

_OCP = "OCP MX specification 1.0, section 6.3"
SCHEMES: Mapping[str, BlockScheme] = MappingProxyType({
    s.name: s
    for s in (
        BlockScheme("per_tensor", "fp8_e4m3", (None, None), title="E4M3 per tensor", source="arXiv:2209.05433"),
        BlockScheme("per_row", "fp8_e4m3", (1, None), title="E4M3 per row", source="torchao, rowwise recipe"),
        BlockScheme("tile_1x128", "fp8_e4m3", (1, 128), title="E4M3 1x128", source="arXiv:2412.19437, 3.3.2"),
        BlockScheme("block_128x128", "fp8_e4m3", (128, 128), title="E4M3 128x128",
                    source="arXiv:2412.19437, 3.3.2"),
        BlockScheme("mxfp8", "fp8_e4m3", (1, 32), "e8m0", "floor", title="MXFP8", source=_OCP),
        BlockScheme("mxfp6", "fp6_e3m2", (1, 32), "e8m0", "floor", title="MXFP6", source=_OCP),
        BlockScheme("mxfp4", "fp4_e2m1", (1, 32), "e8m0", "floor", title="MXFP4", source=_OCP),
        BlockScheme("nvfp4", "fp4_e2m1", (1, 16), "fp8_e4m3", second_level=True, title="NVFP4",
                    source="arXiv:2509.25149, appendix"),
        BlockScheme("int8", INT8, (None, None), title="INT8 per tensor", source="symmetric absmax quantization"),
    )
})  # fmt: skip


def get_scheme(scheme: SchemeLike) -> BlockScheme:
    """The scheme that ``scheme`` names, or ``scheme`` itself.  KeyError, listing the names, for anything else."""
    if isinstance(scheme, BlockScheme):
        return scheme
    found = SCHEMES.get(scheme) if isinstance(scheme, str) else None
    if found is None:
        raise KeyError(f"expected a scheme name or a BlockScheme, got {scheme!r}; the names are {', '.join(SCHEMES)}")
    return found


def divided(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """``amax / largest``, correctly rounded on every device: CUDA multiplies by ``1 / largest`` if it is a number."""
    return amax / torch.full((), largest, dtype=amax.dtype, device=amax.device)


def block_scales(amax: torch.Tensor, scheme: SchemeLike) -> torch.Tensor:
    """The scale that ``scheme`` gives to blocks with these largest magnitudes; values of its scale format, float32.

    Rules.  ``nearest``: ``amax / element.largest`` rounded to nearest in the scale format.  The others give powers of
    two.  ``floor``: ``2**(floor(log2(amax)) - element.max_exponent)``, the rule of OCP MX 1.0, section 6.3; a block
    whose largest value has a fraction above that of ``element.largest`` saturates.  ``round_up``: the smallest power
    of two that saturates nothing (``RCEIL`` in torchao, and what Transformer Engine does).  ``even``: ``floor`` after
    rounding ``amax`` to the element's fraction bits, ties up.

    Scales are held in the range of their format.  An ``amax`` of zero gives the smallest scale, or zero where the
    format has one and is narrower than FP32; FP32 scales stay at or above 2**-126, so that their inverse is finite.
    NaN and infinity give NaN: a scale that nobody can use.  ``second_level`` is the caller's business.
    """
    scheme = get_scheme(scheme)
    element, scale = scheme.element, scheme.scale
    if scheme.rule == "nearest":
        scales = quantize(divided(amax, element.largest).float(), scale)
    else:
        mantissa, exponent = torch.frexp(amax.double())  # amax = mantissa * 2**exponent, mantissa in [0.5, 1)
        if scheme.rule == "round_up":
            top = element.largest / 2.0 ** (element.max_exponent + 1)
            exponent = exponent + (mantissa > top)
        elif scheme.rule == "even":
            digits = 2.0 ** (element.mantissa_bits + 1)
            exponent = exponent + (torch.floor(mantissa * digits + 0.5) >= digits)
        power = (exponent - 1 - element.max_exponent).clamp_(scale.min_exponent, scale.max_exponent)
        power = torch.where(amax == 0, scale.min_exponent, power)
        scales = torch.exp2(power.double()).float()
    if scale.mantissa_bits == 23:
        scales = scales.clamp(min=scale.smallest_normal)
    return scales.masked_fill(~amax.isfinite(), torch.nan)
