"""The exercises of the chapter ``all_regimes``: right answers pass, each usual mistake is told apart."""

import math
import statistics

import pytest
import torch
from test_checks import verdict

from mixprec_lab import checks
from mixprec_lab.regimes import t_quantile, unpaired_interval


def interval(baseline, variant):
    d = [b - a for a, b in zip(baseline, variant, strict=True)]
    half = t_quantile(0.975, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.mean(d) - half, statistics.mean(d) + half


def of_the_normal_distribution(baseline, variant):
    d = [b - a for a, b in zip(baseline, variant, strict=True)]
    half = 1.96 * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.mean(d) - half, statistics.mean(d) + half


def of_one_run(baseline, variant):
    d = [b - a for a, b in zip(baseline, variant, strict=True)]
    half = t_quantile(0.975, len(d) - 1) * statistics.stdev(d)
    return statistics.mean(d) - half, statistics.mean(d) + half


def fewest(deviation, half):
    n = 2
    while t_quantile(0.975, n - 1) * deviation / math.sqrt(n) > half:
        n += 1
    return n


def gaps(train, regimes, seeds):
    found = {r: [] for r in regimes}
    for seed in seeds:
        for regime in regimes:
            torch.manual_seed(seed)
            found[regime].append(train(regime))
    return [statistics.mean(b - a for a, b in zip(found[regimes[0]], found[r], strict=True)) for r in regimes]


def seeded_once(train, regimes, seeds):
    torch.manual_seed(seeds[0])
    found = {r: statistics.mean(train(r) for _ in seeds) for r in regimes}
    return [found[r] - found[regimes[0]] for r in regimes]


def best_of_seeds(train, regimes, seeds):
    found = {r: [] for r in regimes}
    for seed in seeds:
        torch.manual_seed(seed)
        for regime in regimes:
            found[regime].append(train(regime))
    return [min(found[r]) - min(found[regimes[0]]) for r in regimes]


def best_of_pairs(train, regimes, seeds):
    found = {r: [] for r in regimes}
    for seed in seeds:
        for regime in regimes:
            torch.manual_seed(seed)
            found[regime].append(train(regime))
    return [min(found[r]) - min(found[regimes[0]]) for r in regimes]


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        x = torch.randn(8, 4, generator=generator)
        yield x, x.square().sum(1, keepdim=True)


def goes_on():
    generator = torch.Generator().manual_seed(0)

    def batches(seed):
        for _ in range(5):
            x = torch.randn(8, 4, generator=generator)
            yield x, x.square().sum(1, keepdim=True)

    return batches


def one_order(seed):
    return batches(0)


def one_batch(seed):
    return [next(batches(seed))] * 5


def wrong_targets(seed):
    return [(x, y + 1) for x, y in batches(seed)]


RIGHT = [
    (checks.paired_interval, interval), (checks.seeds_for_width, fewest), (checks.mean_gaps, gaps),
    (checks.mean_gaps, lambda *a: torch.tensor(gaps(*a))), (checks.mean_gaps, lambda *a: tuple(gaps(*a))),
    (checks.seeded_batches, batches), (checks.seeded_batches, lambda seed: list(batches(seed))),
]  # fmt: skip
WRONG = [
    (checks.paired_interval, of_the_normal_distribution, "got"), (checks.paired_interval, of_one_run, "got"),
    (checks.paired_interval, unpaired_interval, "got"),
    (checks.seeds_for_width, lambda s, h: max(2, math.ceil((1.96 * s / h) ** 2)), "got"),
    (checks.seeds_for_width, lambda s, h: fewest(s, h) + 1, "got"),
    (checks.mean_gaps, seeded_once, "got"), (checks.mean_gaps, best_of_seeds, "got"),
    (checks.mean_gaps, best_of_pairs, "got"), (checks.mean_gaps, lambda *a: gaps(*a)[1:], "got [0.0]"),
    (checks.mean_gaps, lambda train, r, s: dict(zip(r, gaps(train, r, s), strict=True)), "got {"),
    (checks.seeded_batches, one_batch, "one batch again and again"),
    (checks.seeded_batches, goes_on(), "seed 0 again: others; seed 1: others"),
    (checks.seeded_batches, one_order, "seed 0 again: the same; seed 1: the same"),
    (checks.seeded_batches, wrong_targets, "targets that are not the sums of squares"),
    (checks.seeded_batches, lambda seed: [], "0 batches of shapes []"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "right"), RIGHT)
def test_a_right_answer_is_correct(check, right, capsys):
    assert verdict(check, right, capsys) == "Correct."


@pytest.mark.parametrize(("check", "wrong", "told"), WRONG)
def test_each_usual_mistake_is_told_apart(check, wrong, told, capsys):
    line = verdict(check, wrong, capsys)
    assert line.startswith("Not yet: expected ") and told in line and "\n" not in line


@pytest.mark.parametrize("check", [checks.mean_gaps, checks.seeded_batches])
def test_checks_leave_the_global_generator_as_it_was(check, capsys):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    verdict(check, seeded_once if check is checks.mean_gaps else batches, capsys)
    assert torch.equal(torch.get_rng_state(), before)
