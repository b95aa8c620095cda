"""The depthwise convolution: equal to the library's, whatever the layout, the type and the kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convmixer_edu import depthwise
from convmixer_edu.depthwise import (DepthwiseConv2d, by_shifts, depthwise_conv, fast_depthwise,
                                     weight_gradient_methods)
from convmixer_edu.model import ConvMixer


@pytest.fixture
def eager(monkeypatch):
    """The sum over shifts as it is written: compiling it anew for each shape would take minutes."""
    monkeypatch.setattr(depthwise, "_compiled", by_shifts)


def inputs(k, dtype=torch.float32, layout=torch.contiguous_format, size=(3, 8, 7, 6)):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(*size, generator=g).to(dtype).to(memory_format=layout)
    w, b = torch.randn(size[1], 1, k, k, generator=g).to(dtype), torch.randn(size[1], generator=g).to(dtype)
    return [t.requires_grad_() for t in (x, w, b)]


@pytest.mark.parametrize("method", weight_gradient_methods())
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_to_the_library(eager, method, k, layout):
    ours, theirs = inputs(k, torch.float64, layout), inputs(k, torch.float64, layout)
    a = depthwise_conv(*ours, method=method)
    b = F.conv2d(*theirs, padding="same", groups=8)
    assert torch.equal(a, b)
    weight = torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(0))
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", weight_gradient_methods())
@pytest.mark.parametrize("k", [3, 4])
def test_double_precision_gradcheck(eager, method, k):
    small = inputs(k, torch.float64, size=(2, 3, 5, 4))
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv(*t, method=method), small)


@pytest.mark.parametrize("k", [3, 4])
def test_the_compiled_sum_is_the_sum(k):
    x, grad = (inputs(seed, layout=torch.channels_last)[0].detach() for seed in (k, k + 1))
    ours, plain = depthwise._compiled(x, grad, k), by_shifts(x, grad, k)
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_good_as_bfloat16_can_be(eager):
    x, w, b = inputs(5, torch.bfloat16, torch.channels_last)
    depthwise_conv(x, w, b).float().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    F.conv2d(*exact, padding="same", groups=8).sum().backward()
    assert w.grad.dtype == torch.bfloat16
    assert (w.grad.double() - exact[1].grad).abs().max() < 0.02 * exact[1].grad.abs().max()


def test_autocast_casts_as_the_library_does(eager):
    x, w, b = inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = depthwise_conv(x, w, b), F.conv2d(x, w, b, padding="same", groups=8)
    assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    ours.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_it_compiles_without_a_graph_break(eager):
    model = fast_depthwise(ConvMixer(8, 2, 3, 2, num_classes=4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-4, atol=1e-5) for a, p in zip(got, model.parameters()))


def test_swapping_changes_neither_names_nor_values():
    torch.manual_seed(0)
    model = ConvMixer(8, 2, 3, 2, num_classes=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast_depthwise(model)
    assert sum(isinstance(m, DepthwiseConv2d) for m in model.modules()) == 2
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_only_depthwise_convolutions_are_swapped():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, groups=4, padding=1),
                          nn.Conv2d(4, 4, 3, groups=2, padding="same"), nn.Conv2d(4, 4, 3, groups=4, padding="same"))
    fast_depthwise(model)
    assert [isinstance(m, DepthwiseConv2d) for m in model] == [False, False, False, True]


def test_wrong_use_says_what_was_wrong():
    x, w, b = inputs(3)
    with pytest.raises(ValueError, match="method is 'best'"):
        depthwise_conv(x, w, b, method="best")
    with pytest.raises(ValueError, match=r"\(8, 1, 3, 3\) for 4 channels"):
        depthwise_conv(x[:, :4], w, b)
