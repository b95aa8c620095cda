"""Every chapter runs from top to bottom: offline, without CIFAR-10, from a folder of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, offline

SECONDS = 300


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_chapter_runs(path, tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(path, tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    tool = Path(sys.executable).with_name("nbdev_test")
    try:
        done = subprocess.run(
            [tool, "--path", f"nbs/{path.name}", "--n_workers", "0", "--do_print"], cwd=tmp_path,
            env=offline(CONVMIXER_CACHE=tmp_path / "cache"), capture_output=True, text=True, timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{path.name} did not end within {SECONDS} s")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Success" in done.stdout + done.stderr
