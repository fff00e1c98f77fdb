"""The numbers in the answers of the question bank, computed: FP8, blocks, memory, speed, faults, many devices."""

import math
import warnings
from collections.abc import Callable
from statistics import NormalDist

import torch

from mixprec_lab.bf16_vs_fp16 import paired_comparison
from mixprec_lab.block_scaling import SCHEMES, block_quantize, quantize_blocks
from mixprec_lab.formats import FORMATS
from mixprec_lab.fp8 import amax
from mixprec_lab.loss_scaling import RULES
from mixprec_lab.memory import GPUS, REGIMES, get_model, training_memory
from mixprec_lab.rounding import accumulate, quantize
from mixprec_lab.speed import PUBLISHED, amdahl, amdahl_fraction, get_device, roofline

NUMBERS: dict[str, Callable[[], list[str]]] = {}
E4M3, E5M2, E2M1 = (FORMATS[name] for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1"))
HALF, BRAIN = torch.float16, torch.bfloat16


def number(function: Callable[[], list[str]]) -> Callable[[], list[str]]:
    assert function.__name__ not in NUMBERS
    NUMBERS[function.__name__] = function
    return function


def short(x: float, digits: int = 1) -> str:
    mantissa, exponent = f"{x:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def tera(device: str, dtype: str) -> str:
    return f"{get_device(device).rate(dtype) / 1e12:g}"


def per_parameter(*names: str) -> list[str]:
    return [f"{REGIMES[name].bytes_per_parameter:g}" for name in names]


# hardware


@number
def v100_rates():
    return [tera("v100", "fp16"), tera("v100", "fp32")]


@number
def same_peak():
    assert all(get_device(d).rate("fp16") == get_device(d).rate("bf16") for d in ("a100", "h100"))
    return [tera("h100", "fp16"), tera("a100", "bf16")]


@number
def h100_fp8_rate():
    return [tera("h100", "fp8"), tera("h100", "bf16")]


# fp8


@number
def binades_e4m3():
    return [f"{E4M3.binades} binades"]


@number
def scale_formula():
    return [f"{E4M3.largest:g}", f"{E5M2.largest:g}"]


@number
def stale_scale():
    scale = E4M3.largest / amax(torch.tensor([1.0, -0.5])).item()
    kept = (quantize(torch.tensor([10.0]) * scale, E4M3) / scale).item()
    return [f"{scale:g}", f"= {kept:g}", f"{100 * (1 - kept / 10):.0f} %"]


@number
def fp8_flush():
    edges = []
    for fmt in (E4M3, E5M2):
        edge = fmt.smallest_subnormal / 2
        above = torch.tensor([edge, edge * 1.01], dtype=torch.float64)
        assert quantize(above, fmt).tolist() == [0, fmt.smallest_subnormal]
        edges.append(edge / fmt.largest)
    return [short(edges[0]), short(edges[1]), f"{-math.log2(edges[0]):.1f} binades", f"2^{math.log2(E4M3.largest):.1f}"]


@number
def fp8_relative_error():
    formats = (E4M3, E5M2)
    worst = [f.unit_roundoff / (1 + f.unit_roundoff) for f in formats]
    per_binade = [str(2**f.mantissa_bits) for f in formats]
    return [*(f"{100 * w:.1f} %" for w in worst), *(f"{100 * f.unit_roundoff:g} %" for f in formats), *per_binade]


@number
def fp8_speed_measured():
    ratios = [p.ratio for p in PUBLISHED if p.scope == "training" and p.device == "h100"]
    share = amdahl_fraction(1.25, 2)
    return [*(f"{100 * (ratio - 1):.0f} %" for ratio in ratios), f"{100 * share:.0f} %"]


@number
def single_bias():
    return [f"{FORMATS['fp16'].binades} binades"]


# blocks


@number
def outlier_int8_fp8():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100
    flushed = {s: (quantize_blocks(x, s)[:, 1:] == 0).float().mean().item() for s in ("int8", "per_tensor")}
    assert flushed["int8"] > 0.5 and flushed["per_tensor"] < 0.01
    return ["127", f"{E4M3.binades} binades"]


@number
def zero_blocks():
    x = torch.zeros(2, 32)
    assert (x / (x.abs().amax(-1, keepdim=True) / 448)).isnan().all()
    assert all(torch.equal(quantize_blocks(x, scheme), x) for scheme in SCHEMES)
    assert math.isinf((torch.tensor(448.0) / torch.tensor(1e-40)).item())
    return ["0 / 0", "448 / max"]


@number
def mx_bits():
    tile = SCHEMES["tile_1x128"]
    bits = [SCHEMES[name].element.bits + 8 / SCHEMES[name].block[1] for name in ("mxfp8", "mxfp6", "mxfp4")]
    return [*(f"{b:g}" for b in bits), f"{tile.element.bits + 32 / tile.block[1]:g}"]


@number
def nvfp4_bits():
    scheme = SCHEMES["nvfp4"]
    return [f"{scheme.element.bits + scheme.scale.bits / scheme.block[1]:g} bits", f"{E4M3.largest * E2M1.largest:g}"]


@number
def mx_floor_rule():
    block = torch.zeros(1, 32)
    block[0, 0] = 500
    parts = block_quantize(block, "mxfp8")
    kept = quantize_blocks(block, "mxfp8")[0, 0].item()
    up = 500 / 2
    return [f"Scale {parts.scales.item():g}", f"{kept:g}", f"{100 * (1 - kept / 500):.1f} %", f"{up:g}"]


@number
def floor_saturates():
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    largest = x.abs().amax(-1)
    share = (quantize_blocks(x, "mxfp8").abs().amax(-1) < largest * 0.9375).float().mean().item()
    cut = (torch.frexp(largest).mantissa * 2 > 1.75).float().mean().item()
    assert share <= cut
    return [{6: "one block of six"}[round(1 / cut)]]


@number
def deepseek_blocks():
    parts = block_quantize(torch.ones(4096, 4096), "block_128x128")
    return [str(parts.scales.numel())]


@number
def four_bit_error():
    return [f"{100 * (5 - quantize(torch.tensor(5.0), E2M1).item()) / 5:.0f} %", f"{100 * E2M1.unit_roundoff:.0f} %"]


# memory


@number
def sixteen_bytes():
    return per_parameter("bf16_master", "fp32_sgd")


@number
def seven_billion():
    model = get_model("llama2_7b")
    states = training_memory("llama2_7b", "bf16_master")
    weights = f"{2 * model.parameters / 1e9:.1f} GB"
    return [f"{7 * 16} GB", f"{states.total / 1e9:.1f} GB", f"{model.parameters / 1e9:.2f}e9", weights]


@number
def gradient_conventions():
    return per_parameter("bf16_master", "bf16_master_fp32_grad", "bf16_master_accumulate")


@number
def eight_bytes():
    paper = f"{REGIMES['fp8_lm'].without_weights:g}"
    return [*per_parameter("bf16_pure", "fp8_lm", "nanotron_fp8", "deepseek_v3"), paper]


@number
def activation_formula():
    s, b, h, a = 2048, 1, 4096, 32
    full, flash = s * b * h * (34 + 5 * a * s / h), s * b * h * 34
    return [f"{full / 1e6:.0f} MB", f"{flash / 1e6:.0f} MB", f"{5 * a * s / h:.0f}", f"about {34 * h / (5 * a):.0f}"]


@number
def checkpointing_cost():
    forward, backward = 1, 2
    plain, again = forward + backward, 2 * forward + backward
    return [{3: "a third"}[plain // (again - plain)], f"{again} units instead of {plain}"]


@number
def zero_stages():
    bills = [training_memory(10**9, "bf16_master", zero_stage=stage, world_size=8) for stage in (1, 2, 3)]
    states = [(m.weights + m.gradients + m.masters + m.moments) / 1e9 for m in bills]
    return [f"{states[0]:g}", f"{states[1]:g}", f"stage 3 leaves {states[2]:g}"]


@number
def lora_memory():
    base = get_model("llama2_7b").parameters
    quantized = training_memory("llama2_7b", "bf16_master", adapters=1, base="nf4").weights
    assert quantized < 4e9
    return [f"{2 * base / 1e9:.1f} GB", "below 4 GB", f"{16 - 2} other bytes"]


@number
def eight_bit_adam():
    wide, narrow = REGIMES["bf16_master"], REGIMES["bf16_master_adam8bit"]
    saved = sum(wide.moments) - sum(narrow.moments)
    return [f"{saved:g} bytes", f"{narrow.scales:.2f} bytes"]


@number
def pure_bf16_bytes():
    kahan = REGIMES["bf16_kahan"].bytes_per_parameter - REGIMES["bf16_pure"].bytes_per_parameter
    return [*per_parameter("bf16_pure", "bf16_fp32_moments"), f"adds {kahan:g}"]


@number
def logit_memory():
    return [f"{128256 * 8192 * 4 / 1e9:.1f} GB"]


@number
def gpt2_states():
    size = 1_500_000_000
    plain = training_memory(size, "bf16_master")
    sharded = training_memory(size, "bf16_master", zero_stage=1, world_size=64)
    return [f"{plain.total / 1e9:g} GB", f"{plain.weights / 1e9:g} GB", f"{sharded.total / 1e9:.1f} GB"]


@number
def te_copies():
    return [f"{REGIMES['te_fp8_bf16'].copies:g}", *per_parameter("te_fp8_bf16")]


@number
def gib():
    return [f"{GPUS['h100'].capacity / 2**30:.1f} GiB"]


# speed


@number
def amdahl_sixty():
    share = amdahl_fraction(1.25, 2)
    return [f"{amdahl(0.6, 2):.2f}", f"{amdahl(0.6, math.inf):g} times", f"{100 * share:.0f} %"]


@number
def ridge_point():
    device = get_device("h100")
    bf16, fp8 = (device.rate(dtype) / device.bandwidth for dtype in ("bf16", "fp8"))
    return [f"about {bf16:.0f}", f"about {round(fp8, -1):.0f}", f"{device.bandwidth / 1e12:g} TB/s", f"{1 / 6:.2f}"]


@number
def tokens_for_compute_bound():
    few, many = (roofline(tokens, 4096, 4096, "bf16", "h100") for tokens in (128, 512))
    assert (few.bound, many.bound) == ("memory", "compute")
    return [f"{few.intensity:.0f}", f"{many.intensity:.0f}", f"{few.ridge:.0f}"]


@number
def peak_rates():
    return [*(tera(device, "fp16") for device in ("v100", "a100", "h100", "h100_pcie")), tera("h100", "fp8")]


@number
def te_ratios():
    return [f"{p.ratio:.2f}" for p in PUBLISHED if p.citation == "tegemm"]


@number
def v100_eight():
    ratio = get_device("v100").rate("fp16") / get_device("v100").rate("fp32")
    return [f"is {ratio:.0f}", f"{31.3 / 15.7:.0f}"]


@number
def peak_from_clock():
    a100, h100 = 1.41e9 * 432 * 256 * 2, 1.83e9 * 528 * 512 * 2
    return [f"= {a100 / 1e12:.0f} TFLOPS", f"= {h100 / 1e12:.0f} TFLOPS"]


@number
def alignment():
    padded = -(-50257 // 128) * 128
    assert padded == -(-50257 // 64) * 64
    return [str(padded)]


# faults


@number
def detect_anomaly_limits():
    def passes(function, at: float) -> float:
        x = torch.tensor(at, requires_grad=True)
        with torch.autograd.detect_anomaly(check_nan=True):
            function(x).backward()
        return x.grad.item()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that anomaly mode is slow
        assert math.isinf(passes(torch.sqrt, 0.0))
        return [f"{passes(torch.log, -5.0):.1f}"]


@number
def clipping_spreads():
    def clipped(bad: float) -> list[float]:
        p = torch.nn.Parameter(torch.zeros(3))
        p.grad = torch.tensor([1.0, bad, 2.0])
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        return p.grad.tolist()

    finite, infinite, other = clipped(math.inf)
    assert finite == other and math.isnan(infinite) and all(map(math.isnan, clipped(math.nan)))
    return [f"The finite ones are {finite:g} and the infinite one is NaN"]


@number
def where_trap():
    x = torch.zeros(1, requires_grad=True)
    torch.where(x > 0, x.log(), 0.0).sum().backward()
    return [{True: "NaN"}[x.grad.isnan().item()] + ": the branch that was not taken"]


@number
def softmax_without_max():
    limits = [math.log(torch.finfo(dtype).max) for dtype in (HALF, torch.float32)]
    assert math.isinf(torch.tensor(11.1, dtype=HALF).exp().item())
    return [f"{limits[0]:.1f}", f"{limits[0]:.2f}", f"{limits[1]:.1f}"]


@number
def squares_in_fp16():
    assert math.isinf(torch.tensor(256.0, dtype=HALF).square().item())
    assert torch.tensor(255.9, dtype=HALF).square().isfinite() and torch.tensor(1e-8, dtype=HALF) == 0
    return [str(256**2)]


@number
def adam_eps_fp16():
    assert torch.tensor(1e-8, dtype=HALF) == 0
    edge = math.sqrt(2.0**-25)
    squares = torch.tensor([edge * 0.99, edge * 1.01], dtype=torch.float64).square().to(HALF)
    assert squares[0] == 0 and squares[1] > 0
    return [short(edge), f"2^{math.log2(edge):g}", "2^-24"]


@number
def attention_overflow():
    return [f"{math.sqrt(128):.1f}", f"{65504 / math.sqrt(128):.0f}"]


@number
def nan_comparisons():
    assert not math.nan > 100 and not math.nan < 1e-6
    return [f"{max([1.0, math.nan])} and {max([math.nan, 1.0])}"]


@number
def reset_scale():
    return [f"{2048 / 64:g}"]


@number
def lr_on_overflow():
    halvings = 20_000 // RULES["torch"].window
    return [f"{halvings} times", {1000: "a thousandth"}[round(2**halvings, -3)]]


# many devices, experiments, code


@number
def reduce_dtype():
    total = accumulate(torch.ones(512), "bf16").item()
    return [f"{total:g}"]


@number
def average_or_sum():
    total = torch.tensor(1100.0 * 64)
    assert math.isinf(total.to(HALF).item()) and (total / 64).to(HALF).isfinite()
    return [f"{total.item():g}", f"{math.log2(64):g} binades"]


@number
def accumulate_in_fp32():
    bits = 8 - int(math.log2(64))
    stalls = [f"{accumulate(torch.ones(4096), name).item():g}" for name in ("fp16", "bf16")]
    return [f"{bits} of the 8 bits", *stalls, *per_parameter("bf16_master_accumulate", "bf16_master")]


@number
def ring_traffic():
    buffer = 2 * get_model("llama2_7b").parameters
    sent = 2 * 7 / 8 * buffer
    return [f"{buffer / 1e9:.2f} GB", f"{sent / 1e9:.1f} GB", f"{2 * 7 / 8:g}"]


@number
def random_walk():
    steps = 1e-3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    same_sign = torch.cat([torch.ones(1), torch.full((1000,), 1e-3)])
    # around zero BF16 stays close to the exact sum; from 1 with a common sign nothing arrives
    assert abs(accumulate(steps, "bf16").item() - steps.sum().item()) < 0.1 * steps.norm().item()
    assert accumulate(same_sign, "bf16").item() == 1
    return [f"{len(same_sign) - 1} additions"]


@number
def paired_seeds():
    variance = 2 - 2 * 0.9  # of the difference, in units of the variance of one run
    return [{10: "a tenth"}[round(2 / variance)]]


@number
def five_seeds():
    def best(n: int) -> float:
        return paired_comparison([0.0] * n, [1.0 + i / 10 for i in range(n)]).p_value

    return [f"{best(5):.4f}", f"{best(6):.3f}", f"2/256 = {best(8):.4f}", f"2/{2**5}"]


@number
def seeds_needed():
    level, power = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)
    pairs = ((level + power) * 0.02 / 0.01) ** 2
    return [f"{level:.2f}", f"{power:.2f}", f"{pairs:.1f}", f"{math.ceil(pairs)}"]


@number
def tolerance_of_a_test():
    return [f"2^{math.log2(FORMATS['bf16'].unit_roundoff):g}", f"2^{math.log2(FORMATS['fp32'].unit_roundoff):g}"]


@number
def scale_factor():
    return [f"{RULES['torch'].init_scale:g}"]


@number
def blockwise_bits():
    return [f"{E4M3.bits + 32 / 128:g}", f"{E4M3.largest:g}"]


@number
def kahan_reaches_two():
    values = torch.tensor([1.0, *[0.001] * 1000])
    naive, kahan = (accumulate(values, "bf16", method=method).item() for method in ("naive", "kahan"))
    return [f"stays at {naive:g}", f"reaches {kahan:g}"]


@number
def losing_ratio_code():
    ratios = []
    for dtype in (HALF, BRAIN):
        one = torch.ones((), dtype=dtype)
        ratios.append(next(r for r in range(1, 5000) if one + torch.tensor(1 / r, dtype=dtype) == one))
    return [f"{r:g}" for r in ratios]


@number
def e5m2_largest():
    return [f"{torch.finfo(torch.float8_e5m2).max:g}"]


@number
def mx_exponents():
    formats = (E4M3, E5M2, E2M1)
    names = ("E4M3", "E5M2", "E2M1")
    told = [f"{f.max_exponent} for {name}" for f, name in zip(formats, names, strict=True)]
    return [*told, f"{E4M3.largest:g}", f"{2 ** (E4M3.max_exponent + 1)}"]


