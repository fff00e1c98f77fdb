"""The interface of the note: ``check_model_health`` and ``diagnose_instability``, on the monitor's own machinery."""

import math
from typing import TYPE_CHECKING, Any

import torch

from mixprec_lab.nan_debugging.ledger import scale_of
from mixprec_lab.nan_debugging.sensors import measurable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAST = 10  # reports that a diagnosis looks at


class HealthMixin:
    """One report a call, a history of them, and a diagnosis of the last ten."""

    def check_model_health(self, step: int, loss: torch.Tensor | float, *, scaled: bool = False) -> dict[str, Any]:
        """A report on the loss, the parameters and their gradients as they are now; also kept in ``history``.

        ``scaled`` says that gradients still carry the loss scale: norms are then divided by it.  Keys: ``step``,
        ``loss``, ``loss_nan``, ``loss_inf``, ``grad_norm`` and ``param_norm`` (global, over finite values),
        ``grad_nan_count``, ``grad_inf_count``, ``param_nan_count``, ``param_inf_count``, ``scale``, ``skipped``,
        ``issues`` (text) and ``findings`` (those of this step).  Reads once from the device.

        Raises TypeError for a loss that is no number, ValueError for one with several elements.
        """
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"expected the step as a whole number, got {type(step).__name__}")
        if isinstance(loss, torch.Tensor) and loss.numel() != 1:
            raise ValueError(f"expected a scalar loss, got shape {tuple(loss.shape)}: reduce it first")
        if isinstance(loss, bool) or not isinstance(loss, torch.Tensor | int | float):
            raise TypeError(f"expected the loss as a tensor or a number, got {type(loss).__name__}")
        with torch.no_grad():
            value, counts, scale = self._measure(loss)
        divisor = scale if scaled and scale else 1.0
        report = {
            "step": step, "loss": value, "loss_nan": math.isnan(value), "loss_inf": math.isinf(value),
            "grad_norm": counts["grad"][0] / divisor, "param_norm": counts["param"][0],
            "grad_nan_count": counts["grad"][1], "grad_inf_count": counts["grad"][2],
            "param_nan_count": counts["param"][1], "param_inf_count": counts["param"][2], "scale": scale,
        }  # fmt: skip
        bad = report["grad_nan_count"] + report["grad_inf_count"]
        report["skipped"] = bool(bad and scale and scale > 1 and not report["loss_nan"] and not report["loss_inf"])
        report["issues"] = _issues(report)
        report["findings"] = [f for f in self.findings if f.step == step]
        self.history.append(report)
        return report

    def _measure(self, loss: Any) -> tuple[float, dict[str, tuple[float, int, int]], float | None]:
        """Loss, norms and counts, in one read."""
        value = torch.as_tensor(loss).detach().double().reshape(())
        parameters = list(self.model.parameters())
        groups = {"grad": [p.grad for p in parameters if p.grad is not None], "param": parameters}
        numbers = [value]
        for tensors in groups.values():
            numbers += _numbers([t.coalesce().values() if t.is_sparse else t for t in tensors], value)
        scale = scale_of(self.scaler) if self.scaler is not None else None
        numbers.append(torch.tensor(math.nan) if scale is None else scale.float().reshape(()))
        device = parameters[0].device
        read = torch.stack([n.to(device, torch.float64).reshape(()) for n in numbers]).tolist()
        counts = {"grad": _three(read[1:4]), "param": _three(read[4:7])}
        return read[0], counts, None if math.isnan(read[7]) else read[7]

    def diagnose_instability(self) -> list[str]:
        """What the last ten reports, and the findings, say in words; one line that all is well if they say nothing."""
        faults = [f for f in self.findings if f.severity == "fault"]
        lines = [f"{f.kind} since step {f.step}: {f.evidence}; {f.advice}" for f in faults]
        last = [h for h in self.history if "loss" in h][-_LAST:]
        if not last and not lines:
            return ["no report yet: call check_model_health(step, loss) after backward"]
        for key, what in (("loss_nan", "the loss was NaN"), ("loss_inf", "the loss was infinite")):
            steps = [h["step"] for h in last if h[key]]
            if steps:
                lines.append(f"{what} at steps {steps}: look at the batch, then at the first operation that is bad")
        for kind in ("grad", "param"):
            steps = [h["step"] for h in last if h[f"{kind}_nan_count"] + h[f"{kind}_inf_count"] and not h["skipped"]]
            if steps:
                lines.append(f"{'gradients' if kind == 'grad' else 'parameters'} were not finite at steps {steps}")
        lines += _trends(last)
        return lines or ["no sign of instability in the last reports"]

    def plot_history(self) -> "Figure":
        """Loss, gradient norm and parameter norm over the reports; steps with values that are not finite are marked."""
        from mixprec_lab.plots.nan_debugging import health_history

        return health_history([h for h in self.history if "loss" in h])


def _numbers(tensors: list[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    """Norm over finite values, NaN and infinities of a list of tensors, on their device."""
    square = nan = inf = torch.zeros((), dtype=torch.float64, device=like.device)
    for t in tensors:
        if measurable(t):
            wide = t.detach().double()
            square = square.to(t.device) + wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum()
            nan, inf = nan.to(t.device) + wide.isnan().sum(), inf.to(t.device) + wide.isinf().sum()
    return [square.sqrt(), nan, inf]


def _three(read: list[float]) -> tuple[float, int, int]:
    return read[0], int(read[1]), int(read[2])


def _issues(report: dict[str, Any]) -> list[str]:
    found = []
    if report["loss_nan"] or report["loss_inf"]:
        found.append(f"the loss is {report['loss']}")
    for kind, word in (("grad", "gradients"), ("param", "parameters")):
        for bad in ("nan", "inf"):
            count = report[f"{kind}_{bad}_count"]
            if count:
                found.append(f"{count} {'NaN' if bad == 'nan' else 'infinite'} values in the {word}")
    return found


def _trends(last: list[dict[str, Any]]) -> list[str]:
    """Explosions and vanishing gradients, against the run's own level."""
    lines = []
    finite = [h for h in last if not (h["loss_nan"] or h["loss_inf"])]
    if len(finite) >= 3:
        losses = sorted(abs(h["loss"]) for h in finite[:-1])
        typical = losses[len(losses) // 2]
        if typical > 0 and abs(finite[-1]["loss"]) > 100 * typical:
            factor = abs(finite[-1]["loss"]) / typical
            lines.append(f"the loss is {factor:.3g} times its median: lower the learning rate")
        norms = sorted(h["grad_norm"] for h in finite[:-1])
        middle = norms[len(norms) // 2]
        if middle > 0 and finite[-1]["grad_norm"] > 100 * middle:
            lines.append(f"the gradient norm is {finite[-1]['grad_norm'] / middle:.3g} times its median: clip it")
        if all(h["grad_norm"] < 1e-7 * max(h["param_norm"], 1e-30) for h in finite):
            lines.append("gradients are below 1e-7 of the parameters in every report: they vanish, or are scaled down")
    return lines
