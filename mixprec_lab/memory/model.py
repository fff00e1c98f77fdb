"""``training_memory``: every term of the bill for one GPU, in bytes, with the formula it came from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mixprec_lab.formats import get_format, text_table
from mixprec_lab.memory.activations import Attention, Policy, Saved, end_activations, layer_activations, logit_bytes
from mixprec_lab.memory.regimes import Regime, get_regime
from mixprec_lab.memory.shapes import GPUS, Gpu, ModelShape, get_model

TERMS = ("weights", "gradients", "masters", "moments", "copies", "activations", "logits", "temporary")
#: NF4 with the double quantization of QLoRA (arXiv:2305.14314): 4 bits a parameter, an 8-bit constant for every 64 of
#: them, an FP32 one for every 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Term:
    """One line of the bill: the bytes, and the expression they are the value of."""

    bytes: int
    expression: str


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU by term; ``total`` is what lives at once at the start of a backward pass."""

    parameters: int  #: the model's, adapters not included
    adapters: int  #: trained parameters beside a frozen model; 0 means that the model itself is trained
    regime: Regime
    zero_stage: int
    world_size: int
    terms: Mapping[str, Term]

    @property
    def weights(self) -> int:
        """Parameters as the forward pass reads them, a frozen base included."""
        return self.terms["weights"].bytes

    @property
    def gradients(self) -> int:
        """Gradients and the buffer that accumulates them."""
        return self.terms["gradients"].bytes

    @property
    def masters(self) -> int:
        """The wide copy of the weights that the optimizer steps."""
        return self.terms["masters"].bytes

    @property
    def moments(self) -> int:
        """Optimizer state, its constants, and Kahan compensation."""
        return self.terms["moments"].bytes

    @property
    def copies(self) -> int:
        """FP8 copies of the matrices and their transposes."""
        return self.terms["copies"].bytes

    @property
    def activations(self) -> int:
        """Tensors saved for the backward pass, without the logits."""
        return self.terms["activations"].bytes

    @property
    def logits(self) -> int:
        """Logits and what the loss makes of them, at their peak."""
        return self.terms["logits"].bytes

    @property
    def temporary(self) -> int:
        """16-bit casts that autocast keeps, or the layers that fully sharded training gathers."""
        return self.terms["temporary"].bytes

    @property
    def states(self) -> int:
        """What stays from step to step whatever the batch: weights, gradients, masters, moments, copies."""
        return self.weights + self.gradients + self.masters + self.moments + self.copies

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(term.bytes for term in self.terms.values())

    @property
    def bytes_per_parameter(self) -> float:
        """``states`` of this GPU over all parameters of the model, adapters included."""
        return self.states / (self.parameters + self.adapters)

    @property
    def formula(self) -> str:
        """The bill as one arithmetic expression in Python; its value, rounded up term by term, is ``total``."""
        return " + ".join(term.expression for term in self.terms.values() if term.bytes)

    def fits(self, gpu: "str | Gpu") -> bool:
        """Whether ``total`` is at most the marketed capacity of ``gpu`` (a key of ``GPUS`` or a ``Gpu``).

        The capacity is read as powers of ten, which leaves a few percent for the driver and fragmentation.  KeyError
        for an unknown name.
        """
        if isinstance(gpu, str) and gpu not in GPUS:
            raise KeyError(f"expected a GPU, got {gpu!r}; the names are {', '.join(GPUS)}")
        return self.total <= (GPUS[gpu] if isinstance(gpu, str) else gpu).capacity

    def __str__(self) -> str:
        rows = [[name, f"{t.bytes / 1e9:.3f}", t.expression] for name, t in self.terms.items() if t.bytes]
        rows.append(["total", f"{self.total / 1e9:.3f}", f"states: {self.bytes_per_parameter:.4g} bytes a parameter"])
        shards = f", ZeRO stage {self.zero_stage} over {self.world_size} GPUs" if self.zero_stage else ""
        return f"{self.regime.title}{shards}\n" + text_table(["one GPU", "GB", "from"], rows)


def training_memory(
    parameters: "int | str | ModelShape",
    regime: "str | Regime",
    *,
    zero_stage: int = 0,
    world_size: int = 1,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    vocabulary: int | None = None,
    activation_checkpointing: bool = False,
    attention: Attention = "flash",
    dropout: bool = False,
    policy: Policy = "cuda",
    adapters: int = 0,
    base: str = "bf16",
) -> TrainingMemory:
    """The memory that training takes on one GPU, term by term.

    ``parameters`` is a count, a key of ``MODELS`` or a ``ModelShape``; ``regime`` a key of ``REGIMES`` or a ``Regime``.

    Sharding: ZeRO stage 1 divides masters and moments by ``world_size``, stage 2 gradients too, stage 3 (FSDP's full
    sharding) weights too; shards are padded to whole elements.  Stage 3 gathers two layers at a time (one in use, one
    ahead), which needs the shape of the model and is left out without it.

    Activations: given ``sequence`` and ``batch`` (per GPU), and the shape of the model.  With a count, give
    ``layers``, ``hidden`` and ``heads`` for a GPT of these sizes (inner width 4 * hidden), and ``vocabulary`` for the
    logits.  With ``activation_checkpointing`` every layer keeps its input only, and one layer at a time is recomputed;
    its peak and that of the logits do not coincide, so ``total`` is an upper bound then.

    LoRA: ``adapters`` trained parameters beside ``parameters`` frozen ones, which are stored in ``base``: a format's
    name, or ``"nf4"``.  A base of 16 bits or fewer has a 16-bit residual stream, under autocast too.  The activations
    are those of full training: right where every matrix has an adapter, but for the adapters' own narrow ones and the
    ends of the model.

    Not counted: the CUDA context, fragmentation, communication buffers, workspaces, temporaries of a ``foreach``
    optimizer step, the gradients of activations in flight.

    Raises KeyError for unknown names, TypeError for a count that is not an integer, ValueError for sizes below 1, a
    partial shape, a shape given twice, a stage that is not 0 to 3, and sharding over one GPU.
    """
    r = get_regime(regime)
    shape = _shape(parameters, layers, hidden, heads, vocabulary)
    count = parameters if isinstance(parameters, int) else shape.parameters
    _check_numbers(count, zero_stage, world_size, sequence, batch, adapters, attention, policy)
    if (sequence is None) != (batch is None) or (sequence and shape is None):
        raise ValueError(
            "expected sequence and batch together, with a model's name or with layers, hidden and heads, got "
            f"sequence={sequence}, batch={batch}, layers={layers}: give all of them for activations, or none"
        )
    terms = _states(r, count, shape, adapters, base, zero_stage, world_size)
    zero = Term(0, "0")
    terms |= {"activations": zero, "logits": zero}
    if sequence:
        options = {"attention": attention, "dropout": dropout, "policy": policy}
        narrow = adapters and r.compute == "autocast" and _base_bytes(base) <= 2
        compute = "bf16" if narrow else r.compute
        first, last = (layer_activations(shape, sequence, compute, **options, layer=i) for i in (0, -1))
        ends = sum(saved.bytes_per_token for saved in end_activations(shape, compute, policy))
        tokens = sequence * batch
        terms["activations"] = _activations(shape, tokens, activation_checkpointing, ends, first, last)
        terms["logits"] = _term((logit_bytes(r.compute), tokens * shape.vocabulary))
    ordered = MappingProxyType({name: terms[name] for name in TERMS})
    return TrainingMemory(count, adapters, r, zero_stage, world_size, ordered)


def _shape(parameters, layers, hidden, heads, vocabulary) -> ModelShape | None:
    given = {"layers": layers, "hidden": hidden, "heads": heads}
    if isinstance(parameters, str | ModelShape):
        if any(v is not None for v in (*given.values(), vocabulary)):
            raise ValueError("the model brings its own shape: leave out layers, hidden, heads and vocabulary")
        return get_model(parameters)
    if not isinstance(parameters, int) or isinstance(parameters, bool):
        raise TypeError(f"expected a number of parameters, a model's name or a ModelShape, got {parameters!r}")
    if all(v is None for v in given.values()) and vocabulary is None:
        return None
    if missing := [name for name, v in given.items() if v is None]:
        raise ValueError(f"expected layers, hidden and heads together, got no {', '.join(missing)}: give all or none")
    return ModelShape("own sizes", layers, hidden, heads, vocabulary or 0, 4 * hidden)


def _check_numbers(count, zero_stage, world_size, sequence, batch, adapters, attention, policy) -> None:
    at_least = {"parameters": (count, 1), "world_size": (world_size, 1), "adapters": (adapters, 0)}
    at_least |= {k: (v, 1) for k, v in (("sequence", sequence), ("batch", batch)) if v is not None}
    for name, (value, low) in at_least.items():
        if not isinstance(value, int) or value < low:
            raise ValueError(f"expected {name} to be an integer of {low} or more, got {value!r}")
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"expected zero_stage to be 0 (no sharding), 1, 2 or 3, got {zero_stage!r}")
    if zero_stage and world_size == 1:
        raise ValueError(f"ZeRO stage {zero_stage} over one GPU shards nothing: give a world_size of 2 or more")
    if attention not in ("flash", "full") or policy not in ("cuda", "cpu"):
        raise ValueError(f"expected attention flash or full and policy cuda or cpu, got {attention!r} and {policy!r}")


def _base_bytes(base: str) -> float:
    return NF4_BYTES if base == "nf4" else get_format(base).storage_bits / 8


def _term(*products: tuple[float, int]) -> Term:
    """The sum of bytes times counts, rounded up to whole bytes; products that are 0 are left out."""
    kept = [(width, count) for width, count in products if width and count]
    expression = " + ".join(f"{int(width) if width == int(width) else width}*{count}" for width, count in kept)
    return Term(math.ceil(sum(width * count for width, count in kept)), expression or "0")


def _states(r: Regime, count: int, shape: ModelShape | None, adapters: int, base: str, stage: int, world: int) -> dict:
    def shard(n: int, from_stage: int) -> int:
        return -(-n // world) if stage >= from_stage else n

    base_bytes = _base_bytes(base)
    trained = adapters or count
    matrices = adapters or (shape.matrix_parameters if shape else count)
    head = 0 if adapters or not shape else shape.head_parameters
    if stage == 3:
        # A layer is gathered as wide as the forward pass reads it, with the FP8 copies made of it.
        width = base_bytes if adapters else (4 if r.compute == "fp32" else min(r.weights, 2)) + r.copies
        temporary = _term((width, 2 * shape.layer_parameters if shape else 0))
    else:
        cast = {"autocast": matrices + head, "fp8_autocast": head}.get(r.compute, 0)
        temporary = _term((2, cast))
    return {
        "weights": _term((base_bytes, shard(count, 3) if adapters else 0), (r.weights, shard(trained, 3))),
        "gradients": _term((r.gradients, shard(trained, 2)), (r.accumulated, shard(trained, 2))),
        "masters": _term((r.master, shard(trained, 1))),
        "moments": _term((r.moment_bytes, shard(trained, 1))),
        "copies": _term((r.copies if stage < 3 else 0, matrices)),
        "temporary": temporary,
    }


def _activations(
    shape: ModelShape, tokens: int, checkpointing: bool, ends: int, first: list[Saved], last: list[Saved]
) -> Term:
    """The term of the saved tensors: ``first`` and ``last`` are what the first and the last layer save."""
    sizes = [sum(saved.bytes_per_token for saved in layer) for layer in (first, last)]
    if checkpointing:
        kept = first[0].bytes_per_token  # the input of the first norm: the stream between two layers
        return _term((kept, shape.layers * tokens), (max(sizes) - kept, tokens), (ends, tokens))
    dense = shape.experts.dense_layers if shape.experts else 0
    return _term((sizes[0], dense * tokens), (sizes[1], (shape.layers - dense) * tokens), (ends, tokens))
