"""The one line that an exercise prints: correct, not done, or what was expected and what came."""

import math
from collections.abc import Callable, Iterable

import torch

Case = tuple[tuple, object]


def show(x: object) -> str:
    """``x`` as the verdict prints it: six digits, all of them just beside an integer, a tensor by size and first value.
    """
    if isinstance(x, torch.Tensor):
        x = x.detach().flatten()
        return show(x.item()) if x.numel() == 1 else f"a tensor of {x.numel()} values ({show(x[0])}, ...)"
    if not isinstance(x, float):
        return repr(x)
    beside = math.isfinite(x) and x != round(x) and math.isclose(x, round(x), rel_tol=1e-7)
    return repr(x) if beside else f"{x:.6g}"


def same(got: object, expected: object, relative: float) -> bool:
    """Whether ``got`` is ``expected``: words and truth values exactly, numbers and tensors within ``relative``."""
    if isinstance(expected, bool | str):
        return got == expected
    try:
        got, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return False
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=relative, atol=0, equal_nan=True)


def farthest(got: object, expected: object) -> str:
    """Expected and got value where two tensors differ most, with its index; or their shapes; or what is no tensor."""
    if not (isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor)):
        return f"expected {show(expected)}, got {show(got)}"
    if got.shape != expected.shape:
        return f"expected a tensor of shape {list(expected.shape)}, got one of shape {list(got.shape)}"
    a, b = got.detach().double(), expected.double()
    distance = (a - b).abs().nan_to_num(nan=math.inf)
    distance[(a == b) | (a.isnan() & b.isnan())] = 0.0
    at = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    return f"expected {show(expected[at])}, got {show(got[at])} at {list(at)}"


def check(function: Callable, cases: Iterable[Case], relative: float = 0.0, by_element: bool = False) -> None:
    """Print the verdict on ``function`` over ``cases``: (arguments, expected result), drawn one by one.

    ``by_element``: of a wrong tensor, show the value that is farthest off instead of the first; done anyway where the
    first values are told by the same text.
    """
    for arguments, expected in cases:
        try:
            got = function(*arguments)
        except NotImplementedError:
            got = None
        except Exception as error:  # the reader's own code: whatever it raises is the answer to show
            got = f"{type(error).__name__}: {error}"
        if got is None or got is ...:
            print("Not done yet.")
            return
        if not same(got, expected, relative):
            call = f"{function.__name__}({', '.join(map(show, arguments))})"
            told = f"expected {show(expected)}, got {show(got)}"
            if by_element or show(expected) == show(got):
                told = farthest(got, expected)
            print(f"Not yet: {told} for {call}")
            return
    print("Correct.")
