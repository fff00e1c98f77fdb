"""A model parameter and its FP32 master, and the copies between them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

NARROW = (torch.float16, torch.bfloat16)  #: parameters that need a master
WIDE = (torch.float32, torch.float64)  #: parameters that are their own


Link = tuple[Mapping[str, Any], str, object]  # a dict of a module, a key, and what has to stand there


class Owner:
    """Where a model keeps a parameter, link by link: so that a replaced parameter or module is noticed."""

    def __init__(self, name: str, links: tuple[Link, ...]) -> None:
        self.name, self._links = name, links

    def holds(self) -> bool:
        """Whether the path through the model still leads to the same parameter."""
        return all(slots.get(key) is thing for slots, key, thing in self._links)


def owners_of(model: nn.Module) -> dict[torch.Tensor, Owner]:
    """The first place of every parameter of ``model``; tied ones have several."""
    owners: dict[torch.Tensor, Owner] = {}
    paths: dict[str, tuple[nn.Module, tuple[Link, ...]]] = {}
    for prefix, module in model.named_modules():
        links: tuple[Link, ...] = ()
        if prefix:
            above, _, key = prefix.rpartition(".")
            parent, links = paths[above]
            links = (*links, (parent._modules, key, module))
        paths[prefix] = module, links
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{key}" if prefix else key
                owners.setdefault(parameter, Owner(name, (*links, (module._parameters, key, parameter))))
    return owners


class Pair:
    """``parameter`` of the model and ``master``, which the optimizer steps: FP32, or the same object if that is wide.

    ``version`` is the write counter of ``parameter`` when the two last agreed.
    """

    def __init__(self, parameter: torch.Tensor, owner: Owner) -> None:
        if parameter.dtype not in NARROW + WIDE:
            raise TypeError(
                f"expected parameters in FP16, BF16, FP32 or FP64, got {parameter.dtype} for {owner.name!r}: "
                f"take it out of the optimizer"
            )
        self.parameter, self.owner = parameter, owner
        self.master = parameter
        if self.is_narrow:
            wide = parameter.detach().to(torch.float32, copy=True)
            self.master = nn.Parameter(wide, requires_grad=parameter.requires_grad)
        self.version = parameter._version
        self._spare: torch.Tensor | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether the master is a tensor of its own."""
        return self.parameter.dtype in NARROW

    def clear(self) -> None:
        """Drop both gradients.  On a CPU the master's memory is kept for the next: fresh memory costs more than a copy.

        Elsewhere torch's caching allocator serves it again, and until then the backward pass needs it.
        """
        if self.parameter.device.type == "cpu" and self.master.grad is not None:
            self._spare = self.master.grad
        self.parameter.grad = self.master.grad = None

    def room(self) -> torch.Tensor:
        """Memory for the master's gradient, with anything in it."""
        spare, self._spare = self._spare, None
        return torch.empty_like(self.master) if spare is None else spare

    def check(self, *, values: bool = True) -> None:
        """Raise RuntimeError if the parameter was replaced or moved, or, if ``values``, written to by somebody else."""
        p, m, name = self.parameter, self.master, self.owner.name
        if not self.owner.holds():
            raise RuntimeError(
                f"the model no longer holds the parameter {name!r} that this optimizer was built on (converted layer, "
                f"load_state_dict(assign=True), ...): build optimizer and MasterWeightOptimizer after that"
            )
        if p is m:
            return
        if p.device != m.device or not self.is_narrow:
            raise RuntimeError(
                f"parameter {name!r} is {p.dtype} on {p.device} now, its master is on {m.device}: move and cast the "
                f"model before MasterWeightOptimizer takes it over"
            )
        if values and p._version != self.version:
            if not _same_bits(p, m.to(p.dtype)):
                raise RuntimeError(
                    f"parameter {name!r} was changed by somebody else since the last step: keep that with "
                    f"sync_master_from_model(), or undo it with copy_master_to_model()"
                )
            self.version = p._version


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int16), b.detach().view(torch.int16))


def make_pairs(parameters: Iterable[torch.Tensor], owners: Mapping[torch.Tensor, Owner]) -> list[Pair]:
    """One pair for each of ``parameters``; ValueError for one that the model does not have."""
    pairs = []
    for parameter in parameters:
        if parameter not in owners:
            raise ValueError(
                f"expected an optimizer built on the parameters of the model, got a tensor of shape "
                f"{tuple(parameter.shape)} that the model does not hold: build it on model.parameters()"
            )
        pairs.append(Pair(parameter, owners[parameter]))
    return pairs


def hand_over(optimizer: torch.optim.Optimizer, pairs: Iterable[Pair]) -> None:
    """Put the masters in the place of the parameters in the groups of ``optimizer``; its state follows, in FP32."""
    masters = {pair.parameter: pair.master for pair in pairs}
    for group in optimizer.param_groups:
        group["params"] = [masters[p] for p in group["params"]]
    for parameter, master in masters.items():
        if master is not parameter and parameter in optimizer.state:
            optimizer.state[master] = {key: _widened(value) for key, value in optimizer.state.pop(parameter).items()}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in NARROW else value


@torch.no_grad()
def move_gradients(pairs: Iterable[Pair]) -> None:
    """Add the model's gradients to the masters' in FP32, in one pass, and free them; TypeError for sparse ones."""
    loaded = [pair for pair in pairs if pair.parameter.grad is not None]
    for pair in loaded:
        if pair.parameter.grad.layout != torch.strided:
            raise TypeError(
                f"expected a dense gradient, got {pair.parameter.grad.layout} for {pair.owner.name!r}: "
                f"build the embedding with sparse=False"
            )
    fresh = [pair for pair in loaded if pair.master.grad is None]
    added = [pair for pair in loaded if pair.master.grad is not None]
    if added:
        torch._foreach_add_([pair.master.grad for pair in added], [pair.parameter.grad for pair in added])
    if fresh:
        wide = [pair.room() for pair in fresh]
        torch._foreach_copy_(wide, [pair.parameter.grad for pair in fresh])
        for pair, gradient in zip(fresh, wide, strict=True):
            pair.master.grad = gradient
    for pair in loaded:
        pair.parameter.grad = None


@torch.no_grad()
def store(pairs: list[Pair]) -> None:
    """Round every master to the format of its parameter, to nearest even, and remember that the two agree."""
    if pairs:
        torch._foreach_copy_([pair.parameter for pair in pairs], [pair.master for pair in pairs])
    for pair in pairs:
        pair.version = pair.parameter._version


@torch.no_grad()
def load(pairs: list[Pair]) -> None:
    """Make every master equal to its parameter."""
    if pairs:
        torch._foreach_copy_([pair.master for pair in pairs], [pair.parameter for pair in pairs])
    for pair in pairs:
        pair.version = pair.parameter._version
