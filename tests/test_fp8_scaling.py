"""FP8 operands bit by bit against ml_dtypes, delayed scales against stories worked by hand and TE's kernel."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from mixprec_lab.fp8 import ROLES, CurrentScaling, DelayedScaling, FixedScaling, amax, delayed_update, format_of

FP32, BF16 = torch.float32, torch.bfloat16
INF, NAN = math.inf, math.nan
FP8 = {"fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def oracle_cast(x: np.ndarray, name: str) -> np.ndarray:
    """float32 clamped to the format's largest value and cast by ml_dtypes; NaN stays."""
    scalar, largest = FP8[name]
    return np.clip(x, -largest, largest).astype(scalar).astype(np.float32)


def oracle_operand(x: torch.Tensor, scale: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(oracle_cast((x.float() * scale).numpy(), name))


# -- operands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True], ids=["float32", "float8"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scale", [2.0**-9, 1.0, 0.7, 448 / 3.0, 2.0**20])
def test_an_operand_is_the_scaled_tensor_cast_with_saturation_for_every_bf16_value(role, scale, native):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16).reshape(256, 256)
    quantizer = FixedScaling(**{r: scale for r in ROLES}).quantizer(role)
    operand = quantizer(patterns, True, native).along(1)
    name = format_of("hybrid", role).name
    expected = oracle_operand(patterns, torch.tensor(scale), name)
    got = operand.values.float()
    assert operand.values.dtype == (format_of("hybrid", role).torch_dtype if native else FP32)
    same = (got == expected) & (got.signbit() == expected.signbit())
    assert bool((same | (got.isnan() & expected.isnan())).all())
    assert float(operand.scale) == np.float32(scale)


@pytest.mark.parametrize("native", [False, True], ids=["float32", "float8"])
def test_current_scaling_puts_the_largest_magnitude_on_the_largest_value(native):
    for role, seed in zip(ROLES, range(3), strict=True):
        x = randn(32, 48, seed=seed, scale=1e-4)
        operand = CurrentScaling().quantizer(role)(x, True, native).along(1)
        largest = format_of("hybrid", role).largest
        assert float(operand.values.float().abs().max()) == largest
        assert float(operand.scale) == np.float32(largest) / np.float32(x.abs().max())
        assert torch.equal(operand.values.float(), oracle_operand(x, operand.scale, format_of("hybrid", role).name))


@pytest.mark.parametrize("axis", [0, 1])
def test_row_scaling_is_current_scaling_of_every_line_of_the_sum(axis):
    x = randn(16, 32, seed=1) * torch.logspace(-6, 6, 32)
    operand = CurrentScaling(granularity="row").quantizer("weight")(x).along(axis)
    lines, values = (x, operand.values) if axis == 1 else (x.T, operand.values.T)
    for line, value, scale in zip(lines, values, operand.scale.flatten(), strict=True):
        alone = CurrentScaling().quantizer("weight")(line[None]).along(1)
        assert float(alone.scale) == float(scale)
        assert torch.equal(alone.values[0], value)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0.0, 1.0), (INF, 1.0), (NAN, 1.0), (1e-44, 3.4028235e38), (448.0, 1.0), (3.0, 448 / 3), (2**-100, 448 * 2**100)],
)
def test_current_scales_follow_transformer_engine_at_the_edges(largest, expected):
    scale = CurrentScaling().quantizer("input")(torch.tensor([[largest, 0.0]])).along(1).scale
    assert float(scale) == np.float32(expected)


def test_an_epsilon_bounds_the_amax_from_below():
    quantizer = CurrentScaling(amax_epsilon=2.0**-4).quantizer("input")
    assert float(quantizer(torch.zeros(1, 4)).along(1).scale) == 448 * 16
    assert float(quantizer(torch.full((1, 4), 2.0)).along(1).scale) == 224


def test_powers_of_two_are_rounded_down_so_that_nothing_saturates():
    for exponent in range(-40, 40, 7):
        for fraction in (1.0, 1.2, 1.75, 1.7500001, 1.9):
            largest = fraction * 2.0**exponent
            quantizer = CurrentScaling(power_of_two=True).quantizer("input")
            scale = float(quantizer(torch.tensor([[largest]])).along(1).scale)
            assert math.frexp(scale)[0] == 0.5
            assert largest * scale <= 448 < 2 * largest * scale


def test_amax_of_special_tensors():
    assert float(amax(torch.tensor([[-3.0, 2.0]]))) == 3.0
    assert float(amax(torch.empty(0, 4))) == 0.0
    assert float(amax(torch.tensor([[-INF, 1.0]]))) == INF
    assert math.isnan(float(amax(torch.tensor([[NAN, INF]]))))
    assert amax(torch.ones(1, 1, dtype=BF16)).dtype == FP32


# -- delayed scales ----------------------------------------------------------------------------------------------------


def story(recipe: DelayedScaling, amaxes: list[float], role: str = "input") -> list[float]:
    """The scale that each step was quantized with, and the one after the last."""
    quantizer, scales = recipe.quantizer(role), []
    for value in amaxes:
        scales.append(float(quantizer(torch.tensor([[value, 0.0]])).along(1).scale))
        quantizer.update()
    return [*scales, float(quantizer.scale)]


def test_the_scale_follows_the_largest_amax_of_the_history_a_step_late():
    # history 3: the present amax and the two before it
    assert story(DelayedScaling(amax_history_len=3), [7.0, 14.0, 3.5, 3.5, 3.5]) == [1.0, 64.0, 32.0, 32.0, 32.0, 128.0]


def test_most_recent_looks_at_one_amax():
    recipe = DelayedScaling(amax_history_len=8, amax_compute_algo="most_recent")
    assert story(recipe, [7.0, 14.0, 3.5]) == [1.0, 64.0, 32.0, 128.0]


def test_a_history_of_one_is_most_recent():
    amaxes = [7.0, 14.0, 0.5, 3.5]
    assert story(DelayedScaling(amax_history_len=1), amaxes) == story(
        DelayedScaling(amax_compute_algo="most_recent"), amaxes
    )


@pytest.mark.parametrize("margin", [-1, 0, 3])
def test_a_margin_halves_the_scale_so_many_times(margin):
    assert story(DelayedScaling(margin=margin), [7.0])[-1] == 64.0 * 2.0**-margin


def test_gradients_aim_at_the_largest_e5m2_value():
    assert story(DelayedScaling(), [7.0], "grad_output")[-1] == 57344 / 7
    assert story(DelayedScaling(fp8_format="e4m3"), [7.0], "grad_output")[-1] == 64.0


def test_an_amax_of_zero_leaves_scale_and_history():
    recipe = DelayedScaling(amax_history_len=2)
    # had the zeros been recorded, 7 would have left the history
    assert story(recipe, [7.0, 0.0, 0.0, 0.0, 3.5]) == [1.0, 64.0, 64.0, 64.0, 64.0, 64.0]


def test_an_infinite_amax_freezes_the_scale_until_it_leaves_the_history():
    recipe = DelayedScaling(amax_history_len=4)
    assert story(recipe, [7.0, INF, 3.5, 3.5, 3.5, 3.5]) == [1.0, 64.0, 64.0, 64.0, 64.0, 64.0, 128.0]
    recent = DelayedScaling(amax_history_len=4, amax_compute_algo="most_recent")
    assert story(recent, [7.0, INF, 3.5]) == [1.0, 64.0, 64.0, 128.0]


def test_a_nan_amax_is_passed_over():
    assert story(DelayedScaling(amax_history_len=4), [7.0, NAN, 14.0]) == [1.0, 64.0, 64.0, 32.0]
    assert story(DelayedScaling(amax_compute_algo="most_recent"), [7.0, NAN, 14.0]) == [1.0, 64.0, 64.0, 32.0]


def test_a_tiny_amax_gives_the_largest_float32_not_infinity():
    assert story(DelayedScaling(), [1e-40])[-1] == torch.finfo(FP32).max


def test_slot_zero_is_where_the_present_step_is_staged():
    quantizer = DelayedScaling(amax_history_len=4).quantizer("input")
    for value in (1.0, 2.0, 3.0):
        quantizer(torch.tensor([[value]]))
        assert float(quantizer.amax_history[0]) == value
        quantizer.update()
    assert quantizer.amax_history.tolist() == [0.0, 1.0, 2.0, 3.0]
    quantizer(torch.tensor([[5.0]]))
    quantizer(torch.tensor([[4.0]]))  # two calls in one step: the larger one counts
    assert quantizer.amax_history.tolist() == [5.0, 1.0, 2.0, 3.0]
    quantizer.update()
    assert quantizer.amax_history.tolist() == [0.0, 2.0, 3.0, 5.0]


def kernel_by_index(history: list[float], scale: float, largest: float, margin: int, algorithm: str):
    """Transformer Engine's kernel, element by element: fmaxf passes over NaN."""
    last = history[0]
    if last == 0:
        return history, scale
    rolled, top = [], 0.0
    for i in range(len(history)):
        a = history[i + 1] if i < len(history) - 1 else last
        top = a if a > top else top
        rolled.append(a if i > 0 else 0.0)
    chosen = top if algorithm == "max" else last
    if math.isfinite(chosen) and chosen > 0:
        quotient = np.float32(largest * 2.0**-margin) / np.float32(chosen)
        scale = float(min(quotient, np.finfo(np.float32).max))
    return rolled, scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_the_update_is_the_kernel_of_transformer_engine(length, algorithm):
    generator = torch.Generator().manual_seed(length)
    history, scale = torch.zeros(length), torch.tensor(1.0)
    plain, plain_scale = [0.0] * length, 1.0
    specials = [0.0, INF, NAN, 1e-42]
    for step in range(300):
        draw = float(torch.randint(12, (), generator=generator))
        value = specials[int(draw)] if draw < 4 else float(torch.rand((), generator=generator) * 2.0 ** (draw - 8))
        history[0] = plain[0] = float(np.float32(value))
        history, scale = delayed_update(history, scale, 448.0, step % 5 - 2, algorithm)
        with np.errstate(all="ignore"):
            plain, plain_scale = kernel_by_index([float(v) for v in plain], plain_scale, 448.0, step % 5 - 2, algorithm)
        assert np.array_equal(history.numpy(), np.array(plain, np.float32), equal_nan=True)
        assert float(scale) == plain_scale
