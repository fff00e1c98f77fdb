"""Watching a forward pass from three places: what the autocast microscope is made of.

Above autocast a function mode sees the calls as Python makes them.  In the place of autocast's own kernels stand
wrappers that note which list an operator is on, and hand over to torch's kernel (or to ``casting``'s, for the lists of
a device that is not there).  Below autograd a dispatch mode sees the casts that were really made, and the operators
that are on no list.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.amp.casting import WeightCache, eligible, emulated, kernels, original, target_dtype, tensors_in
from mixprec_lab.amp.policy import OPERATORS, registered

#: Kernels that only move or name memory, besides those that the schema declares to be views.
_MOVES = frozenset({
    "alias", "clone", "detach", "lift_fresh", "_reshape_alias", "_unsafe_view", "unsafe_split", "unsafe_chunk",
    "squeeze_", "t_", "transpose_", "unsqueeze_",
})  # fmt: skip
_CASTS = frozenset({"_to_copy", "to"})


@dataclass
class Event:
    """One call: an operator on a list, a kernel on none, or a call that Python made."""

    module: str
    name: str
    rule: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor] = field(default_factory=list)
    parts: list["Event"] = field(default_factory=list)  # of a call that Python made: what it was made of
    cast: set[int] = field(default_factory=set)  # ids of the tensors that were cast for an operator on a list
    casts: int = 0
    reused: int = 0
    backward: torch.dtype | None = None

    def note_gradient(self, gradient: torch.Tensor) -> None:
        """A hook for the result: the dtype of the gradient that comes back to it."""
        self.backward = gradient.dtype


class Watch:
    """The events of one forward pass on ``host`` under the lists of ``policy``.

    ``emulate`` chooses between torch's own kernels and those of ``casting``; torch's need ``policy`` to be ``host``.
    """

    def __init__(self, host: str, policy: str, emulate: bool) -> None:
        self.host, self.policy, self.emulate = host, policy, emulate
        self.events: list[Event] = []
        self.path = [""]  # of the modules we are in, innermost last
        self._call: Event | None = None  # the call by Python that we are in
        self._listed: Event | None = None  # the operator on a list that we are in

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Watch what happens while the context lasts; then hang a hook on every result for the backward pass."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(kernels(self._runs(), OPERATORS[self.policy], self.host, self._watched))
            for name, module in model.named_modules():
                stack.callback(module.register_forward_pre_hook(self._entering(name), prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(_PythonCalls(self))
            stack.enter_context(_Kernels(self))
            yield
        for event in self.events:
            if event.outputs and event.outputs[0].requires_grad:
                event.outputs[0].register_hook(event.note_gradient)

    def _runs(self) -> dict[str, Callable | None]:
        known, rules = registered(self.host), OPERATORS[self.policy]
        if not self.emulate:
            return {name: original(name, self.host) for name in known}
        cache = WeightCache()
        listed = {name: emulated(name, rule, self.policy, self.host, cache) for name, rule in rules.items()}
        return dict.fromkeys(known) | listed

    def _entering(self, name: str) -> Callable:
        return lambda module, inputs: self.path.append(name)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.path.pop()

    def _watched(self, name: str, rule: str, run: Callable) -> Callable:
        """The autocast kernel of one operator: ``run``, with a note of what it was given, did and returned."""

        def kernel(keyset: object, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled(self.policy):
                return run(keyset, *args, **kwargs)
            event = self._listed = self._event(name.split(".")[0], rule, args, kwargs)
            try:
                result = run(keyset, *args, **kwargs)
            finally:
                self._listed = None
            to = target_dtype(rule, event.inputs, torch.get_autocast_dtype(self.host))
            wanted = {id(x) for x in event.inputs if to is not None and eligible(x) and x.dtype != to}
            event.casts = len(wanted & event.cast)
            event.reused = len(wanted - event.cast)
            self._keep(event, result)
            return result

        return kernel

    def python_call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a call that Python made: one event, or its parts if any of them is on a list."""
        call = self._call = self._event(function.__name__, "none", args, kwargs)
        try:
            result = function(*args, **kwargs)
        finally:
            self._call = None
        if any(part.rule != "none" for part in call.parts):
            self.events += call.parts
        elif call.parts:
            if call.name.startswith("_"):  # 1 / x is a call of __rdiv__; its kernel has a name that people know
                call.name = call.parts[-1].name
            self._keep(call, result)
        return result

    def kernel(self, operator: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
        """Run a kernel below autograd: a cast for the listed operator we are in, or an event of its own."""
        result = operator(*args, **kwargs)
        name = operator._schema.name.split("::")[1]
        if self._listed is not None:
            if name in _CASTS:
                self._listed.cast.add(id(args[0]))
        elif name in _CASTS or not (operator.is_view or name in _MOVES):
            self._keep(self._event("to" if name in _CASTS else name.lstrip("_"), "none", args, kwargs), result)
        return result

    def _event(self, name: str, rule: str, args: tuple, kwargs: dict) -> Event:
        return Event(self.path[-1], name, rule, tensors_in(args, kwargs))

    def _keep(self, event: Event, result: Any) -> None:
        outputs = tensors_in(result)
        event.outputs = [x for x in outputs if x.is_floating_point()] or outputs
        if outputs and any(x.is_floating_point() for x in (*event.inputs, *outputs)):
            (self.events if self._call is None else self._call.parts).append(event)


class _PythonCalls(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.watch.python_call(function, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap the method for the compiler, and load the compiler for it: seconds

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return self.watch.kernel(operator, args, kwargs or {})
