"""From hardware, task and priority to one recommendation, every part of it with its reason and its source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixprec_lab.bf16_vs_fp16.hardware import HARDWARE, Hardware, detect_hardware, get_hardware, unknown
from mixprec_lab.bf16_vs_fp16.rules import LIST_FIELDS, RULES, SINGLE_FIELDS, TASKS, Rule, Task
from mixprec_lab.bf16_vs_fp16.sources import SOURCES, Source

Priority = Literal["stability", "speed"]
PRIORITIES: tuple[str, ...] = ("stability", "speed")


@dataclass(frozen=True)
class Decision:
    """One answer, why, and who says so."""

    value: str
    reason: str
    source: Source

    @property
    def date(self) -> str:
        """The date of the source."""
        return self.source.date


@dataclass(frozen=True)
class Recommendation:
    """What to run in which format; ``str()`` of it is the table."""

    hardware: Hardware
    task: Task
    priority: str
    why_hardware: str  #: how the hardware was found: named by the caller, or detected
    forward: Decision  #: "fp16", "bf16" or "fp32"
    backward: Decision  #: follows the forward pass; "none" for inference
    accumulation: Decision  #: of matrix products
    master: Decision  #: the weights the optimizer updates
    optimizer_state: Decision
    reduction: Decision  #: gradients over ranks and micro-batches
    loss_scaling: Decision  #: "dynamic" or "none"
    tf32: Decision  #: the switch for what stays in FP32
    fp8: Decision  #: the recipe where it pays, else why not
    keep_fp32: tuple[Decision, ...]
    caveats: tuple[Decision, ...]

    def decisions(self) -> list[tuple[str, Decision]]:
        """All (field, decision) pairs, the list fields flattened."""
        single = [(name, getattr(self, name)) for name in SINGLE_FIELDS]
        return single + [(name, d) for name in LIST_FIELDS for d in getattr(self, name)]

    def as_dict(self) -> dict:
        """The values alone, JSON-ready: field -> string, or list of strings."""
        single = {name: getattr(self, name).value for name in SINGLE_FIELDS}
        return single | {name: [d.value for d in getattr(self, name)] for name in LIST_FIELDS}

    def explain(self) -> str:
        """Every decision with its reason, source and date, one block a decision."""
        blocks = [
            f"{field}: {d.value}\n    {d.reason}\n    [{d.source.title}, {d.date}]" for field, d in self.decisions()
        ]
        return "\n".join([f"{self.hardware.title}, {self.task.title}, {self.priority} first", *blocks])

    def __str__(self) -> str:
        rows = [(field.replace("_", " "), d.value) for field, d in self.decisions()]
        width = max(len(field) for field, _ in rows)
        head = f"{self.hardware.title}, {self.task.title}, {self.priority} first ({self.why_hardware})"
        return "\n".join([head, *(f"  {field:{width}}  {value}" for field, value in rows)])


def recommend(
    hardware: str = "auto", task: str = "llm_pretraining", *, priority: Priority = "stability"
) -> Recommendation:
    """The recommendation for ``hardware`` and ``task``: formats, scaling, what stays in FP32, FP8, caveats.

    ``hardware`` is a key or title of ``HARDWARE``, a device name as torch reports it, or ``"auto"``: this machine.
    ``task`` is a key, title or alias of ``TASKS``.  ``priority`` decides where speed and safety part: optimizer state,
    the dtype of FP16 reductions, TF32, the FP8 recipe, FP16 without tensor cores.

    Raises KeyError, with close matches and the known names, for an unknown hardware or task; ValueError for another
    priority; TypeError for names that are not strings.
    """
    if priority not in PRIORITIES:
        raise ValueError(f"expected priority to be 'stability' or 'speed', got {priority!r}")
    chosen_task = get_task(task)
    if hardware == "auto":
        detected = detect_hardware()
        entry, why = detected.hardware, f"auto: {detected.reason}"
    else:
        entry, why = get_hardware(hardware), "named by the caller"
    facts = entry.features | chosen_task.features | {f"hardware:{entry.name}", f"priority:{priority}"}
    forward = _first("forward", facts, chosen_task).value
    facts |= {f"forward:{forward}"}
    single = {name: _decision(_first(name, facts, chosen_task), forward) for name in SINGLE_FIELDS}
    lists = {name: tuple(_decision(r, forward) for r in _all(name, facts, chosen_task)) for name in LIST_FIELDS}
    return Recommendation(entry, chosen_task, priority, why, **single, **lists)


def get_task(name: str) -> Task:
    """The task that ``name`` means: a key, a title or an alias, upper or lower case.

    Raises KeyError, with close matches and the known names, where none does; TypeError for anything but a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a task, got {type(name).__name__}")
    wanted = name.strip().lower()
    for task in TASKS.values():
        if wanted in (task.name, task.name.replace("_", " "), task.title.lower(), *task.aliases):
            return task
    raise KeyError(unknown("task", name, TASKS))


def _all(field: str, facts: frozenset[str], task: Task) -> list[Rule]:
    return [rule for rule in RULES if rule.field == field and rule.applies(facts, task.name)]


def _first(field: str, facts: frozenset[str], task: Task) -> Rule:
    found = _all(field, facts, task)
    if not found:
        raise LookupError(f"no rule for {field} with {sorted(facts)} and task {task.name}: the table has a hole")
    return found[0]


def _decision(rule: Rule, forward: str) -> Decision:
    fill = {"forward": forward}
    return Decision(rule.value.format(**fill), rule.reason.format(**fill), SOURCES[rule.source])


def tables() -> dict:
    """Hardware, tasks, rules and sources as JSON-ready lists and dicts: what an exhibit needs to answer by itself."""
    return {
        "hardware": [{"name": h.name, "title": h.title, "features": sorted(h.features)} for h in HARDWARE.values()],
        "tasks": [{"name": t.name, "title": t.title, "features": sorted(t.features)} for t in TASKS.values()],
        "rules": [
            {"field": r.field, "value": r.value, "reason": r.reason, "source": r.source,
             "needs": sorted(r.needs), "lacks": sorted(r.lacks), "tasks": sorted(r.tasks)}
            for r in RULES
        ],
        "sources": {s.key: {"title": s.title, "url": s.url, "date": s.date} for s in SOURCES.values()},
        "single_fields": list(SINGLE_FIELDS),
        "list_fields": list(LIST_FIELDS),
    }  # fmt: skip


class PrecisionSelector:
    """The source note's selector: three questions, four answers and a reason."""

    @staticmethod
    def recommend_precision(model_type: str, hardware: str, stability_priority: bool = True) -> Mapping[str, str]:
        """``forward``, ``backward``, ``optimizer``, ``loss_scaling`` and ``reason`` for a model and an accelerator.

        ``optimizer`` is the format of its states.  ``recommend`` has the rest, the sources, and the errors.
        """
        chosen = recommend(hardware, model_type, priority="stability" if stability_priority else "speed")
        return {
            "forward": chosen.forward.value,
            "backward": chosen.backward.value,
            "optimizer": chosen.optimizer_state.value,
            "loss_scaling": chosen.loss_scaling.value,
            "reason": chosen.forward.reason,
        }
