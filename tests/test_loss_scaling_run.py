"""Why loss scaling exists: a run that fails without it and works with it; and the figures of its chapter."""

import math

import matplotlib as mpl
import pytest
import torch

from mixprec_lab import models, plots
from mixprec_lab.loss_scaling import (
    DynamicLossScaler,
    MagnitudeHistogram,
    StaticLossScaler,
    record_gradients,
)
from mixprec_lab.loss_scaling.experiment import pixel_loss, train_on_pixels, unexplained

mpl.use("Agg")
LARGE = 32 * 3 * 1024 * 1024


@pytest.fixture(scope="module")
def data():
    return models.digits()


def same_weights(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fp16_fails_without_scaling_and_works_with_it(data, seed):
    reference = train_on_pixels(data, seed, elements=LARGE)
    without = train_on_pixels(data, seed, elements=LARGE, dtype=torch.float16)
    scaled = train_on_pixels(data, seed, elements=LARGE, dtype=torch.float16, scaler=DynamicLossScaler())
    assert reference.unexplained < 0.4
    assert same_weights(without.model, models.autoencoder(seed))  # no weight has moved by a single bit
    assert scaled.skipped == 0 and abs(scaled.unexplained - reference.unexplained) < 0.02


def test_bf16_needs_no_scaling(data):
    assert train_on_pixels(data, elements=LARGE, dtype=torch.bfloat16).unexplained < 0.4


def test_a_static_scale_does_as_well(data):
    run = train_on_pixels(data, elements=LARGE, dtype=torch.float16, scaler=StaticLossScaler(2.0**16))
    assert run.unexplained < 0.4 and run.skipped == 0


def test_fewer_pixels_are_the_ordinary_mean_and_need_no_scaling(data):
    images = data.train_images[:5].flatten(1)
    outputs = torch.rand_like(images)
    torch.testing.assert_close(pixel_loss(5 * 64)(outputs, images), torch.nn.functional.mse_loss(outputs, images))
    assert train_on_pixels(data, elements=64 * 64, dtype=torch.float16).unexplained < 0.4


@pytest.mark.parametrize("elements", [2**20, 3 * 2**20, 3 * 2**23])
def test_an_error_is_lost_up_to_elements_over_2_to_the_26(elements):
    edge = elements * 2.0**-26
    errors = torch.tensor([edge, math.nextafter(edge, 0), edge * (1 + 2**-20), -edge])
    output = errors.clone().requires_grad_()
    half = torch.zeros(4, dtype=torch.float16, requires_grad=True)
    pixel_loss(elements)(half, -errors).backward()
    pixel_loss(elements)(output, torch.zeros(4)).backward()
    assert (half.grad == 0).tolist() == [True, True, False, True]
    assert (output.grad != 0).all()


def test_recorded_under_autocast_every_gradient_is_zero_and_in_fp32_none_of_the_outputs(data):
    images = data.train_images[:64].flatten(1)
    model, loss = models.autoencoder(), pixel_loss(LARGE)
    exact = record_gradients(model, images, images, loss).activations["6"]
    with torch.autocast("cpu", torch.float16):
        half = record_gradients(model, images, images, loss)
    assert half.total().zero == half.total().total and half.total("weights").shares("fp32").zero == 1
    assert exact.zero == 0 and exact.shares("fp16").flushed == 1
    assert exact.shares("fp16", 16).flushed < 0.01


def test_training_restores_the_number_of_threads_and_leaves_the_random_state(data):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run = train_on_pixels(data, elements=64, steps=2)
    assert torch.get_num_threads() == threads and torch.equal(state, torch.get_rng_state())
    assert len(run.errors) == 2 and run.errors[0] > 0


def test_the_mean_image_explains_nothing_and_the_identity_all(data):
    mean = data.train_images.flatten(1).mean(0)

    class Constant(torch.nn.Module):
        def forward(self, x):
            return mean.expand_as(x)

    assert unexplained(Constant(), data) == 1 and unexplained(torch.nn.Identity(), data) == 0


def test_a_loss_over_no_elements_is_refused():
    with pytest.raises(ValueError, match="at least one element"):
        pixel_loss(0)


@pytest.fixture
def figures():
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        yield
        plt.close("all")


def test_gradient_windows_shift_the_shares_by_the_scale(figures):
    x = torch.tensor([2.0**-20, 2.0**-20, 2.0**-18, 0.0])
    ax = plots.gradient_windows({"g": MagnitudeHistogram.of(x)}, "fp16", (0, 9))
    lower, upper = (panel.patches[-1].get_data() for panel in ax.figure.axes[::-1])
    assert upper.values.tolist() == lower.values.tolist() == [50, 0, 25]
    assert upper.edges.tolist() == [-20, -19, -18, -17] and lower.edges.tolist() == [-11, -10, -9, -8]
    flushed, subnormal, normal, over = ax.figure.axes[0].patches[:4]
    assert flushed.get_x() + flushed.get_width() == subnormal.get_x() == -25
    assert subnormal.get_x() + subnormal.get_width() == normal.get_x() == pytest.approx(-14, abs=1e-3)
    assert over.get_x() == pytest.approx(math.log2(65520))
    assert ax.get_xlabel() and ax.get_ylabel()


def test_training_curves_hold_every_seed_and_name_every_way_once(figures):
    ax = plots.training_curves({"a": [[3, 2], [4, 1]], "b": [[1, 1]]}, {"a": "fp32", "b": "fp16"})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3, 2], [4, 1], [1, 1]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.lines[2].get_color() == plots.colour("fp16") and ax.get_xlabel() and ax.get_ylabel()
