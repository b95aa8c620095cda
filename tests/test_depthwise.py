"""The depthwise convolution: equal to the library's, whatever the layout, the type and the kernel."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import HOUR
from torch import nn

from convmixer_edu import depthwise
from convmixer_edu.depthwise import (DepthwiseConv2d, by_groups, can_use, choose_method, depthwise_conv,
                                     fast_depthwise)
from convmixer_edu.model import ConvMixer


METHODS = ("library", "groups")  # "triton" has tests of its own


def inputs(k, dtype=torch.float32, layout=torch.contiguous_format, size=(3, 8, 7, 6)):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(*size, generator=g).to(dtype).to(memory_format=layout)
    w, b = torch.randn(size[1], 1, k, k, generator=g).to(dtype), torch.randn(size[1], generator=g).to(dtype)
    return [t.requires_grad_() for t in (x, w, b)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_to_the_library(method, k, layout):
    ours, theirs = inputs(k, torch.float64, layout), inputs(k, torch.float64, layout)
    a = depthwise_conv(*ours, method=method)
    b = F.conv2d(*theirs, padding="same", groups=8)
    assert torch.equal(a, b)
    weight = torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(0))
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [3, 4])
def test_double_precision_gradcheck(method, k):
    small = inputs(k, torch.float64, size=(2, 3, 5, 4))
    assert torch.autograd.gradcheck(lambda *t: depthwise_conv(*t, method=method), small)


def test_bfloat16_is_as_good_as_bfloat16_can_be():
    x, w, b = inputs(5, torch.bfloat16, torch.channels_last)
    depthwise_conv(x, w, b).float().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    F.conv2d(*exact, padding="same", groups=8).sum().backward()
    assert w.grad.dtype == torch.bfloat16
    assert (w.grad.double() - exact[1].grad).abs().max() < 0.02 * exact[1].grad.abs().max()


def test_autocast_casts_as_the_library_does():
    x, w, b = inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = depthwise_conv(x, w, b), F.conv2d(x, w, b, padding="same", groups=8)
    assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    ours.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_it_compiles_without_a_graph_break():
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


def test_only_what_is_needed_is_computed(monkeypatch):
    x, w, b = inputs(3)
    monkeypatch.setattr(depthwise, "weight_gradient", None)  # calling it would raise
    depthwise_conv(x, w.detach(), b).sum().backward()
    assert w.grad is None and torch.allclose(b.grad, torch.full((8,), 3 * 7 * 6.))
    monkeypatch.undo()
    monkeypatch.setattr(depthwise, "_input_gradient", None)
    depthwise_conv(x.detach(), w, None).sum().backward()
    assert w.grad is not None


def test_the_operator_gives_the_gradients_of_weight_and_bias():
    x, _, _ = inputs(3)
    up = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    weight, bias = depthwise.weight_gradient(x.detach(), up, 3, "groups")
    assert torch.allclose(weight, by_groups(x.detach(), up, 3), atol=1e-4)
    assert torch.allclose(bias, up.sum((0, 2, 3)), atol=1e-4)
    torch.library.opcheck(depthwise.weight_gradient, (x.detach(), up, 3, "groups"))


def test_the_probe_keeps_the_fastest_that_is_right(monkeypatch):
    monkeypatch.setattr(depthwise, "_chosen", {})
    ticks = {"library": 3.0, "groups": 1.0}
    monkeypatch.setattr(depthwise, "time_call", lambda step, device, calls=20: ticks[step.__defaults__[0]])
    shape = (2, 4, 5, 6)
    assert choose_method(shape, 3) == ("groups", ticks)
    monkeypatch.setattr(depthwise, "time_call", None)
    assert choose_method(list(shape), 3)[0] == "groups", "kept for the process"
    assert set(depthwise._candidates(shape, 9, torch.float32, torch.device("cpu"), torch.channels_last)) == {
        "library", "groups"}


def test_the_probe_calls_a_hopeless_way_once(monkeypatch):
    monkeypatch.setattr(depthwise, "_chosen", {})
    ticks, asked = {"library": 2.0, "groups": 6.1}, []

    def clock(step, device, calls=20):
        asked.append(step.__defaults__[0])
        return ticks[asked[-1]]
    monkeypatch.setattr(depthwise, "time_call", clock)
    assert choose_method((2, 4, 5, 6), 3, rounds=2) == ("library", ticks)
    assert [asked.count(name) for name in METHODS] == [3, 1]


def test_a_gpu_is_never_asked_for_a_group_per_image_and_channel():
    assert can_use("groups", "cpu") and not can_use("groups", "cuda")


def test_a_step_is_timed_on_a_gpu_by_its_own_clock(monkeypatch):
    calls, told = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append(len(calls))

        def synchronize(self):
            told.append("waited")

        def elapsed_time(self, end):
            return 40.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    step, gpu = (lambda: calls.append(1)), torch.device("cuda")
    assert depthwise.time_call(step, gpu) == pytest.approx(0.002) and told == [0, 20, "waited"]
    assert depthwise.time_call(step, gpu, calls=1) == 0.04 and told[3:] == [20, 21, "waited"]
    monkeypatch.undo()
    assert depthwise.time_call(step, torch.device("cpu")) >= 0 and len(calls) == 22


def test_the_probe_drops_what_is_wrong_or_fails(monkeypatch, caplog):
    monkeypatch.setattr(depthwise, "_chosen", {})
    monkeypatch.setattr(depthwise, "by_groups", lambda x, g, k: 2 * by_groups(x, g, k))
    name, times = choose_method((2, 4, 5, 6), 3, rounds=1)
    assert name == "library" and set(times) == {"library"}

    def broken(*_):
        raise RuntimeError("no such kernel")
    monkeypatch.setattr(depthwise, "_chosen", {})
    monkeypatch.setattr(depthwise, "by_groups", broken)
    name, times = choose_method((2, 4, 5, 6), 3, rounds=1)
    assert name == "library" and set(times) == {"library"}
    assert "groups is left out: RuntimeError" in caplog.text


def test_without_triton_the_library_steps_in(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not can_use("triton", "cpu")
    x, w, b = inputs(3)
    assert torch.equal(depthwise_conv(x, w, b, method="triton"), F.conv2d(x, w, b, padding="same", groups=8))


def run(script, **environment):
    """A script in a process of its own; what it printed last, as JSON."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=HOUR,
                          env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_import_loads_neither_compiler_nor_triton():
    loaded = run("import json, sys, convmixer_edu.depthwise; print(json.dumps([m for m in sys.modules if m in "
                 "('triton', 'torch._inductor', 'torch._dynamo', 'convmixer_edu.depthwise_triton')]))")
    assert loaded == []


AGAINST_THE_LIBRARY = """
import json, torch, torch.nn.functional as F
from convmixer_edu.depthwise import depthwise_conv, weight_gradient
from convmixer_edu.depthwise_triton import weight_sums
device, cases, worst = DEVICE, CASES, []
for k, kind, layout, (b, h, height, width) in cases:
    g, dtype = torch.Generator().manual_seed(k), getattr(torch, kind)
    make = lambda *size: torch.randn(size, generator=g).to(device, dtype)
    ours = [make(b, h, height, width).contiguous(memory_format=getattr(torch, layout)), make(h, 1, k, k), make(h)]
    ours = [t.requires_grad_() for t in ours]
    exact = [t.detach().double().requires_grad_() for t in ours]
    y, z = depthwise_conv(*ours, method="triton"), F.conv2d(*exact, padding="same", groups=h)
    up = make(*y.shape)
    y.backward(up)
    z.backward(up.double())
    assert y.dtype == dtype and y.stride() == ours[0].stride(), (y.stride(), ours[0].stride())
    pairs = [(y, z)] + [(a.grad, e.grad) for a, e in zip(ours, exact)]
    worst.append(max(float((a.double() - e).abs().max() / e.abs().max()) for a, e in pairs))
    again = weight_gradient(ours[0], up, k, "triton")
    assert all(torch.equal(a, t.grad) for a, t in zip(again, ours[1:])), "the same bits twice"
    few = weight_sums(ours[0].detach(), up, k, 2)  # programs: several tiles each, the last one fewer
    pairs += [(a, e.grad) for a, e in zip(few, exact[1:])]
    worst[-1] = max(worst[-1], *(float((a.double() - e).abs().max() / e.abs().max()) for a, e in pairs[4:]))
small = [torch.randn(2, 3, 4, 3, dtype=torch.double, device=device, requires_grad=True),
         torch.randn(3, 1, 2, 2, dtype=torch.double, device=device, requires_grad=True)]
assert torch.autograd.gradcheck(lambda *t: depthwise_conv(*t, method="triton"), small, fast_mode=True)
print(json.dumps(worst))
"""
CASES = [(1, "float32", "channels_last", (2, 3, 4, 5)), (2, "bfloat16", "channels_last", (3, 5, 1, 1)),
         (2, "float64", "contiguous_format", (1, 3, 4, 3)), (3, "float32", "contiguous_format", (3, 3, 4, 5)),
         (4, "float64", "channels_last", (2, 5, 5, 3)), (5, "bfloat16", "channels_last", (1, 70, 3, 2)),
         (5, "float16", "contiguous_format", (3, 3, 4, 5)), (5, "float32", "channels_last", (1, 3, 17, 2)),
         (7, "float32", "channels_last", (1, 33, 4, 3)), (7, "float64", "contiguous_format", (3, 2, 2, 18)),
         (8, "float32", "channels_last", (2, 9, 5, 2)), (8, "bfloat16", "contiguous_format", (1, 3, 3, 5)),
         (9, "bfloat16", "contiguous_format", (2, 2, 4, 3)), (9, "float64", "channels_last", (1, 2, 17, 1)),
         (9, "float32", "channels_last", (1, 2, 5, 4)), (15, "float32", "channels_last", (3, 2, 3, 1)),
         (15, "bfloat16", "contiguous_format", (1, 2, 3, 4)), (15, "float64", "channels_last", (1, 2, 1, 1))]
ALLOWED = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def check_triton(device, cases, **environment):
    script = AGAINST_THE_LIBRARY.replace("DEVICE", repr(device)).replace("CASES", repr(cases))
    for case, worst in zip(cases, run(script, **environment), strict=True):
        assert worst < ALLOWED[case[1]], case


def test_triton_in_its_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")
    check_triton("cpu", CASES, TRITON_INTERPRET="1")


def test_triton_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the kernels are tested in Triton's interpreter and compiled for one")
    pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")
    large = [(k, kind, layout, (33, 100, 16, 17)) for k in (3, 4, 5, 7, 9) for kind in ("float32", "float16")
             for layout in ("channels_last", "contiguous_format")]
    large += [(k, "bfloat16", "channels_last", (64, 256, side, side)) for k, side in ((5, 16), (9, 16), (9, 32))]
    check_triton("cuda", CASES + large, TRITON_INTERPRET="0")


COMPILE = """
import json, pathlib, re, subprocess, tempfile
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from convmixer_edu.depthwise_triton import convolve, partial_sums
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
shape = dict(C=256, H=16, W=16, ROWS=16, ACC=tl.float32, xc=1, xw=256, xh=4096)
forward = dict(shape, oc=1, ow=256, oh=4096, COLUMNS=16, CHANNELS=32)
backward = dict(shape, gc=1, gw=256, gh=4096, COLUMNS=1, CHANNELS=64)
found = []
for capability, kind, kernel, warps, own in (
        (75, "fp16", convolve, 4, dict(forward, K=9, FLIP=True, BIAS=False)),
        (75, "fp16", partial_sums, 1, dict(backward, K=3, WIDE=3)),
        (90, "bf16", convolve, 4, dict(forward, K=5, FLIP=False, BIAS=True)),
        (90, "bf16", convolve, 4, dict(forward, K=9, FLIP=True, BIAS=False)),
        (90, "bf16", partial_sums, 1, dict(backward, K=5, WIDE=5)),
        (90, "bf16", partial_sums, 1, dict(backward, K=9, WIDE=5))):
    tensors = {n: "*" + kind for n in ("x", "w", "bias", "grad", "out")}
    if kernel is partial_sums:
        tensors["out"] = "*fp32"
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in own else tensors.get(n, "i32") for n in names}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in own}  # as at a launch
    done = compile(ASTSource(kernel, signature, own, whole), target=GPUTarget("cuda", capability, 32),
                   options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found.append([int(re.search("STACK:([0-9]+)", said)[1]),
                  kernel is partial_sums or "ld.global.v2.b32" in done.asm["ptx"]])
print(json.dumps(found))
"""


def test_triton_compiles_for_a_t4_and_an_h100_without_a_spill():
    """And four channels of half precision are read at once."""
    pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")
    assert run(COMPILE, TRITON_INTERPRET="0") == [[0, True]] * 6
