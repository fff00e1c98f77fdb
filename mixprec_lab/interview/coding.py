"""The checks of the coding questions, and the runner that hands a candidate's source to them.

Most tasks use a check of the chapters (``mixprec_lab.checks``); here are those that exist for interviews only.
"""

import math
from collections.abc import Callable

import torch

from mixprec_lab import checks
from mixprec_lab.checks._verdict import check
from mixprec_lab.formats import FORMATS
from mixprec_lab.interview.bank import Code
from mixprec_lab.rounding import accumulate


def run_check(code: Code, source: str) -> None:
    """Run ``source`` and print the verdict of the task's check on what it defines: "Correct.", "Not ..." and why.

    Raises NameError if ``source`` does not define ``code.name``, TypeError if that cannot be called, and what
    ``source`` raises while it is read.
    """
    namespace: dict = {}
    exec(compile(source, f"<{code.name}>", "exec"), namespace)
    if code.name not in namespace:
        got = ", ".join(name for name in namespace if not name.startswith("_")) or "nothing"
        raise NameError(f"expected the source to define {code.name}, got {got}")
    if not callable(namespace[code.name]):
        raise TypeError(f"expected {code.name} to be a function or a class, got {namespace[code.name]!r:.60}")
    get_check(code.check)(namespace[code.name])


def get_check(name: str) -> Callable[[Callable], None]:
    """The check of that name, of this module or of ``mixprec_lab.checks``; KeyError, with the names, for another."""
    if name in OWN:
        return OWN[name]
    if name in checks.__all__:
        return getattr(checks, name)
    raise KeyError(f"expected a check, got {name!r}; the names are {', '.join([*OWN, *checks.__all__])}")


def scaler_class(cls: type) -> None:
    """A dynamic loss scaler as a class: ``cls(init_scale, window)`` with ``scale`` and ``step(gradients) -> bool``."""

    def story(letters: str, window: int) -> object:
        scaler = cls(1024.0, window)
        told = []
        for letter in letters:
            gradients = [torch.tensor([2.0, {"x": math.inf, "n": math.nan}.get(letter, 4.0)])]
            before = scaler.scale
            taken = scaler.step(gradients)
            if taken is None or taken is ...:
                return None
            told.append(_told(bool(taken), gradients[0][0].item() * before if taken else None, scaler.scale))
        return "; ".join(told)

    def expected(letters: str, window: int) -> str:
        scale, clean, told = 1024.0, 0, []
        for letter in letters:
            good = letter == "."
            clean = clean + 1 if good else 0
            if not good:
                scale /= 2
            elif clean == window:
                scale, clean = scale * 2, 0
            told.append(_told(good, 2.0 if good else None, scale))
        return "; ".join(told)

    cases = [("...", 2000), ("x.", 2000), ("n", 2000), ("....", 2), (".x...x", 3)]
    check(story, [(case, expected(*case)) for case in cases])


def _told(taken: bool, gradient: float | None, scale: float) -> str:
    return f"step {taken}" + ("" if gradient is None else f", scaled gradient {gradient:g}") + f", scale {scale:g}"


def losing_ratio(function: Callable[[torch.dtype], int]) -> None:
    """The smallest whole R with 1 + 1/R == 1 in a dtype, found by computing."""
    check(function, [((torch.float16,), 2048), ((torch.bfloat16,), 256)])


def pairwise_bf16(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A pairwise sum of 2**n BF16 values, every addition in BF16."""

    def summed(values: torch.Tensor) -> object:
        total = function(values)
        return f"{total.item():g} in {total.dtype}" if isinstance(total, torch.Tensor) and total.numel() == 1 else total

    generator = torch.Generator().manual_seed(5)
    vectors = [torch.full((4096,), 0.01), torch.tensor([256.0, 1.0, 1.0, 1.0]), torch.tensor([256.0, -256.0, 1.0, 1.0])]
    vectors += [torch.rand(n, generator=generator) for n in (1024, 1024, 1)]
    sums = ((v.bfloat16(), accumulate(v.bfloat16().float(), "bf16", method="pairwise")) for v in vectors)
    check(summed, (((v,), f"{total.item():g} in torch.bfloat16") for v, total in sums))


def spike_free_clip(function: Callable[[list[torch.Tensor], float, float], float]) -> None:
    """The true norm of scaled gradients, which are unscaled and clipped in place."""

    def clipped(gradients: list[float], scale: float, largest: float) -> object:
        tensors = [torch.tensor([g], dtype=torch.float32) for g in gradients]
        norm = function(tensors, scale, largest)
        return norm if norm is None or norm is ... else _words(norm, [t.item() for t in tensors])

    cases = [
        (([3.0 * 1024, 4.0 * 1024], 1024.0, 1.0), _words(5.0, [0.6, 0.8])),
        (([0.3 * 64, 0.4 * 64], 64.0, 1.0), _words(0.5, [0.3, 0.4])),
        (([5.0], 1.0, 2.5), _words(5.0, [2.5])),
    ]
    check(clipped, cases)


def _words(norm: float, gradients: list[float]) -> str:
    return f"norm {float(norm):.4f}, gradients {', '.join(f'{g:.4f}' for g in gradients)}"


def training_loop(function: Callable[..., object]) -> None:
    """A loop in FP16 with clipping, a schedule and an overflow: weight, rate and scale at its end."""

    def trained(rows: list[tuple[float, float]]) -> object:
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        batches = [(torch.tensor([[x]]), torch.tensor([[y]])) for x, y in rows]
        if (done := function(layer, optimizer, scheduler, scaler, batches)) is None or done is ...:
            return None
        return _state(layer.weight.item(), scheduler.get_last_lr()[0], scaler.get_scale())

    def expected(rows: list[tuple[float, float]]) -> str:
        weight, rate, scale = 0.0, 0.25, 1024.0
        for x, y in rows:
            gradient = 2 * x * (weight * x - y)
            if abs(gradient) * scale > FORMATS["fp16"].largest:
                scale /= 2
                continue
            weight -= rate * max(-1.0, min(gradient, 1.0))
            rate /= 2
        return _state(weight, rate, scale)

    small, large, overflowing = (1.0, 0.25), (1.0, 2.0), (1000.0, 2.0)
    cases = [[large], [small, small, (-1.0, 0.5)], [small, overflowing, small], [overflowing, large, small]]
    check(trained, [((rows,), expected(rows)) for rows in cases])


def _state(weight: float, rate: float, scale: float) -> str:
    return f"weight {weight:.4f}, rate {rate:g}, scale {scale:g}"


OWN = {f.__name__: f for f in (scaler_class, losing_ratio, pairwise_bf16, spike_free_clip, training_loop)}
