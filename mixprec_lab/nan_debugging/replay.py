"""Running a step's calls of the model once more, under the tracer, and leaving everything as it was."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from mixprec_lab.nan_debugging.tracer import Event, Tracer

if TYPE_CHECKING:
    from mixprec_lab.nan_debugging.monitor import NumericalStabilityMonitor
    from mixprec_lab.nan_debugging.scopes import OutermostCall


class Outcome(NamedTuple):
    """What a replay showed."""

    events: list[Event]
    outputs_finite: bool
    gradients_finite: bool


def replay(monitor: "NumericalStabilityMonitor", backward: bool, divide: float = 1.0) -> Outcome | None:
    """The outermost calls of the open step, again, from the same inputs, random state and parameters.

    ``backward`` also runs their backward pass, from the gradients that came back to their outputs, divided by
    ``divide``.  ``.grad``, buffers and random state are left as they were.  None if the model was not called.
    """
    scopes, sensors = monitor.scopes, monitor.sensors
    calls = list(scopes.calls)
    if not calls:
        return None
    kept = scopes.stack, scopes.calls, scopes.spans, scopes._starts, sensors.muted
    sensors.muted = True
    events: list[Event] = []
    finite, gradients = True, True
    try:
        for call in calls:
            scopes.stack, scopes.calls, scopes.spans, scopes._starts = [], [], [], []
            tracer = Tracer(scopes, lambda: "forward")
            outputs, grads = _run(call, tracer, backward, divide)
            events += tracer.events
            finite &= all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point())
            gradients &= all(bool(g.isfinite().all()) for g in grads)
    finally:
        scopes.stack, scopes.calls, scopes.spans, scopes._starts, sensors.muted = kept
    for index, event in enumerate(events):
        event.index = index
    return Outcome(events, finite, gradients)


def _run(
    call: "OutermostCall", tracer: Tracer, backward: bool, divide: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.set_grad_enabled(backward and call.grad), tracer:
        outputs = call.run()
        pairs = [(outputs[i], g / divide) for i, g in call.gradients.items() if i < len(outputs)]
        pairs = [(out, g.to(out.dtype)) for out, g in pairs if out.requires_grad]
        if not backward or not pairs:
            return [t.detach() for t in outputs], []
        wanted = [p for p in call.module.parameters() if p.requires_grad]
        roots, entering = zip(*pairs, strict=True)
        grads = torch.autograd.grad(roots, wanted, entering, allow_unused=True)
    return [t.detach() for t in outputs], [g for g in grads if g is not None]
