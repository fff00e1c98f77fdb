"""``scaling_out`` under bad input: what is launched, what comes back, and sums of values that are none."""

import functools
import math
import runpy
import warnings
from collections import OrderedDict, defaultdict

import pytest
import refused_jobs
import torch

from mixprec_lab.scaling_out import RankFailed, launch
from mixprec_lab.scaling_out.reduction import (
    ORDERS,
    error_bound,
    exact_sum,
    gradients,
    reduction_error,
    simulate_reduction,
)


@pytest.mark.parametrize(
    "options",
    [{"processes": n} for n in ("2", 2.0, None, True, math.nan, 0, -1)]
    + [{"timeout": t} for t in ("5", None, math.nan, True, 0, -1.0)],
    ids=str,
)
def test_numbers_that_are_none_start_nothing(options, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(ValueError, match="expected at least one process, a timeout above 0"):
        launch(refused_jobs.one, show="nothing", **options)


@pytest.mark.parametrize("arguments", [[1], "x", 3], ids=str)
def test_arguments_have_names(arguments):
    with pytest.raises(TypeError, match="expected arguments by name, got a"):
        launch(refused_jobs.gives_back, 1, arguments=arguments, show="nothing")


def test_a_function_that_its_module_knows_otherwise_is_not_silently_replaced():
    @functools.wraps(refused_jobs.one)
    def two():
        return 2

    with pytest.raises(ValueError, match="expected a function at the top level of a module"):
        launch(two, 1, show="nothing")


def test_only_dictionaries_that_travel_are_sent():
    with pytest.raises(TypeError, match=r"got a defaultdict as arguments\['x'\]"):
        launch(refused_jobs.gives_back, 1, arguments={"x": defaultdict(int)}, show="nothing")
    sent = OrderedDict(a=[torch.ones(2), None])
    (back,) = launch(refused_jobs.gives_back, 1, arguments={"x": sent}, show="nothing").results
    assert type(back) is OrderedDict and torch.equal(back["a"][0], sent["a"][0])


def test_a_rank_that_leaves_with_status_0_and_without_a_result_has_failed():
    with pytest.raises(RankFailed, match="rank 0 of 1 left with exit status 0 before it had returned") as failure:
        launch(refused_jobs.leaves_without_a_word, 1, show="nothing")
    assert (failure.value.rank, failure.value.code) == (0, 0)


def test_a_rank_that_shows_no_stack_is_said_to_be_silent():
    with pytest.raises(TimeoutError, match="rank 0:\nIt wrote nothing to standard error"):
        launch(refused_jobs.sleeps_deaf, 1, timeout=0.01, show="nothing")


@pytest.mark.parametrize("words", [[], ["folder", "again"], ["folder", "resume", "now"]], ids=str)
def test_the_checkpoint_job_says_how_it_is_called(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["checkpoints", *words])
    with pytest.raises(SystemExit, match="expected FOLDER or FOLDER resume, got"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy: the module is imported already
        runpy.run_module("mixprec_lab.scaling_out.checkpoints", run_name="__main__")


@pytest.mark.parametrize("order", ORDERS)
def test_a_format_without_a_sign_carries_no_gradients(order):
    with pytest.raises(ValueError, match="expected a format with a sign, got E8M0"):
        simulate_reduction(torch.ones(2, 4), "e8m0", order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp8_e4m3"])
def test_a_sum_is_computed_where_its_summands_are_and_not_on_the_default_device(order, wire):
    summands = gradients(4, 10)
    expected = simulate_reduction(summands, wire, order)
    with torch.device("meta"):
        total = simulate_reduction(summands, wire, order)
    assert torch.equal(total, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS)
def test_a_gpu_sums_as_the_cpu_does(order):
    summands = gradients(4, 1001)
    there = simulate_reduction(summands.cuda(), "bf16", order)
    assert torch.equal(there.cpu(), simulate_reduction(summands, "bf16", order))


@pytest.mark.parametrize("ranks", [2.5, "4", math.nan, math.inf, None, 0, -1])
@pytest.mark.parametrize("order", ORDERS)
def test_a_bound_is_for_whole_numbers_of_ranks(ranks, order):
    with pytest.raises(ValueError, match="expected at least one rank"):
        error_bound(ranks, "bf16", order)


def test_a_bound_beyond_all_numbers_is_infinite():
    assert error_bound(10**9, "bf16", "ring") == math.inf
    assert 1 < error_bound(1 << 17, "bf16", "ring") < math.inf


@pytest.mark.parametrize("options", [(0,), (-1,), (2, 0), (2, -1), (2, 4, -1.0), (2, 4, math.nan), (2, 4, math.inf)])
def test_gradients_of_nothing_are_refused(options):
    with pytest.raises(ValueError, match="expected a rank, a value, and noise of 0 or more"):
        gradients(*options)


def test_an_exact_sum_needs_finite_values_and_two_axes():
    for summands in (torch.ones(3), torch.tensor([[math.inf], [-math.inf]]), torch.tensor([[math.nan], [1.0]])):
        with pytest.raises(ValueError, match="expected finite contributions of shape"):
            exact_sum(summands)
    assert math.isnan(reduction_error(torch.zeros(4, 8)))
    assert reduction_error(torch.full((4, 8), 65504.0), "fp16") == math.inf
