"""The shared networks and data: fixed by their seeds, really trained, leaving the caller's state alone."""

import pytest
import torch

from mixprec_lab.models import autoencoder, convnet, digits, recorded_gradients, train, transformer


def test_digits_are_split_once_and_whole():
    data = digits()
    assert data.train_images.shape == (1437, 1, 8, 8) and data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.min() == 0 and data.train_images.max() == 1
    assert torch.bincount(torch.cat([data.train_labels, data.test_labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert torch.equal(data.test_images, digits().test_images)


def test_convnet_is_fixed_by_its_seed_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = (convnet(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    assert sum(p.numel() for p in a.parameters()) == 13_170


def test_training_learns_and_calls_back():
    data, model, steps = digits(), convnet(), []
    losses = train(model, data, 150, after_backward=lambda step, m: steps.append((step, m[0].weight.grad is not None)))
    assert steps == [(i, True) for i in range(150)]
    assert losses[0] > 2 and losses[-1] < 0.5
    assert (model(data.test_images).argmax(1) == data.test_labels).float().mean() > 0.9


def test_recorded_gradients_leave_no_trace():
    data, model = digits(), convnet()
    train(model, data, 3)
    before = [p.grad.clone() for p in model.parameters()]
    gradients = recorded_gradients(model, data, batch_size=32)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert not any(layer._forward_hooks for layer in model)
    loss = torch.nn.functional.cross_entropy(model(data.train_images[:32]), data.train_labels[:32])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert torch.allclose(gradients["weights"], expected, rtol=1e-4, atol=1e-9)
    assert gradients["activations"].numel() == sum(32 * n for n in (1024, 1024, 1024, 1024, 256, 256, 40, 40, 10))


def test_transformer_is_fixed_by_its_seed_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = (transformer(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    assert sum(p.numel() for p in a.parameters()) == 18_026


def test_attention_is_the_fused_attention_written_out():
    attention = transformer().blocks[0].attention.double()
    x = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (
        layer(x).view(3, 8, 2, 16).transpose(1, 2) for layer in (attention.query, attention.key, attention.value)
    )
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 8, 32)
    assert torch.allclose(attention(x), attention.out(fused), rtol=1e-12, atol=1e-14)


def test_transformer_learns_the_digits():
    data, model = digits(), transformer()
    losses = train(model, data, 150)
    assert losses[0] > 2 and losses[-1] < 0.8
    assert (model(data.test_images).argmax(1) == data.test_labels).float().mean() > 0.8


def test_transformer_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="multiple of heads, got 32 and 5"):
        transformer(heads=5)


def test_autoencoder_is_fixed_by_its_seed_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b, c = (autoencoder(seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))
    assert sum(p.numel() for p in a.parameters()) == 7_856


def test_autoencoder_learns_more_than_the_mean_image():
    data, model = digits(), autoencoder()
    images, test = data.train_images.flatten(1), data.test_images.flatten(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x = images[torch.randint(len(images), (64,), generator=generator)]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()
    error = torch.nn.functional.mse_loss(model(test), test)
    assert error < 0.5 * torch.nn.functional.mse_loss(images.mean(0).expand_as(test), test)
