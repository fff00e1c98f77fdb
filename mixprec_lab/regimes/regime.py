"""A training regime as a value: which tensor has which width, who updates the weights, and what is scaled."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from mixprec_lab.block_scaling import BlockScaling, get_scheme
from mixprec_lab.formats import text_table
from mixprec_lab.fp8 import CurrentScaling, DelayedScaling, FixedScaling, Recipe

Compute = Literal["fp32", "tf32", "fp16", "bf16"]
Update = Literal["fp32", "master", "nearest", "stochastic", "kahan"]
Scaling = Literal["none", "dynamic"]
#: which part of the package trains a regime
Engine = Literal["FP32 loop", "MixedPrecisionTrainer", "BF16Trainer", "FP8Trainer"]
_SCALES: Mapping[type, str] = MappingProxyType(
    {DelayedScaling: "delayed", CurrentScaling: "current", FixedScaling: "fixed", BlockScaling: "blocks"}
)
_NARROW: tuple[str, ...] = ("master", "nearest", "stochastic", "kahan")


@dataclass(frozen=True)
class Regime:
    """How a model is trained, component by component; ``dataclasses.replace`` changes one of them.

    ``compute`` is the width of the operands of matrix products outside of ``recipe``'s layers.  ``update`` "fp32" steps
    FP32 weights; the others keep BF16 weights and are the rules of ``BF16Trainer``.  ``scaling`` is that of the loss.
    ``recipe`` quantizes the linear layers.  ``sums`` is the width of partial sums of products; "bf16" is there to show
    what FP32 sums are for.  Raises ValueError for a combination that no trainer of the package runs.
    """

    name: str
    title: str
    compute: Compute = "fp32"
    update: Update = "fp32"
    scaling: Scaling = "none"
    recipe: Recipe | None = None
    sums: Literal["fp32", "bf16"] = "fp32"
    layers: str = ""  #: what the recipe's layers multiply, in words: input, weight / gradient

    def __post_init__(self) -> None:
        for key, allowed in (("compute", ("fp32", "tf32", "fp16", "bf16")), ("update", ("fp32", *_NARROW)),
                             ("scaling", ("none", "dynamic")), ("sums", ("fp32", "bf16"))):  # fmt: skip
            if getattr(self, key) not in allowed:
                raise ValueError(f"expected {key} to be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        narrow = self.update in _NARROW
        wrong = {
            "loss scaling is for compute='fp16'": self.scaling == "dynamic" and self.compute != "fp16",
            "BF16 weights need compute='bf16'": narrow and self.compute != "bf16",
            "a recipe needs compute='bf16' and update='fp32'": self.recipe is not None
            and (self.compute != "bf16" or narrow),
            "sums='bf16' is for compute='bf16' without a recipe": self.sums == "bf16"
            and (self.compute != "bf16" or self.recipe is not None),
        }
        if bad := [reason for reason, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(f"expected a regime that a trainer runs, got {self.name!r}: {'; '.join(bad)}")
        if self.recipe is not None and not self.layers:
            raise ValueError(f"expected layers to say what the recipe of {self.name!r} multiplies, got ''")

    @property
    def engine(self) -> Engine:
        """The part of the package that trains it."""
        if self.recipe is not None:
            return "FP8Trainer"
        if self.update in _NARROW:
            return "BF16Trainer"
        return "MixedPrecisionTrainer" if self.compute in ("fp16", "bf16") else "FP32 loop"

    @property
    def weights(self) -> str:
        """The width of the weights that the forward pass reads."""
        return "bf16" if self.update in _NARROW else "fp32"

    @property
    def emulated(self) -> str:
        """What is emulated on a CPU and would be hardware elsewhere; empty where nothing is."""
        if self.recipe is not None:
            return "quantized products"
        return "TF32 operands" if self.compute == "tf32" else "short sums" if self.sums == "bf16" else ""

    def components(self) -> dict[str, str]:
        """What each component is, in words."""
        kind = type(self.recipe)
        updates = {"fp32": "FP32 AdamW", "master": "FP32 masters, FP32 AdamW", "nearest": "BF16 AdamW, nearest",
                   "stochastic": "BF16 AdamW, stochastic", "kahan": "BF16 AdamW, Kahan"}  # fmt: skip
        return {
            "weights": self.weights.upper(),
            "products": self.layers or self.compute.upper(),
            "gradients": self.weights.upper(),
            "optimizer": updates[self.update],
            "scaling": self.scaling if self.recipe is None else _SCALES.get(kind, kind.__name__),
        }


def _catalogue(*regimes: Regime) -> Mapping[str, Regime]:
    return MappingProxyType({r.name: r for r in regimes})


#: The regimes of the chapter, the baseline first.
REGIMES: Mapping[str, Regime] = _catalogue(
    Regime("fp32", "FP32"),
    Regime("tf32", "TF32", "tf32"),
    Regime("fp16_unscaled", "FP16, unscaled", "fp16"),
    Regime("fp16_dynamic", "FP16, dynamic scale", "fp16", scaling="dynamic"),
    Regime("bf16_autocast", "BF16 autocast", "bf16"),
    Regime("bf16_nearest", "BF16 weights, nearest", "bf16", "nearest"),
    Regime("bf16_stochastic", "BF16 weights, stochastic", "bf16", "stochastic"),
    Regime("bf16_kahan", "BF16 weights, Kahan", "bf16", "kahan"),
    Regime("bf16_master", "BF16 + FP32 masters", "bf16", "master"),
    Regime("fp8_delayed", "FP8, delayed scales", "bf16", recipe=DelayedScaling(), layers="E4M3 / E5M2"),
    Regime("fp8_current", "FP8, current scales", "bf16", recipe=CurrentScaling(), layers="E4M3 / E5M2"),
    Regime("fp8_block", "FP8, 1x128 and 128x128", "bf16", recipe=BlockScaling.deepseek(), layers="E4M3 / E4M3"),
    Regime("mxfp8", "MXFP8", "bf16", recipe=BlockScaling("mxfp8"), layers="E4M3 / E4M3"),
    Regime("mxfp4_forward", "MXFP4 forward", "bf16", recipe=BlockScaling("mxfp4", gradient_scheme="mxfp8"),
           layers="E2M1 / E4M3"),
)  # fmt: skip


_FP4_PER_TENSOR = replace(get_scheme("mxfp4"), name="fp4_per_tensor", block=(None, None), title="E2M1 per tensor")
#: Regimes that only the ablation trains: each is one of the above with one component changed.
VARIANTS: Mapping[str, Regime] = _catalogue(
    replace(REGIMES["bf16_autocast"], name="bf16_short_sums", title="BF16, sums in BF16", sums="bf16"),
    replace(REGIMES["fp8_current"], name="fp8_unscaled", title="FP8, scale 1", recipe=FixedScaling()),
    replace(REGIMES["fp8_current"], name="fp8_e4m3_gradients", title="FP8, E4M3 gradients",
            recipe=CurrentScaling("e4m3"), layers="E4M3 / E4M3"),
    replace(REGIMES["mxfp4_forward"], name="fp4_per_tensor", title="FP4, one scale a tensor",
            recipe=BlockScaling(_FP4_PER_TENSOR, gradient_scheme="mxfp8")),
)  # fmt: skip


def get_regime(x: "str | Regime") -> Regime:
    """The regime that ``x`` names, or ``x`` itself.  KeyError, listing the names, for anything else."""
    if isinstance(x, Regime):
        return x
    known = {**REGIMES, **VARIANTS}
    if not isinstance(x, str) or x not in known:
        raise KeyError(f"expected the name of a regime or a Regime, got {x!r}; the names are {', '.join(known)}")
    return known[x]


def regime_table(regimes: Mapping[str, Regime] = REGIMES) -> str:
    """Every regime with its components, as a plain-text table; gradients have the width of the weights."""
    heads = ("weights", "products", "optimizer", "scaling")
    return text_table(["regime", *heads], [[r.name, *(r.components()[h] for h in heads)] for r in regimes.values()])
