"""AdamW whose weights and state are all BF16: ``BF16AdamW``, with three rules for storing what a step computed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from mixprec_lab.rounding import quantize

Update = Literal["nearest", "stochastic", "kahan"]
_BLOCK = {"cpu": 1 << 16}  # elements a pass works on: four FP32 buffers of this size stay in the L2 cache
_BLOCK_ELSEWHERE = 1 << 24
_COMPENSATED = {"weight": "compensation", "exp_avg_sq": "exp_avg_sq_compensation"}
_STORED = ("weight", "exp_avg", "exp_avg_sq")


class BF16AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay for BF16 parameters, its moments in BF16 too.

    A step is computed in FP32, a block at a time, by the same fused kernel as ``torch.optim.AdamW(fused=True)``: decay
    and update reach the weight as one sum, and what is stored is rounded once.  ``update`` says how:

    ==============  ======================================================  ==========================
    update          what is stored                                          bytes of state a parameter
    ==============  ======================================================  ==========================
    ``nearest``     weight, m and v rounded to nearest even                 4
    ``stochastic``  the same rounded stochastically: right on average       4
    ``kahan``       nearest, and for weight and v what that cut off, BF16   8
    ==============  ======================================================  ==========================

    ``nearest`` is there to show what fails: updates below half a gap of the weight are lost, and v cannot decay, since
    ``beta2 * v`` rounds back to v for every beta2 above 0.998.  ``stochastic`` loses nothing on average at no memory.
    ``kahan`` is deterministic and close to FP32: a weight and its compensation hold about 17 bits, so that updates down
    to 2**-17 of the weight count; m, which decays fast enough, goes without one.  Weight and gradient come on top, two
    bytes each.  Groups may choose their own ``update``.

    ``generator`` feeds stochastic rounding, lives on the device of the parameters, and its state is part of
    ``state_dict``; without it the global one is used.  NaN and infinite gradients reach the state as in torch.

    Raises TypeError for parameters that are not BF16 and sparse gradients; ValueError for hyper-parameters out of range
    and for an unknown ``update``.  Zamirai et al., arXiv:2010.06192, introduce both remedies for the weights.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        update: Update = "stochastic",
        generator: torch.Generator | None = None,
    ) -> None:
        self._generator = generator
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "update": update})

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: torch's part and the generator."""
        return super().__getstate__() | {"_generator": self._generator}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; errors as for the class, and then nothing changes."""
        before = list(self.param_groups)
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups[:] = before
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; the loss of ``closure``, or None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            work = [(p, self._state_of(p, group["update"])) for p in group["params"] if p.grad is not None]
            batches = list(_batches(work))
            scratch = _Scratch(batches)
            for batch in batches:
                _step(batch, group, scratch, self._generator)
        return loss

    def _state_of(self, p: torch.Tensor, update: str) -> dict[str, Any]:
        if p.grad.layout != torch.strided:
            raise TypeError(f"expected dense gradients, got {p.grad.layout}: build the embedding with sparse=False")
        state = self.state[p]
        if not state:
            names = ("exp_avg", "exp_avg_sq", *(_COMPENSATED.values() if update == "kahan" else ()))
            state.update({"step": 0} | {name: torch.zeros_like(p) for name in names})
        state["step"] += 1
        return state

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with the state of the generator under ``"generator"`` (None without one)."""
        generator = None if self._generator is None else self._generator.get_state()
        return super().state_dict() | {"generator": generator}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was saved, with the same draws if there is a generator.

        ValueError for a state of other groups or another ``update``, or with a generator on one side only; then
        nothing changes.
        """
        generator = state_dict.get("generator")
        if (generator is None) != (self._generator is None):
            raise ValueError("expected a generator both in the state and here, or in neither")
        saved, own = ([g.get("update") for g in gs] for gs in (state_dict["param_groups"], self.param_groups))
        if saved != own:
            raise ValueError(f"expected groups that update by {own}, got a state of groups that update by {saved}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator"})
        if generator is not None:
            self._generator.set_state(generator)


def _check_group(group: Mapping[str, Any]) -> None:
    (beta1, beta2), update = group["betas"], group["update"]
    if update not in ("nearest", "stochastic", "kahan"):
        raise ValueError(f"expected update to be nearest, stochastic or kahan, got {update!r}")
    if not (group["lr"] >= 0 and group["eps"] >= 0 and group["weight_decay"] >= 0):
        raise ValueError(
            f"expected lr, eps and weight_decay to be at least 0, got {group['lr']}, {group['eps']} and "
            f"{group['weight_decay']}"
        )
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"expected betas in [0, 1), got {group['betas']}")
    for p in group["params"]:
        if p.dtype != torch.bfloat16:
            raise TypeError(f"expected BF16 parameters, got {p.dtype}: give those to torch.optim.AdamW")


Piece = dict[str, torch.Tensor]  # "weight", "gradient", "step" and the state, cut alike


def _batches(work: Iterable[tuple[torch.Tensor, dict[str, Any]]]) -> Iterator[list[Piece]]:
    """The parameters in lists of pieces of one device, together about a block: small ones joined, large ones cut."""
    steps: dict[tuple[int, torch.device], torch.Tensor] = {}
    batch: list[Piece] = []
    filled = 0
    for p, state in work:
        block = _BLOCK.get(p.device.type, _BLOCK_ELSEWHERE)
        count = state["step"], p.device
        if count not in steps:
            steps[count] = torch.tensor(float(state["step"]), device=p.device)
        for piece in _pieces(p, state, block):
            size = piece["weight"].numel()
            if batch and (filled + size > block or batch[0]["weight"].device != p.device):
                yield batch
                batch, filled = [], 0
            batch.append(piece | {"step": steps[count]})
            filled += size
    if batch:
        yield batch


def _size(batch: list[Piece]) -> int:
    return sum(piece["weight"].numel() for piece in batch)


def _pieces(p: torch.Tensor, state: Mapping[str, Any], block: int) -> Iterator[Piece]:
    tensors = {"weight": p.detach(), "gradient": p.grad} | {k: v for k, v in state.items() if k != "step"}
    if p.numel() <= block:
        yield tensors
        return
    rows = max(1, block * len(p) // p.numel())
    for cut in zip(*(t.split(rows) for t in tensors.values()), strict=True):
        yield dict(zip(tensors, cut, strict=True))


class _Scratch:
    """FP32 room for the largest of ``batches`` on each device, taken once a step: fresh memory is dear on a CPU."""

    def __init__(self, batches: list[list[Piece]]) -> None:
        sizes: dict[torch.device, int] = {}
        for batch in batches:
            device = batch[0]["weight"].device
            sizes[device] = max(sizes.get(device, 0), _size(batch))
        self._room = {device: torch.empty(4 * n, device=device) for device, n in sizes.items()}
        self._rounded = {device: torch.empty(3 * n, device=device) for device, n in sizes.items()}

    def rows(self, batch: list[Piece]) -> torch.Tensor:
        """Four rows as long as ``batch``: weight, m, v and gradient."""
        n = _size(batch)
        return self._room[batch[0]["weight"].device][: 4 * n].view(4, n)

    def rounded(self, batch: list[Piece]) -> torch.Tensor:
        """Three more, to round weight, m and v into."""
        n = _size(batch)
        return self._rounded[batch[0]["weight"].device][: 3 * n].view(3, n)


def _step(batch: list[Piece], group: Mapping[str, Any], scratch: _Scratch, generator: torch.Generator | None) -> None:
    """Widen to FP32, step, store."""
    rows = scratch.rows(batch)
    wide = {name: _shaped(row, batch) for name, row in zip((*_STORED, "gradient"), rows, strict=True)}
    compensated = _COMPENSATED if group["update"] == "kahan" else {}
    for name, views in wide.items():
        torch._foreach_copy_(views, [piece[name] for piece in batch])
    for name, rest in compensated.items():
        torch._foreach_add_(wide[name], [piece[rest] for piece in batch])
    torch._fused_adamw_(
        wide["weight"], wide["gradient"], wide["exp_avg"], wide["exp_avg_sq"], [], [p["step"] for p in batch],
        lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
    if group["update"] == "stochastic":
        rounded = quantize(rows[:3], "bf16", "stochastic", "native", generator, out=scratch.rounded(batch))
        wide = {name: _shaped(row, batch) for name, row in zip(_STORED, rounded, strict=True)}
    for name in _STORED:
        torch._foreach_copy_([piece[name] for piece in batch], wide[name])
    for name, rest in compensated.items():
        torch._foreach_sub_(wide[name], [piece[name] for piece in batch])
        torch._foreach_copy_([piece[rest] for piece in batch], wide[name])


def _shaped(row: torch.Tensor, batch: list[Piece]) -> list[torch.Tensor]:
    flat = row.split([piece["weight"].numel() for piece in batch])
    return [part.view(piece["weight"].shape) for part, piece in zip(flat, batch, strict=True)]
