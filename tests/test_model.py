"""The six lines against timm's ConvMixer, the published format, and wrong use."""
import copy
import inspect
import io
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm2d
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn
from torch.nn import functional as F

from convmixer_edu.model import (NORMS, ConvMixer, PatchEmbedding, Residual, check_sizes,
                                 unit)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

SIZES = [  # dim, depth, kernel_size, patch_size, num_classes, in_chans
    (8, 1, 3, 1, 10, 3),
    (16, 3, 5, 2, 10, 3),
    (12, 2, 8, 4, 7, 1),  # even kernel, grey images
    (20, 4, 9, 7, 1000, 3),
    (6, 2, 1, 3, 2, 4),
]


def published_shapes(h, d, k, p, n, c):
    "Key -> shape of the authors' checkpoints, written out independently of the model."
    def norm(key):
        return {f"{key}.{name}": (h,) for name in
                ("weight", "bias", "running_mean", "running_var")} | {
                    f"{key}.num_batches_tracked": ()}

    shapes = {"0.weight": (h, c, p, p), "0.bias": (h,)} | norm("2")
    for i in range(3, 3 + d):
        shapes |= {f"{i}.0.fn.0.weight": (h, 1, k, k), f"{i}.0.fn.0.bias": (h,)}
        shapes |= norm(f"{i}.0.fn.2")
        shapes |= {f"{i}.1.weight": (h, h, 1, 1), f"{i}.1.bias": (h,)} | norm(f"{i}.3")
    return shapes | {f"{d + 5}.weight": (n, h), f"{d + 5}.bias": (n,)}


def from_timm(key, depth):
    "The published key of one of timm's."
    first, rest = key.split(".", 1)
    if first == "stem":
        return rest
    if first == "head":
        return f"{depth + 5}.{rest}"
    assert first == "blocks"
    block, rest = rest.split(".", 1)
    return f"{3 + int(block)}.{rest}"


def make_pair(h, d, k, p, n, c):
    "timm's model and ours with the same weights, none of them at its initial value."
    torch.manual_seed(0)
    theirs = TimmConvMixer(h, d, k, p, in_chans=c, num_classes=n)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.add_(0.1*torch.randn_like(value))
    ours = ConvMixer(h, d, k, p, n, c)
    ours.load_state_dict({from_timm(key, d): value.clone()
                          for key, value in theirs.state_dict().items()}, strict=True)
    return theirs, ours


@pytest.mark.parametrize("sizes", SIZES)
def test_state_dict_has_the_published_keys_and_shapes(sizes):
    model = ConvMixer(*sizes)
    assert type(model) is nn.Sequential
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == published_shapes(*sizes)
    assert list(shapes) == list(published_shapes(*sizes))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_checkpoint_in_the_published_format_loads_strictly(sizes, tmp_path):
    torch.manual_seed(1)
    weights = {key: torch.randn(shape) if shape else torch.tensor(3)
               for key, shape in published_shapes(*sizes).items()}
    save_file(weights, tmp_path/"published.safetensors")
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    buffer.seek(0)
    for loaded in (load_file(tmp_path/"published.safetensors"),
                   torch.load(buffer, weights_only=True)):
        model = ConvMixer(*sizes)
        model.load_state_dict(loaded, strict=True)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("sizes", SIZES)
def test_logits_gradients_and_statistics_equal_timms(sizes, mode):
    *_, p, n, c = sizes
    theirs, ours = make_pair(*sizes)
    torch.manual_seed(2)
    images, labels = torch.randn(4, c, 5*p + 1, 6*p), torch.randint(n, (4,))
    results = []
    for model in (theirs, ours):
        getattr(model, mode)()
        x = images.clone().requires_grad_()
        logits = model(x)
        F.cross_entropy(logits, labels).backward()
        results.append((logits, x.grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()
    assert results[1][1].abs().max() > 0
    grads = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        ours_grad = grads[from_timm(name, sizes[1])].grad
        assert torch.allclose(weight.grad, ours_grad, atol=1e-5), name
    buffers = dict(ours.named_buffers())
    for name, value in theirs.named_buffers():
        assert torch.allclose(value.float(), buffers[from_timm(name, sizes[1])].float(), atol=1e-5)


def test_the_body_has_at_most_six_lines():
    lines = [line.strip() for line in inspect.getsource(ConvMixer).splitlines()]
    ends = [i for i, line in enumerate(lines) if line.endswith('"""')]
    body = [line for line in lines[ends[-1] + 1:] if line and not line.startswith("#")]
    assert 1 <= len(body) <= 6 and max(map(len, body)) <= 80


def test_order_inside_a_unit_and_residual_around_the_depthwise_half_only():
    kinds = [type(layer) for layer in unit(nn.Conv2d(4, 6, 1))]
    assert kinds == [nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    block = ConvMixer(8, 1, 3, 1, 10)[3]
    assert [type(layer) for layer in block] == [Residual, nn.Conv2d, nn.GELU, nn.BatchNorm2d]
    x = torch.randn(2, 8, 5, 5)
    for weight in block.parameters():
        nn.init.zeros_(weight)
    assert torch.equal(block[0](x), x)  # a silent residual lets its input through
    assert torch.equal(block(x), torch.zeros_like(x))  # the block as a whole has none


@pytest.mark.parametrize("kernel_size", range(1, 12))
def test_the_grid_keeps_its_size_for_every_kernel(kernel_size):
    grid = ConvMixer(4, 2, kernel_size, 2, 10)[:-3](torch.randn(2, 3, 10, 14))
    assert grid.shape == (2, 4, 5, 7)


def test_blocks_differ_and_share_nothing():
    model = ConvMixer(8, 6, 5, 1, 10)
    weights = [w for w in model.parameters()]
    assert len({w.data_ptr() for w in weights}) == len(weights)
    for pick in (lambda b: b[0].fn[0].weight, lambda b: b[1].weight, lambda b: b[1].bias):
        values = [pick(model[3 + i]) for i in range(6)]
        assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_a_seed_gives_the_same_model_and_another_seed_another():
    def make(seed):
        torch.manual_seed(seed)
        return ConvMixer(8, 2, 3, 2, 10)

    x = torch.randn(2, 3, 8, 8)
    first, again, other = make(0), make(0), make(1)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                                 again.state_dict().values()))
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


@pytest.mark.parametrize("name", ["dim", "depth", "kernel_size", "patch_size", "num_classes",
                                  "in_chans"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
def test_a_bad_size_is_named(name, value):
    sizes = dict(dim=8, depth=2, kernel_size=3, patch_size=2, num_classes=10, in_chans=3)
    with pytest.raises(ValueError) as error:
        ConvMixer(**{**sizes, name: value})
    assert name in str(error.value) and repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_check_sizes_takes_whole_numbers_of_any_kind():
    import numpy as np
    assert check_sizes(dim=1, depth=np.int64(3)) is None


@pytest.mark.parametrize("shape", [(1, 3, 6, 32), (1, 3, 32, 6), (1, 3, 1, 1)])
def test_an_image_smaller_than_a_patch_is_named_with_the_patch(shape):
    model = ConvMixer(8, 1, 3, 7, 10).eval()
    with pytest.raises(ValueError, match=f"{shape[2]} x {shape[3]} pixels.*7 x 7"):
        model(torch.zeros(shape))
    assert model(torch.zeros(1, 3, 7, 7)).shape == (1, 10)  # one patch is enough


def test_patch_embedding_is_a_strided_convolution():
    layer, x = PatchEmbedding(3, 5, 4), torch.randn(2, 3, 9, 12)
    assert isinstance(layer, nn.Conv2d)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, stride=4))
    assert layer(x).shape == (2, 5, 2, 3)


def test_the_model_needs_torch_alone():
    code = "import sys, convmixer_edu.model; print(*(m for m in ('timm', 'torchvision', 'datasets') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_layer_norm_over_channels_is_timms():
    ours, theirs = NORMS["layer2d"](6), LayerNorm2d(6)
    torch.nn.init.normal_(ours.weight), torch.nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = 3*torch.randn(2, 6, 4, 5) + 1
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert ours.eps == theirs.eps


@pytest.mark.parametrize("freeze", [torch.jit.script, torch.fx.symbolic_trace])
def test_frozen_it_still_names_an_image_smaller_than_a_patch(freeze):
    model = ConvMixer(8, 2, 5, 4, 10).eval()
    frozen, x = freeze(model), torch.randn(2, 3, 8, 8)
    assert torch.equal(frozen(x), model(x))
    with pytest.raises(Exception, match="3 x 8 pixels, less than one patch of 4 x 4"):
        frozen(x[:, :, :3])


@pytest.mark.parametrize("kernel_size", [5, 8])
def test_the_whole_model_is_one_graph(kernel_size):
    model = ConvMixer(8, 2, kernel_size, 2, 10).eval()
    x = torch.randn(2, 3, 8, 8)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(whole(x), model(x), atol=1e-6)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_and_layouts(dtype):
    model = ConvMixer(8, 2, 5, 2, 10).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    moved = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    out = moved(x.to(dtype=dtype, memory_format=torch.channels_last))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), expected, atol=5e-2 if dtype == torch.bfloat16 else 1e-5)
