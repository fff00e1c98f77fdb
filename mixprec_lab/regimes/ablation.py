"""One component at a time: regimes that differ from a sound one in a single place, and what that place costs."""

from collections.abc import Iterable
from dataclasses import dataclass

from mixprec_lab.regimes.regime import Regime, get_regime
from mixprec_lab.regimes.runs import differences, run_all
from mixprec_lab.regimes.statistics import PairedDifference
from mixprec_lab.regimes.tasks import Task


@dataclass(frozen=True)
class Ablation:
    """A sound regime, the same with one component changed, and which one that is."""

    component: str
    base: str  #: name of the sound regime
    variant: str  #: name of the changed one
    change: str  #: what was changed, in words


#: One row a component: base, variant, change.
ABLATIONS: tuple[Ablation, ...] = (
    Ablation("master weights", "bf16_master", "bf16_nearest", "no FP32 masters"),
    Ablation("loss scaling", "fp16_dynamic", "fp16_unscaled", "no loss scale"),
    Ablation("FP32 sums", "bf16_autocast", "bf16_short_sums", "partial sums in BF16"),
    Ablation("FP8 scales", "fp8_current", "fp8_unscaled", "every scale 1"),
    Ablation("gradient format", "fp8_current", "fp8_e4m3_gradients", "E4M3 instead of E5M2"),
    Ablation("blocks", "mxfp4_forward", "fp4_per_tensor", "one scale a tensor"),
)


def changed_component(base: Regime, variant: Regime) -> str:
    """The name of the one component in which two regimes differ.

    Raises ValueError if there are none or several: then no difference of results could be put down to one.
    """
    fields = ("compute", "update", "scaling", "recipe", "sums")
    differing = [key for key in fields if getattr(base, key) != getattr(variant, key)]
    if len(differing) != 1:
        raise ValueError(
            f"expected {base.name!r} and {variant.name!r} to differ in one component, got "
            f"{', '.join(differing) or 'none'}: change one at a time with dataclasses.replace"
        )
    return differing[0]


def ablate(
    base: "str | Regime",
    variants: Iterable["str | Regime"],
    task: "str | Task" = "images",
    seeds: Iterable[int] = range(5),
    *,
    quick: bool = True,
) -> dict[str, PairedDifference]:
    """The paired difference of each variant's final held-out loss from that of ``base``, by the variant's name.

    Every variant must differ from ``base`` in one component (``changed_component``).  Trains everything anew.  Left
    out is a variant that diverged with any seed: it has no difference.
    ValueError if a variant differs in none or in several.
    """
    first, others = get_regime(base), [get_regime(v) for v in variants]
    for other in others:
        changed_component(first, other)
    runs = run_all([task], [first, *others], seeds, quick=quick, progress=False)
    return {name: found for (_, name), found in differences(runs, first.name).items()}
