"""Faults of what comes in: values that are not numbers, indices out of range, indices in too few bits."""

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.nan_debugging.faults._networks import adam, chain, classification, linear, mlp, plain, regression, sgd
from mixprec_lab.nan_debugging.faults._run import Run, fault, seeded


@fault(
    "A NaN in an input batch",
    "nan_in_data", "data", step=3, modules=("^input$",), operations=("input",),
    cure="check batches when they are loaded; drop or repair; report the index of the sample",
)  # fmt: skip
def nan_in_input(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    bad = x.clone()
    bad[5, 2] = torch.nan
    return plain(model, sgd(model), lambda i: F.mse_loss(model(bad if i == 3 and not repaired else x), y))


@fault(
    "An infinite regression label",
    "inf_in_label", "data", step=2, modules=("^target$", "^loss$"), operations=("mse", "sub"),
    cure="check targets when they are loaded",
)  # fmt: skip
def inf_in_label(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), regression(seed)
    bad = y.clone()
    bad[5, 2] = torch.inf
    return plain(model, sgd(model), lambda i: F.mse_loss(model(x), bad if i == 2 and not repaired else y))


class _Bag(nn.Module):
    """The mean embedding of a sequence, in front of a linear head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(ids).mean(1))


def _ids(seed: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (32, 6), generator=torch.Generator().manual_seed(seed + 3000))


@fault(
    "A token id outside the vocabulary",
    "index_out_of_range", "forward", step=1, modules=("emb",), operations=("embedding",),
    cure="compare ids with num_embeddings before the device sees them: CUDA asserts later and elsewhere",
)  # fmt: skip
def token_out_of_range(seed: int, repaired: bool) -> Run:
    with seeded(seed):
        model = _Bag(50)
    good, y = _ids(seed, 50), classification(seed)[1]
    bad = good.clone()
    bad[3, 3] = 50
    return plain(model, adam(model), lambda i: F.cross_entropy(model(bad if i == 1 and not repaired else good), y))


@fault(
    "A class label equal to the number of classes",
    "index_out_of_range", "forward", step=1, modules=("^loss$", "^target$"), operations=("cross_entropy", "nll_loss"),
    cure="count classes from 0; compare labels with the width of the logits",
)  # fmt: skip
def label_out_of_range(seed: int, repaired: bool) -> Run:
    model, (x, y) = mlp(seed), classification(seed)
    bad = y.clone()
    bad[3] = 4
    return plain(model, adam(model), lambda i: F.cross_entropy(model(x), bad if i == 1 and not repaired else y))


@fault(
    "The whole batch is cast to BF16: token ids above 256 collide",
    "ids_cast_to_low_precision", "data", silent=True,
    modules=("^input$",), operations=("to_copy", r"to\(bfloat16\)", "embedding"),
    cure="cast floating-point tensors only; ids stay int64",
)  # fmt: skip
def token_ids_in_bf16(seed: int, repaired: bool) -> Run:
    with seeded(seed):
        model = _Bag(5000)
    ids, y = _ids(seed, 5000), classification(seed)[1]

    def loss_of(i: int) -> torch.Tensor:
        batch = ids if repaired else ids.to(torch.bfloat16)
        return F.cross_entropy(model(batch.long() % 5000), y)

    return plain(model, adam(model), loss_of)


class _Positions(nn.Module):
    """Adds sines and cosines of the positions, which are counted in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], dtype=self.dtype)
        rates = torch.tensor([1.0, 0.5, 0.1, 0.02])
        angles = positions.float()[:, None] * rates
        return x + torch.cat([angles.sin(), angles.cos()], 1)


@fault(
    "Positions counted in BF16: beyond 256 neighbours share one",
    "ids_cast_to_low_precision", "forward", silent=True,
    modules=("pos", "^input$"), operations=("arange", "to_copy", "mul"),
    cure="count positions in int64 or FP32, and cast the sines",
)  # fmt: skip
def positions_in_bf16(seed: int, repaired: bool) -> Run:
    dtype = torch.float32 if repaired else torch.bfloat16
    model = chain(seed, pos=lambda: _Positions(dtype), fc1=linear(8, 16), fc2=linear(16, 1))
    x = 0.1 * torch.randn(2, 600, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(600)[:, None].mul(0.5).sin()
    return plain(model, adam(model), lambda i: F.mse_loss(model(x), y.expand(2, -1, -1)))


class _Counted(nn.Module):
    """Positions of real tokens by a running sum of the mask, looked up in a table."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.emb, self.head, self.dtype = nn.Embedding(2304, 8), nn.Linear(8, 1), dtype

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.emb(mask.to(self.dtype).cumsum(-1).long() - 1))


@fault(
    "Positions by a running sum in FP16: beyond 2,048 it counts in twos",
    "ids_cast_to_low_precision", "forward", silent=True,
    modules=("emb", "^input$"), operations=("cumsum", "to_copy", "embedding"),
    cure="sum the mask in int64",
)  # fmt: skip
def positions_by_cumsum_fp16(seed: int, repaired: bool) -> Run:
    with seeded(seed):
        model = _Counted(torch.int64 if repaired else torch.float16)
    mask = torch.ones(1, 2300, dtype=torch.bool)
    y = torch.randn(1, 2300, 1, generator=torch.Generator().manual_seed(seed))
    return plain(model, adam(model), lambda i: F.mse_loss(model(mask), y))
