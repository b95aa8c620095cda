"""Which device a model runs on when nobody says."""

import pytest
import torch

from convmixer_edu.machine import choose_device


@pytest.mark.parametrize("cuda, mps, chosen", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_a_gpu_is_taken_if_there_is_one(monkeypatch, cuda, mps, chosen):
    """CUDA is asked first, then Apple's; what was chosen is tried before it is given back."""
    tried = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: tried.append(device.type) or torch.tensor(0.0))
    assert choose_device().type == chosen and tried == [chosen]


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device 'mps' cannot be used here .*: try cpu"):
        choose_device("mps")


def test_a_gpu_with_a_number_is_the_current_one(monkeypatch):
    """A graph is captured, and an event recorded, on the current device."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.tensor(0.0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") == chosen[0]
    choose_device("cuda"), choose_device("cpu")
    assert len(chosen) == 1
