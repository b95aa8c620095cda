"""Checkpoints: whole or absent, checked when read, and draws that need no saving."""

import errno
import os
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
import torch
from torch import nn

from convmixer_edu.checkpoint import (CheckpointError, collect, keyed_generator, latest, read_checkpoint, restore,
                                      save_step, write_atomically, write_checkpoint)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"w": torch.arange(1000.), "half": torch.ones(3, dtype=torch.bfloat16),
                            "count": torch.tensor(7), "empty": torch.zeros(0)}, {"step": 3, "text": "ü"})
    return path


def test_round_trip_keeps_every_bit_type_and_shape(file):
    tensors, meta = read_checkpoint(file)
    assert meta == {"step": 3, "text": "ü"}
    assert torch.equal(tensors["w"], torch.arange(1000.)) and tensors["half"].dtype == torch.bfloat16
    assert tensors["count"].shape == () and tensors["empty"].shape == (0,)


@pytest.mark.parametrize("where", [0, 8, 40, -1, -1500])
def test_one_flipped_bit_is_noticed(file, where):
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_checkpoint(file)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_noticed(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError):
        read_checkpoint(file)


def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path):
    class Trojan:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    path = tmp_path / "model.safetensors"
    torch.save({"w": Trojan()}, path)
    with pytest.raises(CheckpointError, match="pickled code"):
        read_checkpoint(path)
    assert not (tmp_path / "it-ran").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint .*gone"):
        read_checkpoint(tmp_path / "gone")


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_full_disk_keeps_what_was_there(file, call):
    before = file.read_bytes()
    with patch(call, side_effect=OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(CheckpointError, match="No space left on device"):
            write_atomically(file, b"new")
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_a_folder_that_is_gone_gives_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        write_atomically(tmp_path / "no" / "folder", b"x")


def test_only_the_last_two_stay_and_a_damaged_one_is_passed_over(tmp_path):
    assert latest(tmp_path) is None
    for step in (9, 10, 11):
        save_step(tmp_path, step, {"w": torch.full((2,), step)}, {"step": step})
    files = sorted(tmp_path.iterdir())
    assert [int(f.stem.split("-")[1]) for f in files] == [10, 11]
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.warns(UserWarning, match="older"):
        assert latest(tmp_path)[1] == {"step": 10}
    files[0].write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="all 2 are damaged"):
        latest(tmp_path)


WRITER = """
import sys, torch
from convmixer_edu.checkpoint import save_step
step = 0
while True:
    step += 1
    save_step(sys.argv[1], step, {"w": torch.full((200_000,), step)}, {"step": step})
    print(step, flush=True)
"""


def test_killed_while_writing_there_is_always_one_to_go_on_from(tmp_path):
    delays = torch.rand(6, generator=keyed_generator(1)).tolist()
    for delay in delays:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        told = int(writer.stdout.readline())  # at least one is whole
        time.sleep(delay / 5)
        writer.send_signal(signal.SIGKILL)
        told = [told, *map(int, writer.communicate()[0].split())][-1]
        tensors, meta = latest(tmp_path)
        assert meta["step"] >= told and bool((tensors["w"] == meta["step"]).all())


def test_keys_decide_the_draws_and_nothing_else_does():
    torch.manual_seed(1)
    first = torch.rand(5, generator=keyed_generator(0, 1, 2))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(5, generator=keyed_generator(0, 1, 2)))
    draws = {tuple(torch.rand(2, generator=keyed_generator(*key)).tolist())
             for key in [(0,), (0, 0), (0, 1), (1, 0), (10,), (0, 10), (1, 1, 1), (11, 1), (1, 11)]}
    assert len(draws) == 9


def test_a_checkpoint_of_another_model_is_refused():
    def parts(width):
        model = nn.Linear(width, 2)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = parts(3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = collect(model, optimizer)
    assert any(name.startswith("optimizer.0.") for name in tensors)
    with pytest.raises(CheckpointError, match="another model"):
        restore(*parts(4), tensors)


def test_the_optimiser_gets_its_state_back_in_the_layout_of_its_parameters():
    def step(model, optimizer, seed):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 8, 8, generator=keyed_generator(seed)).to(memory_format=torch.channels_last)
        model(x).square().sum().backward()
        optimizer.step()

    def parts():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    model, optimizer = parts()
    step(model, optimizer, 1)
    kept = {name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in collect(model, optimizer).items()}
    step(model, optimizer, 2)
    other, again = parts()
    restore(other, again, kept)
    step(other, again, 2)
    assert torch.equal(model.weight, other.weight)
