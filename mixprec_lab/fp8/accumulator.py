"""A matrix product whose sums are kept in few bits, as Hopper's FP8 tensor cores keep them."""

import torch


def tensor_core_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    accumulator_bits: int = 14,
    products_per_instruction: int = 32,
    promote_every: int | None = None,
) -> torch.Tensor:
    """``a @ b`` with a short accumulator, float64: (m, k) and (k, n) to (m, n).

    One instruction adds ``products_per_instruction`` exact products to the accumulator.  All are shifted to the largest
    exponent among them, accumulator included, cut off below ``accumulator_bits`` bits (toward zero), and added; the
    sum is cut again.  ``promote_every`` elements of k (a multiple of the instruction's) the accumulator is added to an
    FP32 sum and starts again at zero; None never does that.

    This is a model after DeepSeek-V3, arXiv:2412.19437, sections 3.3.2 and 3.5.2 (14 bits, 32 products, promotion every
    128), not a measurement.  Operands must be finite.  Raises ValueError for other shapes and numbers.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"expected (m, k) and (k, n), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.is_complex() or b.is_complex():
        raise TypeError("expected real operands, got complex ones")
    whole = isinstance(accumulator_bits, int) and isinstance(products_per_instruction, int)
    if not whole or not 2 <= accumulator_bits <= 48 or products_per_instruction < 1:
        raise ValueError(
            f"expected 2 to 48 accumulator bits and at least one product an instruction, got {accumulator_bits} and "
            f"{products_per_instruction}"
        )
    if promote_every is not None and (promote_every < 1 or promote_every % products_per_instruction):
        raise ValueError(
            f"expected promote_every to be a multiple of {products_per_instruction} or None, got {promote_every}"
        )
    if not all(bool((t.abs() <= 2.0**60).all()) for t in (a, b)):
        raise ValueError("expected finite operands of at most 2**60, whose sums FP32 holds, got larger, inf or NaN")
    a, b = a.double(), b.double()
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    accumulator = total.double()
    for start in range(0, a.shape[1], products_per_instruction):
        if promote_every is not None and start and start % promote_every == 0:
            total, accumulator = total + accumulator.float(), torch.zeros_like(accumulator)
        chunk = slice(start, start + products_per_instruction)
        products = a[:, chunk].unsqueeze(2) * b[chunk].unsqueeze(0)
        accumulator = _instruction(accumulator, products, accumulator_bits)
    return total.double() + accumulator if promote_every is None else (total + accumulator.float()).double()


def _instruction(accumulator: torch.Tensor, products: torch.Tensor, bits: int) -> torch.Tensor:
    """The accumulator (m, n) after adding ``products`` (m, k, n)."""
    largest = torch.maximum(products.abs().amax(1), accumulator.abs())
    step = _last_place(largest, bits)
    whole = (products / step.unsqueeze(1)).trunc().sum(1) + (accumulator / step).trunc()
    exact = whole * step
    last = _last_place(exact.abs(), bits)
    return (exact / last).trunc() * last


def _last_place(magnitude: torch.Tensor, bits: int) -> torch.Tensor:
    """The value of the last of ``bits`` bits of each magnitude; 1 for zero."""
    _, exponent = torch.frexp(magnitude)
    return torch.where(magnitude > 0, torch.ldexp(torch.ones_like(magnitude), exponent - bits), 1.0)
