"""Where every claim of the selector comes from: one entry a source, with its address and the date of what was read."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Source:
    """A paper, a manual, a test of this package; ``date`` is its publication or the state that was read."""

    key: str
    title: str
    url: str
    date: str  #: YYYY or YYYY-MM


_GITHUB = "https://github.com/"
_ARXIV = "https://arxiv.org/abs/"

SOURCES: Mapping[str, Source] = MappingProxyType({
    source.key: source
    for source in (
        Source("micikevicius2018", "Micikevicius et al., Mixed Precision Training", _ARXIV + "1710.03740", "2018-02"),
        Source("kalamkar2019", "Kalamkar et al., A Study of BFLOAT16", _ARXIV + "1905.12322", "2019-06"),
        Source("zamirai2020", "Zamirai et al., Revisiting BFloat16 Training", _ARXIV + "2010.06192", "2020-10"),
        Source("micikevicius2022", "Micikevicius et al., FP8 Formats for Deep Learning", _ARXIV + "2209.05433",
               "2022-09"),
        Source("deepseekv3", "DeepSeek-V3 Technical Report, section 3.3", _ARXIV + "2412.19437", "2024-12"),
        Source("qi2025", "Qi et al., Defeating the Training-Inference Mismatch via FP16", _ARXIV + "2510.26788",
               "2025-10"),
        Source("opt-chronicles", "OPT-175B, chronicles of the training run",
               _GITHUB + "facebookresearch/metaseq/tree/main/projects/OPT/chronicles", "2022"),
        Source("dettmers2022", "Dettmers et al., 8-bit Optimizers via Block-wise Quantization", _ARXIV + "2110.02861",
               "2021-10"),
        Source("zhang2018", "Zhang et al., Training with Low-precision Embedding Tables",
               "https://research.facebook.com/publications/training-with-low-precision-embedding-tables/", "2018-12"),
        Source("pytorch-amp", "PyTorch, Automatic Mixed Precision package", "https://pytorch.org/docs/stable/amp.html",
               "2026-07"),
        Source("pytorch-amp-examples", "PyTorch, Automatic Mixed Precision examples",
               "https://pytorch.org/docs/stable/notes/amp_examples.html", "2026-07"),
        Source("pytorch-accuracy", "PyTorch, Numerical Accuracy",
               "https://pytorch.org/docs/stable/notes/numerical_accuracy.html", "2026-07"),
        Source("pytorch-bf16", "PyTorch 2.13, torch.cuda.is_bf16_supported",
               _GITHUB + "pytorch/pytorch/blob/v2.13.0/torch/cuda/__init__.py", "2026-07"),
        Source("pytorch-fsdp2", "PyTorch 2.13, torch.distributed.fsdp.MixedPrecisionPolicy",
               "https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html", "2026-07"),
        Source("pytorch-123157", "PyTorch issue 123157, matmul rates of the RTX 4090",
               _GITHUB + "pytorch/pytorch/issues/123157", "2024-04"),
        Source("te-matrix", "Transformer Engine, Datatype and hardware support matrix",
               _GITHUB + "NVIDIA/TransformerEngine/blob/main/docs/support_matrix.rst", "2026"),
        Source("te-docs", "Transformer Engine 2.20, FP8 user guide",
               "https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/", "2026"),
        Source("torchao-float8", "torchao, float8 training workflow",
               _GITHUB + "pytorch/ao/blob/main/docs/source/workflows/training.md", "2026"),
        Source("ml-engineering-dtype", "Bekman, Machine Learning Engineering, tensor precision",
               _GITHUB + "stas00/ml-engineering/blob/master/training/dtype.md", "2026"),
        Source("ml-engineering-accelerators", "Bekman, Machine Learning Engineering, accelerators",
               _GITHUB + "stas00/ml-engineering/blob/master/compute/accelerator/README.md", "2026-08"),
        Source("nvidia-v100", "NVIDIA, Tesla V100 GPU Accelerator data sheet",
               "https://images.nvidia.com/content/technologies/volta/pdf/tesla-volta-v100-datasheet-letter-fnl-web.pdf",
               "2018"),
        Source("nvidia-t4", "NVIDIA, T4 Tensor Core GPU data sheet",
               "https://www.nvidia.com/en-us/data-center/tesla-t4/", "2018"),
        Source("nvidia-p100", "NVIDIA developer forum 53256, FP16 rates of Pascal",
               "https://forums.developer.nvidia.com/t/fp16-support-on-gtx-1060-and-1080/53256", "2017"),
        Source("rocm-precision", "ROCm, Data types and precision support",
               "https://rocm.docs.amd.com/en/latest/reference/precision-support.html", "2026"),
        Source("hipblaslt-1806", "hipBLASLt pull request 1806, TF32 emulation for gfx950",
               _GITHUB + "ROCm/hipBLASLt/pull/1806", "2025-03"),
        Source("google-tpu-bf16", "Google Cloud TPU, bfloat16", "https://docs.cloud.google.com/tpu/docs/bfloat16",
               "2026"),
        Source("jax-1856", "JAX issue 1856, default matmul precision on TPU", _GITHUB + "jax-ml/jax/issues/1856",
               "2019-12"),
        Source("gaudi-amp", "Intel Gaudi, Mixed Precision Training with PyTorch Autocast",
               "https://docs.habana.ai/en/latest/PyTorch/PyTorch_Mixed_Precision/index.html", "2026"),
        Source("gaudi-fp8", "Intel Gaudi, FP8 Training with Intel Gaudi Transformer Engine",
               "https://docs.habana.ai/en/latest/PyTorch/PyTorch_FP8_Training/index.html", "2026"),
        Source("tgi-gaudi-fp8", "text-generation-inference, FP8 layers of the Gaudi backend",
               _GITHUB + "huggingface/text-generation-inference/blob/main/backends/gaudi/server/"
               "text_generation_server/layers/fp8.py", "2025"),
        Source("onednn-types", "oneDNN, Data Types", "https://oneapi-src.github.io/oneDNN/dev_guide_data_types.html",
               "2025"),
        Source("accelerate-3373", "Accelerate pull request 3373, autocast and GradScaler on MPS",
               _GITHUB + "huggingface/accelerate/pull/3373", "2025-01"),
        Source("nanochat-244", "nanochat pull request 244, BF16 on Apple silicon",
               _GITHUB + "karpathy/nanochat/pull/244", "2025-11"),
        Source("transformers-10956", "Transformers pull request 10956, inf/nan of T5 under FP16 autocast",
               _GITHUB + "huggingface/transformers/pull/10956", "2021-03"),
        Source("stylegan2-ada", "NVlabs, stylegan2-ada-pytorch, train.py",
               _GITHUB + "NVlabs/stylegan2-ada-pytorch/blob/main/train.py", "2021"),
        Source("diffusers-upcast", "Diffusers, AutoencoderKL force_upcast",
               _GITHUB + "huggingface/diffusers/blob/main/src/diffusers/models/autoencoders/autoencoder_kl.py",
               "2026"),
        Source("peft-adapters", "PEFT, cast_adapter_dtype",
               "https://huggingface.co/docs/peft/package_reference/functional", "2026"),
        Source("own-tests", "This package, tests/test_bf16_vs_fp16.py, torch 2.13 on a CPU", "", "2026-11"),
    )
})  # fmt: skip
