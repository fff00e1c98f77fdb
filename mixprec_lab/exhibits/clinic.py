"""The clinic: a recorded run is the patient; read its curves, order examinations, make a diagnosis."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module, table_of
from mixprec_lab.exhibits._text import percent, shortest, significant
from mixprec_lab.nan_debugging.drawn import DRAWN, draw
from mixprec_lab.nan_debugging.faults import HEALTHY, Fault
from mixprec_lab.nan_debugging.records import EXAMINATIONS, FAMILIES, MARKS, PLACES, PatientRecord, price, record

#: the patients of the page, in an order that tells nothing
WARD = (
    *("nan_in_input", "where_trap_under_scaler", "scaler_calibration", "attention_logits_fp16", "clip_before_unscale"),
    *("stale_amax", "gradients_underflow", "masked_softmax", "updates_lost_bf16", "loss_in_fp16"),
    *("scaler_state_not_restored", "momentum_large_lr", "token_ids_in_bf16", "rmsnorm_fp16", "one_loss_of_two_scaled"),
    "gradients_in_e4m3",
)
RIGHT_FAMILY, RIGHT_PLACE = 60, 40  # points
MOST_PATIENTS, MOST_STEPS = 64, 256  # the page carries every curve
UNKNOWN, OWN = "?", "own"
_PHASES = ("open", "revealed")
_HIDDEN = "Not revealed yet."
_CURVES = ("loss", "gradient_norm", "scale", "flushed", "bad_gradients", "bad_parameters")


class Clinic(Exhibit):
    """A ward of recorded runs.  Each examination costs points; a diagnosis is worth 60, its place in the step 40.

    ``patients`` are Faults, or names of ``FAULTS`` and ``HEALTHY``; without them the 16 of the page.  They are recorded
    now, in seconds, by ``nan_debugging.records.record``; a Fault of your own is a patient, too.

    ``patient`` is a number, "1" and up; ``ordered`` the examinations, comma-separated, in the order in which they were
    made; ``diagnosis`` a key of ``FAMILIES``, ``place`` one of ``PLACES``, "?" for none yet.  In ``phase`` "revealed"
    the answer is shown.  A new patient in the page starts with nothing ordered; in Python the rest stays as it is.

    Patient "own" is drawn by ``rate``, ``precision``, ``scaler`` and ``spike`` (keys of ``nan_debugging.drawn.DRAWN``):
    all 36 combinations are recorded, too, unless ``own`` is False.  Nothing is scored there.

    Raises ValueError for no patients, for more than 64, and for a run of more than 256 steps; KeyError for an unknown
    name; TraitError for a state out of range.
    """

    _esm = es_module("clinic")
    _kind = "clinic"

    ward = t.List(help="every patient: curves, examinations, and the answer").tag(sync=True)
    choices = t.Dict(help="examinations, families and places, each a list in order").tag(sync=True)
    patient = t.Unicode("1").tag(sync=True)
    step = t.Int(0, min=0, max=MOST_STEPS - 1).tag(sync=True)
    ordered = t.Unicode("").tag(sync=True)
    diagnosis = t.Unicode(UNKNOWN).tag(sync=True)
    place = t.Unicode(UNKNOWN).tag(sync=True)
    phase = t.Unicode("open").tag(sync=True)
    drawn = t.Dict(help="the patients that can be drawn, by their choices").tag(sync=True)
    rate = t.Unicode("0.1").tag(sync=True)
    precision = t.Unicode("fp16").tag(sync=True)
    scaler = t.Unicode("on").tag(sync=True)
    spike = t.Unicode("on").tag(sync=True)

    def __init__(
        self,
        patients: Iterable[Fault | str] | None = None,
        *,
        own: bool = True,
        seed: int = 0,
        name: str | None = None,
        **state: Any,
    ) -> None:
        chosen = list(WARD if patients is None else patients)
        if not 1 <= len(chosen) <= MOST_PATIENTS:
            raise ValueError(f"expected 1 to {MOST_PATIENTS} patients, got {len(chosen)}")
        records = [record(patient, seed) for patient in chosen]
        for one in records:
            if one.steps > MOST_STEPS:
                raise ValueError(f"expected runs of at most {MOST_STEPS} steps, got {one.steps} in {one.name!r}")
        self.records = {str(number): one for number, one in enumerate(records, 1)}
        self._own = {keys: draw(*keys, seed) for keys in itertools.product(*DRAWN.values())} if own else {}
        super().__init__(table_of(["fp16"]), name, **state)
        # Set apart, because the name of the links must not depend on the machine that recorded.
        self.ward = [_for_the_page(one, _twin(patient, seed)) for patient, one in zip(chosen, records, strict=True)]
        self.drawn = {" ".join(keys): _for_the_page(one, None) for keys, one in self._own.items()}
        self.choices = {
            "examinations": [[key, *examination] for key, examination in EXAMINATIONS.items()],
            "families": [list(family) for family in FAMILIES.items()],
            "places": [list(place) for place in PLACES.items()],
            "own": [[key, [list(option) for option in options.items()]] for key, options in DRAWN.items()],
        }

    _check_patient = t.validate("patient")(choice("patient", lambda self: (*self.records, *([OWN] * bool(self._own)))))
    _check_diagnosis = t.validate("diagnosis")(choice("diagnosis", lambda self: (UNKNOWN, *FAMILIES)))
    _check_place = t.validate("place")(choice("place", lambda self: (UNKNOWN, *PLACES)))
    _check_phase = t.validate("phase")(choice("phase", lambda self: _PHASES))
    _check_rate = t.validate("rate")(choice("rate", lambda _: DRAWN["rate"]))
    _check_precision = t.validate("precision")(choice("precision", lambda _: DRAWN["precision"]))
    _check_scaler = t.validate("scaler")(choice("scaler", lambda _: DRAWN["scaler"]))
    _check_spike = t.validate("spike")(choice("spike", lambda _: DRAWN["spike"]))

    @t.validate("ordered")
    def _check_ordered(self, proposal: Any) -> str:
        keys = proposal.value.split(",") if proposal.value else []
        if len(set(keys)) != len(keys) or not set(keys) <= set(EXAMINATIONS):
            known = ", ".join(EXAMINATIONS)
            raise t.TraitError(f"expected ordered to list, without repetition, some of {known}, got {proposal.value!r}")
        return proposal.value

    @property
    def record(self) -> PatientRecord:
        """The record of the present patient."""
        return self._own[self._choice()] if self.patient == OWN else self.records[self.patient]

    def _choice(self) -> tuple[str, ...]:
        return tuple(getattr(self, key) for key in DRAWN)

    @property
    def spent(self) -> int:
        """The points that the examinations have cost."""
        return price(self._ordered())

    def score(self) -> int:
        """60 for the right diagnosis, 40 for the right place, less what the examinations cost; never below 0."""
        right = RIGHT_FAMILY * (self.diagnosis == self.record.family) + RIGHT_PLACE * (self.place == self.record.place)
        return max(0, right - self.spent)

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        shown = self.drawn[" ".join(self._choice())] if self.patient == OWN else self.ward[int(self.patient) - 1]
        revealed = self.phase == "revealed"
        texts = {"history": shown["history"], "verdict": self._score_text() if revealed else self._open_text()}
        for key in EXAMINATIONS:
            text = shown["examinations"][key]
            told = text if key in self._ordered() else ""
            texts[f"exam-{key}"] = shown["marks"][key] + text if revealed else told
        at = min(self.step, self.record.steps - 1)
        for curve in _CURVES:
            value = shown["curves"][curve][at]
            texts[f"now-{curve}"] = percent(float(value)) if curve == "flushed" else value
        return texts | {key: shown[key] if revealed else _HIDDEN for key in ("answer", "report", "cure", "twin", "way")}

    def _ordered(self) -> list[str]:
        return self.ordered.split(",") if self.ordered else []

    def _open_text(self) -> str:
        if not self.ordered and self.patient == OWN:
            return "Nothing is ordered yet. You drew this one: choose, read, and order what you like."
        if not self.ordered:
            return "Nothing is ordered yet. Read the curves, order what you need, and make a diagnosis."
        last = EXAMINATIONS[self._ordered()[-1]].title
        if self.patient == OWN:
            return f"Ordered: {last}. Nothing is scored."
        return f"Ordered: {last}. {self.spent} points are spent; the best that is left is {max(0, 100 - self.spent)}."

    def _score_text(self) -> str:
        if self.patient == OWN:
            return "You drew this one, so nothing is scored. The monitor's report stands below."
        family = "right" if self.diagnosis == self.record.family else "wrong"
        place = "right" if self.place == self.record.place else "wrong"
        return (
            f"The diagnosis is {family}, the place is {place}; {self.spent} points went into examinations. "
            f"Score: {self.score()} of 100."
        )


def _twin(patient: Fault | str, seed: int) -> PatientRecord | None:
    return None if isinstance(patient, str) and patient in HEALTHY else record(patient, seed, repaired=True)


def _for_the_page(one: PatientRecord, twin: PatientRecord | None) -> dict[str, Any]:
    return {
        "history": _history(one),
        "curves": {curve: [_value(curve, value) for value in getattr(one, curve)] for curve in _CURVES},
        "healed": [_value("loss", value) for value in twin.loss] if twin else [],
        "examinations": {key: result.text for key, result in one.results.items()},
        "marks": {key: f"It {MARKS[result.mark]}.\n" if one.family else "" for key, result in one.results.items()},
        "family": one.family,
        "place": one.place,
        "begins": one.step,
        "answer": _answer(one),
        "report": one.results["cheap"].text,
        "cure": _cure(one),
        "twin": _healed(twin),
        "way": _way(one),
    }


def _value(curve: str, value: float) -> str:
    """A value of a curve as the page reads and shows it; scales as powers of two where they are."""
    if curve != "scale":
        return shortest(value)
    if math.isnan(value):
        return "none"
    fraction, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if fraction == 0.5 else significant(value, 3)


def _history(one: PatientRecord) -> str:
    """What the owner of the run can say without looking for it."""
    scaler = "without a GradScaler" if math.isnan(one.scale[0]) else "with a GradScaler"
    bad = [i for i, value in enumerate(one.loss) if not math.isfinite(value)]
    loss = f"The loss goes from {shortest(one.loss[0])} to {shortest(one.loss[-1])}."
    if bad:
        loss = f"The loss is not finite at {_steps(len(bad))}, the first is step {bad[0]}."
    end = f" The run ended in {one.error.rstrip('.')}." if one.error else ""
    return f"{_steps(one.steps)} of training, {scaler}. {loss}{end}"


def _answer(one: PatientRecord) -> str:
    if not one.family:
        return f"{one.title}."
    if one.family == "none":
        return f"Nothing is wrong. This is {one.title}."
    return f"{one.title}. Its class is {one.fault_class}; it begins at step {one.step}, {PLACES[one.place]}."


def _cure(one: PatientRecord) -> str:
    if not one.family:
        silent = one.results["cheap"].text == "no findings"
        return (
            "None is needed, says the monitor." if silent else "It stands in the lines 'do:' of the monitor's report."
        )
    return f"{one.cure}." if one.cure else "None is needed: leave the run alone."


def _healed(twin: PatientRecord | None) -> str:
    if twin is None:
        return "This run has none."
    finds = "finds nothing to call a fault" if twin.results["cheap"].mark == "quiet" else "raises a false alarm"
    return f"{_history(twin)} The monitor {finds}."


def _way(one: PatientRecord) -> str:
    if not one.family:
        return "Nothing is scored."
    if not one.way:
        return "None of these examinations tells it, alone or together with the list of dtypes and settings."
    titles, points = [EXAMINATIONS[key].title for key in one.way], price(one.way)
    told = f"First {'; then '.join(titles)}" if len(titles) > 1 else f"Just {titles[0]}"
    return f"{told}: {points} points, so a score of {100 - points}. Whoever reads it off the curves keeps all 100."


def _steps(n: int) -> str:
    return f"{n} step{'' if n == 1 else 's'}"
