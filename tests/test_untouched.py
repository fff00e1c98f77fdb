"""A model that somebody looked at is the model that it was."""

import pytest
import torch
from torch import nn

from mixprec_lab.untouched import untouched


class Counter(nn.Module):
    """Writes one buffer in place, replaces another, and draws a random number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("none", None)

    def forward(self, x):
        self.count += 1
        self.last = x + torch.rand(3)
        return self.last


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_and_random_state_are_as_before_even_after_an_error(fails):
    model = nn.Sequential(Counter(), nn.BatchNorm1d(3), nn.Dropout())
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    try:
        with untouched(model):
            model(torch.ones(2, 3))
            assert model[0].count == 1 and model[1].num_batches_tracked == 1
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1])
    assert torch.equal(torch.get_rng_state(), state)
