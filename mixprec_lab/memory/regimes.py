"""How many bytes each regime keeps per parameter, buffer by buffer, as data with a source."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from mixprec_lab.formats import text_table

Compute = Literal["fp32", "autocast", "bf16", "fp8", "fp8_autocast"]
#: FP32 constants of block-wise 8-bit Adam: one for every 256 values of each of the two moments (bitsandbytes).
ADAM8BIT_SCALES = 2 * 4 / 256


@dataclass(frozen=True)
class Regime:
    """Bytes per parameter of every buffer that lives from step to step, and the widths activations are saved in."""

    name: str
    title: str
    weights: float  #: the parameters the forward pass reads
    gradients: float  #: what the backward pass writes
    accumulated: float  #: a second gradient buffer, wider, that micro-batches are added into
    master: float  #: the wide copy the optimizer steps
    moments: tuple[float, ...]  #: optimizer state, one entry a buffer
    source: str
    compensation: float = 0.0  #: Kahan compensation of the weights
    scales: float = 0.0  #: constants of quantized moments
    copies: float = 0.0  #: FP8 copies of the matrices, transposes included; the weights above stay
    compute: Compute = "bf16"

    @property
    def gradient_bytes(self) -> float:
        """Both gradient buffers."""
        return self.gradients + self.accumulated

    @property
    def moment_bytes(self) -> float:
        """All optimizer state but the master weights: moments, their constants, Kahan compensation."""
        return sum(self.moments) + self.scales + self.compensation

    @property
    def bytes_per_parameter(self) -> float:
        """Weights, gradients, masters and optimizer state: the number people quote.  FP8 copies are not in it."""
        return self.weights + self.without_weights

    @property
    def without_weights(self) -> float:
        """The same without the weights: how FP8-LM counts (arXiv:2310.18313, equations 7 and 8)."""
        return self.gradient_bytes + self.master + self.moment_bytes


_ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1"
_BEKMAN = "Bekman, Machine Learning Engineering, training/performance"
_PLAYBOOK = "Tazi et al. 2025, The Ultra-Scale Playbook, table of FP8 approaches"
_COUNT = "arithmetic: the sizes of the tensors torch allocates"
_ADAM8 = "Dettmers et al. 2022, arXiv:2110.02861; the constants from the source of bitsandbytes"

REGIMES: Mapping[str, Regime] = MappingProxyType({
    r.name: r
    for r in (
        Regime("fp32", "FP32, Adam", 4, 4, 0, 0, (4, 4), _COUNT, compute="fp32"),
        Regime("fp32_sgd", "FP32, SGD with momentum", 4, 4, 0, 0, (4,), _COUNT, compute="fp32"),
        Regime("autocast", "torch.autocast over FP32 parameters, Adam", 4, 4, 0, 0, (4, 4), _COUNT,
               compute="autocast"),
        Regime("autocast_adam8bit", "torch.autocast over FP32 parameters, 8-bit Adam", 4, 4, 0, 0, (1, 1), _ADAM8,
               scales=ADAM8BIT_SCALES, compute="autocast"),
        Regime("bf16_master", "16-bit weights and gradients, FP32 master, Adam", 2, 2, 0, 4, (4, 4), _ZERO),
        Regime("bf16_master_fp32_grad", "the same with FP32 gradients", 2, 4, 0, 4, (4, 4), _BEKMAN),
        Regime("bf16_master_accumulate", "the same with 16-bit gradients added into an FP32 buffer", 2, 2, 4, 4,
               (4, 4), _PLAYBOOK),
        Regime("bf16_master_adam8bit", "16-bit weights and gradients, FP32 master, 8-bit Adam", 2, 2, 0, 4, (1, 1),
               _ADAM8, scales=ADAM8BIT_SCALES),
        Regime("bf16_fp32_moments", "BF16 weights and gradients, FP32 moments, no master", 2, 2, 0, 0, (4, 4), _COUNT),
        Regime("bf16_pure", "everything in BF16", 2, 2, 0, 0, (2, 2), _BEKMAN),
        Regime("bf16_kahan", "everything in BF16, Kahan compensation", 2, 2, 0, 0, (2, 2),
               "Zamirai et al. 2020, arXiv:2010.06192", compensation=2),
        Regime("te_fp8_fp32", "Transformer Engine FP8 over FP32 parameters, with transposes (Hopper)", 4, 4, 0, 0,
               (4, 4), _PLAYBOOK + "; copies from the Transformer Engine documentation", copies=2,
               compute="fp8_autocast"),
        Regime("te_fp8_bf16", "Transformer Engine FP8 over BF16 parameters, FP32 master, with transposes (Hopper)", 2,
               2, 0, 4, (4, 4), _ZERO + "; copies from the Transformer Engine documentation", copies=2,
               compute="fp8"),
        Regime("deepseek_v3", "DeepSeek-V3: FP8 weights, BF16 gradients and moments, FP32 master and accumulation", 1,
               2, 4, 4, (2, 2), _PLAYBOOK, compute="fp8"),
        Regime("fp8_lm", "FP8-LM: FP8 weights, gradients and first moment, FP16 master and second moment", 1, 1, 0, 2,
               (1, 2), "Peng et al. 2023, arXiv:2310.18313, equation 8", compute="fp8"),
        Regime("fp8_lm_accumulate", "FP8-LM with an FP16 buffer to accumulate gradients", 1, 1, 2, 2, (1, 2),
               _PLAYBOOK, compute="fp8"),
        Regime("nanotron_fp8", "Nanotron FP8: FP8 weights, gradients, moments; BF16 master, FP32 accumulation", 1, 1,
               4, 2, (1, 1), _PLAYBOOK, compute="fp8"),
    )
})  # fmt: skip


def get_regime(x: "str | Regime") -> Regime:
    """The regime that ``x`` names, or ``x`` itself if it is a ``Regime``; KeyError, listing the names, otherwise."""
    if isinstance(x, Regime):
        return x
    found = REGIMES.get(x) if isinstance(x, str) else None
    if found is None:
        raise KeyError(f"expected a regime, got {x!r}; the names are {', '.join(REGIMES)}")
    return found


def regime_table() -> str:
    """Every regime with its bytes per parameter, buffer by buffer, as a plain-text table."""
    rows = []
    for r in REGIMES.values():
        buffers = (r.weights, r.gradients, r.accumulated, r.master)
        moments = " + ".join(f"{m:g}" for m in r.moments)
        rows.append([r.name, *(f"{b:g}" for b in buffers), moments, f"{r.scales + r.compensation:.2g}",
                     f"{r.bytes_per_parameter:.4g}"])  # fmt: skip
    return text_table(["regime", "weights", "grads", "accum.", "master", "moments", "other", "total"], rows)
