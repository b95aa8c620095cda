"""Where things are missing that Linux has, and where other programs want the cores."""

import os
import subprocess
import sys

import pytest
from conftest import HOUR, ROOT, offline

WINDOWS = """
import importlib, os, signal, sys
from pathlib import Path
for name in ("resource", "fcntl", "termios", "pwd", "grp", "tty"):
    sys.modules[name] = None  # importing it fails, as on Windows
for name in ("sched_getaffinity", "posix_fadvise", "getuid", "geteuid", "killpg", "mkfifo"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGPIPE", "SIGCHLD"):
    delattr(signal, name)
import convmixer_edu
modules = sorted(path.stem for path in Path(convmixer_edu.__file__).parent.glob("[!_]*.py"))
for module in modules:
    importlib.import_module("convmixer_edu." + module)
assert {"train", "cli", "sweep", "data"} <= set(modules)
from convmixer_edu.cli import main
small = ["--set", "dim=8", "--set", "depth=1", "--epochs", "1", "--set", "limit=200", "--device", "cpu"]
for words in (["train", "--preset", "digits", "--data", "digits", "--out", "run", *small],
              ["evaluate", "run", "--data", "digits", "--device", "cpu"], ["info"]):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""
WAITING = "import os, sys; {first}; import convmixer_edu; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


def python(code, folder, **more):
    """Run code in a Python of its own; return what it printed."""
    env = {name: value for name, value in offline(OMP_NUM_THREADS=1).items() if name != "GOMP_SPINCOUNT"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env | more, capture_output=True, text=True,
                          timeout=HOUR)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_everything_imports_and_trains_without_what_windows_lacks(tmp_path):
    python(WINDOWS, tmp_path, CONVMIXER_CACHE=str(tmp_path / "cache"))
    assert {"config.json", "run.json", "model.safetensors"} <= set(os.listdir(tmp_path / "run"))


@pytest.mark.parametrize(("first", "more", "told"), [
    ("0", {}, "10000 False"),
    ("0", {"GOMP_SPINCOUNT": "77"}, "77 False"),
    ("0", {"OMP_WAIT_POLICY": "ACTIVE"}, "None False"),
    ("import torch", {}, "None True"),
    ("import convmixer_edu.cli", {}, "10000 False"),
], ids=["package", "own number", "own policy", "too late", "command"])
def test_threads_give_way_unless_told_otherwise(first, more, told, tmp_path):
    assert python(WAITING.format(first=first), tmp_path, **more).strip() == told


def test_make_sets_it_too():
    assert "\nexport GOMP_SPINCOUNT ?= 10000\n" in (ROOT / "Makefile").read_text("utf8")
