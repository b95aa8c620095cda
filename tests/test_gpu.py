"""The evidence on a GPU: the queue tried on a CPU, killed and resumed; the step that a GPU records, by a pretended one."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import patch

import gpu
import pytest
import torch
from conftest import HOUR, ROOT, offline

from convmixer_edu import speed
from convmixer_edu.ledger import read_record
from convmixer_edu.sweep import merge

CPU = torch.device("cpu")


def start(out, *more):
    command = [sys.executable, "tools/gpu.py", "--try", "--out", str(out), "--minutes", "60", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
                            env=offline(OMP_NUM_THREADS=1))


def test_the_queue_killed_and_resumed_leaves_every_record(tmp_path):
    out, said = tmp_path / "gpu", []
    first = start(out)
    for line in first.stdout:
        said.append(line.strip())
        if line.startswith("  light25-seed0"):  # the first of two seeds is safe
            os.killpg(first.pid, signal.SIGKILL)
            break
    first.wait()
    kept = (out / "light25" / "light25-seed0" / "record.json").read_bytes()
    second = start(out)
    told = second.communicate(timeout=HOUR)[0].splitlines()
    assert second.returncode == 0 and told[-1] == "left: nothing", told
    assert {f"{part}: done before" for part in ("kernels", "settings")} <= set(told)
    assert not any("light25-seed0" in line for line in told)
    assert (out / "light25" / "light25-seed0" / "record.json").read_bytes() == kept
    assert read_record("light25-seed1", out / "light25")["test_accuracy"] > 0  # its seal holds
    assert json.loads((out / "kernels" / "kernels.json").read_text())["right"]
    step, whole = (json.loads((out / part / f"{part}.json").read_text()) for part in ("step", "authors"))
    assert {"plain", "five lines, float32", "five lines, bfloat16"} <= set(step["ratio"])
    assert "the authors' way, 1 workers" in whole["ratio"]
    archives = {file.name: tarfile.open(file).getnames() for file in out.glob("*.tar.gz")}
    assert set(archives) == {f"{part}.tar.gz" for part in gpu.PARTS}
    assert not any("work" in name.split("/") for names in archives.values() for name in names)
    with tarfile.open(out / "arms.tar.gz") as tar:
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # from 3.11.4
    assert merge([tmp_path / "arms"], tmp_path / "merged") == 3
    third = start(out)
    assert third.communicate(timeout=HOUR)[0].splitlines()[-1] == "left: nothing"


def test_the_parts_fit_into_twelve_minutes_and_the_last_takes_the_rest():
    limits = [seconds for seconds, _ in gpu.PARTS.values()]
    assert limits[-1] is None and None not in limits[:-1]
    assert gpu.START + sum(limits[:-1]) < 12 * 60 and set(gpu.RUN) == set(gpu.PARTS)


class Graph:
    """What a CUDA graph is, as far as `Recorded` goes: it computes when it is replayed, not when it is recorded."""
    open = None

    def replay(self):
        self.work()


def pretend(monkeypatch, refuses=False):
    """Let `torch.cuda` be one that records; returns the list of what was called."""
    called = []

    class Stream:
        def wait_stream(self, other):
            called.append("wait")

    @contextmanager
    def on(stream):
        called.append("beside")
        yield

    @contextmanager
    def recording(graph, stream):
        if refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long story")
        called.append("record")
        Graph.open = graph
        yield
        Graph.open = None

    for name, value in {"Stream": Stream, "current_stream": Stream, "stream": on, "CUDAGraph": Graph,
                        "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return called


def adder():
    """A step that adds its input to a sum in place; recorded, it does so at each replay."""
    total, result = torch.zeros(3), torch.zeros(())

    def work(x):
        total.add_(x)
        result.copy_(total.sum())

    def step(x):
        if Graph.open is None:
            work(x)
        else:
            Graph.open.work = lambda: work(x)
        return result
    return step, total


def test_a_step_is_run_recorded_and_replayed_and_each_call_counts_once(monkeypatch):
    called = pretend(monkeypatch)
    step, total = adder()
    step = speed.Recorded(step, CPU)
    for call in range(1, 8):
        x = torch.full((3,), float(call))
        assert float(step(x)) == 3 * sum(range(call + 1))
        x.fill_(99.0)  # the caller may use its buffer again
    assert called.count("beside") == 3 and called.count("record") == 1
    assert total.tolist() == [28.0] * 3


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so_once(monkeypatch):
    pretend(monkeypatch, refuses=True)
    step, total = adder()
    step = speed.Recorded(step, CPU)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for call in range(1, 8):
            assert float(step(torch.full((3,), float(call)))) == 3 * sum(range(call + 1))
    assert [str(w.message) for w in heard] == [
        "the step cannot be recorded as a CUDA graph (operation not permitted when stream is capturing) and runs as it is"]


@pytest.mark.parametrize("triton", [False, True])
def test_a_gpu_is_offered_few_settings_the_promising_first(monkeypatch, triton):
    monkeypatch.setattr(speed, "can_use", lambda method, kind: method != "triton" or triton)
    monkeypatch.setattr(speed, "real_dtypes", lambda device: (torch.bfloat16, torch.float32))
    found = speed.choices(SimpleNamespace(type="cuda"))
    assert len(found) == len({str(c) for c in found}) == (6 if triton else 4)
    assert {c.depthwise for c in found} == {"library", *(["triton"] if triton else [])}
    assert found[0].depthwise == ("triton" if triton else "library") and found[0].channels_last
    assert all(c.layout_optimization == c.channels_last for c in found if c.compile)  # NCHW means NCHW


def test_a_slow_candidate_is_timed_once(monkeypatch):
    calls = []

    def step():
        calls.append(1)
        time.sleep(0.01)
        return torch.zeros(())

    assert speed.time_step(step, CPU, enough=0.001) > 0.005
    slow = len(calls)
    speed.time_step(step, CPU)
    assert slow < len(calls) - slow


@pytest.mark.parametrize("device", ["cuda"])
def test_on_a_gpu_there_is_one_step_after_the_other(device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    step = speed.make_step(speed.Workload(16, 2, 3, 2, batch_size=8), speed.RunSettings(True), torch.device(device))
    eager = step.step
    for _ in range(6):
        loss = float(step())
    assert step.graph and loss == pytest.approx(float(eager()), rel=0.2)


def test_a_record_holds_what_was_measured_and_on_what():
    work, cpu = speed.Workload(8, 1, 3, 4, batch_size=4), torch.device("cpu")
    eager = [c for c in speed.choices(cpu) if not c.compile]
    with patch.object(speed, "choices", return_value=eager):
        record = json.loads(json.dumps(gpu.measure(work, cpu, 60)))
    assert record["work"] == asdict(work) and record["torch"] == torch.__version__
    assert record["best"] == max(record["probe"], key=lambda c: c["images_per_second"])
    assert len(record["probe"]) == len(eager)
    longest = max(record["roofline"].values())
    assert record["part_of_roofline"] == pytest.approx(longest * record["best"]["images_per_second"] / 4)
    assert record["profile"] and record["profile"][0][1] <= 1
