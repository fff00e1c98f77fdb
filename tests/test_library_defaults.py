"""What the book says of other libraries' defaults, read from the libraries that are installed.

A page that names a default is wrong the day it changes; then a test here fails and says which.  The autocast lists
are compared in ``test_amp``, finfo of every format in ``test_formats``, the scaler's rule in ``test_loss_scaling``.
"""

import inspect
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch

from mixprec_lab.fp8 import DelayedScaling, why_not
from mixprec_lab.loss_scaling import RULES


def defaults(function) -> dict:
    """By parameter: its default."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def subset(found: dict, wanted: dict) -> dict:
    return {name: found.get(name, "no such parameter") for name in wanted}


def test_grad_scaler_starts_and_moves_as_the_preset_of_its_name():
    torchs = RULES["torch"]
    wanted = {"init_scale": torchs.init_scale, "growth_factor": torchs.growth_factor,
              "backoff_factor": torchs.backoff_factor, "growth_interval": torchs.window,
              "enabled": True, "device": "cuda"}  # fmt: skip
    assert defaults(torch.amp.GradScaler) == wanted
    assert list(torch.amp.GradScaler("cpu").state_dict()) == [
        "scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker",
    ]  # fmt: skip


def test_autocast_is_fp16_on_cuda_bf16_on_the_cpu_and_keeps_its_casts():
    assert torch.get_autocast_dtype("cuda") == torch.float16
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert torch.is_autocast_cache_enabled()
    assert defaults(torch.autocast) == {"dtype": None, "enabled": True, "cache_enabled": None}


@pytest.mark.parametrize("name", ["autocast", "GradScaler"])
def test_the_old_names_under_torch_cuda_amp_warn(name):
    with pytest.warns(FutureWarning, match=rf"torch\.cuda\.amp\.{name}\(args\.\.\.\)` is deprecated"):
        getattr(torch.cuda.amp, name)(enabled=False)


def test_adamw_has_the_numbers_of_the_pages():
    wanted = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "foreach": None, "fused": None}
    assert subset(defaults(torch.optim.AdamW), wanted) == wanted
    assert defaults(torch.optim.Adam)["weight_decay"] == 0


def test_the_states_of_adamw_have_the_dtype_of_the_weight():
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = {name: value.dtype for name, value in optimizer.state[weight].items()}
    assert states == {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}


#: Read where nothing has set them yet: other tests of one process may.
SETTINGS = """import torch
print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
      torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
      torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, torch.get_default_dtype())"""


def test_products_of_fp32_are_fp32_by_default_and_convolutions_may_be_tf32():
    done = subprocess.run([sys.executable, "-c", SETTINGS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["highest", "False", "True", "True", "True", "torch.float32"]


def test_clipping_takes_the_two_norm_and_lets_a_nan_pass():
    assert defaults(torch.nn.utils.clip_grad_norm_) == {"norm_type": 2.0, "error_if_nonfinite": False, "foreach": None}
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.tensor([math.nan, 1.0])
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    assert weight.grad.isnan().all()


def test_fsdp_keeps_the_dtype_of_the_weights_unless_told():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    assert defaults(MixedPrecisionPolicy) == {
        "param_dtype": None, "reduce_dtype": None, "output_dtype": None, "cast_forward_inputs": True,
    }  # fmt: skip


def test_torch_load_reads_tensors_and_runs_nothing():
    class Harmless:
        def __reduce__(self):
            return (print, ("this must not run",))

    file = io.BytesIO()
    torch.save({"x": torch.ones(1)}, file)
    assert torch.load(io.BytesIO(file.getvalue())) == {"x": torch.ones(1)}
    file = io.BytesIO()
    torch.save(Harmless(), file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(file.getvalue()))


#: dtype, value, what the cast gives.
CASTS = [
    (torch.float16, 65519.996, 65504.0), (torch.float16, 65520.0, math.inf), (torch.float16, 2.0**-25, 0.0),
    (torch.float16, 2.0**-25 * (1 + 2.0**-20), 2.0**-24), (torch.float16, 2049.0, 2048.0),
    (torch.bfloat16, 257.0, 256.0), (torch.bfloat16, (2 - 2.0**-8) * 2.0**127, math.inf),
    (torch.bfloat16, (2 - 1.5 * 2.0**-8) * 2.0**127, (2 - 2.0**-7) * 2.0**127), (torch.bfloat16, 2.0**-133, 2.0**-133),
    (torch.float8_e4m3fn, 448.0, 448.0), (torch.float8_e4m3fn, 464.0, 448.0), (torch.float8_e4m3fn, 2.0**-10, 0.0),
    (torch.float8_e4m3fn, 17.0, 16.0), (torch.float8_e5m2, 57344.0, 57344.0), (torch.float8_e5m2, 61440.0, math.inf),
    (torch.float8_e5m2, 2.0**-17, 0.0), (torch.float8_e5m2, 9.0, 8.0),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "x", "expected"), CASTS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_casts_round_to_nearest_even_and_end_where_the_pages_say(dtype, x, expected, sign):
    found = torch.tensor(sign * x).to(dtype).float()
    assert torch.equal(found, torch.tensor(sign * expected)) and torch.signbit(found) == (sign < 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "x", "expected"), CASTS)
def test_casts_on_a_gpu_end_there_too(dtype, x, expected):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; the sibling on the CPU runs everywhere")
    assert torch.equal(torch.tensor(x, device="cuda").to(dtype).float().cpu(), torch.tensor(expected))


def test_e4m3_beyond_its_largest_saturates_since_torch_2_12_and_was_nan_before():
    found = torch.tensor([465.0, 1e9, math.inf]).to(torch.float8_e4m3fn).float()
    if torch.__version__ >= torch.torch_version.TorchVersion("2.12"):
        assert torch.equal(found, torch.full((3,), 448.0))
    else:
        assert found.isnan().all()


def test_nan_is_kept_by_every_cast():
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert torch.tensor(math.nan).to(dtype).float().isnan()


def test_types_meet_where_the_pages_say():
    kinds = {(torch.float16, torch.bfloat16): torch.float32, (torch.float16, torch.float32): torch.float32,
             (torch.bfloat16, torch.int64): torch.bfloat16}  # fmt: skip
    for (a, b), expected in kinds.items():
        assert torch.promote_types(a, b) == expected
    assert (torch.ones(2, dtype=torch.float16) * torch.tensor(3.0)).dtype == torch.float16  # a scalar tensor gives way


def test_sums_of_16_bit_tensors_are_rounded_once_at_the_end():
    """The accumulator is FP32: a naive sum of 4096 ones in FP16 stalls at 2048."""
    ones = torch.ones(4096, dtype=torch.float16)
    assert ones.sum() == 4096 and torch.ones(512, dtype=torch.bfloat16).sum() == 512
    stalled = torch.tensor(2048.0, dtype=torch.float16)
    assert stalled + 1 == 2048


def test_layers_have_the_epsilons_that_fp16_cannot_or_can_hold():
    assert torch.nn.LayerNorm(4).eps == torch.nn.BatchNorm1d(4).eps == 1e-5
    assert torch.tensor(1e-8).half() == 0 and torch.tensor(1e-5).half() > 0
    assert torch.nn.RMSNorm(4).eps is None


def test_the_fp8_product_takes_the_arguments_the_backend_gives_it():
    schema = str(torch.ops.aten._scaled_mm.default._schema)
    names = ["self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum"]
    assert [a.name for a in torch.ops.aten._scaled_mm.default._schema.arguments] == names, schema


def test_our_delayed_scaling_has_the_defaults_that_its_docstring_compares():
    assert defaults(DelayedScaling) == {"margin": 0, "amax_history_len": 16, "amax_compute_algo": "max",
                                        "fp8_format": "hybrid", "reduce_amax": True}  # fmt: skip


@pytest.mark.gpu
def test_delayed_scaling_of_transformer_engine_has_the_defaults_of_the_page():
    if reason := why_not("transformer_engine", torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip(reason)
    from transformer_engine.common.recipe import DelayedScaling as Theirs
    from transformer_engine.common.recipe import Format

    theirs = Theirs()
    ours = DelayedScaling()
    assert (theirs.margin, theirs.amax_compute_algo, theirs.reduce_amax) == (0, ours.amax_compute_algo, True)
    assert theirs.amax_history_len == 1024 and theirs.fp8_format == Format.HYBRID
