"""Several processes train one network: the same batches, sums, weights and counts as one process."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import forked
import pytest
import torch
from conftest import HOUR, needs_compiler
from torch import nn
from torch.distributed import destroy_process_group

from convmixer_edu import distributed as d
from convmixer_edu import units
from convmixer_edu.checkpoint import keyed_generator, read_checkpoint
from convmixer_edu.model import ConvMixer
from convmixer_edu.recipe import Config
from convmixer_edu.train import TrainingError, train


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def together(number, work, *args):
    """Start `work(tell, *args)` in so many processes, as torchrun would."""
    port = free_port()
    return [forked.Process(_one_of, number, rank, port, work, args) for rank in range(number)]


def _one_of(tell, number, rank, port, work, args):
    os.environ.update(WORLD_SIZE=str(number), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)
    torch.set_num_threads(1)
    work(tell, *args)
    if d.world() > 1:
        destroy_process_group()


def ends(processes):
    """Wait for processes; return what each told."""
    return [process.end()[0] for process in processes]


def small(extra=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding="same"), nn.GELU(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.GELU(),
                         nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def by_hand(tell, memory):
    """Train a small network in double precision; tell of gradients, losses, weights and running statistics."""
    d.setup("cpu")
    model = d.synchronise_batchnorm(small()).to(torch.float64, memory_format=memory)
    net = d.parallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(20):
        g = keyed_generator(3, step)
        x, y = torch.randn(24, 2, 5, 5, generator=g, dtype=torch.float64), torch.randint(4, (24,), generator=g)
        x, y = (d.shard(t, d.rank(), d.world()) for t in (x, y))
        loss = nn.functional.cross_entropy(net(x.contiguous(memory_format=memory)), y)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            tell([p.grad.flatten().tolist() for p in model.parameters()])
        optimizer.step()
        losses.append(float(d.all_sum(loss.detach()) / d.world()))
    tell(losses)
    tell({name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()})


def furthest(some, others):
    """Return the largest difference of two lists of numbers."""
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("number, memory", [(2, torch.contiguous_format), (3, torch.channels_last)])
def test_processes_by_hand_equal_one(number, memory):
    one = ends(together(1, by_hand, memory))[0]
    for gradients, losses, state in ends(together(number, by_hand, memory)):
        assert max(furthest(a, b) for a, b in zip(gradients, one[0], strict=True)) < 1e-12
        assert furthest(losses, one[1]) < 1e-9
        assert state.keys() == one[2].keys()
        assert state["2.num_batches_tracked"] == one[2]["2.num_batches_tracked"] == [20]
        assert max(furthest(state[k], one[2][k]) for k in state) < 1e-8


def by_units(tell, bias, lacking, cache):
    """Train with kernels of our own; tell of gradients, running statistics, and why there are none."""
    os.environ["CONVMIXER_CACHE"] = cache
    d.setup("cpu")
    if d.rank() == lacking:
        os.environ["CXX"] = "false"
        units.kernels.cache_clear()
    torch.manual_seed(0)
    model, said = ConvMixer(16, 2, 3, 2, 4), []
    torch.nn.init.constant_(model[3][0].fn[0].bias, bias)
    model = units.fast_units(d.synchronise_batchnorm(model), torch.float32, said.append)
    net, g = d.parallel(model), torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, 10, 8, generator=g), torch.randint(4, (24,), generator=g)
    x, y = (d.shard(t, d.rank(), d.world()) for t in (x, y))
    nn.functional.cross_entropy(net(x), y).backward()
    tell([p.grad.flatten().tolist() for p in model.parameters()])
    tell([b.flatten().tolist() for b in model.buffers()])
    tell([type(model) is units.UnitSequential, *said])


@needs_compiler
@pytest.mark.parametrize("bias", [0.0, 300.0])  # the second: a mean far from zero, whose variance is summed anew
def test_processes_with_kernels_of_our_own_equal_one(bias, tmp_path):
    one = ends(together(1, by_units, bias, 9, str(tmp_path)))[0]
    assert one[2] == [True]  # by kernels of our own, without a word
    for gradients, buffers, _ in ends(together(2, by_units, bias, 9, str(tmp_path))):
        for a, b in zip(gradients + buffers, one[0] + one[1], strict=True):
            assert furthest(a, b) <= 1e-5 * max(1.0, *map(abs, b))


def test_where_one_process_has_no_kernels_all_use_the_library(tmp_path):
    one, *both = (told for number, lacking in ((1, 0), (2, 1))
                  for told in ends(together(number, by_units, 0.0, lacking, str(tmp_path))))
    for gradients, _, (ours, *said) in both:
        assert not ours and len(said) == 1 and "no kernels of our own" in said[0]
        assert max(furthest(a, b) for a, b in zip(gradients, one[0], strict=True)) < 1e-6


def asked(tell):
    """What the smaller functions say in one of several processes."""
    d.setup("cpu")
    me = d.rank()
    tell([me, d.world(), d.is_main(), d.any_of(me == 1), d.any_of(False), int(d.all_sum(torch.tensor(me + 1)))])
    told = d.from_main(lambda: {"from": me, "say": "\u00fc" * 1000})
    mine = {"a": torch.arange(3) + me, "b": torch.tensor(0.5)} if me == 0 else {}
    got = d.shared(mine, {"a": torch.zeros(3, dtype=torch.int64), "b": torch.zeros(())})
    tell([told["from"], len(told["say"]), got["a"].tolist(), float(got["b"])])

    def fails():
        raise ValueError(f"process {me} found nothing")

    try:
        d.from_main(fails)
    except ValueError as error:
        tell(str(error))


def test_what_one_knows_all_know():
    for me, told in enumerate(ends(together(3, asked))):
        assert told[0] == [me, 3, me == 0, True, False, 6]
        assert told[1] == [0, 1000, [0, 1, 2], 0.5]
        assert told[2] == "process 0 found nothing"


def test_alone_nothing_changes():
    model = small()
    assert d.synchronise_batchnorm(model) is model and type(model[2]) is nn.BatchNorm2d
    assert d.parallel(model) is model and (d.rank(), d.world(), d.is_main()) == (0, 1, True)
    assert d.setup("cuda:1") == "cuda:1" and d.setup() is None
    x = torch.arange(5)
    assert d.all_sum(x) is x and torch.equal(d.shard(x, 0, 1), x)


@pytest.mark.parametrize("n, world", [(10_000, 8), (10_003, 8), (3, 4)])
def test_shards_hold_each_row_once(n, world):
    parts = [d.shard(torch.arange(n), r, world) for r in range(world)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_device_that_cannot_be_shared_is_refused(device):
    torchrun = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with patch.dict(os.environ, torchrun), patch("torch.cuda.device_count", return_value=0):
        with pytest.raises(ValueError, match=r"expected cpu, or cuda with a GPU for each .* \(--nproc-per-node\)"):
            d.setup(device)


def test_synced_batchnorm_is_batchnorm_alone():
    plain, synced = nn.BatchNorm2d(3).double(), d.SyncedBatchNorm2d(3).double()
    for layer in (plain, synced):
        nn.init.uniform_(layer.weight, generator=keyed_generator(1))
        nn.init.uniform_(layer.bias, generator=keyed_generator(2))
    for step in range(3):
        x = torch.randn(4, 3, 5, 5, generator=keyed_generator(step), dtype=torch.float64) * 3 + 1
        assert torch.allclose(plain(x), synced(x), rtol=1e-10)
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(tensor, synced.state_dict()[name])
    assert torch.allclose(plain.eval()(x), synced.eval()(x))
    assert torch.autograd.gradcheck(synced.train(), (x[:2, :, :2, :2].clone().requires_grad_(),))
    with torch.autocast("cpu", torch.bfloat16):
        assert synced.float()(x.bfloat16()).dtype == torch.bfloat16


# The trainer itself

TINY = Config(dim=16, depth=2, kernel_size=3, patch_size=1, epochs=3, batch_size=64, lr=0.005, limit=400, mixup=0.5, cutmix=0.5,
              randaug_n=1, randaug_m=5, erase=0.25, holdout=35, checkpoint_seconds=0, depthwise="library",
              precision="float32")
STEPS = TINY.epochs * (365 // 64)


def trains(tell, out, resume, settings):
    """Train as one of several processes, and tell of each event, the last one the run's record."""
    try:
        tell(train(replace(TINY, **settings), "digits", out, resume=resume, device="cpu", report=tell))
    except (TrainingError, ValueError) as error:
        tell(str(error))


def runs(number, out, resume=False, **settings):
    return together(number, trains, out, resume, settings)


def losses(events):
    return {e["step"]: e["loss"] for e in events if isinstance(e, dict) and e.get("event") == "step"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The events of one process, and its folder."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return ends(runs(1, out))[0], out


def same_run(one, other, out, other_out):
    """The same losses at every step, weights, and counts to the image."""
    assert losses(one).keys() == set(range(1, STEPS + 1))
    told = losses(other).keys()  # several processes ask each other now and then, and at the end of an epoch
    assert {STEPS // 3, 2 * STEPS // 3, STEPS} <= told < losses(one).keys()
    assert max(abs(losses(one)[step] - losses(other)[step]) for step in told) < 1e-5
    weights, weights_too = (read_checkpoint(f / "model.safetensors")[0] for f in (out, other_out))
    assert weights.keys() == weights_too.keys()
    assert all(torch.allclose(weights[k].float(), weights_too[k].float(), atol=1e-3) for k in weights)
    first, second = one[-1], other[-1]
    for record in (first, second):
        assert sum(map(sum, record["test_confusion"])) == record["test_images"]
    assert abs(first["test_loss"] - second["test_loss"]) < 1e-4
    assert abs(first["test_accuracy"] - second["test_accuracy"]) <= 100 / first["test_images"] + 1e-3
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, other_out)]
    for a, b in zip(*lines, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["held_out_accuracy"] - b["held_out_accuracy"]) < 3


def test_two_processes_equal_one(alone, tmp_path):
    one, out = alone
    two, silent = ends(runs(2, tmp_path / "run"))
    same_run(one, two, out, tmp_path / "run")
    assert [e.get("event") for e in silent] == [None] and silent[0] == two[-1]  # it wrote and told nothing, but knows
    assert two[-1]["processes"] == 2 and sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "run"))


def test_two_processes_killed_and_resumed_equal_one_and_so_does_a_change_to_four(alone, tmp_path):
    one, out = alone
    told = []
    for stop_at, number, victim in ((4, 2, 0), (8, 2, 1), (STEPS, 4, None)):
        group = runs(number, tmp_path / "run", resume=bool(told))
        for event in group[0]:
            told.append(event)
            if victim is not None and event.get("step", 0) >= stop_at:
                group[victim].end(signal.SIGKILL)
                break
        for process in group:  # torchrun ends the others
            told += process.end(signal.SIGKILL if victim is not None else None)[0]
    records = [e for e in told if isinstance(e, dict) and "event" not in e]
    assert len(records) == 4
    events = [e for e in told if isinstance(e, dict) and "event" in e]
    same_run(one, [*events, records[0]], out, tmp_path / "run")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    group = runs(2, tmp_path / "run", checkpoint_seconds=900)
    for event in group[0]:
        if event.get("step", 0) >= 5:
            os.kill(group[1].process.pid, signal.SIGTERM)
            break
    words = [told[-1] for told in ends(group)]
    assert words[0] == words[1] and "stopped by signal 15 after step" in words[0]
    assert [int(f.stem.split("-")[1]) for f in (tmp_path / "run").glob("checkpoint-*")] == [int(words[0].split()[6])]


def test_errors_reach_all_and_a_batch_must_be_shared_equally(alone, tmp_path):
    told = ends(runs(2, alone[1]))
    assert [t[-1].split(": ")[0].endswith("is not empty") for t in told] == [True, True]
    for t in ends(runs(3, tmp_path / "run")):
        assert "batch of 64 images cannot be shared by 3 processes in pairs" in t[-1]
    assert not (tmp_path / "run").exists()


def test_torchrun_trains_by_the_command(tmp_path):
    settings = [f"--set={k}={v}" for k, v in vars(replace(TINY, epochs=1)).items() if v != getattr(Config(), k)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "convmixer_edu", "train", "--preset=digits", f"--out={tmp_path}/run", "--device=cpu", "--json", *settings,
               "--set=weight_decay=2e-5", "--set=init=uniform", "--set=flip=true", "--set=crop_scale=1"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=HOUR, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CONVMIXER_DATA": "digits"})
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one line, from one process
    assert record["processes"] == 2 and record["steps"] == STEPS // 3
    assert record["config"] == vars(replace(TINY, epochs=1))
