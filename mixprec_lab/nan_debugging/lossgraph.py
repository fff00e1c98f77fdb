"""The loss as autograd sees it: what its nodes saved on the way from the model's output tells where it went bad."""

from typing import Any, NamedTuple

import torch

_SAVED = ("_saved_target", "_saved_self", "_saved_other", "_saved_input", "_saved_result", "_saved_exponent")


class Saved(NamedTuple):
    """One tensor that a node of the loss keeps for its backward."""

    node: str  #: "PowBackward0"
    name: str  #: "self", "target", "result"
    tensor: torch.Tensor
    outside: bool  #: whether the node, or one below it, has an operand that is not in the graph
    ignore: int | None = None  #: the index that a classification loss ignores


def saved_by_loss(loss: torch.Tensor, stop: list[Any], limit: int = 48) -> list[Saved]:
    """The saved tensors of the nodes between ``loss`` and the nodes in ``stop``, those next to the model first."""
    found: list[list[Saved]] = []
    level, seen = [loss.grad_fn], set()
    while level and len(seen) < limit:
        here, following = [], []
        for node in level:
            if node is None or id(node) in seen or any(node is s for s in stop):
                continue
            seen.add(id(node))
            children = [child for child, _ in node.next_functions]
            outside = None in children or any(_has_gap(child, stop) for child in children)
            ignore = _read(node, "_saved_ignore_index")
            here += [Saved(node.name(), name.removeprefix("_saved_"), value, outside, _signed(ignore))
                     for name in _SAVED if isinstance(value := _read(node, name), torch.Tensor)]  # fmt: skip
            following += children
        found.append(here)
        level = following
    return [saved for level in reversed(found) for saved in level]


def nodes_of_loss(loss: torch.Tensor, stop: list[Any], limit: int = 48) -> list[str]:
    """The names of the nodes between ``loss`` and ``stop``, the loss first."""
    names, level, seen = [], [loss.grad_fn], set()
    while level and len(seen) < limit:
        following = []
        for node in level:
            if node is None or id(node) in seen or any(node is s for s in stop):
                continue
            seen.add(id(node))
            names.append(node.name())
            following += [child for child, _ in node.next_functions]
        level = following
    return names


def _has_gap(node: Any, stop: list[Any]) -> bool:
    if node is None or any(node is s for s in stop):
        return False
    return any(child is None for child, _ in node.next_functions)


def _read(node: Any, name: str) -> Any:
    try:
        return getattr(node, name, None)
    except RuntimeError:  # freed already, or overwritten in place: then it tells nothing
        return None


def _signed(index: Any) -> int | None:
    """Autograd shows -100 as an unsigned 64-bit number."""
    return None if not isinstance(index, int) else index - 2**64 if index >= 2**63 else index
