"""The catalogue of faults: each is visible at its step by a measure of its own, and its twin is healthy."""

import copy
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixprec_lab.nan_debugging.faults import FAULTS, HEALTHY, Fault, Run, run_fault
from mixprec_lab.nan_debugging.faults._run import PHASES, seeded

SEEDS = (0, 1, 2, 3)


@dataclass
class Seen:
    """One step of a run, looked at from outside."""

    loss: float = math.nan
    error: Exception | None = None
    before: dict = field(default_factory=dict)  #: parameters and buffers by name
    after: dict = field(default_factory=dict)
    gradients: dict = field(default_factory=dict)  #: when the run says that they are ready
    state_before: list = field(default_factory=list)  #: optimizer states, parameter by parameter
    state: list = field(default_factory=list)
    rates: tuple[float, ...] = ()  #: learning rates before the step, and after it
    scales: tuple[float, ...] = ()
    io: dict = field(default_factory=dict)  #: module -> (first input, output) of its last call

    @property
    def moved(self) -> bool:
        return any(not torch.equal(v, self.after[k]) for k, v in self.before.items() if k in self.gradients)


class Recorder:
    def __init__(self, run: Run, seen: Seen) -> None:
        self.run, self.seen = run, seen

    def loss(self, loss) -> None:
        self.seen.loss = float(loss.detach())

    def gradients(self) -> None:
        self.seen.gradients = {n: p.grad.clone() for n, p in self.run.model.named_parameters() if p.grad is not None}


def tensors(run: Run) -> dict:
    named = [*run.model.named_parameters(), *run.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def states(run: Run) -> list:
    return [copy.deepcopy(o.state.get(p, {})) for o in run.optimizers for g in o.param_groups for p in g["params"]]


def rates(run: Run) -> tuple[float, ...]:
    return tuple(group["lr"] for o in run.optimizers for group in o.param_groups)


def record(fault: Fault, seed: int, repaired: bool) -> list[Seen]:
    """Every step of a run up to the one that raises."""
    run, story, current = fault.build(seed, repaired), [], {}

    def hook(name: str) -> Callable:
        return lambda module, inputs, out: current["seen"].io.update({name: (inputs[0].detach(), out.detach())})

    handles = [m.register_forward_hook(hook(name)) for name, m in run.model.named_modules() if name]
    with warnings.catch_warnings(), seeded(seed):
        warnings.simplefilter("ignore")
        for i in range(min(run.steps, fault.step + 2)):
            seen = current["seen"] = Seen(before=tensors(run), state_before=states(run), rates=rates(run))
            seen.scales = (run.scaler.get_scale(),) if run.scaler else ()
            try:
                run.step(i, Recorder(run, seen))
            except Exception as error:
                seen.error = error
            seen.after, seen.state, seen.rates = tensors(run), states(run), seen.rates + rates(run)
            seen.scales += (run.scaler.get_scale(),) if run.scaler else ()
            story.append(seen)
            if seen.error:
                break
    for handle in handles:
        handle.remove()
    return story


# --- symptoms: (a step of the broken run, the same step of the twin) -> whether the fault shows


def norm(values) -> float:
    return math.sqrt(sum(float(v.double().pow(2).sum()) for v in values))


def update(seen: Seen, prefix: str = "") -> list:
    return [seen.after[k].double() - v.double() for k, v in seen.before.items() if k.startswith(prefix)]


def finite(values) -> bool:
    return all(bool(v.float().isfinite().all()) for v in values)


def loss_is_bad(seen: Seen, twin: Seen) -> bool:
    return seen.error is None and not math.isfinite(seen.loss)


def gradient_is_bad(seen: Seen, twin: Seen) -> bool:
    return math.isfinite(seen.loss) and not finite(seen.gradients.values())


def weights_go_bad(seen: Seen, twin: Seen) -> bool:
    return finite(seen.before.values()) and not finite(seen.after.values())


def raises(kind: type[Exception], text: str) -> Callable[[Seen, Seen], bool]:
    return lambda seen, twin: isinstance(seen.error, kind) and text in str(seen.error)


def skipped(seen: Seen) -> bool:
    return bool(seen.scales) and not seen.moved


def is_skipped(seen: Seen, twin: Seen) -> bool:
    return skipped(seen) and not skipped(twin)


def gradients_differ(share: float) -> Callable[[Seen, Seen], bool]:
    def symptom(seen: Seen, twin: Seen) -> bool:
        gap = norm(seen.gradients[k].double() - twin.gradients[k].double() for k in twin.gradients)
        return gap > share * norm(twin.gradients.values())

    return symptom


def update_is_times(low: float, high: float, prefix: str = "") -> Callable[[Seen, Seen], bool]:
    """The length of the update is between ``low`` and ``high`` times the twin's."""
    return lambda seen, twin: (
        low * norm(update(twin, prefix)) < norm(update(seen, prefix)) < high * norm(update(twin, prefix))
    )


def unchanged(old: torch.Tensor, new: torch.Tensor, where: torch.Tensor) -> float:
    return float((old == new)[where].double().mean())


def updates_are_lost(seen: Seen, twin: Seen) -> bool:
    """More than half of the weights that have a gradient stay as they are."""
    shares = [unchanged(seen.before[k], seen.after[k], g != 0) for k, g in seen.gradients.items() if "weight" in k]
    return min(shares) > 0.5


def stays(name: str) -> Callable[[Seen, Seen], bool]:
    """More than nine in ten values of a tensor that is averaged in every step are what they were."""
    return lambda seen, twin: float((seen.before[name] == seen.after[name]).double().mean()) > 0.9


def decay_is_lost(seen: Seen, twin: Seen) -> bool:
    weight = seen.before["fc1.weight"]
    return torch.equal(weight * (1 - 1e-2 * 0.01), weight)


def second_moment_is(test: Callable[[torch.Tensor], torch.Tensor], share: float) -> Callable[[Seen, Seen], bool]:
    def symptom(seen: Seen, twin: Seen) -> bool:
        moments = torch.cat([s["exp_avg_sq"].flatten() for s in seen.state])
        gradients = torch.cat([g.flatten() for g in seen.gradients.values()])
        return float(test(moments)[gradients != 0].double().mean()) > share

    return symptom


def second_moment_is_frozen(seen: Seen, twin: Seen) -> bool:
    """After a gradient that is far smaller than the moment says, the moment is what it was."""
    pairs = [(s["exp_avg_sq"], t["exp_avg_sq"]) for s, t in zip(seen.state_before, seen.state, strict=True) if s]
    if not pairs:
        return False
    old, new = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
    return unchanged(old, new, old > 0) > 0.9


def distinct_inputs(name: str) -> Callable[[Seen, Seen], bool]:
    return lambda seen, twin: len(seen.io[name][0].unique()) < 0.95 * len(twin.io[name][0].unique())


def positions_collide(seen: Seen, twin: Seen) -> bool:
    """What the module adds to a position beyond 512 is, for more than 40 % of them, what it adds to the next."""
    added = (seen.io["pos"][1] - seen.io["pos"][0])[0, 512:]
    gaps = (added[1:] - added[:-1]).abs().amax(1)
    return float((gaps < 1e-5).double().mean()) > 0.4


def residual_is_lost(seen: Seen, twin: Seen) -> bool:
    x, out = seen.io["stream"]
    return float((x == out).double().mean()) > 0.9


def scaled_products_unaligned(seen: Seen, twin: Seen) -> bool:
    return seen.before["fc.weight"].shape[1] % 16 != 0


def scaled_moments(seen: Seen, twin: Seen) -> bool:
    """The first moment after one step is 0.1 times a gradient; the twin's gradients were unscaled before."""
    ours, theirs = (norm(s["exp_avg"] for s in x.state) for x in (seen, twin))
    return ours > 1000 * theirs


SYMPTOMS: dict[str, Callable[[Seen, Seen], bool]] = {
    "scale_far_too_high": is_skipped,
    "static_scale_unchecked": weights_go_bad,
    "gradients_underflow": lambda s, t: not any(g.any() for g in s.gradients.values()),
    "step_bypasses_scaler_sgd": update_is_times(60_000, 70_000),
    "step_bypasses_scaler_adam": scaled_moments,
    "scaler_never_updated": raises(RuntimeError, "step() has already been called since the last update()"),
    "one_loss_of_two_scaled": lambda s, t: (
        s.gradients["fc2.weight"][4].norm() < 1e-3 * t.gradients["fc2.weight"][4].norm()
    ),
    "loss_in_fp16": is_skipped,
    "half_model_with_scaler": raises(ValueError, "Attempting to unscale FP16 gradients"),
    "unscale_every_micro_batch": raises(RuntimeError, "unscale_() has already been called"),
    "divide_every_micro_batch": gradients_differ(0.5),
    "update_every_micro_batch": raises(AssertionError, "No inf checks were recorded prior to update"),
    "clip_before_unscale": update_is_times(0, 0.01),
    "clip_value_before_unscale": lambda s, t: (
        max(float(x["exp_avg"].abs().max()) for x in s.state) <= 0.1 * 0.5 / 65536 * 1.001
    ),
    "unscale_the_other_optimizer": update_is_times(0, 0.01, "body"),
    "accumulation_not_divided": update_is_times(3.999, 4.001),
    "zero_grad_missing": gradients_differ(0.5),
    "scheduler_on_skipped_step": lambda s, t: skipped(s) and s.rates[0] != s.rates[1],
    "scheduler_before_optimizer": update_is_times(0.49, 0.51),
    "head_replaced": lambda s, t: (
        bool(s.gradients["head.weight"].any()) and torch.equal(s.before["head.weight"], s.after["head.weight"])
    ),
    "no_grad_left_over": lambda s, t: "encoder.weight" not in s.gradients,
    "optimizer_without_gradients": raises(AssertionError, "No inf checks were recorded for this optimizer"),
    "masters_not_copied": lambda s, t: any(g.any() for g in s.gradients.values()) and not s.moved,
    "clipping_spreads_nan": weights_go_bad,
    "clip_norm_overflows": lambda s, t: finite(s.gradients.values()) and not s.moved,
    "scaler_state_not_restored": is_skipped,
    "optimizer_state_not_restored": lambda s, t: s.state[0]["step"] == 1 and t.state[0]["step"] > 1,
    "scheduler_state_not_restored": lambda s, t: s.rates[1] > s.rates[0],
    "optimizer_state_cast": update_is_times(5, 1000),
    "rmsnorm_fp16": lambda s, t: not s.io["norm"][1].any() and bool(s.io["norm"][0].all()),
    "batchnorm_one_sample": raises(ValueError, "Expected more than 1 value per channel"),
    "all_labels_ignored": lambda s, t: loss_is_bad(s, t) and not any(g.any() for g in s.gradients.values()),
    "sqrt_at_zero": gradient_is_bad,
    "root_of_pruned": gradient_is_bad,
    "where_trap": gradient_is_bad,
    "where_trap_hides_nan": gradient_is_bad,
    "where_trap_under_scaler": lambda s, t: gradient_is_bad(s, t) and is_skipped(s, t),
    "acos_at_one": gradient_is_bad,
    "normalize_zero_vector": lambda s, t: float(s.gradients["emb.weight"][0].abs().max()) > 1e9,
    "adam_in_fp16": weights_go_bad,
    "second_moment_fp16": second_moment_is(lambda v: v == 0, 0.5),
    "updates_lost_bf16": updates_are_lost,
    "updates_lost_fp16": updates_are_lost,
    "weight_decay_lost": decay_is_lost,
    "ema_in_bf16": stays("ema.weight"),
    "running_statistics_bf16": stays("norm.running_var"),
    "second_moment_frozen": second_moment_is_frozen,
    "residual_lost_bf16": residual_is_lost,
    "token_out_of_range": raises(IndexError, "index out of range"),
    "label_out_of_range": raises(IndexError, "Target 4 is out of bounds"),
    "token_ids_in_bf16": distinct_inputs("emb"),
    "positions_in_bf16": positions_collide,
    "positions_by_cumsum_fp16": distinct_inputs("emb"),
    "stale_amax": lambda s, t: float(s.io["quantizer"][1].max()) < 1e-3 * float(s.io["quantizer"][0].max()),
    "gradients_in_e4m3": gradients_differ(0.5),
    "fp8_alignment": scaled_products_unaligned,
}  #: every other fault shows in its loss
EVERY = list(FAULTS.values())
SILENT = [fault for fault in EVERY if fault.silent]


def named(faults: list[Fault]):
    return pytest.mark.parametrize("fault", faults, ids=lambda f: f.name)


@named(EVERY)
def test_the_fault_shows_first_at_its_step_and_never_in_its_twin(fault):
    symptom = SYMPTOMS.get(fault.name, loss_is_bad)
    for seed in SEEDS:
        broken, twin = record(fault, seed, False), record(fault, seed, True)
        shows = [symptom(one, other) for one, other in zip(broken, twin, strict=False)][: fault.step + 1]
        assert shows == [False] * fault.step + [True], f"seed {seed}: {shows}"
        assert not any(symptom(one, one) for one in twin), f"seed {seed}: the twin shows it"


@named(EVERY)
def test_silent_means_that_the_loss_stays_finite_and_nothing_raises(fault):
    for seed in SEEDS:
        outcome = run_fault(fault, seed)
        assert outcome.silent == fault.silent, f"seed {seed}: {outcome}"


@named(EVERY)
def test_the_twin_trains(fault):
    """No warning, no exception, everything finite, the loss does not rise, and every parameter moves."""
    for seed in SEEDS:
        outcome = run_fault(fault, seed, repaired=True)
        assert (outcome.error, outcome.warnings, outcome.finite) == (None, (), True), f"seed {seed}"
        assert outcome.losses[-1] <= outcome.losses[0], f"seed {seed}: {outcome.losses}"
        run = fault.build(seed, True)
        start = tensors(run)
        with seeded(seed):
            for i in range(run.steps):
                run.step(i, Recorder(run, Seen()))
        end = tensors(run)
        still = [n for n, p in run.model.named_parameters() if p.requires_grad and torch.equal(start[n], end[n])]
        assert still == [], f"seed {seed}"


@named(EVERY)
def test_a_run_is_deterministic_and_depends_on_its_seed(fault):
    with seeded(99):
        first = run_fault(fault, 1)
    with seeded(7):
        second = run_fault(fault, 1)
    assert [math.isnan(v) or v for v in first.losses] == [math.isnan(v) or v for v in second.losses]
    assert run_fault(fault, 0, repaired=True).losses != run_fault(fault, 1, repaired=True).losses


@named(EVERY)
def test_broken_and_repaired_start_from_the_same_weights(fault):
    """The cure is the only difference: apart from a dtype, and from dimensions that are the fault, nothing else is."""
    broken, twin = fault.build(0, False), fault.build(0, True)
    assert broken.steps == twin.steps
    assert [type(o) for o in broken.optimizers] == [type(o) for o in twin.optimizers]
    if fault.name == "fp8_alignment":
        return
    ours, theirs = broken.model.state_dict(), twin.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


def test_a_fault_takes_less_than_two_seconds():
    slow = {}
    for fault in EVERY:
        start = time.process_time()
        run_fault(fault)
        if (taken := time.process_time() - start) > 2:
            slow[fault.name] = taken
    assert slow == {}


def test_the_catalogue_holds_every_class_of_the_page_in_every_phase():
    page = [
        "loss_scale_too_high",
        "static_scale_no_check",
        "grad_underflow",
        "clip_before_unscale",
        "optimizer_step_bypasses_scaler",
        "missing_scaler_update",
        "partial_loss_scaling",
        "scaler_state_not_restored",
        "scale_not_representable",
        "fp16_overflow",
        "log_of_zero",
        "masked_softmax",
        "exploding_lr",
        "sqrt_zero_grad",
        "where_trap",
        "clip_spreads_nan",
        "eps_underflow",
        "update_swamping",
        "weight_decay_lost",
        "ema_stagnation",
        "fp16_master_weights_with_scaler",
        "second_moment_frozen",
        "residual_swamping",
        "nan_in_data",
        "inf_in_label",
        "index_out_of_range",
        "ids_cast_to_low_precision",
        "fp8_stale_amax",
        "fp8_grad_underflow",
        "fp8_alignment",
    ]
    assert set(page) <= {fault.fault_class for fault in EVERY}
    assert Counter(fault.phase for fault in EVERY).keys() == set(PHASES)
    assert len(EVERY) >= 48 and len(SILENT) >= 22
    assert len({fault.title for fault in EVERY}) == len(EVERY)
    assert SYMPTOMS.keys() <= FAULTS.keys()


def test_the_probe_is_called_once_a_step_and_its_exceptions_end_the_run():
    class Counting:
        def __init__(self, at: int) -> None:
            self.at, self.losses, self.ready = at, 0, 0

        def loss(self, loss) -> None:
            assert loss.numel() == 1
            self.losses += 1
            if self.losses > self.at:
                raise KeyError("no more")

        def gradients(self) -> None:
            self.ready += 1

    probe = Counting(100)
    outcome = run_fault(FAULTS["updates_lost_bf16"], probe=probe)
    assert (probe.losses, probe.ready, len(outcome.losses)) == (8, 8, 8)
    outcome = run_fault(FAULTS["updates_lost_bf16"], probe=Counting(2))
    assert isinstance(outcome.error, KeyError) and outcome.error_step == 2


@pytest.mark.parametrize("repaired", (False, True))
@named(EVERY)
def test_every_step_that_ends_reports_one_loss_and_its_gradients(fault, repaired):
    counts = Counter()

    class Counting:
        def loss(self, loss) -> None:
            counts["loss"] += 1

        def gradients(self) -> None:
            counts["gradients"] += 1

    outcome = run_fault(fault, repaired=repaired, probe=Counting())
    ended = fault.build(0, repaired).steps if outcome.error is None else outcome.error_step
    assert ended <= counts["loss"] <= ended + 1 and ended <= counts["gradients"] <= ended + 1


def test_a_fault_of_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match=r"expected the phase of x to be one of data, .* got 'later'"):
        Fault("x", "t", "c", "later", 0, False, (), (), "cure", lambda seed, repaired: None)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for fault in EVERY[::6]:
        run_fault(fault)
    for build in HEALTHY.values():
        build(0)
    assert torch.equal(torch.rand(4), expected)


# --- healthy runs


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_finite_for_200_steps_and_learns(name):
    run, losses = HEALTHY[name](0), []

    class Keep:
        def loss(self, loss) -> None:
            losses.append(float(loss.detach()))

        def gradients(self) -> None:
            pass

    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("error")
        for i in range(run.steps):
            run.step(i, Keep())
    assert len(losses) == 200 and all(map(math.isfinite, losses))
    assert finite(run.model.parameters())
    if name != "gan":  # two losses that pull against each other have nowhere to fall to
        assert sum(losses[-40:]) < 0.95 * sum(losses[:40])


@pytest.mark.parametrize(("name", "at_once"), [("scaler_calibration", True), ("scaler_growth", False)])
def test_the_healthy_runs_with_a_scaler_skip_steps_and_go_on(name, at_once):
    run = HEALTHY[name](0)
    scales = [run.scaler.get_scale()]
    with seeded(0):
        for i in range(run.steps):
            run.step(i, Recorder(run, Seen()))
            scales.append(run.scaler.get_scale())
    falls = [i for i in range(200) if scales[i + 1] < scales[i]]
    rises = [i for i in range(200) if scales[i + 1] > scales[i]]
    assert len(falls) >= 3 and (falls[0] == 0) == at_once
    assert bool(rises) != at_once and all(b - a == 1 for a, b in zip(falls[:3], falls[1:3], strict=False)) == at_once


# --- places


class Births(TorchDispatchMode):
    """Operators whose result is the first to be NaN or infinite, with the module they ran in."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.path, self.found = [""], []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, inputs, name=name: self.path.append(name))
            module.register_forward_hook(self.leave)

    def leave(self, module, inputs, out) -> None:
        self.path.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        nan, inf = self.bad((args, kwargs))
        out = func(*args, **(kwargs or {}))
        new_nan, new_inf = self.bad(out) if "empty" not in str(func) else (False, False)
        if (new_nan and not nan) or (new_inf and not inf and not nan):
            self.found.append((self.path[-1], str(func)))
        return out

    @staticmethod
    def bad(tree) -> tuple[bool, bool]:
        leaves = [torch.as_tensor(v) for v in tree_leaves(tree) if isinstance(v, torch.Tensor | float)]
        wide = [v.float() for v in leaves if v.is_floating_point()]
        return any(bool(v.isnan().any()) for v in wide), any(bool(v.isinf().any()) for v in wide)


BORN = [
    fault
    for fault in EVERY
    if fault.name not in ("batchnorm_one_sample", "inf_in_label")
    and (SYMPTOMS.get(fault.name, loss_is_bad) in (loss_is_bad, gradient_is_bad, weights_go_bad))
    and fault.phase != "data"
] + [FAULTS[name] for name in ("rmsnorm_fp16", "clip_norm_overflows", "where_trap_under_scaler", "all_labels_ignored")]


@named(BORN)
def test_the_first_bad_value_is_born_where_the_fault_says(fault):
    """A tracer of every operator, which knows nothing of the catalogue, agrees with its modules and operations."""
    run = fault.build(0, False)
    births = Births(run.model)
    for i in range(fault.step + 1):
        births.found.clear()
        with births, seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.step(i, Recorder(run, Seen()))
    module, operation = births.found[0]
    assert any(re.search(pattern, operation) for pattern in fault.operations), births.found
    if module:  # the backward pass and the loss run in no module
        assert any(re.search(pattern, module) for pattern in fault.modules), births.found


@named(EVERY)
def test_places_are_regular_expressions_that_name_something(fault):
    """None is so wide that it matches an empty place, and each module pattern names a part of the run or a call."""
    run = fault.build(0, False)
    parts = [n for n, _ in run.model.named_modules()] + [n for n, _ in run.model.named_parameters()]
    parts += ["input", "target", "loss", "optimizer", "scaler"] + ["scheduler"] * bool(run.scheduler)
    assert fault.modules and fault.operations
    assert not any(re.search(pattern, "") for pattern in fault.modules + fault.operations)
    for pattern in fault.modules:
        assert any(re.search(pattern, part) for part in parts), pattern


# --- claims about torch on which the catalogue rests


def test_float_after_an_fp16_reduction_does_not_save_the_scale():
    """The cure of loss_in_fp16 has to come before the reduction: 65,536 is cast to FP16 on the way back."""
    out = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    (out.abs().mean().float() * 65536.0).backward()
    assert out.grad.isinf().all()
    out.grad = None
    (out.float().abs().mean() * 65536.0).backward()
    assert out.grad.isfinite().all()


def test_relu_and_clamp_stop_the_infinite_slope_that_a_mask_lets_through():
    z = torch.tensor([-1.0, 4.0])
    for off in (torch.relu, lambda x: x.clamp(min=0)):
        leaf = z.clone().requires_grad_()
        off(leaf).sqrt().sum().backward()
        assert leaf.grad.tolist() == [0.0, 0.25]
    leaf = z.clone().requires_grad_()
    (leaf * torch.tensor([0.0, 1.0])).sqrt().sum().backward()
    assert math.isnan(leaf.grad[0]) and leaf.grad[1] == 0.25
