"""The device: what the caller asked for, else what the machine has, with the reason."""

import pytest
import torch

from mixprec_lab import device


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("MIXPREC_DEVICE", "cpu")
    assert str(device.pick()) == "cpu: set by MIXPREC_DEVICE=cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setenv("MIXPREC_DEVICE", name)
    with pytest.raises(ValueError, match=f"got '{name}'"):
        device.pick()


def test_without_cuda_the_cpu_answers_and_says_why(monkeypatch):
    monkeypatch.delenv("MIXPREC_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = device.pick()
    assert choice.device == torch.device("cpu") and "no CUDA device" in choice.reason


def test_one_thread_gives_the_others_back_after_an_error_too():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), device.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
