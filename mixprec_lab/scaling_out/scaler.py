"""A loss scaler for gradients that lie on several ranks: one rank's infinity skips the step on all of them."""

import torch
from torch import distributed

from mixprec_lab.loss_scaling import DynamicLossScaler
from mixprec_lab.loss_scaling.unscaling import Check


class DistributedLossScaler(DynamicLossScaler):
    """``DynamicLossScaler`` whose check is taken over all ranks of a group, by one all-reduce of one number.

    It is needed where each rank holds a part of the gradient (ZeRO, FSDP, tensor parallelism): a rank that skips alone
    keeps old weights, and its scale parts from the others'.  Where every rank holds the same reduced gradient (DDP) the
    checks agree by themselves, and so they do for FSDP2's ``DTensor`` gradients, whose check torch reduces.

    ``group`` is the process group to agree with, None the whole world.  Every rank of it must check as often as every
    other.  A rank whose check raises tells the others of an overflow first, so that they do not wait for it.
    """

    group: distributed.ProcessGroup | None = None

    def _unscale(self, parameters: list[torch.Tensor]) -> Check:
        try:
            check = super()._unscale(parameters)
        except (RuntimeError, ValueError):
            device = parameters[0].device if parameters else torch.device("cpu")
            self._tell(torch.ones((), device=device))
            raise
        self._tell(check.flag)
        return check

    def _tell(self, flag: torch.Tensor) -> None:
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group)
