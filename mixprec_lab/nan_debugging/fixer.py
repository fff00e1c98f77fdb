"""``NumericalStabilityFixer``: what to do after the monitor has spoken, with as little harm as possible.

Zeroing the bad gradients and stepping is not skipping: momentum and weight decay still move the weights.  Halving the
learning rate at each overflow punishes what a scaler does for its living.  And "resetting" the scale raises one that
has backed off.  So the fixer leaves ordinary skips alone, skips a bad step whole, goes back to a checkpoint when
numbers that stay are bad, and touches the learning rate only when going back has not helped.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mixprec_lab.nan_debugging.checkpoint import (
    bad_tensors,
    capture,
    count_infinite_buffers,
    forget_step,
    parts_of,
    plain,
    restore,
    scaler_state,
)
from mixprec_lab.nan_debugging.checkpoint_store import DiskStore, MemoryStore
from mixprec_lab.nan_debugging.fix_report import FixReport, checked, is_count, listed, trouble_of
from mixprec_lab.nan_debugging.learning_rate import scale_learning_rates
from mixprec_lab.nan_debugging.loss_watch import LossWatch
from mixprec_lab.nan_debugging.rollback import Rollback, numbers_of

_CUT = 0.5  # a power of two: the cut is exact
_TRIES = 5  # restores of one checkpoint


class NumericalStabilityFixer:
    """Checkpoints of a training run, and repairs of its steps.

        fixer = NumericalStabilityFixer(model, optimizer, scaler, scheduler)
        for i, (x, y) in enumerate(batches):
            if i % 100 == 0:
                fixer.create_checkpoint(i)
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if fixer.fix_nan_inf(monitor.check_model_health(i, loss)).skip:
                continue
            scale = scaler.get_scale()
            scaler.step(optimizer); scaler.update()
            if scaler.get_scale() >= scale:  # else the scaler has skipped the step
                scheduler.step()

    ``optimizer`` and ``scheduler`` are one, or a list; ``scaler`` is a ``torch.amp.GradScaler`` or a scaler of
    ``mixprec_lab.loss_scaling``.  Copies go to the CPU, or stay where the tensors are with ``device=None``; with a
    ``directory`` they go to files there, and those that lie there already can be restored.  The last ``keep`` stay.
    After ``restore_after`` steps skipped in a row, the last checkpoint is restored.  The scaler of a
    ``MasterWeightOptimizer`` is found there.

    ``history`` holds all reports, ``lr_factor`` what the learning rates were multiplied by, ``extra`` that of the
    checkpoint restored last.  The generators of Python, NumPy and torch are part of a checkpoint; put the state of
    your own into ``extra``, and with it the place in your data.  Each rank of a distributed run needs a directory of
    its own, and all of them must hear of a repair.  Pass the scheduler, or a cut of the learning rate is its to undo.

    Raises TypeError for objects of another kind, ValueError for a model without parameters, an optimizer of
    parameters that are not the model's, another device, and ``keep`` or ``restore_after`` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        scaler: Any = None,
        scheduler: Any = None,
        *,
        device: str | torch.device | None = "cpu",
        directory: str | os.PathLike[str] | None = None,
        keep: int = 3,
        restore_after: int = 5,
    ) -> None:
        self._parts = parts_of(model, optimizer, scaler, scheduler)
        for name, value in (("keep", keep), ("restore_after", restore_after)):
            if not is_count(value) or value < 1:
                raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
        if device is not None and torch.device(device) != torch.device("cpu"):
            raise ValueError(f'expected device to be "cpu", or None to keep copies where the tensors are, got {device}')
        self._keep_device = device is None
        self._store = MemoryStore() if directory is None else DiskStore(directory)
        self._order = self._store.steps()  # the last is the one to go back to
        self._infinite_buffers = count_infinite_buffers(model)
        self._losses = LossWatch()
        self._restored: Counter[int] = Counter()
        self._cut_for: set[tuple[str, int]] = set()
        self._in_a_row = 0
        self._reported: int | None = None
        self.keep, self.restore_after = keep, restore_after
        self.lr_factor = 1.0
        self.extra: Any = None
        self.history: list[FixReport] = []

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The steps of the checkpoints there are; the last is the one that is restored by default."""
        return tuple(self._order)

    def create_checkpoint(self, step: int | None = None, extra: Any = None) -> int:
        """The step under which the present state is kept; call it between two steps.

        ``step`` is the number of the next step: the state has seen the batches before ``step``, and not that one.
        None means the one after the step reported last, or one more than at the last checkpoint, or 0.  A checkpoint
        of the same step is replaced; beyond ``keep``, the one that was made or restored longest ago is removed.
        ``extra`` is kept with it: tensors, numbers, strings, lists, tuples, dicts.

        Raises ValueError for a state that is not finite (going back to it would help nobody), TypeError for state
        that could not be read safely, RuntimeError within a step of our scalers, OSError if the disk fails.  Then the
        earlier checkpoints are what they were.
        """
        step = self._next_step() if step is None else step
        if not is_count(step):
            raise ValueError(f"expected step to be a whole number of at least 0, got {step!r}")
        bad = bad_tensors(self._parts, self._infinite_buffers)
        if bad:
            raise ValueError(f"expected a finite state, got NaN or inf in {listed(bad)}: restore a checkpoint instead")
        if self.scaler is not None:
            self.scaler.state_dict()  # ours raise within a step
        state = capture(self._parts, step, extra=extra, lr_factor=self.lr_factor, keep_device=self._keep_device)
        self._store.save(step, state)
        self._move_to_end(step)
        for old in self._order[: -self.keep]:
            self._drop(old)
        return step

    def restore_checkpoint(self, step: int | None = None) -> int:
        """The step that was restored, bit by bit: ``step``, or that of the checkpoint made or restored last.

        Parameters, buffers, optimizers, scaler, schedulers and generators are those of the checkpoint, gradients are
        cleared, and a scaler forgets that some were unscaled.  Of a monitor, call ``rewind(step)``.

        Raises RuntimeError if there is no (such) checkpoint, ValueError if it is of another model or its file is
        corrupted, OSError if that cannot be read.  Then nothing was changed.
        """
        step = self._last_step() if step is None else step
        if step not in self._order:
            raise RuntimeError(f"expected one of the checkpoints {self._order}, got step {step!r}")
        state = self._store.load(step)
        restore(self._parts, state, keep_device=self._keep_device)
        self._move_to_end(step)
        self.lr_factor, self.extra = state["lr_factor"], plain(state["extra"])
        self._losses.rewind(step)
        self._in_a_row = 0
        self._reported = None if self._reported is None else step - 1
        return step

    def rollback_and_skip(self, batches: int | Iterable[int], *, before: int | None = None) -> Rollback:
        """Go back and leave batches out: the ``Rollback`` says which step was restored and which batches to skip.

        Batch ``i`` is the one that step ``i`` of an uninterrupted run takes, and a checkpoint of step ``k`` has seen
        those before ``k``.  ``batches`` are the numbers of the bad ones: the newest checkpoint that has seen none of
        them is restored.  Or it is how many to leave out from the checkpoint on: ``n`` skips ``k, ..., k + n - 1``.
        ``before`` asks for a checkpoint of at most this step.  Later checkpoints hold what the bad batches did, and
        are removed.  The restored state is exact, learning rate and scale included, so that training on
        ``remaining(batches)`` is bit for bit what it would have been without the bad ones.

        PaLM (Chowdhery et al. 2022, section 5.1) went back about 100 steps before a spike and skipped some 200 to 500
        batches: ``rollback_and_skip(300, before=spike - 100)``.

        Raises ValueError for no or negative numbers, TypeError for what is no number, RuntimeError if no checkpoint is
        old enough; else as ``restore_checkpoint``.  Then nothing was changed.
        """
        numbers = numbers_of(batches)
        if before is not None and not is_count(before):
            raise ValueError(f"expected before to be a step, a whole number of at least 0, got {before!r}")
        latest = min((n for n in (before, min(numbers) if numbers else None) if n is not None), default=None)
        fitting = [step for step in self._order if latest is None or step <= latest]
        if not fitting:
            raise RuntimeError(f"expected a checkpoint of step {latest} or earlier, got {sorted(self._order)}")
        step = self.restore_checkpoint(fitting[-1] if latest is None else max(fitting))
        for later in [s for s in self._order if s > step]:
            self._drop(later)
        self._restored.clear()  # other batches: a new start
        return Rollback(step, frozenset(numbers or range(step, step + batches)))

    # -- repairs ---------------------------------------------------------------------------------------------------

    def fix_nan_inf(self, health_report: Mapping[str, Any]) -> FixReport:
        """What was done about one report of ``NumericalStabilityMonitor.check_model_health``, and why.

        Call it after backward and before the step.  In this order:

        - parameters, buffers or optimizer state hold NaN or inf: "restore" the last checkpoint;
        - a new finding says ``exploding_lr``: "cut_learning_rate", and skip;
        - gradients overflowed under a loss scale while the loss is finite: "none", the scaler skips and backs off;
        - loss or gradients are not finite, or the loss is over 100 times its running median and 10 times the largest
          of the first: "skip"; after ``restore_after`` of these in a row "restore", if there is a checkpoint;
        - else "none".

        A skip clears all gradients; nothing else moves.  A restore takes the scale of the checkpoint unless the present
        one is lower: no scale is raised.  From the second restore of one checkpoint on, the learning rates are halved
        (``details["learning_rates"]``) if numbers outgrew their format: parameters or optimizer state are bad, or the
        loss had climbed a hundredfold.  NaN from a batch is no evidence against a rate.  A cut outlives later restores.

        Raises TypeError and ValueError for something else than such a report, RuntimeError if there is nothing to
        restore and after five restores of one checkpoint.  Then nothing was changed.
        """
        report = checked(health_report)
        bad = bad_tensors(self._parts, self._infinite_buffers)
        if not bad and report["param_nan_count"] + report["param_inf_count"]:
            bad = ["parameters (by the report)"]
        exploding = [f for f in report.get("findings", ()) if self._is_new_explosion(f)]
        trouble, explosion = trouble_of(report), self._losses.explosion(float(report["loss"]))
        if bad:
            outgrown = not all(name.startswith("buffer") for name in bad)  # buffers take what the batch gives them
            fix = self._go_back(f"NaN or inf in {listed(bad)}", bad, outgrown=outgrown, cut=bool(exploding))
        elif exploding:
            fix = self._cut_learning_rate(f"exploding_lr at step {exploding[0].step}: {exploding[0].evidence}")
        elif self._is_ordinary_skip(report):
            fix = FixReport("none", "gradients overflowed under the loss scale: the scaler skips and backs off")
        elif trouble or explosion:
            fix = self._skip(trouble or explosion, outgrown=not trouble or self._losses.climbed())
        else:
            fix = self._note_good_step(report)
        self._cut_for.update((f.kind, f.step) for f in exploding)
        if fix.action != "restore":
            self._reported = report["step"]
        self.history.append(fix)
        return fix

    def _skip(self, trouble: str, *, outgrown: bool) -> FixReport:
        if self._in_a_row + 1 >= self.restore_after and self._order:
            return self._go_back(f"{trouble}, {self._in_a_row + 1} times in a row", outgrown=outgrown)
        self._in_a_row += 1
        forget_step(self._parts)
        advice = "" if self._order else "; there is no checkpoint to go back to if this goes on"
        return FixReport("skip", f"{trouble}{advice}", {"in_a_row": self._in_a_row})

    def _go_back(self, why: str, bad: Iterable[str] = (), *, outgrown: bool, cut: bool = False) -> FixReport:
        step = self._last_step(why)
        tries = self._restored[step] + 1
        if tries > _TRIES:
            raise RuntimeError(
                f"{why}, after the checkpoint of step {step} was restored {_TRIES} times: it is not a matter of one "
                f"batch or of the learning rate. Run the step under NumericalStabilityMonitor(level='deep')"
            )
        present, factor = scaler_state(self.scaler), self.lr_factor
        self.restore_checkpoint(step)
        self._restored[step] = tries
        details: dict[str, Any] = {"step": step, "times": tries, "bad": list(bad), **self._lower_scale(present)}
        reason = f"{why}: went back to the checkpoint of step {step}"
        wanted = factor * (_CUT if cut or (outgrown and tries > 1) else 1)
        if wanted < self.lr_factor:
            details["learning_rates"] = self._set_lr_factor(wanted)
            reason += f", with {wanted:g} times the learning rate that the run began with"
        return FixReport("restore", reason, details)

    def _lower_scale(self, present: dict[str, Any] | None) -> dict[str, Any]:
        """The scale after a restore; the present state of the scaler where its scale is the lower one."""
        if not present:
            return {}
        saved = scaler_state(self.scaler)
        if present["scale"] < saved["scale"]:
            self.scaler.load_state_dict(present)
        return {"scale": min(present["scale"], saved["scale"]), "scale_of_checkpoint": saved["scale"]}

    def _cut_learning_rate(self, why: str) -> FixReport:
        forget_step(self._parts)
        rates = self._set_lr_factor(self.lr_factor * _CUT)
        return FixReport("cut_learning_rate", f"{why}: halved, to {listed(rates)}", {"learning_rates": rates})

    def _set_lr_factor(self, wanted: float) -> list[float]:
        ratio, self.lr_factor = wanted / self.lr_factor, wanted
        return scale_learning_rates(self._parts.optimizers, self._parts.schedulers, ratio)

    def _note_good_step(self, report: Mapping[str, Any]) -> FixReport:
        self._in_a_row = 0
        self._losses.note(report["step"], float(report["loss"]))
        return FixReport("none", "everything is finite")

    def _is_new_explosion(self, finding: Any) -> bool:
        known = (finding.kind, finding.step) in self._cut_for
        return finding.kind == "exploding_lr" and finding.severity == "fault" and not known

    def _is_ordinary_skip(self, report: Mapping[str, Any]) -> bool:
        """As the monitor says; if it does not, as the scaler lets expect."""
        if "skipped" in report:
            return bool(report["skipped"])
        state = scaler_state(self.scaler)
        bad_gradients = report["grad_nan_count"] + report["grad_inf_count"]
        return bool(bad_gradients and state and state["scale"] > 1 and math.isfinite(report["loss"]))

    # -- small things ----------------------------------------------------------------------------------------------

    @property
    def scaler(self) -> Any:
        """The scaler, or None."""
        return self._parts.scaler

    def _next_step(self) -> int:
        if self._reported is not None:
            return self._reported + 1
        return self._order[-1] + 1 if self._order else 0

    def _last_step(self, why: str = "") -> int:
        if not self._order:
            raise RuntimeError(
                f"{why + ': ' if why else ''}expected a checkpoint to go back to, got none: call create_checkpoint() "
                f"at the start of training and every few hundred steps"
            )
        return self._order[-1]

    def _move_to_end(self, step: int) -> None:
        self._order = [s for s in self._order if s != step] + [step]

    def _drop(self, step: int) -> None:
        self._store.drop(step)
        self._order.remove(step)
