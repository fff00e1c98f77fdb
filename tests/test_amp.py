"""The autocast lists and the microscope, against torch's own autocast: its header, its dispatcher, its results."""

import contextlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from amp_zoo import FUNCTIONS, Call, answers, fake_cuda, zoo
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec_lab.amp import OPERATORS, RULES, TORCH_VERSION, policy_table, rule_of, trace_autocast
from mixprec_lab.amp.casting import overload, tensors_in
from mixprec_lab.amp.policy import registered
from mixprec_lab.models import convnet, transformer

LOW = (torch.float16, torch.bfloat16)
OUTPUT_RULES = {("fp32 output", "none"), ("fp32 output", "fp32")}
NO_CUDA_HERE = "not linked with support for cuda devices"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# -- the lists ---------------------------------------------------------------------------------------------------------


def header_lists() -> dict[str, str]:
    """The lists in the header that torch ships: operator -> rule."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    macros = {
        "AT_FORALL_LOWER_PRECISION_FP": "lower precision", "AT_FORALL_FP32": "fp32", "AT_FORALL_PROMOTE": "widest",
        "AT_FORALL_FP32_SET_OPT_DTYPE": "fp32 output", "AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE": "fp32 output",
    }  # fmt: skip
    found = {}
    for macro, rule in macros.items():
        body = re.search(rf"#define {macro}\(_\) *\\\n((?:.*\\\n)*.*)", text)[1]
        if "REDISPATCH" in macro:
            names = re.findall(r'"([\w.]+)"', body)
        else:
            names = [".".join(filter(None, m)) for m in re.findall(r"_\((\w+)(?:, (\w+))?\)", body)]
        found |= dict.fromkeys(names, rule)
    return found


def test_the_cuda_table_is_the_header_of_the_installed_torch():
    assert torch.__version__.startswith(TORCH_VERSION)
    only_in_the_source = {
        "binary_cross_entropy": "banned", "cudnn_convolution": "lower precision",
        "cudnn_convolution_transpose": "lower precision",
    }  # fmt: skip
    assert dict(OPERATORS["cuda"]) == header_lists() | only_in_the_source


@pytest.mark.parametrize("policy", OPERATORS)
def test_the_tables_hold_what_torch_registers_and_nothing_else(policy):
    assert registered(policy) == set(OPERATORS[policy])
    assert set(OPERATORS[policy].values()) <= set(RULES)


def arguments_for(operator: torch._ops.OpOverload, dtypes: tuple[torch.dtype, ...], device: str) -> tuple[list, dict]:
    """Arguments of the right types for any operator; its tensors take ``dtypes`` in turn, the last one repeating."""
    drawn = iter(dtypes)
    last = dtypes[-1]
    values = {
        "int": 1,
        "number": 1.0,
        "SymInt": 1,
        "float": 1.0,
        "Scalar": 1.0,
        "bool": True,
        "str": "mean",
        "ScalarType": None,
    }
    args, kwargs = [], {}

    def value(kind: str):
        if kind == "Tensor":
            return torch.ones(2, 2, dtype=next(drawn, last), device=device)
        if kind == "List[Optional[Tensor]]":  # indices
            return [torch.zeros(2, dtype=torch.int64, device=device)]
        if kind.startswith("List["):
            return [value(kind[5:-1]) for _ in range(2)]
        return values[kind]

    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if kind.startswith("Optional["):
            kind = kind[9:-1] if "Tensor" in kind else None
        made = argument.default_value if kind is None or argument.has_default_value() else value(kind)
        if argument.kwarg_only:
            kwargs[argument.name] = made
        else:
            args.append(made)
    return args, kwargs


class Casts(TorchDispatchMode):
    """What each of the watched tensors was cast to."""

    def __init__(self, watched: list[torch.Tensor]) -> None:
        super().__init__()
        self.watched, self.found = {id(x): x for x in watched}, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name == "aten::_to_copy" and id(args[0]) in self.watched:
            self.found.append((args[0].dtype, kwargs["dtype"]))
        return operator(*args, **(kwargs or {}))


def casts_seen(name: str, policy: str, dtypes: tuple[torch.dtype, ...], low: torch.dtype, enabled: bool) -> set:
    """The casts of an operator's arguments; the call itself may fail, its arguments are made up."""
    torch.set_autocast_enabled(policy, enabled)
    torch.set_autocast_dtype(policy, low)
    args, kwargs = arguments_for(overload(name), dtypes, policy)
    with Casts(tensors_in(args, kwargs)) as casts, torch.no_grad():
        try:
            overload(name)(*args, **kwargs)
        except Exception as error:
            if "unsafe to autocast" in str(error):
                return {"banned"}
        finally:
            torch.set_autocast_enabled(policy, False)
            torch.clear_autocast_cache()
    return set(casts.found)


def observed_rule(name: str, policy: str, low: torch.dtype) -> str:
    """The rule that explains which casts torch's autocast adds for FP32, for 16-bit and for mixed inputs."""
    wide, narrow, mixed = (
        casts_seen(name, policy, dtypes, low, True) - casts_seen(name, policy, dtypes, low, False)
        for dtypes in ((torch.float32,), (low,), (low, torch.float32, low))
    )
    if "banned" in wide:
        return "banned"
    down, up = {(torch.float32, low)}, {(low, torch.float32)}
    meanings = {
        (True, False, False): "lower precision", (False, True, True): "fp32", (False, False, True): "widest",
        (False, False, False): "none",
    }  # fmt: skip
    return meanings.get((wide == down, narrow == up, mixed == up), f"{wide} {narrow} {mixed}")


@pytest.mark.parametrize(("policy", "low"), [("cpu", LOW[0]), ("cpu", LOW[1]), ("cuda", LOW[0])], ids=str)
def test_every_listed_operator_is_cast_by_torch_as_its_rule_says(policy, low):
    """CUDA too: torch's kernels run on tensors that only claim to be on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if policy == "cuda" else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated operators are on the lists, too
        wrong = {
            name: (rule, seen)
            for name, rule in OPERATORS[policy].items()
            # Asked for an FP32 result, softmax of BF16 widens its input itself; the results are tested below.
            if (seen := observed_rule(name, policy, low)) != rule and (rule, seen) not in OUTPUT_RULES
        }
    assert wrong == {}


FP32_RESULTS = {
    "softmax.int": lambda x, **d: torch.softmax(x, -1, **d),
    "log_softmax.int": lambda x, **d: torch.log_softmax(x, -1, **d),
    "sum": lambda x, **d: torch.sum(x, **d), "sum.dim_IntList": lambda x, **d: torch.sum(x, 0, **d),
    "prod": lambda x, **d: torch.prod(x, **d), "prod.dim_int": lambda x, **d: torch.prod(x, 0, **d),
    "cumsum": lambda x, **d: torch.cumsum(x, 0, **d), "cumprod": lambda x, **d: torch.cumprod(x, 0, **d),
    "linalg_vector_norm": lambda x, **d: torch.linalg.vector_norm(x, **d),
    "linalg_matrix_norm": lambda x, **d: torch.ops.aten.linalg_matrix_norm(x, 1, [0, 1], **d),
    "linalg_matrix_norm.str_ord": lambda x, **d: torch.ops.aten.linalg_matrix_norm.str_ord(x, "fro", **d),
    "norm.Scalar": lambda x: torch.ops.aten.norm.Scalar(x, 2),
    "norm.ScalarOpt_dim": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [0]),
}  # fmt: skip


@pytest.mark.parametrize("name", FP32_RESULTS)
def test_operators_of_the_fp32_output_rule_return_fp32_unless_told_otherwise(name):
    assert set(FP32_RESULTS) == {op for op, rule in OPERATORS["cuda"].items() if rule == "fp32 output"}
    model = Call(lambda y, x: FP32_RESULTS[name](y))
    x = (torch.randn(4, 4),)
    for trace in (fake_cuda(model, x, torch.float16), answers("cpu", "cuda", True)(model, x, torch.float16)):
        call = trace.calls[-1]
        assert (call.operation, call.rule) == (name.split(".")[0], "fp32 output")
        assert (call.inputs, call.output, call.casts) == ((torch.float16,), torch.float32, 0)
    if "norm." not in name:
        model.function = lambda y, x: FP32_RESULTS[name](y, dtype=torch.float16)
        for trace in (fake_cuda(model, x, torch.float16), answers("cpu", "cuda", True)(model, x, torch.float16)):
            assert trace.calls[-1].output == torch.float16


def test_rules_are_found_by_name_with_or_without_overload():
    assert rule_of("softmax", "cuda") == rule_of("softmax.int", "cuda") == "fp32 output"
    assert rule_of("softmax", "cpu") == rule_of("embedding", "cuda") == rule_of("linear.out", "cuda") == "none"
    assert rule_of("cross_entropy_loss", "cpu") == "fp32" and rule_of("cross_entropy_loss", "cuda") == "none"
    for policy, listed in OPERATORS.items():
        for name in {name.split(".")[0] for name in listed}:
            assert len({rule for op, rule in listed.items() if op.split(".")[0] == name}) == 1, (policy, name)


def test_the_table_puts_both_devices_side_by_side():
    lines = policy_table(["softmax", "linear"]).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["softmax", "fp32", "output", "none"], ["linear", "lower", "precision", "lower", "precision"],
    ]  # fmt: skip
    assert len(policy_table().splitlines()) - 2 == len(
        {n.split(".")[0] for listed in OPERATORS.values() for n in listed if not n.startswith("_")}
    )


@pytest.mark.parametrize(("operator", "policy"), [("soft_max", "cuda"), ("softmax", "rocm"), ("", "cpu")])
def test_unknown_operators_and_policies_are_refused(operator, policy):
    with pytest.raises(ValueError, match="expected .* got"):
        rule_of(operator, policy)


# -- the microscope ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm says that it is not fused
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", zoo())
def test_the_rebuilt_autocast_does_what_the_real_one_does_on_the_cpu(name, dtype):
    model, inputs = zoo()[name]
    real, rebuilt = (answers("cpu", "cpu", emulate)(model, inputs, dtype) for emulate in (False, True))
    assert real.calls == rebuilt.calls and len(real.calls) >= 8
    assert "own autocast" in real.source and "lists" in rebuilt.source


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_rebuilt_autocast_agrees_function_by_function(name):
    """With torch's CPU autocast in all respects, with its CUDA autocast in those of a forward pass without graph."""
    model, x = Call(FUNCTIONS[name]), (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)),)
    real, rebuilt = (answers("cpu", "cpu", emulate)(model, x, torch.float16) for emulate in (False, True))
    assert real.calls == rebuilt.calls
    try:
        real = fake_cuda(model, x, torch.float16)
    except RuntimeError as error:
        if NO_CUDA_HERE in str(error):
            pytest.skip("equal on the CPU; without CUDA this kernel has no dtypes to compare with on CUDA")
        raise
    rebuilt = answers("cpu", "cuda", True)(model.requires_grad_(False), x, torch.float16)
    assert real.calls == rebuilt.calls


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["convnet", "transformer", "half", "double"])
def test_the_cuda_lists_on_the_cpu_give_what_torchs_cuda_autocast_gives(name, dtype):
    model, inputs = zoo()[name]
    real = fake_cuda(model, inputs, dtype)
    rebuilt = trace_autocast(model.requires_grad_(False), inputs, dtype, "cuda")
    assert real.calls == rebuilt.calls
    assert "CUDA lists of torch 2.13 applied to the operators of the CPU" in rebuilt.source


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["convnet", "transformer", "half", "double"])
def test_the_cuda_lists_on_the_cpu_give_what_a_gpu_gives(name, dtype):
    model, inputs = zoo()[name]
    on_cpu = trace_autocast(model, inputs, dtype, "cuda")
    on_gpu = trace_autocast(model.cuda(), tuple(x.cuda() for x in inputs), dtype, "cuda")
    assert on_cpu.calls == on_gpu.calls and "own autocast on" in on_gpu.source


def rows(trace, *keys):
    return [tuple(row[key] for key in keys) for row in trace.as_rows()]


def test_a_linear_layer_used_twice_is_cast_once():
    layer = nn.Linear(4, 4)
    trace = trace_autocast(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 4), torch.bfloat16)
    assert rows(trace, "module", "operation", "inputs", "output", "rule", "backward", "casts", "reused") == [
        ("0", "linear", ["fp32"] * 3, "bf16", "lower precision", "bf16", 3, 0),
        ("1", "relu", ["bf16"], "bf16", "none", "bf16", 0, 0),
        ("0", "linear", ["bf16", "fp32", "fp32"], "bf16", "lower precision", "bf16", 0, 2),
    ]


def test_softmax_and_layer_norm_are_fp32_on_cuda_and_16_bit_on_the_cpu():
    model, images = transformer(), torch.rand(2, 1, 8, 8)
    cpu, cuda = (trace_autocast(model, images, torch.float16, policy) for policy in ("cpu", "cuda"))
    assert [c.module for c in cpu.calls] == [c.module for c in cuda.calls]
    seen = {(a.operation, a.output, b.output) for a, b in zip(cpu.calls, cuda.calls, strict=True)}
    low, wide = torch.float16, torch.float32
    assert ("softmax", low, wide) in seen and ("layer_norm", wide, wide) in seen
    assert ("linear", low, low) in seen and ("add", wide, wide) in seen


def test_cross_entropy_is_one_operator_on_the_cpu_and_two_on_cuda():
    model, targets = nn.Linear(4, 3), torch.tensor([0, 2])
    cpu, cuda = (
        trace_autocast(model, torch.randn(2, 4), policy=policy, loss_fn=F.cross_entropy, targets=targets)
        for policy in ("cpu", "cuda")
    )
    keys = "module", "operation", "output", "rule"
    assert rows(cpu, *keys)[1:] == [("loss", "cross_entropy_loss", "fp32", "fp32")]
    # cross_entropy names the dtype of its log_softmax, and an explicit dtype is respected: FP16 log-probabilities.
    assert rows(cuda, *keys)[1:] == [
        ("loss", "log_softmax", "fp16", "fp32 output"),
        ("loss", "nll_loss", "fp32", "fp32"),
    ]


def test_modules_made_of_operators_are_not_lost():
    x = torch.randn(2, 3, 8)
    attention = trace_autocast(nn.MultiheadAttention(8, 2), (x, x, x), policy="cuda")
    assert [c.operation for c in attention.calls if c.rule != "none"] == ["linear", "bmm", "softmax", "bmm", "linear"]
    gru = trace_autocast(nn.GRU(8, 4), x, policy="cpu")
    listed = [c for c in gru.calls if c.operation == "linear"]
    assert [c.reused for c in listed] == [0, 0, 2] and {c.module for c in gru.calls} == {""}


class Untidy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.drop(self.norm(self.linear(x)))


@pytest.mark.parametrize("policy", OPERATORS)
def test_nothing_stays_behind(policy):
    model, x = Untidy(), torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    grads, generator = [p.grad.clone() for p in (*model.parameters(), x)], torch.get_rng_state()
    trace_autocast(model, x, policy=policy)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip((*model.parameters(), x), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), generator) and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
    with torch.autocast("cpu", dtype=torch.bfloat16):  # torch's own kernels are back
        assert torch.exp(model.linear(x)).dtype == torch.bfloat16


def test_nothing_stays_behind_when_the_model_fails():
    model = Untidy()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        trace_autocast(model, torch.randn(3, 5), policy="cuda")
    assert model.calls == 0 and not any(m._forward_hooks for m in model.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.exp(model.linear(torch.randn(3, 4))).dtype == torch.bfloat16


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("emulate", [False, True])
def test_without_gradients_there_is_no_backward_dtype(off, emulate):
    with off():
        trace = answers("cpu", "cpu", emulate)(nn.Linear(4, 4), (torch.randn(2, 4),), torch.float16)
    assert rows(trace, "operation", "backward", "casts") == [("linear", None, 3)]


def test_a_region_without_autocast_inside_the_model_is_seen():
    class Careful(nn.Module):
        def forward(self, x, device):
            with torch.autocast(device, enabled=False):
                return x.float() @ x.float()

    for policy, device in (("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda")):
        trace = trace_autocast(Careful(), (torch.randn(2, 2), device), policy=policy)
        assert rows(trace, "operation", "output", "rule") == [("matmul", "fp32", "none")]


def test_bce_after_a_sigmoid_is_banned_on_cuda_and_not_on_the_cpu():
    model, x, y = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), torch.randn(2, 4), torch.ones(2, 1)
    with pytest.raises(RuntimeError, match="BCELoss are unsafe to autocast"):
        trace_autocast(model, x, policy="cuda", loss_fn=F.binary_cross_entropy, targets=y)
    on_cpu = trace_autocast(model, x, policy="cpu", loss_fn=F.binary_cross_entropy, targets=y)
    assert rows(on_cpu, "operation", "rule")[-1] == ("binary_cross_entropy", "fp32")


def test_two_kinds_of_16_bit_in_one_operator_raise_as_in_torch():
    class Mixed(nn.Module):
        def forward(self, x):
            return torch.cat([x.half(), x.bfloat16()])

    for emulate in (False, True):
        with pytest.raises(RuntimeError, match="Unexpected floating ScalarType in at::autocast::prioritize"):
            answers("cpu", "cpu", emulate)(Mixed(), (torch.randn(2),), torch.float16)


def test_rows_are_plain_values_and_the_table_says_where_it_comes_from():
    import json

    trace = trace_autocast(convnet(), torch.rand(2, 1, 8, 8), policy="cuda")
    assert json.loads(json.dumps(trace.as_rows())) == trace.as_rows()
    assert len(str(trace).splitlines()) == len(trace.calls) + 3
    assert str(trace).endswith(f"cuda lists, fp16: {trace.source}")
    assert [c.index for c in trace.calls] == list(range(len(trace.calls)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "expected model to be a torch.nn.Module, got function"),
        ({"inputs": [torch.ones(2, 4)]}, TypeError, "expected inputs to be a tensor or a tuple of arguments, got list"),
        ({"dtype": torch.float32}, ValueError, "float16 or torch.bfloat16, got torch.float32"),
        ({"policy": "mps"}, ValueError, "expected policy to be one of cpu, cuda, got 'mps'"),
        ({"targets": torch.ones(2)}, ValueError, "targets without a loss_fn"),
        ({"inputs": torch.ones(2, 4, device="meta")}, ValueError, "on one CPU or CUDA device, got cpu, meta"),
        ({"model": nn.ReLU(), "inputs": ()}, ValueError, "no tensor at all"),
    ],
)
def test_bad_input_is_told_what_was_expected(changes, error, message):
    arguments = {"model": nn.Linear(4, 4), "inputs": torch.ones(2, 4)} | changes
    with pytest.raises(error, match=re.escape(message)):
        trace_autocast(**arguments)


def test_a_trace_inside_an_autocast_region_is_refused():
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="outside of any other"):
        trace_autocast(nn.Linear(4, 4), torch.ones(2, 4))


def test_integer_inputs_and_models_without_gradients_are_traced():
    trace = trace_autocast(nn.Embedding(5, 4).requires_grad_(False), torch.tensor([1, 2]))
    assert rows(trace, "operation", "inputs", "output", "backward") == [("embedding", ["int64", "fp32"], "fp32", None)]
