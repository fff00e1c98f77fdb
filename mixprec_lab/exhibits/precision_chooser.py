"""The precision chooser: hardware, task and priority to a recommendation, every part of it with reason and source."""

import traitlets as t

from mixprec_lab.bf16_vs_fp16 import HARDWARE, TASKS, Recommendation, get_hardware, get_task, recommend, tables
from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.formats import FORMATS

PRIORITIES = ("stability", "speed")
PARTS = {
    "forward": "Forward pass",
    "backward": "Backward pass",
    "accumulation": "Sums inside a product",
    "master": "Master weights",
    "optimizer_state": "Optimizer state",
    "reduction": "Gradient reduction",
    "loss_scaling": "Loss scaling",
    "tf32": "TF32",
    "fp8": "FP8",
    "keep_fp32": "Keep in FP32",
    "caveats": "Beware",
}


class PrecisionChooser(Exhibit):
    """What ``recommend`` answers for ``hardware`` and ``task`` at ``priority`` (stability, speed), and what for others.

    ``hardware`` and ``task`` are names that ``recommend`` takes ("A100", "gpt"), but not "auto": the page does not know
    the machine that it is read on.  The map shows the forward format of every pair.  Raises KeyError, with close
    matches, for unknown names, and TraitError for another priority.
    """

    _esm = es_module("precision_chooser")
    _kind = "precision-chooser"

    tables = t.Dict(help="hardware, tasks, rules and sources, as bf16_vs_fp16.tables() gives them").tag(sync=True)
    parts = t.List(help="field of a recommendation and its name in the page").tag(sync=True)
    hardware = t.Unicode("a100").tag(sync=True)
    task = t.Unicode("llm_pretraining").tag(sync=True)
    priority = t.Unicode("stability").tag(sync=True)

    def __init__(
        self,
        hardware: str = "a100",
        task: str = "llm_pretraining",
        priority: str = "stability",
        *,
        name: str | None = None,
    ) -> None:
        state = {"hardware": get_hardware(hardware).name, "task": get_task(task).name, "priority": priority}
        super().__init__(table_of(("fp32", "fp16", "bf16")), name, **state)
        self.tables = tables()
        self.parts = [list(part) for part in PARTS.items()]

    _check_hardware = t.validate("hardware")(choice("hardware", lambda self: HARDWARE))
    _check_task = t.validate("task")(choice("task", lambda self: TASKS))
    _check_priority = t.validate("priority")(choice("priority", lambda self: PRIORITIES))

    def recommendation(self, priority: str | None = None) -> Recommendation:
        """The present recommendation, or the one at another ``priority``."""
        return recommend(self.hardware, self.task, priority=priority or self.priority)

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        chosen, texts, seen = self.recommendation(), {}, {}
        for field, decision in chosen.decisions():
            at = seen[field] = seen.get(field, -1) + 1
            source = f"{decision.source.title}, {decision.date}"
            said = {"value": _title(decision.value), "reason": decision.reason, "source": source}
            texts |= {f"{field}-{at}-{key}": text for key, text in said.items()}
        return texts | {"verdict": _verdict(chosen), "changes": self._changes(chosen)}

    def _changes(self, chosen: Recommendation) -> str:
        other = next(p for p in PRIORITIES if p != self.priority)
        theirs = self.recommendation(other).as_dict()
        changed = [
            f"{PARTS[field]}: {_title(theirs[field])} instead of {_title(value)}"
            for field, value in chosen.as_dict().items()
            if isinstance(value, str) and theirs[field] != value
        ]
        return f"With {other} first: {'; '.join(changed) or 'the same'}."


def _verdict(chosen: Recommendation) -> str:
    kind = "inference" if chosen.backward.value == "none" else "training"
    scaling = {"dynamic": "with dynamic loss scaling", "none": "without loss scaling"}[chosen.loss_scaling.value]
    end = f", {scaling}" if kind == "training" else ""
    native = "" if "bf16" in chosen.hardware.features else " It has no BF16 units."
    return f"{chosen.hardware.title}, {chosen.task.title}: {kind} in {_title(chosen.forward.value)}{end}.{native}"


def _title(value: str) -> str:
    return FORMATS[value].title if value in FORMATS else value
