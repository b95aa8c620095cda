"""Kernels of our own on a CPU: what the library would have computed, or the library."""

import json
import os
import stat
import subprocess
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPILER, ROOT, needs_compiler
from torch import nn

from convmixer_edu import data, units
from convmixer_edu.checkpoint import read_checkpoint
from convmixer_edu.model import ConvMixer, Residual, variant
from convmixer_edu.recipe import Config
from convmixer_edu.speed import RunSettings, frozen
from convmixer_edu.train import train

TYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """What is compiled stays for the next run of the tests; what a test breaks does not."""
    monkeypatch.setenv("CONVMIXER_CACHE", str(ROOT / ".pytest_cache" / "kernels"))
    units.kernels.cache_clear()
    yield
    units.kernels.cache_clear()


def make(k, h, training=True):
    """A depthwise unit and a pointwise one, their norms with statistics that are not those of the batch."""
    torch.manual_seed(k)
    both = Residual(nn.Sequential(nn.Conv2d(h, h, k, padding="same", groups=h), nn.GELU(), nn.BatchNorm2d(h))), \
        nn.Sequential(nn.Conv2d(h, h, 1), nn.GELU(), nn.BatchNorm2d(h))
    for part in both:
        for norm in (m for m in part.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        part.train(training)
    return both


def derivatives(part, x, up):
    y = part(x)
    return [y, *torch.autograd.grad(y, [x, *part.parameters()], up.to(y.dtype))]


def apart(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k, h, size", [(2, 16, (3, 7, 6)), (3, 48, (2, 16, 5)), (5, 64, (3, 9, 13)), (5, 32, (5, 1, 1)),
                                        (7, 32, (2, 4, 8)), (8, 32, (3, 5, 7)), (9, 16, (40, 3, 2)), (15, 32, (2, 1, 17))])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_float64(k, h, size, dtype, training):
    generator = torch.Generator().manual_seed(1)
    x, up = (torch.randn(size[0], h, *size[1:], generator=generator).to(dtype) for _ in "ab")
    for depthwise, part in zip((True, False), make(k, h, training)):
        exact = deepcopy(part).double()
        ours = nn.Sequential(part) if depthwise else part
        units.fast_units(ours, dtype, pytest.fail)
        name = "depthwise_unit" if depthwise else "pointwise_unit"
        with torch.autocast("cpu", dtype, dtype != torch.float32):
            with patch.object(units, name, wraps=getattr(units, name)) as own:
                mine = derivatives(ours, x.clone().requires_grad_(), up)
            assert own.call_count == 1
            theirs = derivatives(deepcopy(part) if depthwise else nn.Sequential(*deepcopy(part)),
                                 x.clone().requires_grad_(), up)
        right = derivatives(exact, x.double().requires_grad_(), up)
        for a, b, c in zip(mine, theirs, right):
            assert a.shape == c.shape
            allowed = 1e-5 if dtype == torch.float32 else 0.02
            assert apart(a, c) <= max(allowed, 2 * apart(b, c)), (depthwise, a.shape)
        norm, expected = ([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][0] for net in (ours, exact))
        assert torch.allclose(norm.running_mean.double(), expected.running_mean, rtol=0.02, atol=1e-2)
        assert torch.allclose(norm.running_var.double(), expected.running_var, rtol=0.02, atol=1e-2)
        assert norm.num_batches_tracked == expected.num_batches_tracked == int(training)


@needs_compiler
@pytest.mark.parametrize("bias", [0, 10, 100])
def test_a_mean_far_from_zero_costs_no_more_digits_than_in_the_library(bias):
    x, up = (torch.randn(4, 32, 9, 9, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    for depthwise, part in zip((True, False), make(3, 32)):
        conv = part.fn[0] if depthwise else part[0]
        with torch.no_grad():
            conv.weight.mul_(0.1)
            conv.bias.fill_(bias)
        exact = deepcopy(part).double()
        ours, other = (nn.Sequential(part), deepcopy(part)) if depthwise else (part, nn.Sequential(*deepcopy(part)))
        units.fast_units(ours, torch.float32, pytest.fail)
        mine, theirs = (derivatives(net, x.clone().requires_grad_(), up) for net in (ours, other))
        right = derivatives(exact, x.double().requires_grad_(), up.double())
        for a, b, c in zip(mine, theirs, right):
            assert apart(a, c) <= max(1e-5, 3 * apart(b, c)), (depthwise, a.shape)


def gradient(model, x, dtype=torch.float32):
    """Of all parameters, as one vector."""
    with torch.autocast("cpu", dtype, dtype != torch.float32):
        logits = model(x)
    loss = F.cross_entropy(logits, torch.arange(len(x)) % 4)
    return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@needs_compiler
@pytest.mark.parametrize("dtype, factor", [(torch.float32, 3), (torch.bfloat16, 1.2)], ids=str)
@pytest.mark.parametrize("k, p", [(3, 1), (5, 2), (8, 3)])
def test_the_gradient_of_a_network_is_as_good_as_the_library_s(k, p, dtype, factor):
    torch.manual_seed(k)
    plain, x = ConvMixer(32, 3, k, p, 4), torch.randn(9, 3, 17, 16)
    exact = gradient(deepcopy(plain).double(), x.double())
    ours = gradient(units.fast_units(deepcopy(plain), dtype, pytest.fail), x, dtype)
    assert apart(ours, exact) <= factor * apart(gradient(plain, x, dtype), exact)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_same_bits_twice_and_the_kernels_for_any_number_of_threads(dtype):
    part, _ = make(5, 32)
    x, up = torch.randn(2, 70, 32, 6, 5).to(dtype)
    ours = units.fast_units(nn.Sequential(part), dtype, pytest.fail)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(ours, x.clone().requires_grad_(), up))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_gives_the_same_bits_twice(threads):
    torch.manual_seed(0)
    model, x = units.fast_units(ConvMixer(32, 2, 5, 2, 4)), torch.randn(40, 3, 12, 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(gradient(model, x, torch.bfloat16), gradient(model, x, torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def like_the_library(model, x, dtype=torch.float32):
    """Whether swapping changes nothing at all."""
    plain = deepcopy(model)
    return torch.equal(gradient(units.fast_units(model, dtype), x, dtype), gradient(plain, x, dtype))


@pytest.mark.parametrize("change", [dict(norm="layer"), dict(norm="layer2d"), dict(activation="relu"), dict(dim=24)])
def test_other_parts_run_as_they_did(change):
    torch.manual_seed(0)
    model = variant(**{**dict(dim=16, depth=2, kernel_size=3, patch_size=2, num_classes=4), **change})
    said = []
    units.fast_units(deepcopy(model), report=said.append)
    assert len(said) == 1 and "multiple of 16 channels" in said[0]
    if "norm" not in change:  # the stem and the pointwise units may be ours, but for these
        assert like_the_library(model, torch.randn(4, 3, 8, 8))


def test_double_precision_float16_and_one_position_run_as_they_did():
    torch.manual_seed(0)
    model = ConvMixer(16, 2, 3, 2, 4)
    with torch.no_grad():
        model(torch.randn(8, 3, 8, 8))
    assert like_the_library(deepcopy(model).double(), torch.randn(4, 3, 8, 8).double())
    assert like_the_library(deepcopy(model), torch.randn(4, 3, 8, 8), torch.float16)
    assert like_the_library(deepcopy(model).eval(), torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        units.fast_units(deepcopy(model))(torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="patch"):
        units.fast_units(deepcopy(model))(torch.randn(1, 3, 1, 1))


def test_without_gradients_and_frozen_the_library_runs():
    torch.manual_seed(0)
    plain, x = ConvMixer(16, 2, 3, 2, 4).eval(), torch.randn(4, 3, 8, 8)
    ours = units.fast_units(deepcopy(plain))
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(frozen(ours, RunSettings())(x), frozen(plain, RunSettings())(x))


@needs_compiler
@pytest.mark.parametrize("k, size", [(2, (40, 3, 16, 17)), (5, (40, 3, 16, 16)), (9, (3, 3, 56, 50))])
def test_evaluation_in_bfloat16_is_as_good_as_the_library_s(k, size):
    torch.manual_seed(k)
    plain, x = ConvMixer(32, 3, k, 2, 4), torch.randn(*size)
    with torch.no_grad():
        plain(x)
    ours = units.fast_units(deepcopy(plain).eval(), torch.bfloat16, pytest.fail)
    with torch.no_grad():
        exact = plain.eval().double()(x.double())
        plain.float()
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = ours(x), plain(x)
        assert apart(mine, exact) <= max(0.01, 1.5 * apart(theirs, exact)) and not torch.equal(mine, theirs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x[:1, :, :9, :9]), plain(x[:1, :, :9, :9])), "too few positions for a call"
            ours.train(), plain.train()
            assert torch.equal(ours(x), plain(x)), "the batch's own statistics, without gradients"


def test_a_hook_on_a_layer_is_called():
    model, seen = units.fast_units(ConvMixer(16, 2, 3, 2, 4)), []
    model[3][0].fn[0].register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(4, 3, 8, 8))
    model[4][0].register_forward_hook(lambda *_: seen.append(2))
    model(torch.randn(4, 3, 8, 8))
    assert seen == [1, 1, 2]


@pytest.mark.parametrize("parts, said", [(dict(residual="none"), "no residual around them"), (dict(kernel_size=16), "a kernel of 2 to 15")])
def test_what_cannot_be_run_is_said_in_one_sentence(parts, said):
    told = []
    units.fast_units(variant(**{**dict(dim=16, depth=1, kernel_size=3, patch_size=2, num_classes=4), **parts}), report=told.append)
    assert len(told) == 1 and said in told[0]


def test_swapping_changes_neither_names_nor_values_nor_the_stream_of_random_numbers():
    torch.manual_seed(0)
    model = ConvMixer(16, 2, 3, 2, 4)
    before, stream = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    units.fast_units(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(stream, torch.get_rng_state())


def test_without_a_compiler_one_sentence_and_the_library(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    torch.manual_seed(0)
    model, said = ConvMixer(16, 2, 3, 2, 4), []
    plain, x = deepcopy(model), torch.randn(4, 3, 8, 8)
    units.fast_units(model, report=said.append)
    assert said == ["no kernels of our own: there is no C++ compiler: install g++ or set $CXX"]
    assert torch.equal(gradient(model, x), gradient(plain, x))


def test_a_compiler_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    said = []
    units.fast_units(ConvMixer(16, 2, 3, 2, 4), report=said.append)
    assert len(said) == 1 and "false does not build the kernels" in said[0]


@needs_compiler
@pytest.mark.parametrize("right, wrong", [
    ("store(dx + at, load(up + at) + line[j])", "store(dx + at, line[j])"),
    ("conv_tile<8>(in + x, pitch, w,", "conv_tile<8>(in + x, pitch, w + (K > 1),"),
    ("conv_tile<4>(in + x, pitch, w,", "conv_tile<4>(in + x + 1, pitch, w,"),
    ("f(part, n * image + c, c, own)", "f(part, n * image + c, 0, own)"),
    ("return part * z.images / z.parts", "return part * (z.images / z.parts)"),
    ("ds[to + AFTER", "ds[to + BEFORE"), ("v + load(x + at + to)", "v"), ("store(y + at, load(a + c) * v", "store(y + at, v"),
    ("db[t] += d;", ""), ("own[1] += u * load(g + at);", "own[1] += u;")])
def test_a_kernel_that_is_wrong_is_not_used(right, wrong, monkeypatch):
    source = units.SOURCE.replace(right, wrong)
    assert source != units.SOURCE
    monkeypatch.setattr(units, "SOURCE", source)
    lib, reason = units.kernels(2)
    assert lib is None and "did not give the library's results" in reason


ANSWER = 'extern "C" int answer() { return %d; }'


@needs_compiler
def test_a_library_is_kept_privately_and_built_again_when_damaged_or_not_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    assert units.build(ANSWER % 1).answer() == 1
    file, = (tmp_path / "cache" / "kernels").iterdir()
    good = file.read_bytes()
    assert file.parent.stat().st_mode & 0o022 == 0 and stat.S_ISREG(file.stat().st_mode)
    assert units.build(ANSWER % 2).answer() == 2, "another text, another file"
    compiled, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: compiled.append(a) or run(*a, **k))
    for bad in (b"", b"no library", good[:-1], good[:100] + bytes([good[100] ^ 1]) + good[101:]):
        file.unlink()
        file.write_bytes(bad)
        assert units.build(ANSWER % 1).answer() == 1
        assert file.read_bytes() == good
    assert len(compiled) == 4
    monkeypatch.setattr(units, "is_own", lambda path: path != file)
    units.build(ANSWER % 1)
    assert len(compiled) == 5, "a file of another user is not loaded"


@needs_compiler
def test_another_library_for_the_same_text_is_another_file(monkeypatch, tmp_path):
    """A process does not look at a second file of a name that it has loaded; so what is in a library is in its name."""
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    run = subprocess.run
    assert units.build(ANSWER % 4).answer() == 4
    file, = (tmp_path / "cache" / "kernels").iterdir()
    file.unlink()  # a loaded library cut short in place would end the process with SIGBUS when it is unloaded
    file.write_bytes(b"damaged")
    monkeypatch.setattr(subprocess, "run", lambda *a, input, **k: run(*a, input=input.replace("4", "5"), **k))
    assert units.build(ANSWER % 4).answer() == 5


@needs_compiler
def test_without_a_cache_the_kernels_go_with_the_process(monkeypatch):
    monkeypatch.setattr(data, "is_own", lambda path: False)
    assert units.build(ANSWER % 3).answer() == 3
    assert str(data.private_folder("kernels")) == data._temporary().name


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(dtype, value):
    model, x = units.fast_units(ConvMixer(32, 1, 3, 2, 4), dtype, pytest.fail), torch.randn(4, 3, 8, 8)
    x[0, 0, 0, 0] = value
    assert not gradient(model, x, dtype).isfinite().any()


def test_a_tracer_and_a_compiler_see_the_layers():
    torch.manual_seed(0)
    model, x = units.fast_units(ConvMixer(16, 1, 3, 2, 4)).eval(), torch.randn(4, 3, 8, 8)
    expected = model(x)
    assert torch.allclose(torch.fx.symbolic_trace(model)(x), expected, atol=1e-5)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), expected, atol=1e-5)


def test_the_faster_way_of_a_block_is_told_without_touching_the_model(monkeypatch):
    torch.manual_seed(0)
    model, stream = ConvMixer(16, 2, 3, 2, 4), torch.get_rng_state()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for fastest in (0, 1):
        monkeypatch.setattr(units, "race", lambda steps, *_: {way: abs(fastest - i) for i, way in enumerate(steps)})
        assert units.units_are_faster(model, (2, 16, 4, 4)) == (COMPILER and fastest == 1)
    assert type(model[3]) is nn.Sequential and torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    monkeypatch.undo()
    assert units.units_are_faster(model, (2, 16, 4, 4)) in (True, False)


def test_without_a_compiler_the_library_is_chosen_and_a_line_says_why(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not units.units_are_faster(ConvMixer(16, 1, 3, 2, 4), (2, 16, 4, 4))
    assert [r.getMessage() for r in caplog.records] == [
        "no kernels of our own: there is no C++ compiler: install g++ or set $CXX"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_by_the_kernels_resumes_bit_for_bit(tmp_path, precision):
    c = Config(dim=16, depth=2, kernel_size=3, patch_size=2, epochs=3, batch_size=32, limit=160, randaug_n=0, holdout=20,
               checkpoint_seconds=0, depthwise="units", precision=precision)
    train(c, "digits", tmp_path / "whole", device="cpu")
    for _ in range(3):  # stopped after each epoch
        train(c, "digits", tmp_path / "parts", resume=(tmp_path / "parts").exists(), device="cpu",
              report=lambda event: event["event"] == "epoch")
    one, other = (read_checkpoint(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["depthwise"] == "units"
