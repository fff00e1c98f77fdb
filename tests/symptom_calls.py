"""One short mistake for each message of ``book/symptoms.md`` that a CPU can produce."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from mixprec_lab.fp8 import DelayedScaling, FP8Linear

HALF, BF16, FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
#: Where a GPU or an installed package takes the message away: what must be missing for it to come.
NEEDS_NO_CUDA = {
    "`torch.cuda.amp.GradScaler(args...)` is deprecated.",
    "torch.cuda.amp.GradScaler is enabled, but CUDA is not available. Disabling.",
    "CUDA is not available or torch_xla is imported. Disabling autocast.",
}
CALLS: dict[str, Callable[[], object]] = {}


def says(message: str) -> Callable:
    """Registers a function that must end in ``message``; "..." in it stands for anything."""

    def register(call: Callable) -> Callable:
        assert message not in CALLS, message
        CALLS[message] = call
        return call

    return register


def weight_optimizer_scaler(dtype: torch.dtype = torch.float32):
    weight = nn.Parameter(torch.ones(2, dtype=dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return weight, torch.optim.SGD([weight], lr=0.1), scaler


def backward(scaler, weight) -> None:
    scaler.scale(weight.float().sum()).backward()


def under_anomaly_detection(function: Callable) -> None:
    x = torch.zeros(1, requires_grad=True)
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        function(x).sum().backward()


# The loss or a gradient


@says("Function 'SqrtBackward0' returned nan values in its 0th output.")
def _():
    under_anomaly_detection(lambda x: 0 * x.sqrt())


@says("Function 'LogBackward0' returned nan values in its 0th output.")
def _():
    under_anomaly_detection(lambda x: torch.where(x > 0, x.log(), 0.0))


@says("The total norm of order 2.0 for gradients from `parameters` is non-finite, so it cannot be clipped.")
def _():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, math.inf])
    nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)


@says("all elements of input should be between 0 and 1")
def _():
    F.binary_cross_entropy(torch.tensor([math.nan]), torch.ones(1))


@says("probability tensor contains either `inf`, `nan` or element < 0")
def _():
    torch.multinomial(torch.tensor([math.nan, 1.0]), 1)


@says("Expected parameter logits ... of distribution Categorical ... but found invalid values:")
def _():
    torch.distributions.Categorical(logits=torch.tensor([math.nan, 0.0]))


@says(
    "linalg.svd: The algorithm failed to converge because the input matrix contained non-finite values."
)
def _():
    torch.linalg.svd(torch.full((2, 2), math.nan))


@says("cannot convert float NaN to integer")
def _():
    int(torch.tensor(math.nan).item())


@says("math range error")
def _():
    assert math.exp(709.0) > 1e307
    math.exp(710.0)


@says("Expected more than 1 value per channel when training, got input size ...")
def _():
    nn.BatchNorm1d(4)(torch.ones(1, 4))


@says("Target 12 is out of bounds.")
def _():
    F.cross_entropy(torch.ones(1, 10), torch.tensor([12]))


@says("index out of range in self")
def _():
    nn.Embedding(4, 2)(torch.tensor([7]))


# The loss scale


@says("Attempting to unscale FP16 gradients.")
def _():
    weight, optimizer, scaler = weight_optimizer_scaler(HALF)
    backward(scaler, weight)
    scaler.unscale_(optimizer)


@says("No inf checks were recorded for this optimizer.")
def _():
    _, optimizer, scaler = weight_optimizer_scaler()
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)


@says("No inf checks were recorded prior to update.")
def _():
    weight, _, scaler = weight_optimizer_scaler()
    backward(scaler, weight)
    scaler.update()


@says("unscale_() has already been called on this optimizer since the last update().")
def _():
    weight, optimizer, scaler = weight_optimizer_scaler()
    backward(scaler, weight)
    for _ in range(2):
        scaler.unscale_(optimizer)


@says("step() has already been called since the last update().")
def _():
    weight, optimizer, scaler = weight_optimizer_scaler()
    backward(scaler, weight)
    for _ in range(2):
        scaler.step(optimizer)


@says("unscale_() is being called after step().")
def _():
    weight, optimizer, scaler = weight_optimizer_scaler()
    backward(scaler, weight)
    scaler.step(optimizer)
    scaler.unscale_(optimizer)


@says(
    "Attempted unscale_ but _scale is None. This may indicate your script did not use "
    "scaler.scale(loss or outputs) earlier in the iteration."
)
def _():
    weight, optimizer, scaler = weight_optimizer_scaler()
    weight.sum().backward()
    scaler.unscale_(optimizer)


@says("Closure use is not currently supported if GradScaler is enabled.")
def _():
    weight, optimizer, scaler = weight_optimizer_scaler()
    backward(scaler, weight)
    scaler.step(optimizer, closure=lambda: weight.sum())


@says("torch.cuda.amp.GradScaler is enabled, but CUDA is not available. Disabling.")
def _():
    torch.amp.GradScaler("cuda")


@says("Detected call of `lr_scheduler.step()` before `optimizer.step()`.")
def _():
    weight, optimizer, scaler = weight_optimizer_scaler()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler.scale(weight.sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()


# Numbers


@says("value cannot be converted to type c10::Half without overflow")
def _():
    torch.zeros(2, dtype=HALF).masked_fill(torch.tensor([True, False]), -1e9)


@says("overflow encountered in cast")
def _():
    np.array([1e5], np.float32).astype(np.float16)


@says("linalg.inv: Low precision dtypes not supported. Got BFloat16")
def _():
    torch.linalg.inv(torch.eye(2, dtype=BF16))


# Dtypes


@says("mat1 and mat2 must have the same dtype, but got Half and Float")
def _():
    nn.Linear(2, 2)(torch.ones(1, 2, dtype=HALF))


@says("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16")
def _():
    return torch.ones(2, 2) @ torch.ones(2, 2, dtype=BF16)


@says("expected scalar type Float but found BFloat16")
def _():
    torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2, dtype=BF16))


@says("Input type (c10::Half) and bias type (float) should be the same")
def _():
    nn.Conv2d(1, 1, 1)(torch.ones(1, 1, 2, 2, dtype=HALF))


@says("mixed dtype (CPU): expect parameter to have scalar type of Float")
def _():
    nn.LayerNorm(2)(torch.ones(1, 2, dtype=BF16))
    nn.LayerNorm(2).bfloat16()(torch.ones(1, 2))


@says(
    "Mismatch dtype between input and weight: input dtype = c10::BFloat16, weight dtype = float, "
    "Cannot dispatch to fused implementation."
)
def _():
    nn.RMSNorm(2)(torch.ones(1, 2, dtype=BF16))


@says(
    "Expected query, key, and value to have the same dtype, but got query.dtype: float "
    "key.dtype: c10::Half and value.dtype: float instead."
)
def _():
    query = torch.ones(1, 1, 2, 2)
    F.scaled_dot_product_attention(query, query.half(), query)


@says("RNN input dtype (torch.bfloat16) does not match weight dtype (torch.float32).")
def _():
    nn.LSTM(2, 2)(torch.ones(1, 1, 2, dtype=BF16))


@says(
    "Expected tensor for argument #1 'indices' to have one of the following scalar types: Long, Int; "
    "but got CPUBFloat16Type instead"
)
def _():
    nn.Embedding(4, 2)(torch.ones(1, dtype=BF16))


@says("expected target dtype to be Long or Byte, but got Float")
def _():
    F.cross_entropy(torch.ones(1, 3), torch.ones(1))


@says(
    "Index put requires the source and destination dtypes match, got Half for the destination and "
    "Float for the source."
)
def _():
    torch.zeros(3, dtype=HALF)[torch.tensor([0])] = torch.ones(1)


@says("index_add_(): self (Half) and source (Float) must have the same scalar type")
def _():
    torch.zeros(3, dtype=HALF).index_add_(0, torch.tensor([0]), torch.ones(1))


@says("result type Float can't be cast to the desired output type Long")
def _():
    torch.ones(2, dtype=torch.long).add_(torch.ones(2))


@says("expected dtype float for `end` but got dtype c10::BFloat16")
def _():
    torch.ones(2).lerp_(torch.ones(2, dtype=BF16), 0.1)


@says("attempting to assign a gradient with dtype 'float' to a tensor with grad_dtype 'Half'.")
def _():
    nn.Parameter(torch.ones(2, dtype=HALF)).grad = torch.ones(2)


# Autocast


@says("In CPU autocast, but the target dtype is not supported. Disabling autocast.")
def _():
    torch.autocast("cpu", dtype=torch.float64)


@says("CUDA is not available or torch_xla is imported. Disabling autocast.")
def _():
    torch.autocast("cuda")


@says("`torch.cuda.amp.autocast(args...)` is deprecated.")
def _():
    torch.cuda.amp.autocast()


@says("`torch.cuda.amp.GradScaler(args...)` is deprecated.")
def _():
    torch.cuda.amp.GradScaler()


@says("`torch.cuda.amp.custom_fwd(args...)` is deprecated.")
def _():
    torch.cuda.amp.custom_fwd(lambda ctx, x: x)


@says("Expected `device_type` of type `str`, got: `<class 'torch.device'>`")
def _():
    torch.amp.custom_fwd(lambda ctx, x: x, device_type=torch.device("cpu"))


@says("element 0 of tensors does not require grad and does not have a grad_fn")
def _():
    with torch.no_grad():
        y = nn.Linear(1, 1)(torch.ones(1))
    y.backward()


@says(
    "torch.utils.checkpoint: Recomputed values for the following tensors have different metadata than "
    "during the forward pass."
)
def _():
    dtypes = iter([torch.float32, HALF])
    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: x.to(next(dtypes)).exp().float(), x, use_reentrant=False)
    y.sum().backward()


# Checkpoints


@says(
    "The source state dict is empty, possibly because it was saved from a disabled instance of GradScaler."
)
def _():
    torch.amp.GradScaler("cpu").load_state_dict(torch.amp.GradScaler("cpu", enabled=False).state_dict())


@says('Missing key(s) in state_dict: "quantizers.input.amax_history", ...')
def _():
    FP8Linear(16, 16, recipe=DelayedScaling()).load_state_dict(nn.Linear(16, 16).state_dict())


@says("loaded state dict contains a parameter group that doesn't match the size of optimizer's group")
def _():
    one, two = (torch.optim.Adam([nn.Parameter(torch.ones(1)) for _ in range(n)]) for n in (1, 2))
    one.load_state_dict(two.state_dict())


@says("Got unsupported ScalarType BFloat16")
def _():
    torch.ones(1, dtype=BF16).numpy()


# 8 and 4 bits


@says("No module named 'transformer_engine'")
def _():
    import transformer_engine  # noqa: F401


@says("\"add_stub\" not implemented for 'Float8_e4m3fn'")
def _():
    x = torch.ones(2).to(FP8)
    x + x


@says("Promotion for Float8 Types is not supported, attempted to promote Float8_e4m3fn and Float")
def _():
    torch.ones(2).to(FP8) + torch.ones(2)


@says("Expected mat1 to be Float8 matrix got BFloat16")
def _():
    x, one = torch.ones(16, 16, dtype=BF16), torch.ones(())
    torch._scaled_mm(x, x.t(), one, one)


@says("Invalid scaling configuration.")
def _():
    x = torch.ones(16, 16).to(FP8)
    torch._scaled_mm(x, x.t(), torch.ones(3), torch.ones(1))


@says("\"copy_kernel\" not implemented for 'Float4_e2m1fn_x2'")
def _():
    torch.ones(2).to(torch.float4_e2m1fn_x2)


# Memory and speed


@says("DefaultCPUAllocator: can't allocate memory: you tried to allocate ... bytes.")
def _():
    torch.empty(1 << 60, dtype=torch.uint8)


@says("PyTorch is checking whether allow_tf32_new is enabled for cuBlas matmul")
def _():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        return torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = before


# Several devices; those after the first two run in a process group of one


@says("Default process group has not been initialized, please make sure to call init_process_group.")
def _():
    torch.distributed.all_reduce(torch.ones(1))


@says(
    "Error initializing torch.distributed using env:// rendezvous: environment variable RANK expected, but not set"
)
def _():
    torch.distributed.init_process_group("gloo")


class Unused(nn.Module):
    """A layer that takes part in the loss, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x):
        return self.used(x)


@says("Expected to have finished reduction in the prior iteration before starting a new one.")
def in_group_unused():
    model = nn.parallel.DistributedDataParallel(Unused())
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()


@says("FSDP expects uniform original parameter dtype but got")
def in_group_uniform():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())
    fully_shard(model)
    model(torch.ones(1, 2))


@says(
    "got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor before calling "
    "distributed operators!"
)
def in_group_mixed():
    sharded = distribute_tensor(torch.ones(2, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    return sharded + torch.ones(2, 2)


@says("Invalid scalar type")
def in_group_fp8():
    torch.distributed.all_reduce(torch.ones(2).to(FP8))


@says("Weights only load failed.")
def with_a_file(path):
    torch.save({"model": nn.Linear(1, 1)}, path)
    torch.load(path)
