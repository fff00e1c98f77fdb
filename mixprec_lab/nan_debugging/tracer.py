"""Every operation of a step, below autograd: where values that are not finite are born, and where digits vanish.

An output is a birth where it holds NaN and no input does, or an infinity and all inputs are finite.  Masks may write
infinities on purpose, so operations that only place constants are no births.  Operations are named by the kernel, those
of the backward pass also by the autograd node that runs, and attributed to the module that made it.
"""


import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.nan_debugging.findings import TensorFacts
from mixprec_lab.nan_debugging.scopes import Scopes, tensors_in

LOW = (torch.float16, torch.bfloat16)
_UNREADABLE = tuple(getattr(torch, n) for n in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, n))
FLOAT8 = tuple(getattr(torch, n) for n in dir(torch) if n.startswith("float8_e") and "e8m0" not in n)
#: operations that place constants, or only move data: what they put is no birth
_PLACES = frozenset({
    "masked_fill", "masked_fill_", "full", "full_like", "new_full", "fill", "fill_", "where", "scalar_tensor", "copy_",
    "masked_scatter", "zeros", "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "lift_fresh",
    "index_put", "index_put_", "clone", "detach", "_to_copy", "expand", "triu", "tril", "constant_pad_nd",
})  # fmt: skip
_ADDS = frozenset({"add", "add_", "sub", "sub_", "mul_", "lerp_", "addcmul_", "addcdiv_", "_foreach_add_"})


@dataclass
class Event:
    """One operation that made something remarkable."""

    index: int
    phase: str  #: forward, loss, backward, optimizer
    module: str
    op: str  #: the kernel, "aten.exp"
    node: str  #: the autograd node that runs, "ExpBackward0"; "" in the forward pass
    what: str  #: birth, swamped, flushed, saturated, zeroed
    output: TensorFacts
    inputs: list[TensorFacts]
    share: float = 1.0  #: of the elements
    extra: dict[str, Any] = field(default_factory=dict)


def traceable(x: torch.Tensor) -> bool:
    """Whether ``x`` is a dense tensor of floating-point numbers."""
    return x.is_floating_point() and x.layout == torch.strided and not x.is_nested and x.dtype not in _UNREADABLE


def facts(x: torch.Tensor) -> TensorFacts:
    """``x`` in numbers; reads from the device."""
    x = x.detach()
    wide = x.float() if x.is_floating_point() else x
    nan, inf = int(wide.isnan().sum()), int(wide.isinf().sum())
    finite = wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) if nan or inf else wide
    amax = float(finite.abs().max()) if x.numel() else 0.0
    return TensorFacts(dtype_of(x), tuple(x.shape), amax, nan, inf, int((wide == 0).sum()), x.numel())


def dtype_of(x: torch.Tensor) -> str:
    """The dtype in short: "float16"."""
    return str(x.dtype).removeprefix("torch.")


class Tracer(TorchDispatchMode):
    """Watches what happens while it is entered; ``events`` are in the order of time."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap the method for the compiler, and load the compiler for it: seconds

    def __init__(
        self,
        scopes: Scopes,
        phase: Callable[[], str],
        rescaled: Callable[[list[torch.Tensor]], None] = lambda tensors: None,
    ) -> None:
        super().__init__()
        self.scopes, self._phase, self._rescaled = scopes, phase, rescaled
        self.events: list[Event] = []
        self.operations = 0
        self.nodes: set[str] = set()  #: autograd nodes that ran
        self._bad: list[torch.Tensor] = []  # outputs that are not finite, kept so that they are known later
        self._clamped: list[tuple[torch.Tensor, float, TensorFacts]] = []
        self._quiet = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._quiet:
            return operator(*args, **kwargs)
        name = operator._schema.name.split("::")[1]
        if name in ("_foreach_mul_", "_foreach_div_") and args:
            self._rescaled(list(args[0]))
        inputs = [t for t in tensors_in((args, kwargs)) if traceable(t)]
        before = _copy_of_first(name, inputs)
        result = operator(*args, **kwargs)
        if not operator.is_view:
            self._quiet = True
            try:
                self._look(name, args, inputs, before, result)
            finally:
                self._quiet = False
        return result

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, operations are not looked at."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _look(self, name: str, args: tuple, inputs: list, before: torch.Tensor | None, result: Any) -> None:
        self.operations += 1
        outputs = [t for t in tensors_in(result) if traceable(t) and t.numel()]
        node = torch._C._current_autograd_node()
        if node is not None:
            self.nodes.add(node.name())
        for out in outputs:
            if not bool(_finite(out)):
                self._maybe_entered(name, inputs, before, out)
                if name not in _PLACES:
                    self._maybe_birth(name, inputs, before, out)
                self._bad.append(out)
        if not outputs:
            return
        out = outputs[0]
        if out.dtype in LOW:
            self._look_at_16_bits(name, args, inputs, before, out)
        if name == "logsumexp" and bool((out == -math.inf).any()):
            self._note("birth", name, out, inputs, born="inf")
        if name in ("mul", "mul_") and len(inputs) > 1:
            self._maybe_masked(name, before if before is not None else inputs[0], inputs[1], out)
        if name == "clamp" and inputs:
            self._remember_clamp(args, inputs[0], out)
        if name == "_to_copy" and out.dtype in (*LOW, *FLOAT8):
            if inputs and inputs[0].dtype.itemsize > out.dtype.itemsize:
                self._maybe_flushed(name, inputs[0], out)
            elif not inputs:
                self._maybe_merged(name, args[0], out)
        if name == "_scaled_mm" and any(size % 16 for t in inputs[:2] for size in t.shape):
            self._note("misaligned", name, out, inputs)

    def _look_at_16_bits(
        self, name: str, args: tuple, inputs: list, before: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        if name in _ADDS and inputs:
            self._maybe_swamped(name, inputs, before, out)
        if name in ("add", "add_", "clamp_min", "clamp") and len(args) > 1:
            self._maybe_lost_constant(name, args, out)
        if name in ("arange", "cumsum", "range"):
            self._maybe_merged(name, None, out)
        if name in ("mm", "addmm", "bmm", "baddbmm") and inputs:
            self._maybe_zeroed(name, inputs, out)

    def _maybe_masked(self, name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """Zero times something that is not finite, as a mask that multiplies."""
        if bool(_finite(out)):
            return
        a, b = torch.broadcast_tensors(a, b)
        share = float((((a == 0) & b.isinf()) | ((b == 0) & a.isinf())).double().mean())
        if share > 0:
            self._note("masked", name, out, [a, b], share)

    def _remember_clamp(self, args: tuple, source: torch.Tensor, out: torch.Tensor) -> None:
        """The share that a clamp cuts off, for the cast to FP8 that may follow."""
        high = args[2] if len(args) > 2 else None
        if isinstance(high, int | float) and high in (448, 57344, 240) and source.numel():
            share = float((source.abs() > high * 1.04).double().mean())
            self._clamped.append((out, share, facts(source)))

    def _maybe_lost_constant(self, name: str, args: tuple, out: torch.Tensor) -> None:
        """A constant, such as an epsilon, that is zero in the format of the result."""
        constants = [a for a in args[1:] if isinstance(a, float) and a != 0]
        if any(torch.tensor(c, dtype=out.dtype).item() == 0 for c in constants):
            self._note("constant_lost", name, out, [], constant=constants[0])

    def _maybe_merged(self, name: str, source: Any, out: torch.Tensor) -> None:
        """Whole numbers in 16 bits beyond those that it tells apart: ids and positions collide."""
        exact = 256 if out.dtype == torch.bfloat16 else 2048 if out.dtype == torch.float16 else 16
        wide = out.float()
        if out.numel() < 2 or bool(((wide != wide.round()) & wide.isfinite()).any()):
            return
        if isinstance(source, torch.Tensor) and (source.is_floating_point() or source.dtype == torch.bool):
            return
        above = source.abs() > exact if isinstance(source, torch.Tensor) else wide.abs() > exact
        if int(above.sum()) >= 2:
            self._note("merged", name, out, [])

    def _maybe_birth(self, name: str, inputs: list, before: torch.Tensor | None, out: torch.Tensor) -> None:
        sources = [before if before is not None and t is inputs[0] else t for t in inputs]
        sources = [t for t in sources if t.numel()]
        nan = bool(out.float().isnan().any())
        if nan and any(bool(t.float().isnan().any()) for t in sources):
            return
        if not nan and any(not bool(_finite(t)) for t in sources):
            return
        self._note("birth", name, out, sources, born="nan" if nan else "inf")

    def _maybe_entered(self, name: str, inputs: list, before: torch.Tensor | None, out: torch.Tensor) -> None:
        """An operand that is not finite and that no operation made: it came from outside.  Masks of -inf may."""
        for t in inputs:
            source = before if before is not None and t is inputs[0] else t
            if t.numel() and not any(t is known for known in self._bad) and not bool(_finite(source)):
                wide = source.float()
                if bool((wide.isnan() | (wide == float("inf"))).any()) and t is not out:
                    self._bad.append(t)
                    self._note("entered", name, out, [source])

    def _maybe_swamped(self, name: str, inputs: list, before: torch.Tensor | None, out: torch.Tensor) -> None:
        first = before if before is not None else inputs[0]
        if first.shape != out.shape or first.dtype != out.dtype:
            return
        if name.endswith("_"):
            same = (out == first) & (first != 0)
            moved = first != 0
        else:
            if len(inputs) < 2 or inputs[1].shape != out.shape:
                return
            moved = (inputs[1] != 0) & (first != 0)
            same = (out == first) & moved
        total = int(moved.sum())
        share = float(same.sum()) / total if total else 0.0
        if share > 0.5 and total >= 8:
            self._note("swamped", name, out, [first, *inputs[1:]], share)

    def _maybe_flushed(self, name: str, source: torch.Tensor, out: torch.Tensor) -> None:
        nonzero = source != 0
        total = int(nonzero.sum())
        if not total:
            return
        wide = out.float()
        flushed = float(((wide == 0) & nonzero).sum()) / total
        largest = torch.finfo(out.dtype).max
        saturated = float((source.float().abs() > largest * 1.04).sum()) / total
        saturated = max([saturated, *(share for t, share, _ in self._clamped if t is source)])
        if flushed > 0.2:
            self._note("flushed", name, out, [source], flushed)
        if saturated > 0.01 and out.dtype in FLOAT8:
            self._note("saturated", name, out, [source], saturated)

    def _maybe_zeroed(self, name: str, inputs: list, out: torch.Tensor) -> None:
        """A product in 16 bits whose result is mostly zero although its operands are not: it was flushed."""
        zero = float((out == 0).double().mean())
        if zero < 0.5 or min(float((t != 0).double().mean()) for t in inputs[-2:]) < 0.05:
            return
        operands = [t for t in inputs if t.dim() >= 2][-2:]
        if len(operands) < 2 or operands[0].shape[-1] != operands[1].shape[-2]:
            return
        exact = operands[0].float() @ operands[1].float()
        if exact.numel() != out.numel():
            return
        flushed = float(((out.reshape(exact.shape) == 0) & (exact != 0)).double().mean())
        if flushed > 0.2:
            self._note("zeroed", name, out, inputs, flushed)

    def _note(self, what: str, name: str, out: torch.Tensor, inputs: list, share: float = 1.0, **extra: Any) -> None:
        node = torch._C._current_autograd_node()
        phase = self._phase()
        extra["where"] = any("Where" in n for n in self.nodes)
        extra["constant_lost"] = any(e.what == "constant_lost" for e in self.events)
        if node is not None:
            phase, module, node_name = "backward", self.scopes.module_of(node._sequence_nr()), node.name()
        else:
            module, node_name = self.scopes.path, ""
        self.events.append(
            Event(len(self.events), phase, module, f"aten.{name}", node_name, what, facts(out),
                  [facts(t) for t in inputs[:3]], share, extra)
        )  # fmt: skip


def _finite(x: torch.Tensor) -> torch.Tensor:
    """Whether all of ``x`` is finite, 0-dim bool: a sum of x * 0 is NaN exactly if something is not."""
    if x.dtype in FLOAT8:
        x = x.float()
    return torch.isfinite((x * 0).sum(dtype=torch.float32 if x.dtype.itemsize < 4 else None))


def _copy_of_first(name: str, inputs: list[torch.Tensor]) -> torch.Tensor | None:
    """What an in-place operation is about to overwrite."""
    if not name.endswith("_") or not inputs or name.startswith("_foreach") or name.startswith("_fused"):
        return None
    return inputs[0].detach().clone() if inputs[0].numel() <= 1 << 22 else None


