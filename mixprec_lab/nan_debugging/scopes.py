"""Where the program is: the module whose forward runs, and which module a backward node belongs to.

Hooks on every module keep a stack of paths.  The outermost call of a step is remembered with its arguments, its random
state and its autocast settings, so that it can be run again; and every call notes which numbers autograd gave the
nodes it made, so that a node of the backward pass can be traced to the module that made it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mixprec_lab.untouched import untouched


@dataclass(eq=False)
class OutermostCall:
    """One call of the model from outside: what a replay needs, and what came of it."""

    path: str
    module: nn.Module
    args: tuple
    kwargs: dict
    rng: torch.Tensor
    cuda_rng: list[torch.Tensor]
    autocast: tuple[str, bool, torch.dtype]
    training: bool
    grad: bool
    outputs: list[torch.Tensor] = field(default_factory=list)  #: detached
    nodes: list[Any] = field(default_factory=list)  #: of the outputs that have one
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)  #: of the outputs, by index

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """The random state and the autocast settings of the call; the model's buffers are put back afterwards."""
        device, enabled, dtype = self.autocast
        with untouched(self.module), torch.autocast(device, dtype=dtype, enabled=enabled):
            torch.set_rng_state(self.rng)
            if self.cuda_rng:
                torch.cuda.set_rng_state_all(self.cuda_rng)
            yield

    def run(self) -> list[torch.Tensor]:
        """The outputs of the call, made again: tensors in the order of the first time."""
        with self.conditions():
            return tensors_in(self.module(*self.args, **self.kwargs))


@dataclass(frozen=True)
class Span:
    """The autograd numbers of the nodes that one call of a module made."""

    path: str
    first: int
    end: int


class _Hook:
    """A hook of one module; a copy of the model, or a file with it, has none."""

    def __init__(self, act: Callable, name: str) -> None:
        self.act, self.name = act, name

    def __call__(self, *args: Any) -> None:
        self.act(self.name, *args)

    def __deepcopy__(self, memo: dict) -> Callable:
        return _nothing

    def __reduce__(self) -> tuple:
        return _no_hook, ()


def _nothing(*args: Any) -> None:
    """What a hook is in a copy of the model."""


def _no_hook() -> Callable:
    return _nothing


class Scopes:
    """The stack of module paths of ``model``, with hooks that cost a microsecond a module."""

    def __init__(self, model: nn.Module, on_output: Callable[[str, nn.Module, Any], None]) -> None:
        self.active = False
        self.stack: list[str] = []
        self.calls: list[OutermostCall] = []
        self.spans: list[Span] = []
        self._starts: list[int] = []
        self._on_output = on_output
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._handles = []
        self.names = {weakref.ref(m): name for name, m in model.named_modules()}
        self.failed_in = ""
        inner = () if _is_compiled(model) else [(n, m) for n, m in model.named_modules() if m is not model]
        for name, module in [("", model), *inner]:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks of this kind
            before, after = _Hook(self._enter, name), _Hook(self._leave, name)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self) -> None:
        """Forget the last step."""
        self.stack, self.calls, self.spans, self._starts = [], [], [], []
        self.failed_in, self.active = "", True

    def end(self) -> None:
        """The step is over: let go of its tensors."""
        self.active, self.calls = False, []

    @property
    def path(self) -> str:
        """Of the module whose forward is running; "" outside of the model."""
        return self.stack[-1] if self.stack else ""

    def module_of(self, node_number: int) -> str:
        """The path of the innermost module that made the autograd node with this number; "" if none did."""
        inside = [span for span in self.spans if span.first <= node_number < span.end]
        return min(inside, key=lambda span: span.end - span.first).path if inside else ""

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.active or _transformed():
            return
        if not self.stack:
            self.calls.append(self._remember(name, module, args, kwargs))
        self.stack.append(name)
        self.failed_in = ""  # what returned None before has not failed
        self._starts.append(torch.autograd._get_sequence_nr())

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.active or not self.stack or _transformed():
            return
        if output is None:  # the forward has raised, or has nothing to say
            self.failed_in = self.failed_in or self.stack[-1]
        self.stack.pop()
        self.spans.append(Span(name, self._starts.pop(), torch.autograd._get_sequence_nr()))
        self._on_output(name, module, output)
        if not self.stack:
            self._finish(self.calls[-1], output)

    def _remember(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> OutermostCall:
        kind = self._device.type
        cuda = torch.cuda.get_rng_state_all() if kind == "cuda" else []
        autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return OutermostCall(
            name, module, args, kwargs, torch.get_rng_state(), cuda, autocast, module.training, torch.is_grad_enabled()
        )

    def _finish(self, call: OutermostCall, output: Any) -> None:
        for index, tensor in enumerate(tensors_in(output)):
            call.outputs.append(tensor.detach())
            if tensor.requires_grad and tensor.grad_fn is not None:
                call.nodes.append(tensor.grad_fn)
                tensor.register_hook(_keeper(call, index))


def _keeper(call: OutermostCall, index: int) -> Callable[[torch.Tensor], None]:
    def keep(gradient: torch.Tensor) -> None:
        call.gradients[index] = gradient.detach()

    return keep


def tensors_in(x: Any) -> list[torch.Tensor]:
    """The tensors in ``x``, at any depth of tuples, lists, dicts and dataclass-like outputs, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for value in x.values() for t in tensors_in(value)]
    if isinstance(x, list | tuple | set):
        return [t for value in x for t in tensors_in(value)]
    if hasattr(x, "__dataclass_fields__"):
        return [t for name in x.__dataclass_fields__ for t in tensors_in(getattr(x, name))]
    return []


def _transformed() -> bool:
    """Whether a transform of ``torch.func`` is running: its tensors must not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_compiled(model: nn.Module) -> bool:
    return type(model).__name__ == "OptimizedModule" or getattr(model, "_compiled_call_impl", None) is not None
