"""The selector's knowledge as data: tasks, and rules that ask for facts and answer with a value, a reason, a source.

A rule applies when every fact in ``needs`` holds, none in ``lacks`` does, and the task is among ``tasks`` (empty: any).
Facts are the features of the hardware and of the task, ``hardware:NAME``, ``priority:stability`` or ``priority:speed``
and, once the forward format is chosen, ``forward:NAME``.  For the fields in ``SINGLE_FIELDS`` the first rule that
applies decides; for those in ``LIST_FIELDS`` all of them speak.  ``{forward}`` in a value is the forward format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SINGLE_FIELDS = (
    "forward", "backward", "accumulation", "master", "optimizer_state", "reduction", "loss_scaling", "tf32", "fp8",
)  # fmt: skip
LIST_FIELDS = ("keep_fp32", "caveats")


@dataclass(frozen=True)
class Task:
    """One kind of work; ``features`` are facts the rules may ask for."""

    name: str
    title: str
    features: frozenset[str]
    aliases: tuple[str, ...] = ()


def _task(name: str, title: str, features: str, *aliases: str) -> Task:
    return Task(name, title, frozenset(features.split()), aliases)


TASKS: Mapping[str, Task] = MappingProxyType({
    task.name: task
    for task in (
        _task("llm_pretraining", "LLM pre-training", "training llm", "llm", "gpt", "pretraining", "pre-training"),
        _task("fine_tuning", "fine-tuning", "training llm pretrained", "finetuning", "sft", "bert"),
        _task("lora", "LoRA", "training llm pretrained", "qlora", "peft"),
        _task("rl_fine_tuning", "RL fine-tuning", "training llm pretrained", "rl", "rlhf", "grpo", "ppo"),
        _task("vision_cnn", "vision CNN", "training", "cnn", "resnet", "vision"),
        _task("vit", "vision transformer", "training", "vision_transformer"),
        _task("diffusion", "diffusion", "training", "stable_diffusion", "dit"),
        _task("speech_rnn", "speech, RNN", "training", "rnn", "lstm", "speech", "asr"),
        _task("gan", "GAN", "training", "stylegan", "dcgan"),
        _task("recommender", "recommender", "training", "dlrm", "recsys"),
        _task("inference", "inference", "", "serving", "deployment"),
    )
})  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    field: str
    value: str
    reason: str
    source: str  #: a key of ``SOURCES``
    needs: frozenset[str]
    lacks: frozenset[str]
    tasks: frozenset[str]

    def applies(self, facts: frozenset[str], task: str) -> bool:
        """Whether the rule speaks about ``facts`` and ``task``."""
        return self.needs <= facts and not self.lacks & facts and (not self.tasks or task in self.tasks)


def _for(field: str, *rows: tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules of one field from rows ``(value, reason, source, needs, lacks, tasks)``, the last three optional."""

    def rule(value: str, reason: str, source: str, needs: str = "", lacks: str = "", tasks: str = "") -> Rule:
        return Rule(field, value, reason, source, *(frozenset(x.split()) for x in (needs, lacks, tasks)))

    return tuple(rule(*row) for row in rows)


_FORWARD = _for(
    "forward",
    ("fp16", "rollout and trainer agree on log-probabilities only as closely as the format rounds, and FP16 has "
     "three bits more than BF16; use it on both sides",
     "qi2025", "fp16_matrix grad_scaler", "flushes_subnormals", "rl_fine_tuning"),
    ("bf16", "most published weights were trained in it; check before converting them to FP16",
     "ml-engineering-dtype", "bf16", "", "inference"),
    ("bf16", "same peak rate as FP16 on every NVIDIA GPU since the A100, with the range of FP32: nothing to scale, "
     "and 65504 is no limit", "ml-engineering-accelerators", "bf16 cuda"),
    ("bf16", "the matrix units multiply BF16 and nothing wider in one pass", "google-tpu-bf16", "bf16 tpu"),
    ("bf16", "the range of FP32 in 16 bits: no change of hyper-parameters against FP32", "kalamkar2019", "bf16"),
    ("fp16", "125 TFLOP/s in FP16 on tensor cores against 15.7 in FP32; BF16 would be widened to FP32",
     "nvidia-v100", "hardware:v100"),
    ("fp16", "65 TFLOP/s in FP16 on tensor cores against 8.1 in FP32; BF16 would be widened to FP32",
     "nvidia-t4", "hardware:t4"),
    ("fp16", "half the memory traffic of FP32", "micikevicius2018", "fp16", "", "inference"),
    ("fp16", "full-rate FP16 arithmetic halves memory and at best doubles speed; there are no tensor cores",
     "nvidia-p100", "fp16 priority:speed"),
    ("fp32", "without tensor cores FP16 is at best twice as fast, and asks for a loss scaler", "nvidia-p100", "fp16"),
    ("fp16", "half the memory traffic of FP32", "accelerate-3373", "apple", "", "inference"),
    ("fp32", "16-bit autocast works, but a gain in speed is not certain: one report measured none",
     "nanochat-244", "apple"),
    ("fp32", "without BF16 instructions every 16-bit operator is widened to FP32 and rounded back",
     "onednn-types", "cpu"),
)  # fmt: skip

_BACKWARD = _for(
    "backward",
    ("none", "inference has no backward pass", "pytorch-amp", "", "training"),
    ("{forward}", "backward operators run in the dtype of their forward operators; there is no separate switch",
     "pytorch-amp"),
)  # fmt: skip

_ACCUMULATION = _for(
    "accumulation",
    ("fp32", "operands and sums are FP32", "pytorch-accuracy", "forward:fp32"),
    ("fp32", "half the rate of FP16 sums on a GeForce (165 against 330 TFLOP/s on an RTX 4090), and still right: a "
     "sum in FP16 stalls", "pytorch-123157", "half_rate_fp32_accumulation"),
    ("fp32", "tensor cores add in FP32; torch.backends.cuda.matmul.allow_{forward}_reduced_precision_reduction = "
     "False keeps cuBLAS from adding partial sums in 16 bits", "pytorch-accuracy", "cuda fp16_matrix"),
    ("fp32", "the matrix units accumulate in FP32", "google-tpu-bf16", "tpu"),
    ("fp32", "oneDNN accumulates floating-point products in FP32", "onednn-types", "cpu"),
    ("fp32", "products of 16-bit numbers, added in FP32, rounded on store", "micikevicius2018"),
)  # fmt: skip

_MASTER = _for(
    "master",
    ("none", "the weights do not change", "pytorch-amp", "", "training"),
    ("fp32", "the weights are FP32 themselves", "micikevicius2018", "forward:fp32"),
    ("fp32 adapters only", "the adapters train, so they are kept in FP32; the frozen base receives no updates and "
     "needs no master", "peft-adapters", "", "", "lora"),
    ("fp32", "BF16 rounds away every update 256 to 511 times smaller than its weight; stochastic rounding or Kahan "
     "summation where memory forbids FP32", "zamirai2020", "forward:bf16"),
    ("fp32", "FP16 rounds away every update 2048 to 4095 times smaller than its weight", "micikevicius2018"),
)  # fmt: skip

_OPTIMIZER_STATE = _for(
    "optimizer_state",
    ("none", "no optimizer", "pytorch-amp", "", "training"),
    ("bf16 moments", "DeepSeek-V3 kept both AdamW moments in BF16 beside FP32 masters; a second moment in BF16 "
     "decays at beta2 = 0.95 and freezes at 0.999", "deepseekv3", "priority:speed forward:bf16", "", "llm_pretraining"),
    ("8-bit moments", "block-wise 8-bit moments take 2 bytes a parameter instead of 8",
     "dettmers2022", "priority:speed cuda", "", "fine_tuning rl_fine_tuning"),
    ("fp32", "in FP16 eps = 1e-8 and the square of 1e-4 are 0", "own-tests", "forward:fp16"),
    ("fp32", "in BF16 the second moment cannot decay at beta2 = 0.999", "own-tests", "forward:bf16"),
    ("fp32", "the format of the weights", "micikevicius2018"),
)  # fmt: skip

_REDUCTION = _for(
    "reduction",
    ("none", "no gradients", "pytorch-amp", "", "training"),
    ("fp32", "gradients are FP32", "micikevicius2018", "forward:fp32"),
    ("fp32", "eight bits of precision do not survive a sum over ranks or micro-batches",
     "ml-engineering-dtype", "forward:bf16"),
    ("fp16, scaled", "half the traffic, and safe while the loss is scaled; accumulate micro-batches in FP32",
     "ml-engineering-dtype", "forward:fp16 priority:speed"),
    ("fp32", "a sum over ranks can pass 65504", "ml-engineering-dtype", "forward:fp16"),
)  # fmt: skip

_LOSS_SCALING = _for(
    "loss_scaling",
    ("none", "no gradients", "pytorch-amp", "", "training"),
    ("dynamic", "DCGAN and the image classifiers of the paper needed none, SSD diverged without: leave it on",
     "micikevicius2018", "forward:fp16", "", "vision_cnn gan"),
    ("dynamic", "gradients at or below 2^-25 become 0; SSD and bigLSTM diverged without it",
     "micikevicius2018", "forward:fp16"),
    ("none", "scaling cures underflow, and BF16 has the exponent of FP32", "kalamkar2019", "forward:bf16"),
    ("none", "FP32 reaches down to 1.4e-45", "micikevicius2018", "forward:fp32"),
)  # fmt: skip

_TF32 = _for(
    "tf32",
    ("on", "torch.backends.cuda.matmul.fp32_precision = 'tf32'; convolutions use it by default; most networks "
     "converge as with FP32", "pytorch-accuracy", "tf32 cuda priority:speed"),
    ("off", "what stays in FP32 stays there for its bits, and TF32 reads ten of them; matmuls are off by default, "
     "convolutions need torch.backends.cudnn.conv.fp32_precision = 'ieee'", "pytorch-accuracy", "tf32 cuda"),
    ("off", "the matrix cores of CDNA 3 have it; what stays in FP32 stays there for its bits",
     "rocm-precision", "tf32 rocm"),
    ("off", "hipBLASLt builds TF32 products from several BF16 products on this GPU", "hipblaslt-1806", "tf32_emulated"),
    ("off", "the hardware has it; what stays in FP32 stays there for its bits",
     "ml-engineering-accelerators", "tf32 gaudi"),
    ("not a switch", "JAX multiplies FP32 matrices in BF16 on a TPU unless precision='highest' is asked for",
     "jax-1856", "tpu"),
    ("no hardware", "TF32 is a mode of tensor cores from Ampere on", "pytorch-accuracy", "cuda"),
    ("no hardware", "no matrix units that read FP32 as TF32", "ml-engineering-accelerators", "rocm"),
    ("no hardware", "TF32 is a mode of NVIDIA's tensor cores", "pytorch-accuracy"),
)  # fmt: skip

_FP8 = _for(
    "fp8",
    ("no", "it would widen the very mismatch that FP16 is chosen against", "qi2025", "", "", "rl_fine_tuning"),
    ("E4M3 weights and activations", "post-training, per tensor: BERT 88.19 to 88.09 F1, where INT8 fell to 76.89",
     "micikevicius2022", "fp8", "", "inference"),
    ("E4M3 FNUZ weights and activations", "as E4M3, but ending at 240: rescale OCP weights",
     "rocm-precision", "fp8_fnuz", "", "inference"),
    ("no", "recipes replace nn.Linear; convolutions, recurrent cells, embeddings and small adapters stay in 16 bits",
     "te-docs", "", "", "vision_cnn gan speech_rnn recommender lora"),
    ("no hardware", "no matrix units for FP8", "te-matrix", "cuda", "fp8"),
    ("no hardware", "oneDNN trains in FP32, BF16 and FP16 on a CPU", "onednn-types", "cpu"),
    ("no hardware", "autocast on MPS takes FP16 and BF16 only", "accelerate-3373", "apple"),
    ("no hardware", "no matrix units for FP8", "ml-engineering-accelerators", "", "fp8 fp8_fnuz"),
    ("only if the linear layers are large", "quantizing costs a pass over each operand; torchao measured 4 to 25 % "
     "end to end on an 8B model, less is likely below", "torchao-float8", "", "", "fine_tuning vit diffusion"),
    ("NVFP4", "Transformer Engine measured 2.03x over BF16 for the GEMMs of a 5B model on a B300, MXFP8 1.44x; keep "
     "the last layers wider", "te-docs", "nvfp4 priority:speed"),
    ("MXFP8", "Transformer Engine's default on this GPU: a scale for each 32 values", "te-matrix", "mxfp8"),
    ("per tensor, current scaling", "Transformer Engine's default on compute capability 12.0",
     "te-matrix", "hardware:rtx50"),
    ("per tensor, current scaling", "25 % end to end on Llama 3 8B and 8 H100 (torchao, tensorwise)",
     "torchao-float8", "fp8_blocks priority:speed"),
    ("128-element blocks", "DeepSeek-V3: tiles of 1x128 and blocks of 128x128, loss within 0.25 % of BF16",
     "deepseekv3", "fp8_blocks"),
    ("per tensor, delayed scaling", "Transformer Engine's default on compute capability 8.9", "te-matrix", "fp8 cuda"),
    ("per tensor, FNUZ", "15 % end to end on Llama 3 8B and 8 MI300X (torchao, tensorwise)",
     "torchao-float8", "fp8_fnuz"),
    ("per tensor", "OCP encodings on the matrix cores", "rocm-precision", "fp8 rocm"),
    ("per tensor, delayed scaling", "through Intel's Transformer Engine for Gaudi", "gaudi-fp8", "fp8 gaudi"),
)  # fmt: skip

_KEEP_FP32 = _for(
    "keep_fp32",
    ("everything", "the whole run is FP32", "micikevicius2018", "forward:fp32"),
    ("normalization: parameters and statistics", "gains sit near 1, where 16 bits lose updates first (in BF16 every "
     "AdamW step below 1.95e-3), and statistics are long sums", "own-tests", "training", "forward:fp32"),
    ("softmax, exponentials and the loss", "CUDA autocast runs them in FP32", "pytorch-amp", "", "forward:fp32"),
    ("position and rotary tables", "BF16 rounds position 257 to 256",
     "own-tests", "", "forward:fp32", "llm_pretraining fine_tuning lora rl_fine_tuning inference"),
    ("embedding, output head and router out of FP8", "DeepSeek-V3 kept them in BF16 or FP32",
     "deepseekv3", "fp8", "", "llm_pretraining"),
    ("embedding, output head and router out of FP8", "DeepSeek-V3 kept them in BF16 or FP32",
     "deepseekv3", "fp8_fnuz", "", "llm_pretraining"),
    ("log-probabilities, ratios and KL", "differences of nearly equal numbers",
     "qi2025", "", "forward:fp32", "rl_fine_tuning"),
    ("timesteps and noise schedule", "BF16 rounds timestep 999 to 1000", "own-tests", "", "forward:fp32", "diffusion"),
    ("the VAE where force_upcast is set", "the decoder of SDXL overflows FP16",
     "diffusers-upcast", "", "forward:fp32", "diffusion inference"),
    ("features before the logarithm", "an energy of 1e-8 is 0 in FP16 and its logarithm minus infinity",
     "own-tests", "", "forward:fp32", "speech_rnn"),
    ("gradient penalties", "their graph is differentiated twice: unscale first, then take the norm",
     "pytorch-amp-examples", "", "forward:fp32", "gan"),
    ("updates of embedding tables", "computed in FP32; tables stored in 16 bits need stochastic rounding",
     "zhang2018", "", "forward:fp32", "recommender"),
)  # fmt: skip

_CAVEATS = _for(
    "caveats",
    ("torch.cuda.is_bf16_supported() says True here", "it counts emulation: ask with including_emulation=False",
     "pytorch-bf16", "cuda", "bf16"),
    ("16-bit subnormals are flushed to zero", "in matrix instructions; in a backward pass PyTorch lets rocBLAS go "
     "through BF16 for FP16 products", "pytorch-accuracy", "flushes_subnormals"),
    ("FP8 is FNUZ", "E4M3 ends at 240 instead of 448, and the codes differ from the OCP ones",
     "rocm-precision", "fp8_fnuz"),
    ("E4M3 ends at 240", "on Gaudi 2: codes beyond it read as NaN there, so rescale weights that were stored for 448",
     "tgi-gaudi-fp8", "hardware:gaudi2"),
    ("no MXFP8, NVFP4 without stochastic rounding", "Transformer Engine on compute capability 12.0",
     "te-matrix", "hardware:rtx50"),
    ("FP8 needs CUDA 12.1 and cuBLASLt 12.1.3", "on compute capability 8.9",
     "te-matrix", "fp8 cuda", "fp8_blocks mxfp8"),
    ("FP8 sizes", "both dimensions of a GEMM must be multiples of 16",
     "torchao-float8", "training fp8", "", "llm_pretraining fine_tuning vit diffusion"),
    ("versions", "autocast on MPS: FP16 from torch 2.5, BF16 from 2.6 and macOS 14, GradScaler from 2.8",
     "accelerate-3373", "apple"),
    ("no FP16, no GradScaler", "scaling has nothing to do here", "google-tpu-bf16", "tpu"),
    ("CPU autocast is not CUDA autocast", "softmax and layer norm stay in BF16 (torch 2.13)", "own-tests", "cpu bf16"),
    ("lists of its own", "Gaudi's autocast has its own operator lists", "gaudi-amp", "gaudi"),
    ("check the checkpoint", "weights or activations of a model trained in BF16 may pass 65504; T5 did",
     "transformers-10956", "forward:fp16 llm", "", "fine_tuning lora rl_fine_tuning"),
    ("check the checkpoint", "weights or activations of a model trained in BF16 may pass 65504; T5 did",
     "transformers-10956", "forward:fp16", "", "inference"),
    ("BF16 has limits too", "it overflows above 3.39e38 and loses updates that FP16 keeps",
     "own-tests", "forward:bf16 training"),
    ("expect a fight", "OPT-175B in FP16: loss scales that fell to their minimum, dozens of restarts",
     "opt-chronicles", "forward:fp16", "", "llm_pretraining"),
    ("reduce_dtype", "FSDP2 reduces in param_dtype unless told: MixedPrecisionPolicy(param_dtype=torch.bfloat16, "
     "reduce_dtype=torch.float32)",
     "pytorch-fsdp2", "forward:bf16 cuda", "", "llm_pretraining fine_tuning rl_fine_tuning"),
    ("mismatch stays", "without fast FP16, rollout and trainer differ by BF16 rounding: correct by importance "
     "sampling", "qi2025", "forward:bf16", "", "rl_fine_tuning"),
    ("clamp activations", "StyleGAN2-ADA runs only its highest resolutions in FP16 and clamps convolutions to 256",
     "stylegan2-ada", "forward:fp16", "", "gan"),
    ("one scaler", "for both optimizers, one update() a step", "pytorch-amp-examples", "forward:fp16", "", "gan"),
    ("ids stay integers", "BF16 rounds 257 to 256", "own-tests", "", "", "recommender llm_pretraining"),
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    *_FORWARD, *_BACKWARD, *_ACCUMULATION, *_MASTER, *_OPTIMIZER_STATE, *_REDUCTION, *_LOSS_SCALING, *_TF32, *_FP8,
    *_KEEP_FP32, *_CAVEATS,
)  # fmt: skip
