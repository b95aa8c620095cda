"""The formulas against the module, the hooks, PyTorch's own counter and published figures."""
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convmixer_edu.anatomy import (Layer, count_saved_activations, count_macs, count_parameters, layers,
                                   receptive_field)
from convmixer_edu.model import PAPER_MODELS, ConvMixer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

PUBLISHED = {  # (h, d, k, p): parameters, timm's GMACs
    (1536, 20, 9, 7): (51_625_960, 48.68),
    (768, 32, 7, 7): (21_110_248, 19.55),
    (1024, 20, 9, 14): (24_383_464, 5.55),
}
FULL_GMACS = {(1536, 20, 9, 7): 51.1, (768, 32, 7, 7): 20.7, (1024, 20, 9, 14): 5.95}
GRID = [(*sizes, n, c) for sizes, (n, c) in itertools.product(
    itertools.product((2, 9, 32), (1, 4), (1, 2, 8, 9), (1, 3, 4)), ((2, 1), (1000, 3)))]


def meta(*sizes):
    with torch.device("meta"):
        return ConvMixer(*sizes)


def test_parameters_equal_the_modules_over_a_grid_of_sizes():
    for sizes in GRID:
        assert count_parameters(*sizes) == sum(w.numel() for w in meta(*sizes).parameters()), sizes


@pytest.mark.parametrize("size", list(PAPER_MODELS))
def test_parameters_of_the_papers_models(size):
    k, p, data = PAPER_MODELS[size]
    sizes = (*size, k, p, data["num_classes"])
    assert count_parameters(*sizes) == sum(w.numel() for w in meta(*sizes).parameters())


def test_macs_equal_the_hooks_over_a_grid_of_sizes():
    for i, sizes in enumerate(GRID):
        side = 13 + i % 4  # not divisible by the patch size, too
        seen = layers(meta(*sizes), side, in_chans=sizes[-1])
        assert sum(x.macs for x in seen) == count_macs(*sizes, image_size=side), sizes
        assert sum(x.parameters for x in seen) == count_parameters(*sizes), sizes


@pytest.mark.parametrize("sizes", list(PUBLISHED))
def test_published_figures(sizes):
    parameters, gmacs = PUBLISHED[sizes]
    assert count_parameters(*sizes) == parameters
    assert round(count_macs(*sizes, exclude_depthwise=True)/1e9, 2) == gmacs
    assert count_macs(*sizes)/1e9 == pytest.approx(FULL_GMACS[sizes], rel=2e-3)


@pytest.mark.parametrize("sizes", list(PUBLISHED))
def test_macs_equal_pytorchs_own_counter(sizes):
    with FlopCounterMode(display=False) as witness, torch.no_grad():
        meta(*sizes)(torch.empty(1, 3, 224, 224, device="meta"))
    assert count_macs(*sizes) == witness.get_total_flops()/2


def test_what_exclude_depthwise_leaves_out_and_adds():
    h, d, k, p, n, c, side = 24, 3, 5, 4, 10, 3, 32
    places = (side//p)**2
    sizes = dict(dim=h, depth=d, kernel_size=k, patch_size=p, num_classes=n, in_chans=c,
                 image_size=side)
    seen = layers(ConvMixer(h, d, k, p, n, c), side)
    depthwise = sum(x.macs for x in seen if x.kind == "depthwise")
    norms = sum(2*x.shape[0]*x.shape[1]*x.shape[2] for x in seen if x.kind == "BatchNorm2d")
    assert depthwise == places*d*h*k*k
    assert count_macs(**sizes, exclude_depthwise=True) == (
        count_macs(**sizes) - depthwise + norms + places*h)


@pytest.mark.parametrize("depth, kernel_size, patch_size",
                         [*itertools.product((1, 2, 3), (1, 2, 3, 5, 8, 9), (1, 2, 3))])
def test_receptive_field_equals_the_nonzero_gradient(depth, kernel_size, patch_size):
    # positive weights and images, so that no two influences cancel; double precision
    side = receptive_field(depth, kernel_size, patch_size)
    model = ConvMixer(2, depth, kernel_size, patch_size, 2, 1).double().eval()
    for weight in model.parameters():
        nn.init.constant_(weight, 1/max(1, weight[0].numel()))
    places = 2*(side//patch_size) + 1
    image = torch.ones(1, 1, places*patch_size, places*patch_size, dtype=torch.double,
                       requires_grad=True)
    model[:-3](image)[0, :, places//2, places//2].sum().backward()
    seen = image.grad[0, 0].ne(0)
    for axis in (0, 1):
        at = seen.any(axis).nonzero().flatten()
        assert len(at) == side and int(at[-1] - at[0]) + 1 == side
    assert seen.sum() == side*side


@pytest.mark.parametrize("h, d, k, p, c, side, batch", [(5, 2, 2, 3, 3, 20, 3), (6, 1, 3, 1, 1, 5, 1), (5, 4, 5, 3, 3, 20, 3), (16, 7, 9, 4, 2, 33, 2)])
def test_kept_values_are_those_that_autograd_puts_aside(h, d, k, p, c, side, batch):
    """On images that the patches do not divide, too; by the storage of every tensor that is saved."""
    model, seen = ConvMixer(h, d, k, p, 7, c), {}
    own = {w.untyped_storage().data_ptr() for w in model.state_dict().values()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tensor.dim() > 1 and storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (tensor, storage.nbytes() // 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.rand(batch, c, side, side)).sum().backward()
    padding = 0 if k % 2 else batch * d * h * ((side // p + 1) ** 2 - (side // p) ** 2)
    assert sum(values for _, values in seen.values()) == batch * count_saved_activations(h, d, p, c, side) + padding


def test_receptive_field_of_the_papers_models():
    assert receptive_field(20, 9, 7) == 7*(1 + 20*8) == 1127
    assert receptive_field(32, 7, 7) == 1351
    assert receptive_field(1, 1, 5) == 5


def test_layers_names_kinds_and_shapes():
    seen = layers(ConvMixer(8, 2, 4, 1, 10, in_chans=1), 6, in_chans=1)
    assert all(isinstance(x, Layer) for x in seen)
    convs = [(x.name, x.kind, x.shape) for x in seen if x.macs]
    assert convs == [("0", "patch", (8, 6, 6)), ("3.0.fn.0", "depthwise", (8, 6, 6)),
                     ("3.1", "pointwise", (8, 6, 6)), ("4.0.fn.0", "depthwise", (8, 6, 6)),
                     ("4.1", "pointwise", (8, 6, 6)), ("7", "linear", (10,))]
    with pytest.raises(AttributeError):
        seen[0].macs = 0  # a record, not a notebook


def test_layers_counts_groups_strides_and_tokens_of_other_models():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(2),
                          nn.Linear(16, 5))
    conv, _, linear = layers(model, 8, in_chans=4)
    assert (conv.kind, conv.macs) == ("convolution", 6*4*4*(4//2)*9)
    assert (linear.kind, linear.macs) == ("linear", 6*5*16)


def test_layers_leaves_the_model_as_it_found_it():
    model = ConvMixer(8, 2, 3, 1, 10)
    model[3].eval()
    modes = [m.training for m in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers(model, 8)
    with pytest.raises(RuntimeError):
        layers(model, 8, in_chans=5)  # even when the model refuses the image
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("call", [
    lambda v: count_parameters(v, 1, 1, 1), lambda v: count_parameters(1, v, 1, 1),
    lambda v: count_parameters(1, 1, 1, 1, num_classes=v), lambda v: count_macs(1, 1, v, 1),
    lambda v: count_macs(1, 1, 1, 1, image_size=v), lambda v: receptive_field(v, 1, 1),
    lambda v: receptive_field(1, 1, v), lambda v: layers(ConvMixer(2, 1, 1, 1), v)])
@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_a_bad_size_is_named(call, value):
    with pytest.raises(ValueError, match=f"got {value}"):
        call(value)


def test_an_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match="image_size.*7.*got 6"):
        count_macs(8, 1, 3, 7, image_size=6)
    with pytest.raises(ValueError, match="6 x 6"):
        layers(ConvMixer(8, 1, 3, 7), 6)


def test_defaults_are_imagenets():
    assert count_macs(8, 1, 3, 1) == count_macs(8, 1, 3, 1, num_classes=1000, in_chans=3, image_size=224)
    assert count_saved_activations(8, 1, 7) == count_saved_activations(8, 1, 7, in_chans=3, image_size=224)
    assert count_parameters(8, 1, 3, 7) == count_parameters(8, 1, 3, 7, num_classes=1000, in_chans=3)


def test_an_image_of_one_patch_is_enough():
    assert count_macs(8, 1, 3, 7, image_size=7) == 8 * (9 + 8 + 3 * 49 + 1000)


def test_a_convolution_of_one_channel_is_not_depthwise():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 2, 1))
    assert [x.kind for x in layers(model, 5, in_chans=1)] == ["convolution", "pointwise", "pointwise"]


def test_two_channels_are_enough_for_a_depthwise_convolution():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Conv2d(2, 2, 1))
    assert [x.kind for x in layers(model, 5, in_chans=2)] == ["depthwise", "pointwise"]


def test_layers_shows_the_model_one_black_image():
    seen, model = [], nn.Sequential(nn.Conv2d(3, 4, 1))
    model.register_forward_pre_hook(lambda module, images: seen.append(images[0]))
    layers(model, 5)
    assert [tuple(x.shape) for x in seen] == [(1, 3, 5, 5)] and not seen[0].any()
