"""Loss scalers to train with: scale the loss, unscale the gradients, step or skip, move the scale.

    scaler = DynamicLossScaler()
    scaler.scale_loss(loss).backward()
    scaler.unscale_gradients(optimizer)                    # optional: to clip or look at the true gradients
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    took_it = scaler.step(optimizer)                       # unscales what is not unscaled yet, steps or skips, updates

The scale lives on the host, as a Python float; the devices are asked once a step whether a gradient was not finite.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from mixprec_lab.loss_scaling.rules import ScalerRule, ScalerState, get_rule, to_fp32
from mixprec_lab.loss_scaling.unscaling import Check, check_and_unscale, parameters_of


class _LossScaler:
    """What static and dynamic scalers share: everything but the scale and its movement."""

    def __init__(self) -> None:
        self.steps = 0  #: updates so far
        self.skipped = 0  #: updates with a gradient that was not finite
        self.skipped_in_a_row = 0  #: the same, since the last good one
        self._begin()

    def _begin(self) -> None:
        self._checks: list[Check] = []
        self._stepped: list[Any] = []  # the optimizers themselves: an id could be used again

    @property
    def scale(self) -> float:
        """The present loss scale."""
        raise NotImplementedError

    def scale_loss(self, outputs: Any) -> Any:
        """``outputs * scale``: a floating-point tensor of any shape, or a list, tuple or other iterable of such.

        16-bit tensors are multiplied in FP32, so that the scaled value does not overflow.  The gradient of an FP16
        loss is the scale itself, in FP16, and beyond 65504 that is infinite: compute losses in FP32.  TypeError for
        integer tensors and for anything that is not a tensor.
        """
        if isinstance(outputs, torch.Tensor):
            if not outputs.is_floating_point():
                raise TypeError(f"expected a floating-point loss, got {outputs.dtype}: only such a loss has a gradient")
            wide = outputs.float() if outputs.dtype.itemsize < 4 else outputs
            return wide * self.scale
        if isinstance(outputs, Iterable) and not isinstance(outputs, str | bytes | Mapping):
            scaled = [self.scale_loss(x) for x in outputs]
            return tuple(scaled) if isinstance(outputs, tuple) else scaled
        raise TypeError(f"expected a tensor or an iterable of tensors, got {type(outputs).__name__}")

    def unscale_gradients(self, target: Any) -> torch.Tensor:
        """Divide the gradients of ``target`` by the scale, in place, and check them in the same pass.

        ``target`` is an optimizer or any iterable of parameters.  What comes back is a 0-dim FP32 tensor on the
        gradients' device, not read yet: above 0 if a scaled gradient was infinite or NaN.  Sparse gradients are
        unscaled through their values.

        Raises RuntimeError if a gradient of ``target`` was unscaled since the last update, if ``target`` has no
        gradient, and if the scale is too small for a finite inverse; ValueError for FP16 gradients and for an empty
        ``target``.
        """
        parameters = parameters_of(target)
        if len(self._fresh(parameters)) < len(parameters):
            raise RuntimeError(
                "a gradient of this target has been unscaled already since the last update: call unscale_gradients() "
                "once per optimizer and step, after the last backward()"
            )
        return self._unscale(parameters).flag

    def step(self, optimizer: Any, parameters: Iterable[torch.Tensor] | None = None, *, update: bool = True) -> bool:
        """Step ``optimizer`` if all its gradients are finite; True if it was stepped, False if it was skipped.

        Gradients of the optimizer, and of further ``parameters``, that are not unscaled yet are unscaled first.  Then
        the scale is updated, unless ``update`` is False: with several optimizers, step each of them so and call
        ``update_scale()`` once.  Raises RuntimeError for a second step without an update; else as
        ``unscale_gradients``.
        """
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
            raise TypeError(f"expected an optimizer, got {type(optimizer).__name__}")
        if any(optimizer is other for other in self._stepped):
            raise RuntimeError("this optimizer was stepped already since the last update: call update_scale() first")
        wanted = parameters_of(optimizer)
        if parameters is not None:
            wanted = list({id(p): p for p in (*wanted, *parameters_of(parameters))}.values())
        earlier, fresh = bool(self._checks), self._fresh(wanted)
        if len(fresh) == len(wanted) or any(p.grad is not None for p in fresh):
            self._unscale(fresh)
        checks = [c for c in self._checks if not c.ids.isdisjoint(map(id, wanted))] if earlier else self._checks
        finite = not any([check.found for check in checks])
        if finite:
            optimizer.step()
        self._stepped.append(optimizer)
        if update:
            self.update_scale()
        return finite

    def update_scale(self, found_inf: bool | torch.Tensor | None = None) -> None:
        """Count the step and move the scale: ``found_inf`` says whether a gradient was not finite.

        None means what the checks since the last update found; RuntimeError if there were none.
        """
        if found_inf is None:
            if not self._checks:
                raise RuntimeError(
                    "no gradient was checked since the last update: call step() or unscale_gradients() first, or say "
                    "update_scale(found_inf)"
                )
            found_inf = any([check.found for check in self._checks])
        overflow = bool(found_inf)
        self._begin()
        self.steps += 1
        self.skipped += overflow
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if overflow else 0
        self._move(overflow)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain numbers and strings; RuntimeError between check and update."""
        if self._checks:
            raise RuntimeError("gradients are checked but the scale is not updated: save after update_scale()")
        return {"kind": type(self).__name__, **{k: getattr(self, k) for k in _COUNTERS}, **self._own_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved.  ValueError for a state of another kind; then nothing changes."""
        expected = {"kind", *_COUNTERS, *self._own_state()}
        if not isinstance(state, Mapping) or set(state) != expected:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"expected a state with the keys {sorted(expected)}, got {got}")
        if state["kind"] != type(self).__name__:
            raise ValueError(f"expected the state of a {type(self).__name__}, got that of a {state['kind']}")
        counters = {key: _count(key, state[key]) for key in _COUNTERS}
        self._load_own(state)  # raises before it changes anything
        vars(self).update(counters)
        self._begin()

    def _move(self, overflow: bool) -> None:
        raise NotImplementedError

    def _own_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load_own(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _fresh(self, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those of ``parameters`` that were not unscaled since the last update."""
        if not self._checks:
            return parameters
        return [p for p in parameters if not any(id(p) in check.ids for check in self._checks)]

    def _unscale(self, parameters: list[torch.Tensor]) -> Check:
        """Unscale and check the gradients of ``parameters``; RuntimeError if the scale has no finite inverse."""
        inverse = to_fp32(1 / self.scale) if self.scale else math.inf  # reciprocal in float64, as torch does
        if math.isinf(inverse):
            raise RuntimeError(
                f"the loss scale has fallen to {self.scale:g} after {self.skipped_in_a_row} skipped steps in a row and "
                f"has no finite inverse: it is not the scale that makes these gradients overflow. Look for the first "
                f"NaN or inf in data, loss or weights, and give the scaler a min_scale"
            )
        check = check_and_unscale(parameters, inverse)
        self._checks.append(check)
        return check


_COUNTERS = ("steps", "skipped", "skipped_in_a_row")


def _count(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected {key} to be a whole number of at least 0, got {value!r}")
    return value


class DynamicLossScaler(_LossScaler):
    """A loss scale that backs off after an overflow and grows after ``scale_window`` clean steps.

    It starts at ``init_scale`` and moves by ``scale_factor`` within [``min_scale``, ``max_scale``]; ``hysteresis``
    overflows are needed for a step down, and a growth refills them.  At the floor the scaler goes on skipping;
    ``skipped_in_a_row`` tells.  ``DynamicLossScaler.from_rule`` takes any rule, such as a framework's.

    With ``from_rule("torch")`` it does what ``torch.amp.GradScaler`` does, step by step and bit by bit; the one
    difference is a scale so small that its inverse is infinite, where torch steps on NaN and this scaler raises.
    ValueError for arguments that make no sense (see ``ScalerRule``).
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        min_scale: float = 1.0,
        max_scale: float = 2.0**24,
        hysteresis: int = 1,
    ) -> None:
        if not 1 < scale_factor < float("inf"):
            raise ValueError(f"expected scale_factor to be above 1 and finite, got {scale_factor!r}")
        self._start(
            ScalerRule(
                "own", init_scale=init_scale, growth_factor=scale_factor, backoff_factor=1 / scale_factor,
                window=scale_window, hysteresis=hysteresis, min_scale=min_scale, max_scale=max_scale,
            )
        )  # fmt: skip

    @classmethod
    def from_rule(cls, rule: "str | ScalerRule") -> "DynamicLossScaler":
        """A scaler that follows ``rule``: "torch", "deepspeed", "megatron" or a ``ScalerRule``."""
        scaler = cls.__new__(cls)
        scaler._start(get_rule(rule))
        return scaler

    def _start(self, rule: ScalerRule) -> None:
        super().__init__()
        self.rule = rule
        self._state = rule.start()

    @property
    def scale(self) -> float:
        """The present loss scale."""
        return self._state.scale

    @property
    def growth_tracker(self) -> int:
        """Clean steps counted toward the next growth."""
        return max(self._state.clean - self.rule.grace, 0) % self.rule.window

    @property
    def hysteresis_left(self) -> int:
        """Overflows until the scale backs off."""
        return self._state.hysteresis_left

    def _move(self, overflow: bool) -> None:
        self._state = self.rule.update(self._state, overflow)

    def _own_state(self) -> dict[str, Any]:
        return {"rule": asdict(self.rule), **self._state._asdict()}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        try:
            rule = ScalerRule(**state["rule"])
        except TypeError as error:
            raise ValueError(f"expected the fields of a ScalerRule, got {state['rule']!r}") from error
        scale = state["scale"]
        if not (isinstance(scale, float) and rule.min_scale <= scale <= rule.max_scale):
            raise ValueError(f"expected a scale within [{rule.min_scale:g}, {rule.max_scale:g}], got {scale!r}")
        left = _count("hysteresis_left", state["hysteresis_left"])
        if not 1 <= left <= rule.hysteresis:
            raise ValueError(f"expected hysteresis_left within [1, {rule.hysteresis}], got {left}")
        self.rule, self._state = rule, ScalerState(scale, _count("clean", state["clean"]), left)


class StaticLossScaler(_LossScaler):
    """A loss scale that never moves; a step with a gradient that is not finite is skipped and counted all the same.

    ValueError unless ``scale`` is positive, finite, and has a finite inverse in FP32.
    """

    def __init__(self, scale: float = 1024.0) -> None:
        super().__init__()
        self._scale = _static(scale)

    @property
    def scale(self) -> float:
        """The loss scale."""
        return self._scale

    def _move(self, overflow: bool) -> None:
        """Stay."""

    def _own_state(self) -> dict[str, Any]:
        return {"scale": self._scale}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self._scale = _static(state["scale"])


def _static(scale: object) -> float:
    try:
        return ScalerRule("static", init_scale=scale, min_scale=2.0**-126).start().scale
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a scale that is positive, finite and at least 2**-126, got {scale!r}") from error
