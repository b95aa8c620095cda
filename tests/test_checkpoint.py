"""Checkpoints: whole or absent, checked when read, and draws that need no saving."""

import ctypes
import errno
import os
import resource
import signal
import struct
import time
import warnings
from unittest.mock import patch

import forked
import pytest
import torch
from torch import nn

from convmixer_edu.checkpoint import (Backup, CheckpointError, claimed, collect, copy_checked, keyed_generator, latest,
                                      read_checkpoint, remove_partial, restore, run_files, save_step, write_atomically,
                                      write_checkpoint)


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


@pytest.mark.parametrize("call, number", [("os.fsync", errno.ENOSPC), ("os.replace", errno.ENOSPC),
                                          ("builtins.open", errno.EROFS)])
def test_a_failing_write_keeps_what_was_there(file, call, number):
    before, words = file.read_bytes(), os.strerror(number)
    with patch(call, side_effect=OSError(number, words)):
        with pytest.raises(CheckpointError, match=words):
            write_atomically(file, b"new")
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def attempt(folder, step, count):
    """Save so many numbers; return the error, if there is one, and what the folder holds after."""
    try:
        save_step(folder, step, {"w": torch.zeros(count)}, {"step": step})
        told = None
    except CheckpointError as error:
        told = str(error)
    return told, sorted(os.listdir(folder)), latest(folder)[1]["step"]


def on_small_disks(tell, folder):
    """In a world of mounts of its own: a disk of 300 kB, first full, then read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group, new_user, new_mounts, remount = os.getuid(), os.getgid(), 0x10000000, 0x20000, 32 | 1
    if libc.unshare(new_user | new_mounts):
        return tell(f"no mounts of one's own here: {os.strerror(ctypes.get_errno())}")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    if libc.mount(b"disk", os.fsencode(folder), b"tmpfs", 0, b"size=300k"):
        return tell(f"no tmpfs may be mounted here: {os.strerror(ctypes.get_errno())}")
    tell([attempt(folder, 1, 20_000), attempt(folder, 2, 200_000), attempt(folder, 3, 20_000),
          libc.mount(b"disk", os.fsencode(folder), b"tmpfs", remount, None), attempt(folder, 4, 20_000)])


def test_a_disk_that_is_full_and_one_that_is_read_only(tmp_path):
    told, code = forked.Process(on_small_disks, tmp_path).end()
    assert code == 0
    if isinstance(told[0], str):
        pytest.skip(told[0])
    first, full, again, remounted, closed = told[0]
    names = [f"checkpoint-00000000{i}.safetensors" for i in (1, 3)]
    assert first == (None, names[:1], 1)
    assert "No space left on device" in full[0] and full[1:] == first[1:] and "\n" not in full[0]
    assert again == (None, names, 3) and remounted == 0
    assert "Read-only file system" in closed[0] and closed[1:] == again[1:]


def with_short_files(tell, folder):
    """Where no file may grow beyond 100 kB."""
    save_step(folder, 1, {"w": torch.zeros(20_000)}, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    tell(attempt(folder, 2, 200_000))


def test_a_file_that_may_not_grow_is_reported_and_removed(tmp_path):
    told, _ = forked.Process(with_short_files, tmp_path).end()
    message, names, step = told[0]
    assert "File too large" in message and names == ["checkpoint-000000001.safetensors"] and step == 1


@pytest.mark.skipif(os.getuid() == 0, reason="the superuser may write to any folder: see the read-only disk")
def test_a_folder_without_the_right_to_write(tmp_path):
    save_step(tmp_path, 1, {"w": torch.zeros(3)}, {"step": 1})
    tmp_path.chmod(0o500)
    try:
        message, names, step = attempt(tmp_path, 2, 3)
    finally:
        tmp_path.chmod(0o700)
    assert "Permission denied" in message and len(names) == 1 and step == 1


def claim_and_copy(tell, file):
    """A copy of the process goes on when the process itself gives the claim back."""
    reader, writer = os.pipe()
    with patch("convmixer_edu.checkpoint._forget"), claimed(file) as first:
        copy = os.fork()
        if not copy:
            os.write(writer, b".")
            signal.pause()
        os.read(reader, 1)
        with claimed(file) as meanwhile:
            pass
    with claimed(file) as again:
        tell([first, meanwhile, again])
    os.kill(copy, signal.SIGKILL)


def test_a_claim_is_not_handed_down(tmp_path):
    told, _ = forked.Process(claim_and_copy, tmp_path / ".lock").end()
    assert told == [[True, False, True]]


@pytest.fixture
def backed_up(tmp_path):
    """A run's folder and a backup that holds the same."""
    run, drive = tmp_path / "run", tmp_path / "drive"
    run.mkdir()
    (run / "config.json").write_text('{"dim": 8}')
    (run / "notes.txt").write_text("not a file of the run")
    backup = Backup(run, drive)
    for step in (1, 2, 3):
        save_step(run, step, {"w": torch.full((4,), step)}, {"step": step})
        assert backup.update()
    return run, drive, backup


def listing(folder):
    return {file.name: file.read_bytes() for file in run_files(folder)}


def test_a_backup_holds_what_the_run_holds_and_gives_it_back(backed_up, tmp_path):
    run, drive, backup = backed_up
    assert listing(drive) == listing(run) and not (drive / "notes.txt").exists()
    with patch("convmixer_edu.checkpoint.copy_checked") as copy:
        assert backup.update() and not copy.called  # nothing is sent twice
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "run.json").write_text("{}")
    for file in run.glob("checkpoint-*"):
        file.unlink()
    assert backup.update() and listing(drive) == listing(run)
    again = tmp_path / "deep" / "again"
    (drive / ".convmixer-1.part").write_text("{")  # a kill in the middle of a copy
    Backup(again, drive, resume=True)
    assert listing(again) == listing(run)
    assert not list(drive.glob(".*.part"))


def test_a_fetch_that_broke_off_starts_over(backed_up, tmp_path):
    _, drive, _ = backed_up
    calls = []

    def breaks(source, target):
        calls.append(target.name)
        if len(calls) == 2:
            raise CheckpointError("the line went dead")
        copy_checked(source, target)

    with patch("convmixer_edu.checkpoint.copy_checked", breaks), pytest.raises(CheckpointError):
        Backup(tmp_path / "new", drive, resume=True)
    Backup(tmp_path / "new", drive, resume=True)
    assert listing(tmp_path / "new") == listing(drive)


def test_a_failing_backup_warns_once_and_catches_up(backed_up):
    run, drive, backup = backed_up
    save_step(run, 4, {"w": torch.full((4,), 4)}, {"step": 4})
    rotten = patch("convmixer_edu.checkpoint.write_atomically", lambda path, data: path.write_bytes(data[:-1]))
    with rotten, pytest.warns(UserWarning) as caught:
        assert not backup.update() and not backup.update()
    assert len(caught) == 1 and "does not read back" in str(caught[0].message)
    assert backup.update() and listing(drive) == listing(run)


def test_a_backup_of_another_run_is_not_written_over(backed_up, tmp_path):
    run, drive, _ = backed_up
    before, other = listing(drive), tmp_path / "other"
    other.mkdir()
    with pytest.raises(CheckpointError, match="holds a run already"):
        Backup(other, drive)
    (other / "config.json").write_text('{"dim": 16}')
    with pytest.raises(CheckpointError, match="holds another run"):
        Backup(other, drive, resume=True)
    for place in (tmp_path / "no" / "drive", run):
        with pytest.raises(CheckpointError, match="cannot be a backup"):
            Backup(run, place, resume=True)
    assert listing(drive) == before


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


def saving(tell, folder, backup, diary):
    """Save for ever, and note in a diary which step was begun and which is done."""
    found = latest(folder)
    step, second = found[1]["step"] if found else 0, Backup(folder, backup)
    with open(diary, "wb", buffering=0) as handle:
        while True:
            step += 1
            os.pwrite(handle.fileno(), struct.pack("qq", step, step - 1), 0)
            save_step(folder, step, {"w": torch.full((100_000,), float(step))}, {"step": step})
            os.pwrite(handle.fileno(), struct.pack("qq", step, step), 0)
            if step == 1 or step % 4 == 0:
                second.update()
            tell(step)


def test_100_kills_during_a_save_leave_a_checkpoint_that_loads(tmp_path):
    folder, backup, diary = tmp_path / "run", tmp_path / "backup", tmp_path / "diary"
    folder.mkdir(), backup.mkdir()
    delays = torch.rand(400, generator=keyed_generator(1)).tolist()
    inside = torn = 0
    while inside < 100:
        process = forked.Process(saving, folder, backup, diary)
        next(iter(process))  # it is at work
        time.sleep(delays.pop() / 40)
        assert process.end(signal.SIGKILL)[1] == -signal.SIGKILL
        begun, done = struct.unpack("qq", diary.read_bytes())
        inside += begun > done
        torn += remove_partial(folder) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing damaged has to be passed over
            for place, at_least in ((folder, done), (backup, 1)):
                tensors, meta = latest(place)
                assert meta["step"] >= at_least and bool((tensors["w"] == meta["step"]).all())
        assert len(list(folder.iterdir())) <= 3
    assert torn >= 20, f"only {torn} kills left half a file: they came at the wrong moments"


def test_keys_decide_the_draws_and_nothing_else_does():
    torch.manual_seed(1)
    first = torch.rand(5, generator=keyed_generator(0, 1, 2))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(5, generator=keyed_generator(0, 1, 2)))
    draws = {tuple(torch.rand(2, generator=keyed_generator(*key)).tolist())
             for key in [(0,), (0, 0), (0, 1), (1, 0), (10,), (0, 10), (1, 1, 1), (11, 1), (1, 11)]}
    assert len(draws) == 9


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


@pytest.mark.parametrize("spoil", [
    lambda tensors: tensors.pop("optimizer.0.exp_avg_sq"),
    lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("optimizer.0.")],
    lambda tensors: tensors.update({"optimizer.0.exp_avg": torch.zeros(2, 3)}),
], ids=["a moment", "a parameter's", "another shape"])
def test_a_checkpoint_that_lacks_a_part_of_the_optimiser_is_refused(spoil):
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = collect(model, optimizer)
    restore(model, optimizer, dict(tensors))
    spoil(tensors)
    with pytest.raises(CheckpointError, match="optimiser|another model: optimizer.0.exp_avg"):
        restore(model, optimizer, tensors)
