"""The random Hadamard transform: an orthonormal change of basis that spreads an outlier over its group."""

import torch


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The orthonormal Hadamard matrix of Sylvester's construction, shape (size, size): symmetric, its own inverse.

    Entries are ``+-size**-0.5``, exact where ``size`` is a power of four.  Raises ValueError unless ``size`` is a power
    of two.
    """
    if not isinstance(size, int) or size < 1 or size & (size - 1):
        raise ValueError(f"expected size to be a power of two, got {size!r}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * size**-0.5).to(dtype)


def random_signs(size: int = 16, generator: torch.Generator | None = None) -> torch.Tensor:
    """``size`` random signs, +1 or -1, float32: the random part of the transform, drawn once and then kept."""
    device = None if generator is None else generator.device
    return torch.randint(0, 2, (size,), generator=generator, device=device).float() * 2 - 1


def random_hadamard(x: torch.Tensor, signs: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """``x`` with every ``len(signs)`` values along ``axis`` multiplied by ``signs`` and the Hadamard matrix.

    The transform is orthonormal: norms stay, and so does a product of two matrices whose contracted dimensions were
    both transformed with the same signs.  An outlier of size ``k`` becomes ``len(signs)`` values of ``k /
    sqrt(len(signs))``.  Computed in float32 at least and rounded once to the dtype of ``x``.  NVFP4 training uses it on
    both inputs of the weight gradient, with groups of 16 (arXiv:2509.25149).

    Raises ValueError unless the number of signs is a power of two that divides the dimension.
    """
    grouped, back = _groups(x, signs, axis)
    matrix = hadamard_matrix(len(signs), grouped.dtype).to(x.device)
    return back((grouped * signs.to(grouped)) @ matrix)


def undo_random_hadamard(x: torch.Tensor, signs: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """The inverse of ``random_hadamard`` with the same ``signs`` and ``axis``; errors are the same."""
    grouped, back = _groups(x, signs, axis)
    matrix = hadamard_matrix(len(signs), grouped.dtype).to(x.device)
    return back((grouped @ matrix) * signs.to(grouped))


def _groups(x: torch.Tensor, signs: torch.Tensor, axis: int):
    """``x`` as (..., groups, len(signs)), and the function that puts a tensor of that shape back."""
    if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim()):
        raise TypeError(
            f"expected a floating-point tensor with a dimension, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    moved = x.movedim(axis, -1)
    if signs.dim() != 1 or moved.shape[-1] % max(len(signs), 1):
        raise ValueError(
            f"expected a vector of signs whose length divides the dimension, got shape {tuple(signs.shape)} for "
            f"{moved.shape[-1]} values along axis {axis}: pad x, or take fewer signs"
        )
    working = x.dtype if x.dtype == torch.float64 else torch.float32
    grouped = moved.to(working).unflatten(-1, (-1, len(signs)))
    return grouped, lambda y: y.flatten(-2).movedim(-1, axis).to(x.dtype)
