"""The trainer against hand-written torch.amp loops, bit for bit, and against its own interrupted self."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.amp import MixedPrecisionTrainer, StepResult, choose_dtype
from mixprec_lab.loss_scaling import DynamicLossScaler

LOW = (torch.float16, torch.bfloat16)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 16), nn.BatchNorm1d(16),
            nn.Linear(16, 4),
        )  # fmt: skip


def batches(count: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = seeded(1)
    return [
        (torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def grad_scaler(**settings) -> torch.amp.GradScaler:
    """A scaler that overflows at once and grows every third step."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3, growth_factor=8.0, **settings)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
}


def by_hand(dtype, make, data, *, accumulation=1, max_norm=None) -> tuple[nn.Module, list[float], list[float]]:
    """The loop of PyTorch's own AMP examples: the model, the losses, and the scale at every step."""
    model = network()
    optimizer = make(model.parameters())
    scaler = grad_scaler(enabled=dtype == torch.float16)
    losses, scales = [], []
    for i, (x, y) in enumerate(data):
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        scaler.scale(loss / accumulation).backward()
        if (i + 1) % accumulation:
            continue
        if max_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, losses, scales


def trainer_for(dtype, make=OPTIMIZERS["sgd"], model=None, **settings) -> MixedPrecisionTrainer:
    model = network() if model is None else model
    if dtype == torch.float16:
        settings.setdefault("scaler", grad_scaler())
    return MixedPrecisionTrainer(model, make(model.parameters()), F.cross_entropy, dtype=dtype, **settings)


def same_parameters(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, None), (3, None), (1, 0.5), (3, 0.5)])
def test_it_is_the_hand_written_loop_bit_for_bit(dtype, make, accumulation, max_norm):
    data = batches(60)
    model, losses, scales = by_hand(dtype, make, data, accumulation=accumulation, max_norm=max_norm)
    trainer = trainer_for(dtype, make, accumulation_steps=accumulation, max_norm=max_norm)
    results = [trainer.train_step(x, y) for x, y in data]
    assert [r.loss.item() for r in results] == losses
    assert trainer.scales.tolist() == scales
    assert [r.scale.item() for r in results[accumulation - 1 :: accumulation]] == scales
    assert same_parameters(trainer.model, model)
    if dtype == torch.float16:
        assert len(set(scales)) > 5 and 0 < trainer.skipped_steps < len(scales)
    else:
        assert set(scales) == {1.0} and trainer.skipped_steps == 0 and trainer.scaler is None


def test_the_courses_own_scaler_does_the_same_as_torchs():
    settings = {"init_scale": 2.0**20, "scale_factor": 2.0, "scale_window": 3}
    data = batches(40)
    own = trainer_for(torch.float16, scaler=DynamicLossScaler(**settings, max_scale=2.0**40), max_norm=1.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    reference = trainer_for(torch.float16, scaler=theirs, max_norm=1.0)
    for x, y in data:
        a, b = own.train_step(x, y), reference.train_step(x, y)
        assert torch.equal(a.loss, b.loss) and torch.equal(a.scale, b.scale)
    assert same_parameters(own.model, reference.model)
    assert own.skipped_steps == reference.skipped_steps > 0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_skipped_steps_move_neither_parameters_nor_the_schedule(make):
    model = network()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rate = scheduler.get_last_lr()[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    trainer = MixedPrecisionTrainer(
        model, optimizer, lambda out, y: F.cross_entropy(out, y) * y.sum().float().sign(), dtype=torch.float16,
        scaler=scaler, scheduler=scheduler,
    )  # fmt: skip
    x, y = batches(1)[0]
    story = []
    for bad in (False, True, True, False):
        before = copy.deepcopy(dict(model.named_parameters()))
        if bad:
            model[0].weight.register_hook(lambda g: g + math.inf) if not story[-1][0] else None
        else:
            model[0].weight._backward_hooks = None
        trainer.train_step(x, y)
        moved = any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
        story.append((bad, moved, scheduler.get_last_lr()[0] / rate, trainer.optimizer_steps, trainer.skipped_steps))
    assert story == [
        (False, True, 0.5, 1, 0), (True, False, 0.5, 1, 1), (True, False, 0.5, 1, 2), (False, True, 0.25, 2, 2),
    ]  # fmt: skip
    assert trainer.scales.tolist() == [4096, 4096, 2048, 1024]


def test_gradients_are_unscaled_when_they_are_looked_at_and_then_clipped():
    seen = []
    x, y = batches(1)[0]
    trainer = trainer_for(
        torch.float16, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), max_norm=0.1,
        on_gradients=lambda model: seen.append(nn.utils.get_total_norm([p.grad for p in model.parameters()])),
    )  # fmt: skip
    trainer.train_step(x, y)
    plain = network()
    F.cross_entropy(plain(x), y).backward()
    true = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    assert seen[0] == pytest.approx(true.item(), rel=0.01) and seen[0] == trainer.grad_norm
    after = nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert after.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_flushed_window_is_the_mean_of_what_came(dtype):
    data = batches(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if dtype == torch.float16 else None
    trainer = trainer_for(dtype, accumulation_steps=4, scaler=scaler, max_norm=1.0)
    for x, y in data:
        trainer.train_step(x, y)
    assert trainer.optimizer_steps == 1 and trainer.flush() and trainer.optimizer_steps == 2
    assert not trainer.flush() and trainer.optimizer_steps == 2
    other = torch.amp.GradScaler("cpu", init_scale=256.0) if dtype == torch.float16 else None
    reference = trainer_for(dtype, accumulation_steps=4, scaler=other, max_norm=1.0)
    for x, y in data[:4]:
        reference.train_step(x, y)
    reference.accumulation_steps = 2
    for x, y in data[4:]:
        reference.train_step(x, y)
    assert same_parameters(trainer.model, reference.model)


def test_batches_of_accumulation_equal_one_large_batch_up_to_rounding():
    x, y = batches(1, 32)[0]
    linear = nn.Linear(8, 4)
    whole, parts = (trainer_for(torch.bfloat16, model=copy.deepcopy(linear), accumulation_steps=n) for n in (1, 4))
    whole.train_step(x, y)
    for a, b in zip(x.split(8), y.split(8), strict=True):
        parts.train_step(a, b)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=2e-3) and not torch.equal(
            p, linear.weight if p.ndim == 2 else linear.bias
        )


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(300, 8), nn.Linear(8, 4)

    def forward(self, ids, weight=1.0):
        assert ids.dtype == torch.int64
        return self.linear(self.embedding(ids).mean(1) * weight)


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict_and_ids_stay_integers():
    ids, y = torch.tensor([[257, 299], [1, 2]]), torch.tensor([0, 1])
    losses = []
    for inputs in (ids, (ids,), (ids, 1.0), {"ids": ids, "weight": 1.0}):
        torch.manual_seed(0)
        losses.append(trainer_for(torch.bfloat16, model=Joined()).train_step(inputs, y).loss)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_the_result_is_two_detached_scalars():
    result = trainer_for(torch.float16).train_step(*batches(1)[0])
    assert isinstance(result, StepResult) and result._fields == ("loss", "scale")
    assert all(t.shape == () and t.dtype == torch.float32 and not t.requires_grad for t in result)


def test_a_run_that_fails_without_scaling_works_with_it():
    """Gradients of the output start at 2^-26, which FP16 flushes; the default trainer learns all the same."""
    x = torch.ones(64, 4)
    target = torch.full((64, 1), 2.0)

    def loss_fn(output, y):
        return (output.float() - y).square().mean() * 2.0**-22

    class NoScaler:
        scale = 1.0
        scale_loss = staticmethod(lambda loss: loss)
        unscale_gradients = staticmethod(lambda optimizer: None)
        step = staticmethod(lambda optimizer: optimizer.step())
        update_scale = staticmethod(lambda found_inf: None)
        state_dict = staticmethod(dict)
        load_state_dict = staticmethod(lambda state: None)

    moved = []
    for scaler in (NoScaler(), None):
        model = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(model.weight)
        trainer = MixedPrecisionTrainer(
            model, torch.optim.SGD([model.weight], lr=2.0**18), loss_fn, dtype=torch.float16, scaler=scaler
        )
        for _ in range(20):
            trainer.train_step(x, target)
        moved.append(model.weight.abs().sum().item())
    assert moved[0] == 0 and abs(moved[1] - 2) < 0.01


# -- what it costs -----------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator._schema.name == "aten::_local_scalar_dense"
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "make", "reads"),
    [
        (torch.bfloat16, "sgd", 0),
        (torch.float16, "sgd", 1),
        (torch.bfloat16, "fused adamw", 0),
        (torch.float16, "fused adamw", 0),
    ],
)
def test_nothing_is_read_that_gradscaler_does_not_read(dtype, make, reads):
    trainer = trainer_for(dtype, OPTIMIZERS[make], max_norm=1.0, accumulation_steps=2)
    with Reads() as counter:
        for x, y in batches(60):
            trainer.train_step(x, y)
    assert counter.count == reads * 30
    ends = [*trainer.scales.tolist(), trainer.scaler.get_scale() if trainer.scaler else 1.0]
    backed_off = sum(b < a for a, b in itertools.pairwise(ends))
    assert trainer.skipped_steps == backed_off and trainer.optimizer_steps == 30 - backed_off > 5
    assert (backed_off > 0) == (dtype == torch.float16)


def test_a_scheduler_with_a_fused_optimizer_costs_one_read_a_step():
    model = network()
    optimizer = OPTIMIZERS["fused adamw"](model.parameters())
    trainer = MixedPrecisionTrainer(
        model, optimizer, F.cross_entropy, dtype=torch.float16, scaler=grad_scaler(),
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
    )  # fmt: skip
    with Reads() as counter:
        for x, y in batches(10):
            trainer.train_step(x, y)
    assert counter.count == 10


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("dtype", "make"), [(torch.bfloat16, "adamw"), (torch.float16, "fused adamw")])
def test_a_step_on_a_gpu_waits_for_nothing(dtype, make):
    trainer = trainer_for(dtype, OPTIMIZERS[make], model=network().cuda(), scaler=None, max_norm=1.0)
    data = [(x.cuda(), y.cuda()) for x, y in batches(6)]
    trainer.train_step(*data[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[1:]:
            trainer.train_step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.optimizer_steps + trainer.skipped_steps == 6


# -- checkpoints -------------------------------------------------------------------------------------------------------


def full_trainer(dtype, make="adamw"):
    model = network(dropout=0.3)
    optimizer = OPTIMIZERS[make](model.parameters())
    return MixedPrecisionTrainer(
        model, optimizer, F.cross_entropy, dtype=dtype, scaler=grad_scaler() if dtype == torch.float16 else None,
        accumulation_steps=3, max_norm=1.0, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("make", ["adamw", "fused adamw"])
@pytest.mark.parametrize("stop", [0, 12, 13, 14])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(dtype, make, stop, tmp_path):
    data = batches(24)
    torch.manual_seed(5)
    whole = full_trainer(dtype, make)
    expected = [whole.train_step(x, y).loss for x, y in data]
    torch.manual_seed(5)
    first = full_trainer(dtype, make)
    losses = [first.train_step(x, y).loss for x, y in data[:stop]]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = full_trainer(dtype, make)
    second.train_step(*data[0])
    torch.manual_seed(99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses += [second.train_step(x, y).loss for x, y in data[stop:]]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert same_parameters(second.model, whole.model)
    assert torch.equal(second.scales, whole.scales) and second.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert (second.optimizer_steps, second.skipped_steps) == (whole.optimizer_steps, whole.skipped_steps)


def test_without_the_scaler_state_a_resumed_run_goes_another_way():
    data = batches(24)
    first = full_trainer(torch.float16)
    for x, y in data[:12]:
        first.train_step(x, y)
    second = full_trainer(torch.float16)
    state = first.state_dict()
    fresh = {**state, "scaler": second.state_dict()["scaler"]}
    second.load_state_dict(fresh)
    for x, y in data[12:]:
        second.train_step(x, y)
    assert second.skipped_steps > first.skipped_steps


def test_a_state_is_a_snapshot():
    trainer = full_trainer(torch.float16)
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    for x, y in batches(6):
        trainer.train_step(x, y)
    assert all(torch.equal(state["model"][k], kept["model"][k]) for k in kept["model"])
    assert str(state["optimizer"]) == str(kept["optimizer"])
    second = full_trainer(torch.float16)
    second.load_state_dict(state)
    for x, y in batches(6):
        second.train_step(x, y)
    assert torch.equal(state["rng"], kept["rng"]) and str(state["optimizer"]) == str(kept["optimizer"])


def broken(state, change):
    state = dict(state)
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scaler"), "expected the state of a MixedPrecisionTrainer with the keys"),
        (lambda s: s.update(extra=1), "expected the state of a MixedPrecisionTrainer with the keys"),
        (lambda s: s.update(dtype="bf16"), "expected a state with dtype 'fp16' as in this trainer, got 'bf16'"),
        (lambda s: s.update(device="cuda"), "expected a state with device 'cpu'"),
        (lambda s: s.update(accumulation_steps=2), "expected a state with accumulation_steps 3"),
        (lambda s: s.update(scaler={}), "expected a state with a scaler as in this trainer, got one without"),
        (lambda s: s.update(scheduler=None), "expected a state with a scheduler as in this trainer, got one without"),
        (lambda s: s.update(scaler={"kind": "x"}), "state of a torch.amp.GradScaler"),
        (lambda s: s.update(model={}), "Missing key"),
        (lambda s: s.update(optimizer={"state": {}, "param_groups": []}), "different number of parameter groups"),
        (lambda s: s.update(rng=torch.zeros(3, dtype=torch.uint8)), "RNG state size to be 3"),
    ],
)
def test_a_wrong_state_is_refused_and_nothing_of_it_stays(change, message):
    trainer, other = full_trainer(torch.float16), full_trainer(torch.float16)
    for x, y in batches(4):
        trainer.train_step(x, y)
    for x, y in batches(10)[5:]:
        other.train_step(x, y)
    state = broken(other.state_dict(), change)
    before = trainer.state_dict()
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        trainer.load_state_dict(state)
    assert str(trainer.state_dict()) == str(before)


def test_a_state_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match="got list"):
        full_trainer(torch.bfloat16).load_state_dict([])


def test_parameters_of_a_loss_function_are_trained_and_saved():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros(()))

        def forward(self, output, y):
            return F.cross_entropy(output, y) * (-self.log_variance).exp() + self.log_variance

    def make():
        model, loss_fn = network(), Weighted()
        optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
        return MixedPrecisionTrainer(model, optimizer, loss_fn, dtype=torch.bfloat16, accumulation_steps=2)

    a, b, data = make(), make(), batches(6)
    for x, y in data[:3]:
        a.train_step(x, y)
    b.load_state_dict(a.state_dict())
    assert b.loss_fn.log_variance != 0 and torch.equal(a.loss_fn.log_variance.grad, b.loss_fn.log_variance.grad)
    for x, y in data[3:]:
        assert torch.equal(a.train_step(x, y).loss, b.train_step(x, y).loss)


# -- choices and refusals ----------------------------------------------------------------------------------------------


def test_the_default_dtype_and_its_reason_can_be_read():
    model = network()
    trainer = MixedPrecisionTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy)
    assert trainer.dtype == torch.bfloat16 and trainer.scaler is None
    assert repr(trainer) == (
        "MixedPrecisionTrainer(Sequential on cpu, bf16 (BF16 on a CPU: FP32's range, so no loss scaling), no scaler)"
    )
    assert "asked for), GradScaler" in repr(trainer_for(torch.float16))


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_cuda_bf16_needs_hardware_that_computes_in_it(native, dtype, monkeypatch):
    import contextlib

    def supported(including_emulation=True):
        return native or including_emulation  # as on a V100: emulation counts as support

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a V100")
    chosen, reason = choose_dtype(torch.device("cuda"))
    assert chosen == dtype and reason.startswith("a V100") and ("loss scaling" in reason)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="expected a CPU or CUDA device, got mps"):
        choose_dtype(torch.device("mps"))


def two_devices():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "m"}, TypeError, "expected a torch.nn.Module, a torch.optim.Optimizer and a function, got str, SGD"),
        ({"optimizer": 1}, TypeError, "got Sequential, int"),
        ({"loss_fn": None}, TypeError, "NoneType"),
        ({"model": nn.ReLU()}, ValueError, "expected a model with parameters that require a gradient, got none"),
        ({"model": network().requires_grad_(False)}, ValueError, "require a gradient, got none"),
        ({"model": network().half()}, ValueError, "expected FP32 parameters, got some in fp16: do not call half()"),
        ({"model": network().bfloat16()}, ValueError, "expected FP32 parameters, got some in bf16"),
        ({"model": two_devices()}, ValueError, "expected all parameters on one device, got cpu, meta"),
        ({"device": "meta"}, ValueError, "expected a model on meta, got its parameters on cpu"),
        ({"optimizer": torch.optim.SGD(network().parameters())}, ValueError,
         "expected an optimizer of this model's parameters, got 10 that"),
        ({"optimizer": torch.optim.LBFGS(network().parameters())}, TypeError, "without a closure, got LBFGS"),
        ({"dtype": torch.float32}, ValueError,
         "expected dtype to be torch.float16, torch.bfloat16 or None, got torch.float32"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "got torch.float8_e4m3fn"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps to be a whole number of at least 1, got 0"),
        ({"accumulation_steps": 1.5}, ValueError, "at least 1, got 1.5"),
        ({"max_norm": 0.0}, ValueError, "max_norm to be positive and finite, or None, got 0.0"),
        ({"max_norm": math.nan}, ValueError, "got nan"),
        ({"scaler": torch.amp.GradScaler("cpu", enabled=False)}, ValueError, "got one that is switched off"),
        ({"scaler": 65536.0}, TypeError, "expected scaler to be a torch.amp.GradScaler or a scaler of mixprec_lab"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once(changes, error, message):
    model = network()
    arguments = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loss_fn": F.cross_entropy}
    with pytest.raises(error, match=re.escape(message)):
        MixedPrecisionTrainer(**arguments | changes)


def test_the_silently_disabled_cuda_scaler_is_refused_on_a_machine_without_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.warns(UserWarning, match="GradScaler is enabled, but CUDA is not available.  Disabling."):
        scaler = torch.amp.GradScaler("cuda")
    with pytest.raises(ValueError, match="switched off"):
        trainer_for(torch.float16, scaler=scaler)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda out, y: 1.0, TypeError, "expected loss_fn to return a floating-point tensor, got float"),
        (lambda out, y: out.argmax(), TypeError, "got torch.int64"),
        (
            lambda out, y: F.cross_entropy(out, y, reduction="none"),
            ValueError,
            "expected a scalar loss, got shape (16,)",
        ),
        (lambda out, y: out.sum()[None], ValueError, "got shape (1,)"),
        (lambda out, y: out.detach().sum(), ValueError, "got one without a gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused_and_costs_nothing(loss_fn, error, message):
    trainer = trainer_for(torch.float16)
    before = str(trainer.state_dict())
    good, trainer.loss_fn = trainer.loss_fn, loss_fn
    with pytest.raises(error, match=re.escape(message)):
        trainer.train_step(*batches(1)[0])
    trainer.loss_fn = good
    after = trainer.state_dict()
    assert (after["pending"], after["windows"]) == (0, 0) and before.count("pending") == 1


def test_lists_of_inputs_are_refused():
    with pytest.raises(TypeError, match="a tensor, a tuple or a dict, got list"):
        trainer_for(torch.bfloat16).train_step([torch.ones(2, 8)], torch.zeros(2, dtype=torch.int64))


def test_a_model_that_was_halved_later_meets_torchs_own_words():
    trainer = trainer_for(torch.float16, scaler=torch.amp.GradScaler("cpu"))
    trainer.model.half()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients."):
        trainer.train_step(*batches(1)[0])


@pytest.mark.parametrize("own", [False, True], ids=["GradScaler", "DynamicLossScaler"])
@pytest.mark.parametrize("where", ["on_gradients", "optimizer"])
def test_after_an_exception_between_backward_and_step_training_goes_on_with_unscaled_gradients(where, own):
    scaler = DynamicLossScaler(2.0**10) if own else torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen, armed = [], [True]

    def fail(*_):
        if armed.pop() if armed else False:
            raise KeyboardInterrupt

    def look(model):
        seen.append(model[0].weight.grad.abs().max().item())
        if where == "on_gradients":
            fail()

    trainer = trainer_for(torch.float16, scaler=scaler, on_gradients=look)
    if where == "optimizer":
        trainer.optimizer.register_step_pre_hook(fail)
    batch = batches(1)[0]
    with pytest.raises(KeyboardInterrupt):
        trainer.train_step(*batch)
    trainer.train_step(*batch)
    assert seen[1] == pytest.approx(seen[0], rel=0.05) and not armed
    assert (trainer.optimizer_steps, trainer.scales.tolist()) == (1, [2.0**10])


def test_clipping_sparse_gradients_is_refused_and_unclipped_ones_are_trained():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4, sparse=True)

        def forward(self, ids):
            return self.embedding(ids)

    ids, y = torch.tensor([1, 2, 2]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="clipping needs dense gradients, got sparse ones"):
        trainer_for(torch.float16, model=Sparse(), max_norm=1.0).train_step(ids, y)
    model = Sparse()
    before = model.embedding.weight.detach().clone()
    trainer_for(
        torch.float16, lambda p: torch.optim.SGD(p, lr=0.1), model, scaler=torch.amp.GradScaler("cpu", init_scale=8.0)
    ).train_step(ids, y)
    assert (model.embedding.weight != before).any(1).tolist() == [i in (1, 2) for i in range(10)]


def test_no_gradient_at_the_optimizer_is_an_error():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    trainer = MixedPrecisionTrainer(
        model,
        torch.optim.SGD(model[1].parameters(), lr=0.1),
        lambda out, y: model[0].weight.sum(),
        dtype=torch.bfloat16,
    )
    with pytest.raises(RuntimeError, match="no gradient reached the optimizer's parameters"):
        trainer.train_step(torch.ones(1, 8), None)


# -- the figure --------------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_scale_and_counts_every_move():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    trainer = trainer_for(torch.float16)
    for x, y in batches(20):
        trainer.train_step(x, y)
    figure = trainer.analyze_gradient_scale()
    left, right = figure.axes
    line = left.lines[0].get_ydata()
    assert line[:-1].tolist() == trainer.scales.tolist() and line[-1] == trainer.scaler.get_scale()
    assert left.get_yscale() == "log" and left.get_xlabel() and left.get_ylabel()
    moves = torch.as_tensor(line).double().log2().diff()
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in right.patches}
    assert bars == {int(v): int((moves == v).sum()) for v in moves[moves != 0].unique()}
    assert sum(bars.values()) + int(right.get_title().split()[0]) == 20
    plt.close(figure)


def test_a_state_but_for_its_tensors_is_plain():
    state = full_trainer(torch.bfloat16).state_dict()
    json.dumps(
        {k: state[k] for k in ("dtype", "device", "accumulation_steps", "pending", "windows", "skipped", "scaler")}
    )
