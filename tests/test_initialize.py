"""First filters: drawn kernels have the covariance of the formula, other weights stay, the seed decides."""

import pytest
import torch

from convmixer_edu.initialize import WIDTH, covariance_init, filter_covariance
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import Config, with_settings
from convmixer_edu.train import train


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("variance", [0.05, 0.5, 2.0])
def test_the_matrix_is_a_covariance(k, variance):
    m = filter_covariance(k, variance)
    assert m.shape == (k * k, k * k) and torch.equal(m, m.T)
    assert torch.linalg.eigvalsh(m).min() > -1e-12
    grid = m.diagonal().view(k, k)
    assert torch.allclose(grid, grid.T) and torch.allclose(grid, grid.flip(0, 1))
    assert grid.max() == grid[(k - 1) // 2, (k - 1) // 2]


def test_kernels_have_the_covariance_asked_for_and_nothing_else_changes():
    torch.manual_seed(0)
    model = ConvMixer(20_000, 3, 5, 4, 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    covariance_init(model, torch.Generator().manual_seed(0))
    a, b, c = WIDTH
    for i, t in enumerate((0, 0.5, 1)):
        flat = model[3 + i][0].fn[0].weight.detach().flatten(1)
        wanted = filter_covariance(5, a + b * t + c * t * t / 2).float()
        assert (flat.T @ flat / len(flat) - wanted).abs().max() < 0.03
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{3 + i}.0.fn.0.weight" for i in range(3)}


@pytest.mark.parametrize("variance", [0, -1.0, float("nan")])
def test_a_width_that_is_none_is_refused(variance):
    with pytest.raises(ValueError, match="above 0"):
        filter_covariance(3, variance)


def test_a_run_draws_its_filters_from_its_seed(tmp_path):
    c = Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=1, batch_size=64, limit=100, flip=False,
               depthwise="library")
    losses = {}
    for name, settings in {"a": {"init": "covariance"}, "b": {"init": "covariance"}, "c": {},
                           "d": {"init": "covariance", "seed": 1}}.items():
        record = train(with_settings(c, settings), "digits", tmp_path / name, device="cpu")
        losses[name] = record["test_loss"]
    assert losses["a"] == losses["b"] and len(set(losses.values())) == 3
