"""Speed-ups that others measured and published, with their machine and source: read here, not measured here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mixprec_lab.speed.devices import identify
from mixprec_lab.speed.rooflines import RECIPES

Scope = Literal["kernel", "layer", "products", "training"]


@dataclass(frozen=True)
class PublishedPoint:
    """One published ratio of FP8 to BF16.

    ``scope``: ``kernel``: products of operands that are quantized already; ``products``: products and their casts;
    ``layer``: a linear layer, forward and backward, casts included; ``training``: whole steps.
    """

    title: str
    device: str  #: a key of ``DEVICES``
    recipe: str  #: a key of ``RECIPES``
    scope: Scope
    ratio: float  #: BF16 time over FP8 time
    citation: str  #: key in the book's bibliography
    shapes: tuple[tuple[int, int, int], ...] = ()  #: (M, K, N) of every product's forward pass


#: hidden 4096, intermediate 16384, 31 sequences of 512 tokens: query-key-value, attention output, MLP up and down
_TE_LAYER = ((15872, 4096, 12288), (15872, 4096, 4096), (15872, 4096, 16384), (15872, 16384, 4096))


def _te(title: str, recipe: str, scope: Scope, bf16: float, fp8: float) -> PublishedPoint:
    return PublishedPoint(f"Transformer Engine, {title}", "h200_nvl", recipe, scope, bf16 / fp8, "tegemm", _TE_LAYER)


def _torchao(title: str, device: str, recipe: str, before: float, after: float) -> PublishedPoint:
    ratio = after / before
    return PublishedPoint(f"torchao, Llama 3 8B, {title}", device, recipe, "training", ratio, "torchaotraining")


#: Transformer Engine: milliseconds of all products of one layer, docs/examples/gemm_profiling.  torchao: the README of
#: torchao/float8 for single layers, docs/source/workflows/training.md (tokens per second) for whole training steps.
PUBLISHED: tuple[PublishedPoint, ...] = (
    PublishedPoint("torchao, small linear layer", "h100", "current", "layer", 0.80, "torchaofloat8",
                   ((1024, 2048, 1024),)),
    PublishedPoint("torchao, large linear layer", "h100", "current", "layer", 1.39, "torchaofloat8",
                   ((4096, 8192, 16384),)),
    _te("quantized operands", "none", "kernel", 31.968, 16.785),
    _te("delayed scaling", "delayed", "products", 32.014, 18.978),
    _te("current scaling", "current", "products", 32.014, 20.285),
    _te("128-element blocks", "block", "products", 32.014, 22.882),
    _torchao("one scale a tensor", "h100", "current", 6150, 7689.5),
    _torchao("one scale a row", "h100", "current", 6150, 6768),
    _torchao("one scale a tensor", "b200", "current", 8307.5, 10417),
)  # fmt: skip


def measured_points(records: Mapping[str, Mapping[str, Any]]) -> tuple[PublishedPoint, ...]:
    """The layers that ``make measure`` timed in real FP8 against BF16 on a device of the table, one point each.

    ``records`` as ``load_all`` returns them.  Left out are emulated FP8, devices without a data sheet here, and scaling
    by rows: the model knows none of them.
    """
    found = []
    for record in records.values():
        device = identify(record["device"])
        sections = [record["sections"].get(name, {}) for name in ("linear", "transformer_engine")]
        rows = [row for section in sections if section.get("status") == "ok" for row in section["rows"]]
        if device is None:
            continue
        title = f"{record['device']}, measured {record['provenance']['date'][:10]}"
        found += [
            PublishedPoint(f"{title}, {row['recipe']} scaling", device.name, row["recipe"],
                           "layer" if row["casts"] else "kernel", row["ratio"]["median"], "", (tuple(row["shape"]),))
            for row in rows
            if row["dtype"] == "fp8" and not row["emulated"] and row["recipe"] in RECIPES
        ]  # fmt: skip
    return tuple(found)
