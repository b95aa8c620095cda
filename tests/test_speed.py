"""Speed: what the hardware has, the roofline by hand, the probe and its cache, the records of the command."""

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest.mock import DEFAULT, patch

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convmixer_edu import machine, speed
from convmixer_edu.model import ConvMixer
from convmixer_edu.speed import RunSettings, Workload

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = Workload(8, 1, 3, 4, batch_size=4)


def gpu_of(major, minor):
    """A GPU of this compute capability, as far as PyTorch's questions go."""
    return patch.multiple(torch.cuda, is_available=lambda: True, current_device=lambda: 0,
                          get_device_properties=lambda device: SimpleNamespace(major=major, minor=minor))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speed.json"


@pytest.mark.parametrize("name, capability, first", [
    ("T4", (7, 5), torch.float16), ("A100", (8, 0), torch.bfloat16), ("L4", (8, 9), torch.bfloat16),
    ("H100", (9, 0), torch.bfloat16)])
def test_a_gpu_gets_a_type_it_really_has(name, capability, first):
    with gpu_of(*capability):
        assert machine.choose_precision(GPU) == first
        assert (torch.bfloat16 in machine.real_dtypes(GPU)) == (capability >= (8, 0))
        assert {torch.float16, torch.float32} < set(machine.real_dtypes(GPU)) or first == torch.float16
        assert machine.choose_precision(GPU, "float32") == torch.float32


@pytest.mark.parametrize("avx512_bf16", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_a_cpu_gets_bfloat16_with_the_instructions_only(avx512_bf16, amx):
    with patch("torch.cpu._is_avx512_bf16_supported", return_value=avx512_bf16), \
            patch("torch.cpu._is_amx_tile_supported", return_value=amx):
        assert (torch.bfloat16 in machine.real_dtypes(CPU)) == (avx512_bf16 or amx)
        assert torch.float32 in machine.real_dtypes(CPU)


@pytest.mark.parametrize("seconds, first", [((1.0, 2.0), torch.bfloat16), ((2.0, 1.0), torch.float32)])
def test_a_cpu_gets_the_type_whose_product_is_faster_and_remembers(seconds, first, cache, monkeypatch):
    """To have the instructions is not to be fast at them."""
    times = dict(zip((torch.bfloat16, torch.float32), seconds))
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(machine, "_seconds_of_a_product", times.__getitem__)
    assert machine.choose_precision(CPU) == first and machine.choose_precision(CPU, "float32") == torch.float32
    monkeypatch.setattr(machine, "_seconds_of_a_product", None)
    assert machine.choose_precision(CPU) == first


def test_an_unknown_device_and_an_old_torch_get_float32():
    assert machine.real_dtypes(torch.device("mps")) == (torch.float32,)
    with ExitStack() as stack:
        for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            if hasattr(torch.cpu, flag):
                stack.enter_context(patch.object(torch.cpu, flag))
                delattr(torch.cpu, flag)
        assert machine.real_dtypes(CPU) == (torch.float32,)


def test_memory_is_kept_where_the_library_understands():
    calls = []
    library = SimpleNamespace(mallopt=lambda *pair: calls.append(pair) or 1)
    with patch("ctypes.CDLL", return_value=library):
        assert machine.keep_freed_memory() is True
    assert {name for name, _ in calls} == {-1, -3}
    with patch("ctypes.CDLL", return_value=SimpleNamespace()):
        assert machine.keep_freed_memory() is False


@pytest.mark.parametrize("k, p", [(3, 1), (5, 2)])
def test_arithmetic_is_what_torch_counts(k, p):
    work = Workload(16, 2, k, p, batch_size=3, image_size=8)
    model, x = ConvMixer(16, 2, k, p, 10), torch.randn(3, 3, 8, 8)
    with FlopCounterMode(display=False) as forward:
        loss = model(x).sum()
    assert speed.step_flops(replace(work, train=False)) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    places = 3 * (8 // p) ** 2
    stem = 2 * places * 3 * p * p * 16  # images need no gradient
    # torch takes the weight gradient of a depthwise convolution for one of a dense convolution: 16 times the work
    excess = 2 * (2 * places * k * k * 16) * (16 - 1)
    assert speed.step_flops(work) == forward.get_total_flops() + backward.get_total_flops() + stem - excess


def test_bytes_by_hand():
    work = Workload(dim=16, depth=2, kernel_size=3, patch_size=4, batch_size=3, image_size=8)
    activation, image = 3 * 16 * 4, 3 * 3 * 64
    weights = sum(p.numel() for p in ConvMixer(16, 2, 3, 4, 10).parameters())
    assert speed.step_bytes(work) == 4 * ((9 + 2 * (14 + 12) + 2) * activation + image) + 40 * weights
    assert speed.step_bytes(replace(work, train=False), torch.bfloat16) == \
        2 * ((1 + 2 * (2 + 2) + 1) * activation + image + weights)


def test_the_roofline_is_two_times():
    work = replace(TINY, train=False)
    flops, moved = speed.step_flops(work), speed.step_bytes(work)
    limit = speed.roofline(work, (flops / 2, moved / 3))
    assert limit == pytest.approx({"arithmetic": 2, "memory": 3})


def test_ceilings_count_operations_and_both_ways_of_a_copy():
    with patch.object(speed, "_fastest", side_effect=lambda function, device: function() is None or 2.0):
        flops, copied = speed.ceilings(CPU)
    assert (flops, copied) == (2 * 2048**3 / 2.0, 2 * 4 * 2**25 / 2.0)


def test_ceilings_are_measured_on_random_numbers():
    with patch.object(speed, "_fastest", side_effect=lambda function, device: function() is None or 1.0), \
            patch("torch.mm", wraps=torch.mm) as product:
        speed.ceilings(CPU)
    a, b = product.call_args.args
    assert float(a.std()) > 0.9 and abs(float(a.mean())) < 0.01 and a is b


def test_every_setting_is_there_once():
    with patch.object(speed, "real_dtypes", return_value=(torch.bfloat16, torch.float32)):
        every = speed.choices(CPU)
    assert len(every) == len({str(c) for c in every}) == 2 * 3 * 2
    assert [str(c) for c in every[:2]] == ["bfloat16, channels_last, eager", "bfloat16, channels_last, compile"]
    assert {str(c) for c in every[2:4]} == {"float32, channels_last, eager", "bfloat16, NCHW, eager"}


@pytest.mark.parametrize("keep", [False, True])
def test_prepare_compiles_the_blocks_as_asked(keep):
    model = ConvMixer(8, 2, 3, 2, 4)
    with patch.object(nn.Module, "compile", autospec=True) as compiled:
        speed.prepare(model, RunSettings(True, True, not keep))
    assert [call.args[0] for call in compiled.call_args_list] == [m for m in model if isinstance(m, nn.Sequential)]
    assert all(call.kwargs["options"] == {"layout_optimization": not keep} for call in compiled.call_args_list)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    with patch.object(nn.Module, "compile", autospec=True) as compiled:
        speed.prepare(model, RunSettings())
    assert not compiled.called and model[0].weight.is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_setting_takes_the_same_step(dtype, channels_last):
    step = speed.make_step(TINY, RunSettings(channels_last, dtype=dtype), CPU)
    plain = speed.make_step(TINY, RunSettings(), CPU)
    ours, theirs = ([float(f()) for _ in range(12)] for f in (step, plain))
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert ours[-1] < ours[0], "it learns"


def test_float16_is_trained_with_a_scaler_and_nothing_else_is():
    for dtype in ("float32", "bfloat16", "float16"):
        with patch("torch.amp.GradScaler", wraps=torch.amp.GradScaler) as scaler:
            speed.make_step(TINY, RunSettings(dtype=dtype), CPU)
        assert scaler.call_args.kwargs["enabled"] == (dtype == "float16")


@pytest.mark.parametrize("choice", [RunSettings(), RunSettings(True, dtype="bfloat16"), RunSettings(True, True, dtype="bfloat16")],
                         ids=str)
def test_a_frozen_model_says_what_the_model_said(choice):
    torch.manual_seed(0)
    model, x = ConvMixer(16, 2, 3, 4, 10), torch.randn(8, 3, 16, 16)
    speed.fast_depthwise(model)
    with torch.no_grad():
        model(x)
        expected = model.eval()(x)
        model.train()
        forward = speed.frozen(model, choice)
        tolerance = 0.03 * expected.abs().max() if choice.dtype != "float32" else 1e-5
        assert (forward(x) - expected).abs().max() < tolerance and forward(x).dtype == torch.float32
        before = forward(x)
        for parameter in model.parameters():
            parameter.mul_(3)
        assert model.training and torch.equal(forward(x), before), "a copy: the model can be trained on"
    assert all(part._compiled_call_impl is None for part in model)
    assert next(m for m in model.modules() if isinstance(m, speed.nn.Conv2d) and m.groups > 1).method == "groups"


def test_a_step_that_gives_no_number_is_refused():
    with pytest.raises(ValueError, match="not a finite number"):
        speed.time_step(lambda: torch.tensor(float("nan")), CPU)


def test_a_setting_that_fails_says_why_and_the_next_is_tried():
    def make(work, choice, device):
        if choice.channels_last:
            raise RuntimeError("no such kernel\nand a long story")
        return lambda: torch.zeros(())

    told = []
    with patch.object(speed, "make_step", make):
        timed = speed.probe(TINY, CPU, report=told.append)
    assert timed == told and [replace(c, images_per_second=0.0, reason="") for c in timed] == speed.choices(CPU)
    for choice in timed:
        assert choice.reason == ("RuntimeError: no such kernel" if choice.channels_last else "")
        assert (choice.images_per_second > 0) != choice.channels_last


def test_a_probe_ends_in_time():
    clock = iter([0.0, 1.0, 11.0] + [11.0] * 99)
    with patch.object(speed.time, "monotonic", lambda: next(clock)), \
            patch.multiple(speed, make_step=DEFAULT, time_step=lambda *a, enough: 4.0):
        first, *rest = speed.probe(TINY, CPU, seconds=10)
    assert first.images_per_second and all(c.reason == "not reached in 10 s" for c in rest)


def test_a_probe_is_not_charged_for_finding_out_what_to_try():
    """Which types are real is measured, too, and may take longer than the probe."""
    clock = [0.0]

    def settings(device):
        clock[0] += 100
        return [RunSettings()]

    with patch.object(speed.time, "monotonic", lambda: clock[0]), patch.object(speed, "choices", settings), \
            patch.multiple(speed, make_step=DEFAULT, time_step=lambda *a, enough: 4.0):
        assert speed.probe(TINY, CPU, seconds=10)[0].images_per_second


def probing(speeds):
    """A probe that finds these speeds, and a list that counts how often it was asked."""
    asked = []

    def probe(work, device, seconds, report=None):
        asked.append(work)
        return [replace(c, images_per_second=s) for c, s in zip(speed.choices(device), speeds)]

    return patch.object(speed, "probe", probe), asked


def test_settings_of_another_cache_are_found(cache, tmp_path):
    other = tmp_path / "other.json"
    best = replace(speed.choices(CPU)[0], images_per_second=7.0)
    other.write_text(json.dumps({machine.choice_key(asdict(TINY), CPU): asdict(best), "another machine": asdict(best)}))
    machine.remember(machine.read_answers(other))
    probe, asked = probing([2.0])
    with probe:
        assert speed.choose(TINY, CPU) == best and not asked
        assert speed.choose(replace(TINY, dim=16), CPU) != best and len(asked) == 1


def test_the_fastest_is_kept_and_found_again(cache):
    probe, asked = probing([2.0, 9.0, 3.0])
    with probe:
        first = speed.choose(TINY, CPU)
        assert first == replace(speed.choices(CPU)[1], images_per_second=9.0)
        assert speed.choose(TINY, CPU) == first and len(asked) == 1
        speed.choose(replace(TINY, batch_size=5), CPU)
        with patch.object(torch, "__version__", "0.0"):
            speed.choose(TINY, CPU)
        with patch.object(torch, "get_num_threads", return_value=99):
            speed.choose(TINY, CPU)
        with patch.object(machine, "device_name", return_value="another"):
            speed.choose(TINY, CPU)
        with patch.object(machine, "_abilities", return_value=" other"):
            speed.choose(TINY, CPU)
    kept = [key for key in json.loads(cache.read_text()) if "precision" not in key]
    assert len(asked) == len(kept) == 6


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": 1}', '{"a": {"unknown": 1}}'])
def test_a_damaged_cache_is_made_anew(cache, damage):
    cache.parent.mkdir()
    cache.write_text(damage)
    probe, asked = probing([1.0])
    with probe:
        assert speed.choose(TINY, CPU) == speed.choose(TINY, CPU)
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_does_not_stop_anyone(cache):
    cache.parent.write_text("a file where the folder should be")
    probe, asked = probing([1.0])
    with probe:
        assert speed.choose(TINY, CPU).images_per_second == 1.0
        speed.choose(TINY, CPU)
    assert len(asked) == 1, "kept as long as the process lives"


def test_no_setting_that_works_is_an_error_with_its_reason(cache):
    with patch.object(speed, "make_step", side_effect=RuntimeError("out of memory")):
        with pytest.raises(RuntimeError, match=r"no setting works on cpu \(RuntimeError: out of memory\)"):
            speed.choose(TINY, CPU)
    assert not cache.exists() or "images_per_second" not in cache.read_text(), "the precision alone"


def test_a_profile_names_what_took_the_time():
    step = speed.make_step(TINY, RunSettings(), CPU)
    every = speed.profile_step(step, CPU, top=1000)
    assert sum(share for _, share in every) == pytest.approx(1)
    assert [s for _, s in every] == sorted((s for _, s in every), reverse=True)
    assert {"aten::convolution_backward", "aten::gelu"} < {name for name, _ in every}
    assert len(speed.profile_step(step, CPU, top=3)) == 3


def test_what_is_measured_leaves_the_callers_draws_alone(monkeypatch, tmp_path):
    """Also where nothing is kept yet, so that a seed means the same on a machine's first day and on its second."""
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    machine._seconds_of_a_product.cache_clear()
    before = torch.get_rng_state()
    machine.choose_precision(CPU), speed.ceilings(CPU)
    assert machine._seconds_of_a_product.cache_info().misses == 2  # both types were timed
    assert torch.equal(torch.get_rng_state(), before)
