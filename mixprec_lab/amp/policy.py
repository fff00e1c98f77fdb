"""The autocast lists of PyTorch 2.13 as data: for each device and each operator, what autocast does to its inputs.

Names are those of the ATen operators, with the overload where only one overload is listed (``softmax.int``): that is
the level at which autocast acts.  A Python function that is not here may call operators that are: on CUDA
``cross_entropy`` is ``log_softmax`` and then ``nll_loss``.  Whatever is on no list takes the dtypes it is given, and
promotes them by torch's ordinary rules if they differ.

The tests compare these tables with the installed torch: both with what it has registered for the two dispatch keys,
CUDA with the header ``ATen/autocast_mode.h`` and with the dispatcher at work, CPU with the dtypes that come out.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

import torch

from mixprec_lab.formats import FORMATS, text_table

Policy = Literal["cpu", "cuda"]
Rule = Literal["lower precision", "fp32", "fp32 output", "widest", "banned", "none"]

#: The release of torch that the tables were read from.
TORCH_VERSION = "2.13"

#: What each rule does, in one sentence.
RULES: Mapping[str, str] = MappingProxyType({
    "lower precision": "every floating-point input is cast to the autocast dtype; casts of FP32 parameters are cached",
    "fp32": "every floating-point input is cast to FP32",
    "fp32 output": "inputs stay as they are, the kernel is asked for an FP32 result (unless the call names a dtype)",
    "widest": "inputs of the autocast dtype are cast to FP32 if any other input is FP32",
    "banned": "the call raises",
    "none": "autocast does nothing: the operator runs in the dtypes it is given",
})  # fmt: skip

_CUDA = {
    "lower precision": """
        _convolution _convolution.deprecated _scaled_dot_product_flash_attention _thnn_fused_gru_cell
        _thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc
        conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution
        cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv prelu
        rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention""",
    "fp32": """
        _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss
        cosine_similarity dist erfinv exp expm1 frobenius_norm.dim group_norm hinge_embedding_loss huber_loss kl_div
        l1_loss layer_norm log log10 log1p log2 logsumexp margin_ranking_loss mse_loss multi_margin_loss
        multilabel_margin_loss native_layer_norm nll_loss nll_loss2d nuclear_norm nuclear_norm.dim pdist
        poisson_nll_loss pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal renorm rms_norm rsqrt sinh
        smooth_l1_loss soft_margin_loss softplus tan triplet_margin_loss upsample_bicubic2d upsample_bilinear2d
        upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d""",
    "fp32 output": """
        cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm log_softmax.int norm.Scalar
        norm.ScalarOpt_dim prod prod.dim_int softmax.int sum sum.dim_IntList""",
    "widest": "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot",
    "banned": "binary_cross_entropy",
}

_CPU = {
    "lower precision": """
        _addmm_activation _convolution.deprecated _native_multi_head_attention addbmm addmm baddbmm bmm conv1d
        conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_tbc conv_transpose1d conv_transpose2d.input
        conv_transpose3d.input linalg_vecdot linear matmul mkldnn_rnn_layer mm prelu scaled_dot_product_attention""",
    "fp32": """
        _grid_sampler_2d_cpu_fallback _lu_with_info adaptive_avg_pool3d adaptive_max_pool3d avg_pool3d
        binary_cross_entropy binary_cross_entropy_with_logits cdist cholesky cholesky_inverse cholesky_solve
        cosine_embedding_loss cross_entropy_loss ctc_loss.IntList ctc_loss.Tensor fake_quantize_per_tensor_affine
        fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_irfft fft_irfft2 fft_irfftn
        fft_rfft fft_rfft2 fft_rfftn fractional_max_pool2d fractional_max_pool3d geqrf grid_sampler grid_sampler_2d
        grid_sampler_3d hinge_embedding_loss huber_loss inverse kl_div l1_loss linalg_cholesky linalg_cholesky_ex
        linalg_cond linalg_cond.p_str linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
        linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_rank
        linalg_matrix_rank.atol_rtol_float linalg_matrix_rank.atol_rtol_tensor linalg_matrix_rank.tol_tensor linalg_qr
        linalg_solve linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve lu_solve margin_ranking_loss
        max_pool3d max_unpool2d max_unpool3d mse_loss multi_margin_loss multilabel_margin_loss
        multilabel_margin_loss_forward nanquantile nanquantile.scalar nll_loss nll_loss2d orgqr ormqr pinverse
        poisson_nll_loss polar prod prod.dim_int qr quantile quantile.scalar reflection_pad1d reflection_pad2d
        replication_pad1d replication_pad2d replication_pad3d smooth_l1_loss soft_margin_loss stft stft.center svd
        trace triangular_solve triplet_margin_loss view_as_complex""",
    "widest": "cat index_copy stack",
}

#: policy -> operator -> rule.  Operators that are missing have the rule "none".
OPERATORS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    policy: MappingProxyType({op: rule for rule, ops in lists.items() for op in ops.split()})
    for policy, lists in (("cpu", _CPU), ("cuda", _CUDA))
})  # fmt: skip

#: The dispatch key under which torch registers the lists of a device.
DISPATCH_KEYS: Mapping[str, str] = MappingProxyType({"cpu": "AutocastCPU", "cuda": "AutocastCUDA"})


def check_policy(policy: str) -> str:
    """``policy`` itself; ValueError if it is not ``"cpu"`` or ``"cuda"``."""
    if policy not in OPERATORS:
        raise ValueError(f"expected policy to be one of {', '.join(OPERATORS)}, got {policy!r}")
    return policy


def rule_of(operator: str, policy: Policy) -> str:
    """The rule that ``policy`` has for an ATen operator, ``"none"`` if it is on no list.

    ``operator`` is a name with or without its overload.  Without it, the rule of the listed overloads comes back
    (they always agree): ``rule_of("softmax", "cuda")`` is ``"fp32 output"``.  ValueError for an unknown policy and
    for a name that no operator of the installed torch has.
    """
    listed = OPERATORS[check_policy(policy)]
    if operator in listed:
        return listed[operator]
    base = operator.split(".")[0]
    if not hasattr(torch.ops.aten, base):
        raise ValueError(f"expected the name of an ATen operator such as 'linear' or 'softmax.int', got {operator!r}")
    if operator != base:
        return "none"
    return next((rule for name, rule in listed.items() if name.split(".")[0] == base), "none")


def registered(policy: Policy) -> frozenset[str]:
    """The operators for which the installed torch itself has an autocast kernel: empty where it has no such key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(DISPATCH_KEYS[check_policy(policy)])
    return frozenset(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


def policy_table(operators: Iterable[str] | None = None) -> str:
    """A text table of operators and their rules on CUDA and on the CPU, side by side.

    None shows every listed operator (overloads merged, names with a leading underscore left out).
    """
    if operators is None:
        bases = {name.split(".")[0] for lists in OPERATORS.values() for name in lists}
        operators = sorted(base for base in bases if not base.startswith("_"))
    rows = [[name, rule_of(name, "cuda"), rule_of(name, "cpu")] for name in operators]
    return text_table(["operator", "CUDA", "CPU"], rows)


def dtype_name(dtype: torch.dtype) -> str:
    """``"fp16"`` for torch.float16 and so on for the formats of the course; torch's own name for the rest."""
    known = {fmt.torch_dtype: name for name, fmt in FORMATS.items() if fmt.torch_dtype is not None}
    return known.get(dtype, str(dtype).removeprefix("torch."))
