"""What a transformer keeps for its backward pass, tensor by tensor.

The list is the one of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1): with 16-bit activations, dropout and
attention that stores its probabilities, one layer of a GPT keeps ``s b h (34 + 5 a s / h)`` bytes.  Here every entry
carries its own width, so that the same list serves FP32, autocast (whose residual stream stays FP32), FP8 (whose matrix
inputs are saved in one byte), FlashAttention, SwiGLU, grouped queries, latent attention and experts.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from mixprec_lab.memory.regimes import Compute
from mixprec_lab.memory.shapes import ModelShape

Attention = Literal["flash", "full"]
Policy = Literal["cuda", "cpu"]


class Saved(NamedTuple):
    """One saved tensor: its name and the bytes it takes for one token of one layer."""

    name: str
    bytes_per_token: int


class Widths(NamedTuple):
    """Bytes a value takes in each role."""

    matrix_input: int  #: what a linear layer saves for its weight gradient
    value: int  #: everything else inside a layer
    residual: int  #: the stream between layers, and so the inputs of the norms
    statistic: int  #: mean and inverse deviation of a layer norm
    softmax: tuple[int, ...]  #: the copies of the attention probabilities, if they are stored at all
    cast_each: bool  #: a matrix input is a cast made anew for every matrix that reads it (autocast)
    fused_rms: bool  #: one kernel for RMSNorm


def widths(compute: Compute, policy: Policy = "cuda") -> Widths:
    """The widths of ``compute``.

    Under ``torch.autocast`` the residual stream is FP32, because FP32 embeddings start it, and the output of a norm is
    cast once for every matrix that reads it: autocast remembers the casts of weights, not those of activations.  On
    CUDA softmax is on the FP32 list: its output is saved in FP32 and once more as the 16-bit input of the next
    product; on a CPU it stays 16-bit.  A layer norm over 16-bit parameters keeps FP32 statistics on CUDA and 16-bit
    ones on a CPU.  RMSNorm is one kernel on CUDA; on a CPU it is written in tensor operators, which save two FP32
    tensors of the input's size.  All of this is torch 2.13.
    """
    autocast, cuda = compute in ("autocast", "fp8_autocast"), policy == "cuda"
    if compute == "fp32":
        return Widths(4, 4, 4, 4, (4,), False, cuda)
    matrix_input, residual = 1 if compute.startswith("fp8") else 2, 4 if autocast else 2
    softmax = (4, 2) if autocast and cuda else (2,)
    return Widths(matrix_input, 2, residual, 4 if autocast or cuda else 2, softmax, compute == "autocast", cuda)


def layer_activations(
    shape: ModelShape,
    sequence: int,
    compute: Compute,
    *,
    attention: Attention = "flash",
    dropout: bool = False,
    policy: Policy = "cuda",
    layer: int = -1,
) -> list[Saved]:
    """The tensors that one layer saves, in bytes per token, in the order of the forward pass.

    ``layer`` matters for models with experts, whose first layers are dense.  ``attention="full"`` stores the
    probabilities (and grows with ``sequence``); ``flash`` keeps one FP32 number per head and token instead.  Dropout
    masks take one byte a value on CUDA and a full value on a CPU.  Linear layers in FP8 save their input in one byte,
    beside the 16-bit output that FlashAttention needs.
    """
    w = widths(compute, policy)
    mask = (1 if policy == "cuda" else w.value) if dropout else 0
    parts = [*_norm("first norm", shape, shape.hidden, w.residual, w), *_attention(shape, sequence, attention, mask, w)]
    parts += [Saved("dropout mask after attention", mask * shape.hidden)]
    parts += [*_norm("second norm", shape, shape.hidden, w.residual, w)]
    dense = shape.experts is None or layer % shape.layers < shape.experts.dense_layers
    parts += _mlp(shape, shape.inner, w) if dense else _experts(shape, w)
    parts += [Saved("dropout mask after the MLP", mask * shape.hidden)]
    return [part for part in parts if part.bytes_per_token]


def _norm(name: str, shape: ModelShape, size: int, width: int, w: Widths) -> Iterator[Saved]:
    if shape.norm == "rms" and not w.fused_rms:
        yield Saved(f"input of the {name}, in FP32", 4 * size)
        yield Saved(f"statistic of the {name}", 4)
        yield Saved(f"normalized values of the {name}, in FP32", 4 * size)
        return
    yield Saved(f"input of the {name}", width * size)
    yield Saved(f"statistics of the {name}", 2 * w.statistic if shape.norm == "layer" else 4)


def _attention(shape: ModelShape, sequence: int, attention: str, mask: int, w: Widths) -> Iterator[Saved]:
    query, key, value, out = shape.widths
    readers = 1 if shape.fused or not w.cast_each else 2 if shape.latent else 3
    yield Saved("input of query, key and value", readers * w.matrix_input * shape.hidden)
    if low := shape.latent:
        yield from _norm("query norm", shape, low.query_rank, w.value, w)
        yield Saved("input of the query expansion", w.matrix_input * low.query_rank)
        yield from _norm("latent norm", shape, low.latent_rank + low.rotary_size, w.value, w)
        yield Saved("input of the key and value expansion", w.matrix_input * low.latent_rank)
    groups = shape.heads // shape.key_heads if attention == "full" else 1  # written out, or left to the kernel
    yield Saved("query, key, value", w.value * (query + groups * (key + value)))
    if attention == "flash":
        yield Saved("log of the softmax sums", 4 * shape.heads)
        yield Saved("attention output", w.value * out)
        separate = w.matrix_input != w.value
        yield Saved("input of the output matrix", w.matrix_input * out if separate else 0)
        return
    probabilities = shape.heads * sequence
    yield Saved("attention probabilities", w.softmax[0] * probabilities)
    yield Saved("dropout mask of the probabilities", mask * probabilities)
    # One FP32 or 16-bit tensor is both the output of softmax and an operand of the product, unless something between
    # them (dropout, a cast) makes a second one.
    second = mask or len(w.softmax) > 1
    yield Saved("probabilities as operand", w.softmax[-1] * probabilities if second else 0)
    yield Saved("input of the output matrix", w.matrix_input * out)


def _mlp(shape: ModelShape, inner: int, w: Widths, entry: bool = True) -> Iterator[Saved]:
    readers = 2 if shape.gated and not shape.fused and w.cast_each else 1
    yield Saved("input of the MLP", readers * w.matrix_input * shape.hidden if entry else 0)
    yield Saved("input of the activation function", w.value * inner)
    if shape.gated:
        yield Saved("output of the activation function", w.value * inner)
        yield Saved("the other factor of the gate", w.value * inner)
    yield Saved("input of the last matrix", w.matrix_input * inner)


def _experts(shape: ModelShape, w: Widths) -> Iterator[Saved]:
    e = shape.experts
    yield Saved("input of router and shared expert", w.matrix_input * shape.hidden)
    yield Saved("router scores", 4 * e.routed)
    yield Saved("tokens sent to the routed experts", w.matrix_input * e.active * shape.hidden)
    for saved in _mlp(shape, e.inner * (e.active + e.shared), w, entry=False):
        yield Saved(f"{saved.name}, all visited experts", saved.bytes_per_token)
    yield Saved("outputs of the routed experts", w.value * e.active * shape.hidden)


def end_activations(shape: ModelShape, compute: Compute, policy: Policy = "cuda") -> list[Saved]:
    """What the ends of the model save, in bytes per token: token ids, the last norm, the input of the head.

    The head is taken to run in 16 bits (FP32 where everything is), as every FP8 recipe leaves it.
    """
    w = widths(compute, policy)
    positions = [Saved("position ids, 8 bytes each", 8)] if shape.positions else []
    head = Saved("input of the head", w.value * shape.hidden)
    norm = _norm("last norm", shape, shape.hidden, w.residual, w)
    return [Saved("token ids, 8 bytes each", 8), *positions, *norm, head]


def logit_bytes(compute: Compute) -> int:
    """Bytes per token and vocabulary entry while the loss is differentiated: the peak that the logits cause.

    Alive together: the logits, the log-softmax that cross-entropy saves, its gradient, and the gradient of the
    log-softmax.  Under autocast the last three are FP32 (cross-entropy is on the FP32 list) and the logits 16-bit.
    With 16-bit parameters and no autocast all four are 16-bit.
    """
    return {"fp32": 16, "autocast": 2 + 12, "fp8_autocast": 2 + 12, "bf16": 8, "fp8": 8}[compute]
