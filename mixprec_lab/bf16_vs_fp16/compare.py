"""The same weights, gradients and updates through both 16-bit formats, every result as data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mixprec_lab.device import one_thread
from mixprec_lab.formats import (
    FloatFormat,
    FormatLike,
    PrecisionAnalyzer,
    RangeShares,
    classify,
    get_format,
    text_table,
)
from mixprec_lab.formats.reports import AccumulationResult
from mixprec_lab.master_weights import lost_updates
from mixprec_lab.rounding import quantize, relative_error

FORMATS_COMPARED = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class RoundingCost:
    """What rounding to one format does to a tensor whose values it can all hold or lose."""

    format: FloatFormat
    rms_error: float  #: root mean square of ``rounded - x``
    rms_relative: float  #: ``rms_error`` over the root mean square of ``x``
    median_relative: float  #: median of ``|rounded - x| / |x|`` over the non-zero ``x``
    worst_relative: float  #: largest of them; 1 is a value flushed to zero
    shares: RangeShares


def rounding_cost(x: torch.Tensor, fmt: FormatLike) -> RoundingCost:
    """Error and loss of ``x`` rounded to nearest in ``fmt``, in float64.

    Values that overflow are left out of the errors and counted in ``shares.overflowed``; flushed values stay in, with
    a relative error of 1.  The errors are 0 where nothing is left.  Raises as ``classify`` for an empty tensor, one
    that is not floating-point or an unsigned format, and ValueError for NaN or infinity in ``x``.
    """
    fmt, shares = get_format(fmt), classify(x, fmt)
    if shares.nan or shares.infinite:
        raise ValueError("expected finite values, got NaN or infinity: select x[x.isfinite()] first")
    exact = x.detach().double().flatten()
    rounded = quantize(exact, fmt, overflow="native")
    kept = rounded.isfinite()
    exact, rounded = exact[kept], rounded[kept]
    relative = relative_error(exact, rounded)[exact != 0]
    if relative.numel() == 0:
        return RoundingCost(fmt, 0.0, 0.0, 0.0, 0.0, shares)
    rms = float((rounded - exact).square().mean().sqrt())
    return RoundingCost(
        fmt, rms, rms / float(exact.square().mean().sqrt()), float(relative.median()), float(relative.max()), shares
    )


@dataclass(frozen=True)
class BF16FP16Comparison:
    """Everything ``compare_bf16_fp16`` measures; ``str()`` of it is the report."""

    formats: tuple[FloatFormat, ...]
    tensors: dict[str, dict[str, RoundingCost]]  #: tensor name -> format name -> cost
    accumulation: dict[str, AccumulationResult]  #: ``steps`` equal increments added up in each format
    lost: dict[str, dict[float, float]]  #: format name -> size of update -> share of weights it leaves unchanged

    @property
    def error_ratio(self) -> float:
        """How many times larger BF16's error of the weights is than FP16's."""
        weights = self.tensors["weights"]
        return weights["bf16"].rms_error / weights["fp16"].rms_error

    def __str__(self) -> str:
        return "\n\n".join((self._ranges(), self._tensors(), self._sums(), self._lost()))

    def _ranges(self) -> str:
        rows = [
            (f.title, f"{f.largest:.4e}", f"{f.smallest_normal:.4e}", f"{f.smallest_subnormal:.4e}", f"{f.eps:.2e}")
            for f in self.formats
        ]
        return text_table(["format", "largest", "smallest normal", "smallest subnormal", "eps"], rows)

    def _tensors(self) -> str:
        rows = [
            (name, cost.format.title, f"{cost.rms_relative:.2e}", f"{cost.shares.flushed:.2%}",
             f"{cost.shares.subnormal:.2%}", f"{cost.shares.overflowed:.2%}")
            for name, costs in self.tensors.items() for cost in costs.values()
        ]  # fmt: skip
        return text_table(["tensor", "format", "relative RMS error", "flushed", "subnormal", "overflowed"], rows)

    def _sums(self) -> str:
        first = next(iter(self.accumulation.values()))
        rows = [
            (r.format.title, f"{r.total:.4e}", f"{r.relative_error:.2%}",
             "no" if r.stalled_after is None else f"after {r.stalled_after}")
            for r in self.accumulation.values()
        ]  # fmt: skip
        head = f"{first.steps} x {first.exact / first.steps:g} = {first.exact:g}"
        return head + "\n" + text_table(["accumulator", "sum", "error", "stalled"], rows)

    def _lost(self) -> str:
        sizes = list(next(iter(self.lost.values())))
        rows = [(get_format(name).title, *(f"{shares[s]:.1%}" for s in sizes)) for name, shares in self.lost.items()]
        return text_table(["updates lost, by size", *(f"{s:g}" for s in sizes)], rows)


def compare_bf16_fp16(
    gradients: torch.Tensor | None = None,
    activations: torch.Tensor | None = None,
    *,
    steps: int = 1000,
    increment: float = 1e-6,
    update_sizes: Sequence[float] = (1e-5, 3e-5, 1e-4, 3e-4),
    generator: torch.Generator | None = None,
    show: bool = True,
) -> BF16FP16Comparison:
    """Range, rounding error, accumulation and lost updates of FP16, BF16 and FP32, as data; printed if ``show``.

    - Weights: one million from N(0, 0.02), drawn with ``generator`` (seed 0 without one).
    - Gradients and activations: yours, or those of the digits network after 100 steps (``recorded_tensors``).
    - Accumulation: ``increment`` added ``steps`` times, one sign, so that errors add up instead of cancelling.
    - Lost updates: one update of each size in ``update_sizes`` to each weight, random sign.

    Raises ValueError for non-finite gradients or activations, ``steps`` < 1 or an increment of 0; TypeError for tensors
    that are not floating-point.
    """
    generator = generator or torch.Generator().manual_seed(0)
    weights = torch.randn(1_000_000, generator=generator) * 0.02
    signs = torch.where(torch.rand(1_000_000, generator=generator) < 0.5, -1.0, 1.0)
    recorded = recorded_tensors() if gradients is None or activations is None else {}
    given = {
        "weights": weights,
        "gradients": recorded["gradients"] if gradients is None else gradients,
        "activations": recorded["activations"] if activations is None else activations,
    }
    sums = PrecisionAnalyzer(FORMATS_COMPARED).gradient_accumulation_error(steps, increment, show=False)
    comparison = BF16FP16Comparison(
        tuple(map(get_format, FORMATS_COMPARED)),
        {name: costs_by_format(x) for name, x in given.items()},
        {r.format.name: r for r in sums},
        {name: {size: lost_updates(weights, signs * size, name) for size in update_sizes} for name in FORMATS_COMPARED},
    )
    if show:
        print(comparison)
    return comparison


def costs_by_format(x: torch.Tensor, formats: Iterable[FormatLike] = ("fp16", "bf16")) -> dict[str, RoundingCost]:
    """``rounding_cost`` of ``x`` in each format, by the format's name."""
    return {fmt.name: rounding_cost(x, fmt) for fmt in map(get_format, formats)}


def recorded_tensors(steps: int = 100, batch_size: int = 256) -> Mapping[str, torch.Tensor]:
    """``gradients`` and ``activations`` of the digits network after ``steps`` of FP32 training, flat float32.

    The gradients are those of the layers' outputs, which are what an FP16 backward pass has to hold.
    """
    from mixprec_lab.models import convnet, digits, recorded_gradients, train

    data, model = digits(), convnet()
    with one_thread():
        train(model, data, steps)
    gradients = recorded_gradients(model, data, batch_size)["activations"]
    return {"gradients": gradients, "activations": layer_outputs(model, data.train_images[:batch_size])}


def layer_outputs(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The floating-point outputs of all layers (modules without children) of one forward pass, flat float32.

    No gradients are recorded and the model is left in its mode.  Raises ValueError if no layer returns such a tensor.
    """
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            outputs.append(output.detach().float().flatten())

    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    hooks = [leaf.register_forward_hook(keep) for leaf in leaves]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs:
        raise ValueError("expected a model whose layers return floating-point tensors, got none")
    return torch.cat(outputs)
