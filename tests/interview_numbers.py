"""The numbers in the answers of the question bank, computed: formats, rounding, scaling, weights.

A function is named by the ``check`` of a question and returns texts that must stand in it.  Nothing here reads the
bank.  ``interview_numbers_systems`` holds the other half.
"""

import math
from collections.abc import Callable

import torch
from interview_numbers_systems import NUMBERS as SYSTEMS
from torch.nn import functional as F

from mixprec_lab.bf16_vs_fp16 import compare_bf16_fp16, rounding_cost
from mixprec_lab.formats import FORMATS, all_values, decode
from mixprec_lab.loss_scaling import RULES, ScalerRule, choose_scale, simulate_scaler
from mixprec_lab.master_weights import update_threshold
from mixprec_lab.memory import REGIMES
from mixprec_lab.rounding import accumulate, quantize

NUMBERS: dict[str, Callable[[], list[str]]] = dict(SYSTEMS)
FP32, FP16, BF16, E4M3, E5M2, E2M1 = (
    FORMATS[name] for name in ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1")
)
HALF, BRAIN = torch.float16, torch.bfloat16


def number(function: Callable[[], list[str]]) -> Callable[[], list[str]]:
    assert function.__name__ not in NUMBERS
    NUMBERS[function.__name__] = function
    return function


def power(x: float) -> str:
    """A power of two as the answers write it."""
    exponent = math.log2(x)
    assert exponent == int(exponent)
    return f"2^{int(exponent)}"


def stored(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()


def gap(x: float, dtype: torch.dtype) -> float:
    value = torch.tensor(x, dtype=dtype)
    return (torch.nextafter(value, torch.tensor(math.inf, dtype=dtype)) - value).item()


def sci(x: float, digits: int = 2) -> str:
    """3 significant digits with a short exponent: 6.10e-5."""
    mantissa, exponent = f"{x:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# formats


@number
def fp16_largest():
    assert math.isinf(stored(65520, HALF)) and stored(65519.99, HALF) == 65504
    return [f"{FP16.largest:g}", f"{FP16.overflow_threshold:g}"]


@number
def bit_layouts():
    return [f"1 + {f.exponent_bits} + {f.mantissa_bits}" for f in (FP32, FP16, BF16, E4M3, E5M2)]


@number
def fp16_smallest():
    assert stored(2.0**-25, HALF) == 0 and stored(2.0**-25 * 1.001, HALF) == 2.0**-24
    smallest = FP16.smallest_subnormal
    return [power(FP16.smallest_normal), sci(FP16.smallest_normal), power(smallest), sci(smallest), power(smallest / 2)]


@number
def eps_and_smallest():
    kept = stored(1e-7, HALF)
    return [power(FP16.eps), sci(kept), f"{100 * (kept / 1e-7 - 1):.0f} %"]


@number
def decimal_digits():
    formats = (FP32, FP16, BF16)
    around = [f"{100 * gap(1.0, BRAIN):.2f} %", f"{100 * gap(1.0, BRAIN) / 2:.2f} %"]
    return [f"{f.decimal_digits:.2f}" for f in formats] + [power(f.unit_roundoff) for f in formats] + around


@number
def bf16_range():
    assert math.isinf(torch.tensor(FP32.largest).to(BRAIN).item())
    ends = [power(BF16.smallest_normal), power(BF16.smallest_subnormal), power(FP32.smallest_subnormal)]
    return [sci(BF16.largest, 4), sci(FP32.largest, 4), *ends]


@number
def e4m3_largest():
    top = [v for v in all_values("fp8_e4m3").tolist() if v >= 256]
    ieee = (2 - 2.0**-3) * 2.0 ** (14 - 7)
    return [f"{v:g}" for v in (*top, top[-1] + 32, ieee, E5M2.largest)]


@number
def binades():
    return [str(f.binades) for f in (E4M3, E5M2, FP16)]


@number
def first_lost_integer():
    lost = [next(n for n in range(1, 4000) if stored(n, dtype) != n) for dtype in (HALF, BRAIN)]
    assert gap(512.0, BRAIN) == 4
    return [str(n) for n in lost]


@number
def tf32():
    return [f"{FORMATS['tf32'].exponent_bits} exponent bits", f"{FORMATS['tf32'].mantissa_bits} fraction bits"]


@number
def subnormals():
    subnormal = int(math.log2(FP16.smallest_normal / FP16.smallest_subnormal))
    return [f"{subnormal} binades", power(FP16.smallest_subnormal), power(FP16.smallest_normal), power(2.0**-126)]


@number
def count_values():
    return [str(len(set(all_values(name).tolist()))) for name in ("fp16", "bf16", "fp8_e4m3")]


@number
def fnuz():
    other = FORMATS["fp8_e4m3fnuz"]
    codes = torch.arange(0x7F)
    assert torch.equal(decode(codes, "fp8_e4m3"), 2 * decode(codes, other))
    nan = [code for code in range(256) if math.isnan(decode(torch.tensor(code), other).item())]
    return [str(other.bias), str(E4M3.bias), f"{other.largest:g}", *(f"0x{code:02X}" for code in nan)]


@number
def e8m0():
    values = decode(torch.arange(256), "e8m0")
    finite = values[values.isfinite()]
    assert values.isnan().sum() == 1 and (finite > 0).all()
    return [str(len(finite)), power(finite.min().item()), power(finite.max().item())]


@number
def e2m1_values():
    magnitudes = sorted({abs(v) for v in all_values("fp4_e2m1").tolist()})
    worst = max((b - a) / (a + b) for a, b in zip(magnitudes, magnitudes[1:], strict=False) if a >= 1)
    return [", ".join(f"{v:g}" for v in magnitudes[:-1]) + f" and {magnitudes[-1]:g}", f"{100 * worst:.0f} %"]


@number
def cast_overflow():
    largest = torch.finfo(torch.float8_e4m3fn).max
    assert math.isinf(torch.tensor(1e6).to(torch.float8_e5m2).item())
    return [f"{largest:g}"]


@number
def decode_by_hand():
    fp16 = torch.tensor([0x3C01], dtype=torch.int16).view(HALF).item()
    fp8 = torch.tensor([0x7E], dtype=torch.uint8).view(torch.float8_e4m3fn).item()
    small = [torch.tensor([1], dtype=torch.int16).view(HALF), torch.tensor([1], dtype=torch.uint8)]
    small[1] = small[1].view(torch.float8_e4m3fn)
    return [f"{fp16:.10f}", f"{fp8:g}", *(power(s.item()) for s in small)]


# rounding


@number
def sum_of_ones():
    return [f"{accumulate(torch.ones(10000), name).item():g}" for name in ("bf16", "fp16")]


@number
def stall_of_small_addends():
    told = []
    for dtype in (HALF, BRAIN):
        addend, total, steps = torch.tensor(1e-7, dtype=dtype), torch.zeros((), dtype=dtype), 0
        while total + addend != total:
            total, steps = total + addend, steps + 1
        told += [power(total.item()), sci(total.item()), str(steps)]
    return [*told, str(math.ceil(2.0**-15 / 1e-7))]


@number
def stochastic_expectation():
    steps, weight = torch.full((1000,), 1e-3), torch.ones(4000)
    generator = torch.Generator().manual_seed(0)
    for step in steps:
        weight = quantize(weight + step, "bf16", "stochastic", generator=generator)
    nearest = torch.ones((), dtype=BRAIN)
    for step in steps:
        nearest = nearest + step.to(BRAIN)
    return ["about " + f"{weight.mean():.0f}", "stays at " + f"{nearest.item():g}"]


@number
def stochastic_bits():
    x = torch.tensor([1 + 2.0**-7 * 0.25]).repeat(20_000)
    random = torch.randint(0, 1 << 16, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rounded = ((x.view(torch.int32) + random) & -(1 << 16)).view(torch.float32)
    up = (rounded == 1 + 2.0**-7).float().mean().item()
    assert abs(up - 0.25) < 0.02 and torch.equal(rounded, rounded.to(BRAIN).float())
    return ["16-bit integer", f"{1 << 16} steps"]


@number
def fp32_accumulation():
    return [str(FP16.mantissa_bits + 1), str(2 * (FP16.mantissa_bits + 1)), str(FP32.mantissa_bits + 1)]


@number
def worst_relative_error():
    u = BF16.unit_roundoff
    worst = u / (1 + u)
    return [power(u), f"1/{1 / worst:.0f}", f"{100 * worst:.3f} %", f"{100 * u:.3f} %", f"{100 * BF16.eps:.2f} %"]


@number
def rounding_twice():
    x = torch.tensor(1 + 2.0**-4 + 2.0**-13)
    direct, twice = quantize(x, "fp8_e4m3").item(), quantize(x.to(BRAIN).float(), "fp8_e4m3").item()
    return [f"{direct:g} directly", f"but {twice:g} by way of BF16"]


@number
def pairwise_error():
    terms = 4096
    return [str(terms - 1), f"{math.log2(terms):g}"]


@number
def cancellation():
    kept = stored(1.01, BRAIN)
    difference = torch.tensor(kept, dtype=BRAIN) - 1
    return [f"{kept:.7f}", f"{difference.item():.7f}", f"{100 * (1 - difference.item() / 0.01):.0f} %"]


@number
def not_associative():
    a, one = torch.tensor(2048, dtype=HALF), torch.tensor(1, dtype=HALF)
    return [f"(2048 + 1) + 1 is {((a + one) + one).item():g}", f"2048 + (1 + 1) is {(a + (one + one)).item():g}"]


@number
def gap_at_1000():
    assert gap(1024.0, HALF) == 1 and gap(2048.0, HALF) == 2
    return [f"{gap(1000.0, dtype):g} in {name}" for dtype, name in ((HALF, "FP16"), (BRAIN, "BF16"))]


@number
def bit_in_decibels():
    bits = FP16.mantissa_bits - BF16.mantissa_bits
    return [f"{20 * math.log10(2):.2f} dB", f"{20 * bits * math.log10(2):.2f} dB", f"a factor of {2**bits}"]


# the recipe and loss scaling


@number
def autocast_states():
    return [f"{REGIMES['autocast'].bytes_per_parameter:g} bytes"]


@number
def cpu_autocast_default():
    return [{BRAIN: "BF16. FP16 has to be asked for"}[torch.get_autocast_dtype("cpu")]]


@number
def backward_dtype():
    x, seen = torch.ones(2, 2, requires_grad=True), []
    with torch.autocast("cpu", dtype=HALF):
        y = x @ x
    y.register_hook(lambda g: seen.append(g.dtype))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    return [{HALF: "gradients of 16-bit products are 16-bit"}[seen[0]]]


@number
def exp_overflow():
    return [f"{math.log(65504):.2f}"]


@number
def sigmoid_rounds_to_one():
    assert torch.tensor(12.0, dtype=HALF).sigmoid().item() == 1
    loss = F.binary_cross_entropy(torch.tensor(-200.0).sigmoid(), torch.tensor(1.0)).item()
    below = 1 - torch.nextafter(torch.tensor(1.0, dtype=HALF), torch.tensor(0.0, dtype=HALF)).item()
    return [sci(1 / (1 + math.exp(12)), 1), f"{loss:g}", power(below)]


@number
def default_scale():
    return [f"{torch.amp.GradScaler('cpu').state_dict()['scale']:g}"]


@number
def fp16_smallest_scaled():
    return [power(FP16.smallest_subnormal / 2), power(FP16.smallest_normal)]


@number
def histogram_shift():
    scale = RULES["torch"].init_scale
    return [f"{math.log2(scale):g} binades", power(2.0**-25 / scale), power(2.0**-25), f"{FP16.binades} binades"]


@number
def static_scale():
    scale = choose_scale(torch.tensor([0.5]), headroom=1.0)
    return [f"{scale:g}", f"{0.5 * scale:g}", f"{FP16.largest:g}", f"{scale:g}, which overflows"]


@number
def scaler_defaults():
    state = torch.amp.GradScaler("cpu").state_dict()
    return [f"{state[key]:g}" for key in ("scale", "growth_factor", "growth_interval", "backoff_factor")]


@number
def scaler_trace():
    big = 1e6  # overflows at every scale above 1
    run = simulate_scaler(ScalerRule("short", window=4), [big, *[1e-6] * 5, big])
    taken = len(run.overflow) - run.skipped
    assert taken == 5
    return [f"{run.final_scale:g}", "Five"]


@number
def equilibrium_cost():
    steps = 40_000
    run = simulate_scaler("torch", [1.5] * steps)  # 1.5 * 2**15 fits FP16, 1.5 * 2**16 does not
    late = run.overflow[steps // 2 :]
    return [f"{100 * sum(late) / len(late):.2f} %", "2000"]


@number
def scale_below_one():
    run = simulate_scaler("torch", [math.inf] * 30)
    return [str(1 + next(i for i, scale in enumerate(run.scale_after) if scale < 1))]


@number
def scale_without_ceiling():
    scale, doublings = torch.tensor(65536.0), 0
    while scale.isfinite():
        scale, doublings = scale * 2, doublings + 1
    return [str(doublings)]


@number
def fp16_loss():
    loss = torch.ones(1, dtype=HALF)
    assert torch.isinf(loss * 65536).item() and math.isinf(stored(65536, HALF))
    return [f"{65520 / 1024:.2f}"]


@number
def ssd_eight():
    return [f"2^-27 * {FP16.smallest_subnormal / 2.0**-27:g} = {power(FP16.smallest_subnormal)}"]


@number
def bf16_smallest_normal():
    assert BF16.smallest_normal == FP32.smallest_normal
    return [sci(BF16.smallest_normal)]


@number
def deepspeed_rule():
    rule = RULES["deepspeed"]
    patience, least = f"hysteresis of {rule.hysteresis}", f"minimum of {rule.min_scale:g}"
    return [power(rule.init_scale), str(rule.window), patience, least]


@number
def clip_before_unscale():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0]) * 65536
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    norm = (p.grad / 65536).norm().item()
    return [f"1/{1 / norm:.0f}", sci(norm, 1)]


@number
def power_of_two():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.equal(x * 65536 / 65536, x) and not torch.equal(x * 1000 / 1000, x)
    return ["1000"]


@number
def adam_and_the_scale():
    return [power((2.0**16) ** 2)]


@number
def unscale_in_fp32():
    gradient = torch.tensor(2.0**-10, dtype=HALF)
    scale = torch.tensor(2.0**15, dtype=HALF)  # 2**16 is no FP16 number: divide in two steps
    assert (gradient / scale / 2).item() == 0 and (gradient.float() / 2**16).item() == 2.0**-26
    return [power(2.0**-10 / 2**16), power(2.0**-25)]


# master weights


@number
def losing_ratios():
    told = []
    for name, eps in (("fp16", FP16.eps), ("bf16", BF16.eps)):
        for w in (1.0, 2 - eps):
            ratios = torch.arange(1, 5000, dtype=torch.float64)
            lost = quantize(w + w / ratios, name) == w
            told.append(str(int(ratios[lost][0])))
    return [*told, power(2 / FP32.eps)]


@number
def absolute_or_relative():
    assert stored(1e-4, HALF) + 1e-7 != stored(1e-4, HALF)
    w = torch.tensor(1e-4, dtype=HALF)
    assert w + torch.tensor(1e-7, dtype=HALF) != w
    half = gap(0.02, BRAIN) / 2
    return [f"{power(2 * half)} / 2 = {sci(half, 1)}", "2048"]


@number
def share_of_lost_updates():
    rates, one = (1e-5, 1e-4), torch.ones(1)
    lost = compare_bf16_fp16(one, one, steps=1, update_sizes=rates, show=False).lost["bf16"]
    return [f"{100 * lost[rate]:.0f} %" for rate in rates]


@number
def frozen_gain():
    gain = torch.ones((), dtype=BRAIN)
    for _ in range(200):
        gain = gain - torch.tensor(1e-3, dtype=BRAIN)
    down, up = (update_threshold(1.0, "bf16", side).size for side in ("toward", "away"))
    assert gain.item() == 1
    return [f"at {gain.item():.1f}", power(float(down)), sci(float(down)), power(float(up)), sci(float(up), 1)]


@number
def cost_of_masters():
    r, plain = REGIMES["bf16_master"], REGIMES["fp32"]
    more = (r.weights + r.master) / plain.weights - 1
    sizes = (r.master, r.weights + r.master, r.bytes_per_parameter)
    return [*(f"{size:g} bytes" for size in sizes), f"{100 * more:.0f} %"]


@number
def moments_are_separate():
    return [f"{REGIMES[name].bytes_per_parameter:g}" for name in ("bf16_pure", "bf16_master")]


@number
def v_ratchet():
    moments = [torch.ones((), dtype=dtype) for dtype in (torch.float32, BRAIN)]
    for _ in range(1000):
        for v in moments:
            v.mul_(0.999)
    slow = torch.ones((), dtype=BRAIN).mul_(0.95)
    assert slow < 1 and moments[1] == 1
    half = float(update_threshold(1.0, "bf16").size)  # the relative gap is widest just above a power of two
    return [f"{moments[0].item():.3f}", f"stays at {moments[1].item():g}", power(half), f"{100 * half:.2f} %"]


@number
def ema_in_bf16():
    half = float(update_threshold(1.0, "bf16", "toward").size)  # relative to the value it is smallest here
    return [sci(1 - 0.9999, 0), power(half), f"about {half / (1 - 0.9999):.0f}"]


# bf16 or fp16


@number
def bf16_factor():
    bits = FP16.mantissa_bits - BF16.mantissa_bits
    return [{3: "three bits"}[bits], {8: "eight times"}[2**bits]]


@number
def weights_error_factor():
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.02
    ratio = rounding_cost(weights, "bf16").rms_error / rounding_cost(weights, "fp16").rms_error
    return [{8: "a factor of eight"}[round(ratio)], "2^3"]


@number
def mask_minimum():
    fill = torch.full((1, 4), torch.finfo(torch.float32).min)
    assert fill.softmax(-1).isfinite().all() and fill.to(BRAIN).softmax(-1).isnan().all()
    return ["0/0"]


@number
def largest_fp16_in_bf16():
    kept = stored(65504, BRAIN)
    return [f"{kept:g}", f"{kept - 65280:g}", power(2.0**-24 * 2**BF16.mantissa_bits)]


@number
def token_ids():
    return [f"{stored(257, BRAIN):g}", f"{gap(32000.0, BRAIN):g}"]


