"""quantize_scaled: the same bits as quantize of the scaled tensor, in either dtype."""

import pytest
import torch

from mixprec_lab.rounding import quantize, quantize_scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "bf16"])
def test_quantize_scaled_is_quantize_of_the_scaled_tensor(name, dtype):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    longer = torch.cat([patterns.float() * 1.001, patterns.float()])
    for x in (patterns, longer, longer.double().float().reshape(2, -1).T, torch.empty(0, 3)):
        for scale in (2.0**-10, 1.0, 0.7, 3e38):
            got = quantize_scaled(x, torch.tensor(scale), name, dtype)
            expected = quantize(x.float() * torch.tensor(scale), name)
            assert got.dtype == dtype and got.shape == x.shape
            assert torch.equal(got.float().nan_to_num(nan=7e37), expected.nan_to_num(nan=7e37))
            assert torch.equal(got.signbit() | got.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2), torch.ones(2), "fp8_e4m3"), "0-dim float32"),
        ((torch.ones(2), torch.ones((), dtype=torch.float64), "fp8_e4m3"), "0-dim float32"),
        ((torch.ones(2), torch.ones(()), "fp16", torch.bfloat16), "hold FP16"),
        ((torch.ones(2), torch.ones(()), "fp8_e4m3", torch.float16), "torch.float16"),
    ],
)
def test_quantize_scaled_refuses_scales_and_dtypes_that_do_not_fit(arguments, said):
    with pytest.raises(ValueError, match=said):
        quantize_scaled(*arguments)
