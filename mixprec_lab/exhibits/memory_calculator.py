"""The memory calculator: a model, a regime and a sharding; what each GPU must hold, and which one holds it."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from typing import Any

import traitlets as t

from mixprec_lab.exhibits._base import Exhibit, choice, es_module
from mixprec_lab.exhibits._text import significant
from mixprec_lab.memory import (
    GPUS,
    MODELS,
    NF4_BYTES,
    REGIMES,
    TERMS,
    ModelShape,
    TrainingMemory,
    lora_parameters,
    training_memory,
)
from mixprec_lab.plots.memory import TERM_COLOURS

OWN = "own sizes"
SEQUENCES = tuple(2**k for k in range(7, 18))
VOCABULARIES = (256, 32000, 50257, 128256)
RANKS = (0, 4, 8, 16, 32, 64, 128)
STORED = ("every activation", "layer inputs only")
_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


class MemoryCalculator(Exhibit):
    """The bill of one training run, and under it the bills of all other regimes for the same run.

    ``model`` is a key of ``mixprec_lab.memory.MODELS`` or ``"own sizes"``: a GPT of ``layers`` layers of width
    ``128 * width``, in heads of 128, with one of ``VOCABULARIES``.  ``regime`` is a key of ``REGIMES``, ``gpu`` of
    ``GPUS``.  ``stage`` shards by ZeRO over ``2**world`` GPUs; ``batch`` sequences of ``sequence`` tokens per GPU (0:
    no activations); ``stored`` and ``attention`` say what the forward pass keeps.  ``rank`` > 0 freezes the model in
    ``base`` (``bf16`` or ``nf4``) and trains adapters of that rank on every matrix, but for models with experts.
    TraitError for anything else.
    """

    _esm = es_module("memory_calculator")
    _kind = "memory-calculator"

    tables = t.Dict(help="regimes, models, GPUs and colours of the terms, for the page").tag(sync=True)
    model = t.Unicode("llama3_8b").tag(sync=True)
    layers = t.Int(32, min=1, max=128).tag(sync=True)
    width = t.Int(32, min=1, max=128).tag(sync=True)
    vocabulary = t.Int(50257).tag(sync=True)
    regime = t.Unicode("bf16_master").tag(sync=True)
    stage = t.Int(0, min=0, max=3).tag(sync=True)
    world = t.Int(3, min=1, max=13).tag(sync=True)
    batch = t.Int(1, min=0, max=64).tag(sync=True)
    sequence = t.Int(4096).tag(sync=True)
    stored = t.Unicode(STORED[0]).tag(sync=True)
    attention = t.Unicode("flash").tag(sync=True)
    rank = t.Int(0).tag(sync=True)
    base = t.Unicode("bf16").tag(sync=True)
    gpu = t.Unicode("h100").tag(sync=True)

    def __init__(self, model: str = "llama3_8b", regime: str = "bf16_master", *, name: str | None = None, **state: Any):
        defaults = self.trait_defaults()
        if unknown := [key for key in state if key not in defaults or key in ("tables", "formats")]:
            raise TypeError(f"MemoryCalculator has no {', '.join(unknown)}")
        super().__init__({}, name, model=model, regime=regime, **state)
        self.tables = _tables()

    _check_model = t.validate("model")(choice("model", lambda self: (*MODELS, OWN)))
    _check_regime = t.validate("regime")(choice("regime", lambda self: REGIMES))
    _check_vocabulary = t.validate("vocabulary")(choice("vocabulary", lambda self: VOCABULARIES))
    _check_sequence = t.validate("sequence")(choice("sequence", lambda self: SEQUENCES))
    _check_stored = t.validate("stored")(choice("stored", lambda self: STORED))
    _check_attention = t.validate("attention")(choice("attention", lambda self: ("flash", "full")))
    _check_rank = t.validate("rank")(choice("rank", lambda self: RANKS))
    _check_base = t.validate("base")(choice("base", lambda self: ("bf16", "nf4")))
    _check_gpu = t.validate("gpu")(choice("gpu", lambda self: GPUS))

    @property
    def shape(self) -> ModelShape:
        """The model of the present state."""
        if self.model in MODELS:
            return MODELS[self.model]
        hidden = 128 * self.width
        return ModelShape(OWN, self.layers, hidden, self.width, self.vocabulary, 4 * hidden, title="A GPT of own sizes")

    def bill(self, regime: str | None = None) -> TrainingMemory:
        """What ``training_memory`` says of the present state, or of the same run under another regime."""
        shape = self.shape
        adapters = self.rank * _adapter_unit(shape) if shape.experts is None else 0
        run = {"sequence": self.sequence, "batch": self.batch} if self.batch else {}
        return training_memory(
            shape, regime or self.regime, **run, zero_stage=self.stage, world_size=2**self.world if self.stage else 1,
            activation_checkpointing=self.stored != STORED[0], attention=self.attention, adapters=adapters,
            base=self.base,
        )  # fmt: skip

    def result(self) -> dict[str, str]:
        """Every text that the page shows, by its ``data-field``; see ``Exhibit.result``."""
        bill, shape, r = self.bill(), self.shape, REGIMES[self.regime]
        gpu = GPUS[self.gpu]
        count = f"each of {2**self.world} GPUs" if self.stage else "one GPU"
        answer = f"fits into the {gpu.title}" if bill.fits(gpu) else f"does not fit into the {gpu.title}"
        held = [g.title for g in GPUS.values() if bill.fits(g)]
        per = [(r.weights, "weights"), (r.gradients, "gradients"), (r.accumulated, "accumulated"),
               (r.master, "masters"), (r.moment_bytes, "moments")]  # fmt: skip
        parts = " + ".join(f"{significant(n, 6)} {word}" for n, word in per if n)
        texts = {name: _gigabytes(getattr(bill, name)) for name in TERMS}
        trained = f", {significant(bill.adapters / 1e6, 4)} million of them in adapters" if bill.adapters else ""
        refused = f" LoRA is not counted for {shape.title}." if self.rank and not bill.adapters else ""
        return texts | {
            "verdict": f"{shape.title} takes {_gigabytes(bill.total)} on {count}: it {answer}.{refused}",
            "parameters": f"{significant((bill.parameters + bill.adapters) / 1e9, 4)} billion{trained}",
            "convention": f"{significant(r.bytes_per_parameter, 6)} bytes a trained parameter: {parts}",
            "total": _gigabytes(bill.total),
            "held": ", ".join(held) or "none of these",
            "formula": bill.formula,
        }


def _gigabytes(n: int) -> str:
    return f"{significant(n / 1e9, 4)} GB"


@cache
def _adapter_unit(shape: ModelShape) -> int:
    """Parameters of rank-1 adapters on every matrix."""
    return lora_parameters(shape, 1, [name for name in _TARGETS if shape.gated or name != "gate"])


def _ranked(items: Iterable[Any], describe: Callable[[Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Descriptions by name, each with its place: the built page sorts the keys of a widget's state."""
    return {item.name: describe(item) | {"rank": rank} for rank, item in enumerate(items)}


def _describe_regime(r: Any) -> dict[str, Any]:
    keys = ("title", "weights", "gradients", "accumulated", "master", "copies", "compute")
    return {key: getattr(r, key) for key in keys} | {"moments": r.moment_bytes, "total": r.bytes_per_parameter}


def _describe_model(m: ModelShape) -> dict[str, Any]:
    keys = ("title", "layers", "hidden", "heads", "vocabulary", "inner", "gated", "fused", "norm", "positions")
    described = {key: getattr(m, key) for key in keys} | {"groups": m.heads // m.key_heads, "widths": list(m.widths)}
    described |= {"latent": asdict(m.latent) if m.latent else None, "experts": asdict(m.experts) if m.experts else None}
    return described | {
        "parameters": m.parameters,
        "matrices": m.matrix_parameters,
        "layer": m.layer_parameters,
        "adapter": 0 if m.experts else _adapter_unit(m),
    }


def _tables() -> dict[str, Any]:
    return {
        "regimes": _ranked(REGIMES.values(), _describe_regime),
        "models": _ranked(MODELS.values(), _describe_model),
        "gpus": _ranked(GPUS.values(), lambda g: {"title": g.title, "capacity": g.capacity}),
        "terms": [{"name": name, "colours": list(TERM_COLOURS[name])} for name in TERMS],
        "nf4": NF4_BYTES,
    }
