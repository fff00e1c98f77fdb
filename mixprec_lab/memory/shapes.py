"""The sizes of real models and GPUs as data, each with its source; parameter counts are derived from the shape."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): low-rank queries, one latent for keys and values."""

    query_rank: int
    latent_rank: int
    plain_size: int  #: size of a query or key head without position
    rotary_size: int  #: size of its rotary part, shared by all key heads
    value_size: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in all but the first ``dense_layers`` layers."""

    routed: int
    shared: int
    active: int  #: routed experts a token visits
    inner: int  #: inner width of one expert
    dense_layers: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer: enough to count its parameters and the tensors it saves for the backward pass."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    inner: int  #: inner width of the MLP
    kv_heads: int | None = None  #: None means one key and value head for each query head
    gated: bool = False  #: SwiGLU: two matrices into the MLP instead of one
    fused: bool = True  #: query, key and value (and the gate's two inputs) come from one matrix each
    biased: bool = True  #: biases in the linear layers
    norm: Literal["layer", "rms"] = "layer"
    positions: int = 0  #: learned position embeddings
    tied: bool = True  #: the output head is the embedding
    latent: LatentAttention | None = None
    experts: Experts | None = None
    published: int | None = None  #: the parameter count its authors' files have
    source: str = ""
    title: str = ""

    def __post_init__(self) -> None:
        sizes = {"layers": 1, "hidden": 1, "heads": 1, "inner": 1, "vocabulary": 0, "positions": 0}
        for name, low in (sizes | ({} if self.kv_heads is None else {"kv_heads": 1})).items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"expected {name} to be an integer of {low} or more, got {value!r}")
        if self.latent is None and self.hidden % self.heads:
            raise ValueError(f"expected hidden to be a multiple of heads, got {self.hidden} and {self.heads}")
        if self.heads % self.key_heads:
            raise ValueError(f"expected heads to be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def key_heads(self) -> int:
        """Number of key heads (and of value heads)."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Widths of query, key, value and attention output for one token."""
        if self.latent:
            query = self.latent.plain_size + self.latent.rotary_size
            return tuple(self.heads * size for size in (query, query, self.latent.value_size, self.latent.value_size))
        key = self.key_heads * (self.hidden // self.heads)
        return self.hidden, key, key, self.hidden

    def _attention(self) -> tuple[int, int]:
        """Parameters in matrices, and others (biases, inner norms)."""
        query, key, value, out = self.widths
        if self.latent is None:
            matrices = self.hidden * (query + key + value + out)
            return matrices, query + key + value + self.hidden if self.biased else 0
        low = self.latent
        down = self.hidden * (low.query_rank + low.latent_rank + low.rotary_size)
        up = low.query_rank * query + low.latent_rank * self.heads * (low.plain_size + low.value_size)
        return down + up + out * self.hidden, low.query_rank + low.latent_rank

    def _mlp(self, inner: int) -> tuple[int, int]:
        matrices = 3 if self.gated else 2
        biases = (matrices - 1) * inner + self.hidden if self.biased else 0
        return matrices * self.hidden * inner, biases

    def _layer(self, index: int) -> tuple[int, int]:
        """Parameters of one layer: in matrices, and others; the router of the experts is among the others."""
        dense = self.experts is None or index < self.experts.dense_layers
        mlp = self._mlp(self.inner if dense else self.experts.inner)
        copies = 1 if dense else self.experts.routed + self.experts.shared
        router = 0 if dense else self.experts.routed * (self.hidden + 1)  # + 1: the balancing bias of DeepSeek-V3
        matrices, others = self._attention()
        return matrices + copies * mlp[0], others + copies * mlp[1] + router + 2 * self._norm()

    def _all_layers(self) -> tuple[int, int]:
        """Parameters of all layers, of which there are at most two kinds: in matrices, and others."""
        dense = min(self.experts.dense_layers, self.layers) if self.experts else 0
        (first, others), (last, rest) = self._layer(0), self._layer(self.layers - 1)
        return dense * first + (self.layers - dense) * last, dense * others + (self.layers - dense) * rest

    def _norm(self) -> int:
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the last layer, the largest: what fully sharded training gathers at a time."""
        return sum(self._layer(self.layers - 1))

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices inside the layers: what FP8 recipes copy.  No embedding, no head, no router."""
        return self._all_layers()[0]

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        tables = self.head_parameters * (1 if self.tied else 2) + self.positions * self.hidden
        return tables + sum(self._all_layers()) + self._norm()


_GPT2 = "OpenAI GPT-2, hparams of the released checkpoints"
_LLAMA3 = "Llama 3, params.json of the released checkpoints; arXiv:2407.21783, table 3"


def _gpt2(name: str, title: str, layers: int, hidden: int, heads: int, published: int) -> ModelShape:
    return ModelShape(name, layers, hidden, heads, 50257, 4 * hidden, positions=1024, published=published,
                      source=_GPT2, title=title)  # fmt: skip


def _llama3(name: str, title: str, layers: int, hidden: int, heads: int, inner: int, published: int) -> ModelShape:
    return ModelShape(name, layers, hidden, heads, 128256, inner, kv_heads=8, gated=True, fused=False, biased=False,
                      norm="rms", tied=False, published=published, source=_LLAMA3, title=title)  # fmt: skip


MODELS: Mapping[str, ModelShape] = MappingProxyType({
    m.name: m
    for m in (
        _gpt2("gpt2", "GPT-2 small", 12, 768, 12, 124_439_808),
        _gpt2("gpt2_medium", "GPT-2 medium", 24, 1024, 16, 354_823_168),
        _gpt2("gpt2_large", "GPT-2 large", 36, 1280, 20, 774_030_080),
        _gpt2("gpt2_xl", "GPT-2 XL", 48, 1600, 25, 1_557_611_200),
        ModelShape("llama2_7b", 32, 4096, 32, 32000, 11008, gated=True, fused=False, biased=False, norm="rms",
                   tied=False, published=6_738_415_616, title="Llama 2 7B",
                   source="Llama 2, config.json of the released checkpoint; arXiv:2307.09288"),
        _llama3("llama3_8b", "Llama 3 8B", 32, 4096, 32, 14336, 8_030_261_248),
        _llama3("llama3_70b", "Llama 3 70B", 80, 8192, 64, 28672, 70_553_706_496),
        ModelShape("deepseek_v3", 61, 7168, 128, 129280, 18432, gated=True, fused=False, biased=False, norm="rms",
                   tied=False, latent=LatentAttention(1536, 512, 128, 64, 128),
                   experts=Experts(256, 1, 8, 2048, 3), published=671_026_419_200, title="DeepSeek-V3",
                   source="DeepSeek-V3 config.json and README_WEIGHTS.md (671B without the prediction module)"),
    )
})  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU and the memory its maker names, in bytes."""

    name: str
    title: str
    capacity: int  #: the marketed number of GB, read as 10**9 bytes: the careful reading
    source: str


def _gpu(name: str, title: str, gigabytes: int, maker: str = "NVIDIA") -> Gpu:
    return Gpu(name, title, gigabytes * 10**9, f"{maker} data sheet of the {title.rsplit(' ', 1)[0]}")


GPUS: Mapping[str, Gpu] = MappingProxyType({
    g.name: g
    for g in (
        _gpu("t4", "T4 16GB", 16), _gpu("rtx4090", "RTX 4090 24GB", 24), _gpu("v100", "V100 SXM2 32GB", 32),
        _gpu("a100_40", "A100 40GB", 40), _gpu("l40s", "L40S 48GB", 48), _gpu("h100", "A100 and H100 80GB", 80),
        _gpu("h200", "H200 141GB", 141), _gpu("b200", "B200 180GB", 180), _gpu("mi300x", "MI300X 192GB", 192, "AMD"),
    )
})  # fmt: skip


def get_model(x: "str | ModelShape") -> ModelShape:
    """The model that ``x`` names, or ``x`` itself if it is a ``ModelShape``; KeyError, listing the names, otherwise."""
    if isinstance(x, ModelShape):
        return x
    found = MODELS.get(x) if isinstance(x, str) else None
    if found is None:
        raise KeyError(f"expected a model, got {x!r}; the names are {', '.join(MODELS)}")
    return found


_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


def lora_parameters(model: "str | ModelShape", rank: int, targets: Iterable[str] = ("query", "value")) -> int:
    """Parameters of LoRA adapters: ``rank * (inputs + outputs)`` for every adapted matrix of every layer.

    ``targets`` are among query, key, value, output, gate, up and down; the default is the paper's (Hu et al. 2021,
    arXiv:2106.09685).  ValueError for another name, a gate where the MLP has none, a rank below 1, and for models with
    latent attention or experts, whose matrices have other names.
    """
    shape, targets = get_model(model), tuple(targets)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"expected a rank of 1 or more, got {rank!r}")
    if shape.latent or shape.experts:
        raise ValueError(f"{shape.name} has latent attention or experts: give the number of adapter parameters instead")
    allowed = [t for t in _TARGETS if shape.gated or t != "gate"]
    if not targets or (wrong := [t for t in targets if t not in allowed]):
        raise ValueError(f"expected targets among {', '.join(allowed)}, got {wrong if targets else 'none'}")
    query, key, value, out = shape.widths
    ends = {"query": query, "key": key, "value": value, "output": out}
    ends |= dict.fromkeys(("gate", "up", "down"), shape.inner)
    return shape.layers * sum(rank * (shape.hidden + ends[t]) for t in set(targets))
