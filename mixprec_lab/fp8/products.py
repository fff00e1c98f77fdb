"""The three products of a linear layer, every operand in FP8, sums in FP32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mixprec_lab.fp8.scaling import Scaled

MULTIPLE = 16  # of both dimensions of every operand, in elements: what the FP8 matrix units take


class Way(NamedTuple):
    """How the products of one call are computed."""

    quantizers: Any  #: role -> quantizer
    backend: str  #: "emulated" or "scaled_mm"
    record: bool  #: whether amaxes are staged
    out_dtype: torch.dtype  #: of the output
    product_dtype: torch.dtype  #: of emulated products: float32, or bfloat16 for BF16 matrix units

    def quantized(self, role: str, x: torch.Tensor) -> Any:
        """``x`` as the operand ``role``."""
        return self.quantizers[role](x, self.record, self.backend == "scaled_mm")


class FP8Products(torch.autograd.Function):
    """``x @ weight.T + bias`` with quantized operands, and its two backward products likewise."""

    @staticmethod
    def forward(ctx, x, weight, bias, way):
        input_ = way.quantized("input", x)
        weight_ = way.quantized("weight", weight)
        kept = [_kept(operand) for operand in (input_, weight_)]
        ctx.save_for_backward(*(t for _, tensors in kept for t in tensors))
        ctx.way, ctx.kinds = way, [(make, len(tensors)) for make, tensors in kept]
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return product(input_.along(1), transposed(weight_.along(1)), way, way.out_dtype, bias=bias, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        way, saved = ctx.way, list(ctx.saved_tensors)
        (make_input, count), (make_weight, _) = ctx.kinds
        input_, weight_ = make_input(saved[:count]), make_weight(saved[count:])
        dtypes, needed = ctx.dtypes, ctx.needs_input_grad
        grad_ = way.quantized("grad_output", grad)
        grad_x = grad_weight = grad_bias = None
        if needed[0]:
            grad_x = product(grad_.along(1), weight_.along(0), way, dtypes[0])
        if needed[1]:
            grad_weight = product(transposed(grad_.along(0)), input_.along(0), way, dtypes[1])
        if dtypes[2] is not None and needed[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(dtypes[2])
        return grad_x, grad_weight, grad_bias, None


def _kept(operand: Any) -> tuple[Callable[[list[torch.Tensor]], Any], list[torch.Tensor]]:
    """How to make an operand again from its tensors, and the tensors, which autograd keeps: hooks may see them."""
    fields = list(operand)
    places = [i for i, value in enumerate(fields) if isinstance(value, torch.Tensor)]

    def make(tensors: list[torch.Tensor]) -> Any:
        values = [None if i in places else value for i, value in enumerate(fields)]
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return type(operand)(*values)

    tensors = [fields[i] for i in places]
    for i in places:
        fields[i] = None
    return make, tensors


def transposed(operand: Scaled) -> Scaled:
    """The operand of the transposed tensor."""
    return Scaled(operand.values.mT, operand.scale if operand.scale.dim() == 0 else operand.scale.mT)


def product(
    a: Scaled,
    b: Scaled,
    way: Way,
    dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """``a @ b + bias`` of the tensors that were quantized, in ``dtype``: (m, k) and (k, n) to (m, n), sums in FP32.

    ``fast`` allows Hopper's short accumulator, as Transformer Engine does for the forward product only.
    Autocast is off inside: it would round the sums.
    """
    with torch.autocast(a.values.device.type, enabled=False):
        if way.backend == "scaled_mm":
            return _scaled_mm(a, b, dtype, bias, fast)
        operands = a.values.to(way.product_dtype), b.values.to(way.product_dtype)
        output = _unscaled(torch.mm(*operands).float(), a.scale, b.scale)
        return (output if bias is None else output.add_(bias)).to(dtype)


def _unscaled(output: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """``output / (a_scale * b_scale)``, in place: in one pass where the product of the scales cannot leave float32."""
    if output.device.type == "cpu" and a_scale.dim() == b_scale.dim() == 0:  # reading a scale costs nothing there
        divisor = float(a_scale) * float(b_scale)
        if 2.0**-100 < divisor < 2.0**100:
            return output.mul_(1 / divisor)
    return output.mul_(a_scale.reciprocal()).mul_(b_scale.reciprocal())


def _scaled_mm(a: Scaled, b: Scaled, dtype: torch.dtype, bias: torch.Tensor | None, fast: bool) -> torch.Tensor:
    """The same on FP8 tensors.  The kernel takes decoding scales, the first operand by rows, the second by columns.

    On Hopper it takes no other layout, so that the backward products need transposed copies of their operands.
    A whole number of 16 elements is filled up with zeros.  Row scales come with a BF16 output only, a bias inside of
    the kernel only with an output of 16 bits, in which it is rounded first.
    """
    left, right = _filled(a.values).contiguous(), _filled(b.values).mT.contiguous().mT
    scales = [_decoding(a.scale, left.shape[0]), _decoding(b.scale, right.shape[1])]
    rows = a.scale.dim() > 0
    if rows:
        scales = [scales[0].reshape(-1, 1), scales[1].reshape(1, -1)]
    out = torch.bfloat16 if rows else dtype
    inside = None if bias is None or dtype == torch.float32 else _padded(bias.to(out), right.shape[1])
    output = torch._scaled_mm(
        left, right, *scales, bias=inside, out_dtype=out, use_fast_accum=fast and left.is_cuda
    )[: a.values.shape[0], : b.values.shape[1]]
    if bias is not None and inside is None:
        output = output + bias
    return output.to(dtype)


def _decoding(scale: torch.Tensor, size: int) -> torch.Tensor:
    if scale.dim() == 0:
        return scale.reciprocal()
    return _padded(scale.flatten().reciprocal(), size)


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, size - x.numel()))


def _filled(x: torch.Tensor) -> torch.Tensor:
    rows, columns = (-size % MULTIPLE for size in x.shape)
    if not rows and not columns:
        return x
    bytes_ = torch.nn.functional.pad(x.view(torch.uint8), (0, columns, 0, rows))  # zero bits are the number zero
    return bytes_.view(x.dtype)
