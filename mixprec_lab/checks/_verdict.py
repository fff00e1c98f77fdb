"""The one line that an exercise prints: correct, not done, or what was expected and what came."""

from collections.abc import Callable, Iterable

import torch

Case = tuple[tuple, object]


def show(x: object) -> str:
    """``x`` as the verdict prints it: six digits, a tensor by its size and first value."""
    if isinstance(x, torch.Tensor):
        x = x.detach().flatten()
        return show(x.item()) if x.numel() == 1 else f"a tensor of {x.numel()} values ({show(x[0])}, ...)"
    return f"{x:.6g}" if isinstance(x, float) else repr(x)


def same(got: object, expected: object, relative: float) -> bool:
    """Whether ``got`` is ``expected``: words and truth values exactly, numbers and tensors within ``relative``."""
    if isinstance(expected, bool | str):
        return got == expected
    try:
        got, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return False
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=relative, atol=0, equal_nan=True)


def check(function: Callable, cases: Iterable[Case], relative: float = 0.0) -> None:
    """Print the verdict on ``function`` over ``cases``: (arguments, expected result), drawn one by one."""
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
            print(f"Not yet: expected {show(expected)}, got {show(got)} for {call}")
            return
    print("Correct.")
