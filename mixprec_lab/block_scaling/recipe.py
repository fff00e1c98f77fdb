"""Block scaling as a recipe of ``FP8Linear``: each operand is quantized along the axis that its product sums over."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mixprec_lab.block_scaling.hadamard import hadamard_matrix, random_hadamard, random_signs
from mixprec_lab.block_scaling.quantized import quantize_blocks
from mixprec_lab.block_scaling.schemes import BlockScheme, SchemeLike, get_scheme
from mixprec_lab.fp8.recipes import Role
from mixprec_lab.fp8.scaling import Scaled


@dataclass(frozen=True)
class BlockScaling:
    """A recipe for ``FP8Linear`` and ``FP8Trainer``: block-scaled operands, emulated on any device.

    ``scheme`` (a name or a ``BlockScheme``) is for activations, and for weights and gradients unless they have their
    own.  Blocks of one dimension lie along the axis of the product's sum, so that every operand of a layer is quantized
    twice from the source; square blocks give the same copy both times.

    ``stochastic_gradients`` rounds gradients stochastically.  ``hadamard`` is the group size of a random Hadamard
    transform on both operands of the weight gradient, along the tokens they are summed over; 0 means none, and tokens
    are filled up with zeros to whole groups.  ``seed`` feeds both; the state of the stochastic rounding is not part of
    a checkpoint.  ``BlockScaling.nvfp4()`` and ``BlockScaling.deepseek()`` are the published recipes.

    Raises KeyError for an unknown scheme, ValueError for a group size that is no power of two.
    """

    scheme: SchemeLike = "mxfp8"
    weight_scheme: SchemeLike | None = None
    gradient_scheme: SchemeLike | None = None
    stochastic_gradients: bool = False
    hadamard: int = 0
    seed: int = 0

    backends = ("emulated",)
    fp8_format = "e4m3"

    def __post_init__(self) -> None:
        for scheme in (self.scheme, self.weight_scheme, self.gradient_scheme):
            if scheme is not None:
                get_scheme(scheme)
        if self.hadamard:
            hadamard_matrix(self.hadamard)

    @classmethod
    def nvfp4(cls, **changes) -> "BlockScaling":
        """NVFP4 training (arXiv:2509.25149): weights in 16x16 blocks, stochastic gradients, Hadamard groups of 16."""
        weights = replace(get_scheme("nvfp4"), name="nvfp4_16x16", block=(16, 16), title="NVFP4, 16x16 blocks")
        settings = {"weight_scheme": weights, "stochastic_gradients": True, "hadamard": 16}
        return cls(**({"scheme": "nvfp4"} | settings | changes))

    @classmethod
    def deepseek(cls, **changes) -> "BlockScaling":
        """DeepSeek-V3 (arXiv:2412.19437): E4M3 throughout, 1x128 tiles, weights in 128x128 blocks."""
        return cls(**({"scheme": "tile_1x128", "weight_scheme": "block_128x128"} | changes))

    def of(self, role: Role) -> BlockScheme:
        """The scheme of the operand ``role``."""
        own = {"weight": self.weight_scheme, "grad_output": self.gradient_scheme}.get(role)
        return get_scheme(self.scheme if own is None else own)

    def quantizer(self, role: Role) -> "BlockQuantizer":
        """A quantizer for the operand ``role`` of one layer."""
        return BlockQuantizer(self, role)


class BlockQuantizer(nn.Module):
    """What quantizes one operand of one layer; without state but for the generator of stochastic rounding."""

    signs: torch.Tensor

    def __init__(self, recipe: BlockScaling, role: Role) -> None:
        super().__init__()
        self.scheme, self.seed = recipe.of(role), recipe.seed
        self.stochastic = recipe.stochastic_gradients and role == "grad_output"
        # Only the weight gradient sums over tokens, axis 0 of both its operands; both must draw the same signs.
        groups = recipe.hadamard if role != "weight" else 0
        self.register_buffer("signs", random_signs(groups, torch.Generator().manual_seed(recipe.seed)), False)
        self._generators: dict[torch.device, torch.Generator] = {}

    def forward(self, x: torch.Tensor, record: bool = True, native: bool = False) -> "BlockScaled":
        """``x`` (rows, columns), to be quantized along one axis or the other."""
        return BlockScaled(x, self)

    def along(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """``x`` after a round trip through the scheme with blocks along ``axis``, float32; transformed if axis is 0."""
        x = x.float()
        if axis == 0 and len(self.signs):
            x = random_hadamard(F.pad(x, (0, 0, 0, -len(x) % len(self.signs))), self.signs, 0)
        if not self.stochastic:
            return quantize_blocks(x, self.scheme, axis)
        generator = self._generators.get(x.device)
        if generator is None:
            generator = self._generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        return quantize_blocks(x, self.scheme, axis, "stochastic", generator)


class BlockScaled(NamedTuple):
    """A tensor that needs a quantized copy for each axis it is summed over."""

    source: torch.Tensor
    quantizer: BlockQuantizer

    def along(self, axis: int) -> Scaled:
        """The operand of a product that sums over ``axis``: its values carry their scales already."""
        return Scaled(self.quantizer.along(self.source, axis), torch.ones((), device=self.source.device))
