"""Models that call many operators, for the comparison of two ways to answer what autocast does."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mixprec_lab.amp.trace import AutocastTrace, _trace
from mixprec_lab.amp.watch import Watch
from mixprec_lab.models import convnet, transformer


class Layers(nn.Module):
    """Layers one after the other, each on an input of its own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.up2, self.up3 = (
            nn.ConvTranspose1d(2, 3, 3),
            nn.ConvTranspose2d(2, 3, 3),
            nn.ConvTranspose3d(2, 3, 3),
        )
        self.conv1, self.conv3 = nn.Conv1d(2, 3, 3, padding="same"), nn.Conv3d(2, 3, 3)
        self.prelu, self.bilinear = nn.PReLU(), nn.Bilinear(4, 4, 3)
        self.batch_norm, self.group_norm, self.rms_norm = nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.RMSNorm(4)
        self.pad = nn.ReflectionPad1d(1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(2, 2, 4, 4, 4) -> results of every layer."""
        line, plane = x[:, :, :, 0, 0], x[:, :, :, :, 0]
        low = self.up1(line)
        results = [self.conv1(line), self.conv3(x), low, self.up2(plane), self.up3(x), self.prelu(low)]
        results += [self.bilinear(line, line), self.batch_norm(low), self.group_norm(low), self.rms_norm(low[..., :4])]
        results += [
            self.pad(low),
            F.max_pool2d(low, 2),
            F.adaptive_avg_pool3d(x, 1),
            F.interpolate(low, scale_factor=2),
        ]
        results += [
            F.avg_pool3d(self.up3(x), 2),
            F.grid_sample(self.up2(plane), torch.zeros(2, 2, 2, 2).to(x.device), align_corners=False),
        ]
        return results


class Call(nn.Module):
    """One function of a 16-bit tensor ``y`` (a linear layer's output) and an FP32 tensor ``x``, both (4, 4)."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        """(4, 4) -> what the function returns."""
        return self.function(self.linear(x), x)


def _labels(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(4, device=x.device)


FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    # sums and other reductions, with and without a dtype of their own
    "softmax": lambda y, x: y.softmax(-1), "log_softmax": lambda y, x: F.log_softmax(y, -1),
    "softmax dtype": lambda y, x: y.softmax(-1, dtype=y.dtype), "sum": lambda y, x: y.sum(),
    "sum dim": lambda y, x: y.sum(0, keepdim=True), "sum dtype": lambda y, x: y.sum(dtype=torch.float32),
    "prod": lambda y, x: y.prod(), "prod dim": lambda y, x: y.prod(0), "cumsum": lambda y, x: y.cumsum(0),
    "cumprod": lambda y, x: y.cumprod(0), "norm": lambda y, x: y.norm(), "norm dim": lambda y, x: y.norm(p=2, dim=0),
    "vector_norm": lambda y, x: torch.linalg.vector_norm(y), "mean": lambda y, x: y.mean(), "std": lambda y, x: y.std(),
    "logsumexp": lambda y, x: y.logsumexp(0), "normalize": lambda y, x: F.normalize(y), "trace": lambda y, x: y.trace(),
    # element by element
    "exp": lambda y, x: y.exp(), "log": lambda y, x: y.abs().log(), "pow": lambda y, x: y**2, "rpow": lambda y, x: 2**y,
    "reciprocal": lambda y, x: 1 / y, "rsqrt": lambda y, x: y.abs().rsqrt(), "softplus": lambda y, x: F.softplus(y),
    "gelu": lambda y, x: F.gelu(y), "add": lambda y, x: y + x, "add_": lambda y, x: y.clone().add_(x),
    "addcmul": lambda y, x: torch.addcmul(y, x, y), "atan2": lambda y, x: torch.atan2(y, x),
    "integers": lambda y, x: (_labels(x).sum(), y + _labels(x)), "where": lambda y, x: torch.where(x > 0, y, x),
    # products
    "matmul": lambda y, x: y @ x, "mm": lambda y, x: torch.mm(x, x), "mv": lambda y, x: torch.mv(y, y[0]),
    "mm out": lambda y, x: torch.mm(x.detach(), x.detach(), out=x.new_empty(4, 4)), "dot": lambda y, x: y[0].dot(y[1]),
    "bmm": lambda y, x: torch.bmm(y[None], x[None]), "addmm": lambda y, x: torch.addmm(y, x, y),
    "baddbmm": lambda y, x: torch.baddbmm(y[None], x[None], y[None]),
    "einsum": lambda y, x: torch.einsum("ij,kj->ik", y, x),
    "multi_dot": lambda y, x: torch.linalg.multi_dot([y, y, y]), "tensordot": lambda y, x: torch.tensordot(y, y, 1),
    "sdpa": lambda y, x: F.scaled_dot_product_attention(y[None, None], x[None, None], y[None, None]),
    "double": lambda y, x: (x.double() @ x.double(), x.double().softmax(-1)), "kron": lambda y, x: torch.kron(y, x),
    # several inputs
    "cat": lambda y, x: torch.cat([y, x]), "cat low": lambda y, x: torch.cat([y, y]),
    "stack": lambda y, x: torch.stack([y, x]),
    "scatter_add": lambda y, x: x.detach().scatter_add(0, _labels(x).expand(4, 4), x),
    "cross": lambda y, x: torch.linalg.cross(y[:, :3], y[:, 1:]), "cosine": lambda y, x: F.cosine_similarity(y, x),
    "cdist": lambda y, x: torch.cdist(y, x), "embedding": lambda y, x: F.embedding(_labels(x), x),
    # losses
    "cross_entropy": lambda y, x: F.cross_entropy(y, _labels(x)),
    "soft cross_entropy": lambda y, x: F.cross_entropy(y, x.softmax(-1), label_smoothing=0.1),
    "nll_loss": lambda y, x: F.nll_loss(y.log_softmax(-1), _labels(x)), "mse_loss": lambda y, x: F.mse_loss(y, x),
    "l1_loss": lambda y, x: F.l1_loss(y, x), "huber_loss": lambda y, x: F.huber_loss(y, x),
    "smooth_l1_loss": lambda y, x: F.smooth_l1_loss(y, x),
    "multi_margin_loss": lambda y, x: F.multi_margin_loss(y, _labels(x)),
    "bce_with_logits": lambda y, x: F.binary_cross_entropy_with_logits(y, x.sigmoid()),
    "kl_div": lambda y, x: F.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
    "poisson_nll_loss": lambda y, x: F.poisson_nll_loss(y, x.abs()),
    "soft_margin_loss": lambda y, x: F.soft_margin_loss(y, x.sign()),
    "hinge_embedding_loss": lambda y, x: F.hinge_embedding_loss(y, x.sign()),
    "margin_ranking_loss": lambda y, x: F.margin_ranking_loss(y[0], y[1], x[0].sign()),
    "triplet_margin_loss": lambda y, x: F.triplet_margin_loss(y, x, y.flip(0)),
    "cosine_embedding_loss": lambda y, x: F.cosine_embedding_loss(y, x, x[0].sign()),
}  # fmt: skip


class Recurrent(nn.Module):
    """Recurrent layers and cells, whose steps share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.gru = nn.RNN(4, 4), nn.GRU(4, 4, num_layers=2)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(steps, batch, 4) -> (batch, 4)."""
        x = self.gru(self.rnn(x)[0])[0]
        state, cell = self.lstm_cell(x[0])
        for step in x[1:]:
            state, cell = self.lstm_cell(step, (state, cell))
        return self.rnn_cell(self.gru_cell(x[0], state), cell)


class Regions(nn.Module):
    """Attention as a module, a region without autocast in it, one with another dtype, and shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embedding, self.linear, self.other = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) int64 -> (batch, tokens, 8)."""
        x = self.embedding(ids)
        x = x + self.attention(x, x, x)[0]
        with torch.autocast(x.device.type, enabled=False):
            x = self.linear(x.float())
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            x = self.other(x).float()
        with torch.no_grad():
            x = x + self.linear(x)
        return self.linear(self.linear(x).half()) + F.dropout(x)


def zoo() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """name -> (model, inputs), seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "convnet": (convnet(), (torch.rand(3, 1, 8, 8),)),
            "transformer": (transformer(), (torch.rand(3, 1, 8, 8),)),
            "layers": (Layers(), (torch.randn(2, 2, 4, 4, 4),)),
            "recurrent": (Recurrent(), (torch.randn(3, 2, 4),)),
            "regions": (Regions(), (torch.tensor([[0, 1, 4], [2, 2, 3]]),)),
            "half": (convnet().half(), (torch.rand(3, 1, 8, 8),)),
            "double": (convnet().double(), (torch.rand(3, 1, 8, 8, dtype=torch.float64),)),
        }


def fake_cuda(model: nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> AutocastTrace:
    """What torch's own CUDA autocast does, on a machine without CUDA, by tensors that only claim to be on a GPU.

    The dispatcher and the autocast kernels are torch's; dtypes are computed and numbers are not.  Without a GPU torch
    cannot record a graph for such tensors, so parameters require no gradient: no weight cache, no backward pass.
    """
    with contextlib.ExitStack() as stack:
        model = copy.deepcopy(model).requires_grad_(False)
        stack.enter_context(FakeTensorMode())
        for name, answer in (
            ("torch.cuda.amp.common.amp_definitely_not_available", False),
            ("torch.cuda.is_bf16_supported", True),
            ("torch.cuda.get_device_name", "a device that is not there"),
            ("torch.cuda.current_device", 0),
        ):
            stack.enter_context(mock.patch(name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch("torch.random.fork_rng", lambda devices: contextlib.nullcontext()))
        for module in model.modules():
            for name, value in module._parameters.items():
                module._parameters[name] = None if value is None else nn.Parameter(_claimed(value), requires_grad=False)
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else _claimed(value)
        return _trace(model, tuple(map(_claimed, inputs)), dtype, Watch("cuda", "cuda", False), backward=False)


def _claimed(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def answers(
    host: str, policy: str, emulate: bool
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.dtype], AutocastTrace]:
    """A trace with the engine chosen by hand."""
    return lambda model, inputs, dtype: _trace(model, inputs, dtype, Watch(host, policy, emulate))
