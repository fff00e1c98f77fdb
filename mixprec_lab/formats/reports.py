"""What happens to a tensor in a format: shares of its elements, and the source note's tables put right."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mixprec_lab.formats.codes import Bits, bits_of, decode, encode
from mixprec_lab.formats.descriptor import FloatFormat, FormatLike, get_format


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain-text table: first column left-aligned, the others right-aligned, a rule under the headers."""
    cells = [list(map(str, row)) for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    return "\n".join([line(cells[0]).rstrip(), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


@dataclass(frozen=True)
class RangeShares:
    """Shares of a tensor's elements by what rounding to nearest makes of them; the seven add up to 1."""

    zero: float  #: were zero already
    flushed: float  #: not zero before, zero after
    subnormal: float
    normal: float
    overflowed: float  #: finite before, beyond the largest value after
    infinite: float  #: were infinite already
    nan: float  #: were NaN already


def classify(x: torch.Tensor, fmt: FormatLike, scale: float = 1.0) -> RangeShares:
    """Shares of ``x * scale`` that are zero, flushed, subnormal, normal, overflowed, infinite or NaN in ``fmt``.

    The product is taken in float64.  Raises ValueError for an empty tensor, for an unsigned format (E8M0) and for a
    scale that is not positive and finite; TypeError for a tensor that is not floating-point.
    """
    fmt = get_format(fmt)
    if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
        raise TypeError(f"expected a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.numel() == 0:
        raise ValueError("expected at least one element, got an empty tensor")
    if not fmt.signed:
        raise ValueError(f"{fmt.title} is an unsigned scale format: classify() needs one with a sign and a zero")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"expected a positive, finite scale, got {scale}")
    magnitude = x.detach().double().abs().mul_(scale)
    keeps, normal, overflow = (_count(magnitude, edge, at_threshold=upper) for edge, upper in fmt.nearest_edges)
    infinite, nan, zero = int(x.isinf().sum()), int(x.isnan().sum()), int((x == 0).sum())
    n = x.numel()
    counts = (zero, n - zero - nan - keeps, keeps - normal, normal - overflow, overflow - infinite, infinite, nan)
    return RangeShares(*(c / n for c in counts))


def _count(magnitude: torch.Tensor, threshold: float, *, at_threshold: bool) -> int:
    """How many elements lie above ``threshold``, or on it if ``at_threshold``; NaN never counts."""
    return int((magnitude >= threshold if at_threshold else magnitude > threshold).sum())


@dataclass(frozen=True)
class GradientDistribution:
    """Moments of a tensor of gradients and what each format makes of it."""

    mean: float
    std: float
    smallest: float
    largest: float
    shares: dict[str, RangeShares]

    def __str__(self) -> str:
        head = f"mean {self.mean:.1e}, std {self.std:.3e}, range {self.smallest:.2e} to {self.largest:.2e}"
        rows = [
            [get_format(name).title, *(f"{v:.2%}" for v in (s.flushed, s.subnormal, s.normal, s.overflowed))]
            for name, s in self.shares.items()
        ]
        return head + "\n" + text_table(["format", "flushed to 0", "subnormal", "normal", "overflowed"], rows)


def analyze_gradient_distribution(
    gradients: torch.Tensor | None = None,
    formats: Iterable[FormatLike] = ("fp16", "bf16"),
    generator: torch.Generator | None = None,
) -> GradientDistribution:
    """Moments of ``gradients`` and their shares per format.

    Without ``gradients`` it draws the source note's example: one million values from N(0, 1e-5), seeded with 0 unless a
    ``generator`` is given.  That is a drill, not a typical LLM: real gradients span dozens of binades.
    """
    if gradients is None:
        generator = generator or torch.Generator().manual_seed(0)
        gradients = torch.randn(1_000_000, generator=generator) * 1e-5
    shares = {fmt.name: classify(gradients, fmt) for fmt in map(get_format, formats)}
    g = gradients.double()
    return GradientDistribution(float(g.mean()), float(g.std()), float(g.min()), float(g.max()), shares)


@dataclass(frozen=True)
class FormatComparison:
    """The formats asked for and one gradient distribution; ``str()`` of it is the table."""

    formats: tuple[FloatFormat, ...]
    gradients: GradientDistribution

    def __str__(self) -> str:
        headers = ["format", "bits", "smallest subnormal", "smallest normal", "largest", "eps", "digits"]
        rows = [
            (f.title, f.bits, f"{f.smallest_subnormal:.6e}" if f.smallest_subnormal else "none",
             f"{f.smallest_normal:.6e}", f"{f.largest:.6e}", f"{f.eps:.6e}", f"{f.decimal_digits:.1f}")
            for f in self.formats
        ]  # fmt: skip
        return text_table(headers, rows) + f"\n\nGradients: {self.gradients}"


def compare_precision_formats(
    formats: Iterable[FormatLike] = ("fp32", "tf32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"),
    gradients: torch.Tensor | None = None,
    *,
    show: bool = True,
) -> FormatComparison:
    """Range and precision of ``formats`` and the fate of ``gradients`` in each; prints the table if ``show``.

    The smallest *normal* and the smallest *subnormal* value are separate columns: a gradient below the first loses
    precision, only one at or below half the second is lost.  Raises KeyError for an unknown format.
    """
    chosen = tuple(map(get_format, formats))
    comparison = FormatComparison(chosen, analyze_gradient_distribution(gradients, chosen))
    if show:
        print(comparison)
    return comparison


@dataclass(frozen=True)
class CastResult:
    """One number rounded to one format: ``outcome`` is normal, subnormal, zero, flushed to zero, overflow or nan."""

    format: FloatFormat
    value: float
    result: Bits
    relative_error: float

    @property
    def outcome(self) -> str:
        """What became of the number, in words."""
        kind = self.result.kind
        if kind == "zero" and self.value != 0:
            return "flushed to zero"
        beyond = kind in ("infinity", "nan") or abs(self.value) > self.format.overflow_threshold
        if beyond and math.isfinite(self.value):
            return f"overflow to {self.result.value:g}"
        return str(kind)


@dataclass(frozen=True)
class AccumulationResult:
    """A sum of equal increments kept in one format."""

    format: FloatFormat
    steps: int
    increment: float  #: the increment as the format stores it
    total: float
    exact: float
    stalled_after: int | None  #: additions after which the sum no longer moved, or None

    @property
    def relative_error(self) -> float:
        """``|total - exact| / |exact|``."""
        return abs(self.total - self.exact) / abs(self.exact)

    @property
    def increment_error(self) -> float:
        """Relative error of the stored increment: the part of the error that is not accumulation."""
        exact = self.exact / self.steps
        return abs(self.increment - exact) / abs(exact)


class PrecisionAnalyzer:
    """The source note's two experiments, on any formats."""

    def __init__(self, formats: Iterable[FormatLike] = ("fp32", "fp16", "bf16")) -> None:
        self.formats = tuple(map(get_format, formats))

    def test_overflow_underflow(
        self, values: Sequence[float] = (1e-10, 1e-5, 1e5, 1e10), *, show: bool = True
    ) -> list[CastResult]:
        """What each of ``values`` becomes in each format: normal, subnormal, flushed to zero or overflow."""
        results = []
        for value in values:
            for fmt in self.formats:
                bits = bits_of(value, fmt)
                error = abs(bits.value - value) / abs(value) if value else 0.0
                results.append(CastResult(fmt, value, bits, error))
        if show:
            rows = [[f"{r.value:g}", r.format.title, f"{r.result.value:.6g}", r.outcome] for r in results]
            print(text_table(["value", "format", "becomes", "outcome"], rows))
        return results

    def gradient_accumulation_error(
        self, steps: int = 1000, increment: float = 1e-7, *, show: bool = True
    ) -> list[AccumulationResult]:
        """Add ``increment`` to a running sum ``steps`` times, the sum itself kept in each format.

        Every addition is rounded once, to nearest even.  Raises ValueError unless ``steps`` >= 1 and ``increment`` is
        finite and not zero.
        """
        if steps < 1 or not math.isfinite(increment) or increment == 0:
            raise ValueError(f"expected steps >= 1 and a finite increment other than 0, got {steps} and {increment}")
        results = [_accumulate_equal(fmt, steps, increment) for fmt in self.formats]
        if show:
            rows = [
                (r.format.title, f"{r.increment:.6e}", f"{r.total:.6e}", f"{r.relative_error:.2%}",
                 f"{r.increment_error:.2%}", "no" if r.stalled_after is None else f"after {r.stalled_after}")
                for r in results
            ]  # fmt: skip
            headers = ["format", "stored increment", "sum", "error", "error of the increment", "stalled"]
            print(f"{steps} x {increment:g} = {steps * increment:g}\n" + text_table(headers, rows))
        return results


def _accumulate_equal(fmt: FloatFormat, steps: int, increment: float) -> AccumulationResult:
    step = decode(encode(increment, fmt), fmt)
    total, stalled_after = torch.zeros((), dtype=torch.float64), None
    for i in range(steps):
        # float64 holds the exact sum of two such values or rounds it innocuously (Figueroa 1995: 53 >= 2 * 24 + 2).
        new = decode(encode(total + step, fmt), fmt)
        if bool(new == total):
            stalled_after = i
            break
        total = new
    return AccumulationResult(fmt, steps, float(step), float(total), steps * increment, stalled_after)
