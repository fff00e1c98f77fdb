"""The rooms of the theme "weights": master weights, BF16 training, and the choice of a format."""

from collections.abc import Callable

import torch
from torch import nn

from mixprec_lab.checks._verdict import check
from mixprec_lab.checks.broken_code._told import told

Tensor, BRAIN, HALF = torch.Tensor, torch.bfloat16, torch.float16


def _line(weight: float, dtype: torch.dtype = BRAIN) -> nn.Linear:
    """A layer that multiplies by ``weight``."""
    layer = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, weight)
    return layer


def wrong_parameters(function: Callable[[nn.Module, float], tuple[list[Tensor], torch.optim.Optimizer]]) -> None:
    """``broken_code``: FP32 masters and an optimizer that steps them."""

    def weight_after(steps: int, lr: float) -> object:
        model = _line(1.0)

        def train(built: object) -> float:
            masters, optimizer = built
            for _ in range(steps):
                model.weight.grad = torch.ones_like(model.weight)
                masters[0].grad = model.weight.grad.float()
                optimizer.step()
                model.weight.data.copy_(masters[0])
            return model.weight.item()

        return told(function(model, lr), train)

    check(weight_after, [((4, 0.125), 0.5), ((512, 2.0**-10), 0.5)])


def kept_gradients(function: Callable[[nn.Module, list[Tensor], list[Tensor]], list[float]]) -> None:
    """``broken_code``: the master's gradient of every batch, each for itself."""

    def master_gradients(*batches: float) -> object:
        model = _line(1.0)
        masters = [model.weight.detach().float()]
        got = function(model, masters, [torch.full((1, 1), b, dtype=BRAIN) for b in batches])
        return told(got, lambda g: str([float(x) for x in g]))

    check(master_gradients, ((run, str(list(run))) for run in ((3.0,), (1.0, 2.0, 4.0))))


def raw_half_gradient(function: Callable[[Tensor, float], tuple[bool, Tensor]]) -> None:
    """``broken_code``: whether an FP16 gradient is finite, and its true value in FP32."""

    def master_gradient(scaled: float, scale: float) -> object:
        def words(answer: object) -> str:
            finite, gradient = answer
            return f"finite True, gradient {float(gradient):.6g}" if finite else "finite False"

        return told(function(torch.tensor([scaled], dtype=HALF), scale), words)

    cases = [
        ((3.0, 1.0), "finite True, gradient 3"),
        ((2.0**-10, 2.0**16), f"finite True, gradient {2.0**-26:.6g}"),
        ((float("inf"), 2.0**16), "finite False"),
        ((float("nan"), 2.0**16), "finite False"),
    ]
    check(master_gradient, cases)


def backward_dtype(function: Callable[[Tensor, Tensor, torch.dtype], torch.dtype]) -> None:
    """``broken_code``: the dtype in which the gradient arrives at a product under autocast, which leaves FP64 alone."""

    def under(dtype: torch.dtype, operands: torch.dtype) -> object:
        x = torch.ones(2, 2, dtype=operands)
        return told(function(x, torch.ones_like(x, requires_grad=True), dtype), str)

    runs = ((BRAIN, torch.float32, BRAIN), (HALF, torch.float32, HALF), (BRAIN, torch.float64, torch.float64))
    check(under, (((dtype, operands), str(answer)) for dtype, operands, answer in runs))


def missing_case(function: Callable[[str], object]) -> None:
    """``broken_code``: the format for a known GPU; an error that names an unknown one."""

    def advice(gpu: str) -> object:
        try:
            got = function(gpu)
        except (KeyError, ValueError) as error:
            return "an error that names it" if gpu in str(error) else f"{type(error).__name__}: {error}"
        return got if got is None or got is ... else str(got)

    known = {"A100": "bf16", "H100": "bf16", "V100": "fp16"}
    answers = known | dict.fromkeys(("T4", "B200"), "an error that names it")
    check(advice, (((gpu,), answer) for gpu, answer in answers.items()))


def habit(function: Callable[[dict[str, float]], str]) -> None:
    """``broken_code``: the format with the highest peak, BF16 where it ties with FP16."""
    peaks = {
        "V100": {"fp16": 125.0},
        "A100": {"tf32": 156.0, "fp16": 312.0, "bf16": 312.0},
        "H100": {"tf32": 494.5, "fp16": 989.0, "bf16": 989.0, "fp8": 1979.0},
        "a chip with TF32 only": {"fp32": 19.5, "tf32": 156.0},
    }

    def fastest_on(gpu: str) -> object:
        return function(dict(peaks[gpu]))

    answers = {"V100": "fp16", "A100": "bf16", "H100": "fp8", "a chip with TF32 only": "tf32"}
    check(fastest_on, (((gpu,), answer) for gpu, answer in answers.items()))


def missing_import(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``broken_code``: the cross-entropy of BF16 logits, computed in FP32."""

    def loss(logits: list[float], target: int) -> object:
        return function(torch.tensor([logits], dtype=BRAIN), torch.tensor([target]))

    runs = (([1.0, 2.0], 0), ([0.5, -1.5, 3.0], 2))
    cases = [((x, t), float(torch.logsumexp(torch.tensor(x).double(), 0)) - x[t]) for x, t in runs]
    check(loss, cases, relative=1e-5)


def clipped_copies(function: Callable[[list[nn.Parameter], float], float]) -> None:
    """``broken_code``: gradients clipped to a norm; returns the norm before."""

    def clipped(*gradients: float) -> object:
        parameters = [nn.Parameter(torch.zeros(())) for _ in gradients]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = torch.tensor(g)
        norm = function(parameters, 1.0)
        return told(norm, lambda n: f"norm {float(n):.4f}, gradients {[round(p.grad.item(), 4) for p in parameters]}")

    cases = [((3.0, 4.0), "norm 5.0000, gradients [0.6, 0.8]"), ((0.25, 0.0), "norm 0.2500, gradients [0.25, 0.0]")]
    check(clipped, cases)


def half_everything(function: Callable[[float, float, int], float]) -> None:
    """``broken_code``: a weight after Adam steps of one gradient, each of which moves it by the learning rate."""
    runs = ((1.0, 1e-3, 20), (0.5, 1e-4, 50))
    check(function, (((w, lr, steps), w - steps * lr) for w, lr, steps in runs), relative=1e-5)


def rounded_ids(function: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """``broken_code``: a batch with its real numbers in BF16 and its token ids untouched."""

    def converted(ids: list[int], values: list[float]) -> object:
        def words(batch: object) -> str:
            return f"ids {batch['ids'].tolist()} in {batch['ids'].dtype}, values in {batch['values'].dtype}"

        return told(function({"ids": torch.tensor(ids), "values": torch.tensor(values)}), words)

    runs = ([1, 2], [257, 50_001])
    cases = [((ids, [0.5, 1.5]), f"ids {ids} in torch.int64, values in torch.bfloat16") for ids in runs]
    check(converted, cases)


def two_dtypes(function: Callable[[nn.Embedding, nn.Linear, Tensor], Tensor]) -> None:
    """``broken_code``: an FP32 embedding into a 16-bit layer."""

    def output(dtype: torch.dtype) -> object:
        embedding, linear = nn.Embedding.from_pretrained(torch.tensor([[0.0], [0.5], [2.0]])), _line(3.0, dtype)
        return told(function(embedding, linear, torch.tensor([1, 2])), lambda y: f"{y.flatten().tolist()} in {y.dtype}")

    check(output, (((dtype,), f"[1.5, 6.0] in {dtype}") for dtype in (BRAIN, HALF, torch.float32)))


def by_name(function: Callable[[nn.Module], list[str]]) -> None:
    """``broken_code``: the names of the embeddings of a model, whatever they are called."""

    def found(*names: str) -> object:
        model = nn.ModuleDict({n: nn.Embedding(2, 2) for n in names} | {"embedding_head": nn.Linear(2, 2)})
        return told(function(model), lambda got: ", ".join(sorted(got)))

    runs = (("embedding",), ("wte", "wpe"), ("embed_tokens",))
    check(found, ((run, ", ".join(sorted(run))) for run in runs))
