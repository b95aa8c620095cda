"""Every chapter runs from top to bottom: offline, without CIFAR-10, from a folder of its own."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, offline

SECONDS = 300
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))


def run(path, folder):
    """Run a chapter in a process of one thread, in a copy of what a checkout has around it."""
    (folder / "nbs").mkdir()
    shutil.copy(path, folder / "nbs")
    shutil.copy(ROOT / "settings.ini", folder)
    tool = Path(sys.executable).with_name("nbdev_test")
    return subprocess.run(
        [tool, "--path", f"nbs/{path.name}", "--n_workers", "0", "--do_print"], cwd=folder,
        env=offline(CONVMIXER_CACHE=folder / "cache", OMP_NUM_THREADS=1), capture_output=True, text=True,
        timeout=SECONDS,
    )


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    """All chapters, two at a time: a future for each."""
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path, tmp_path_factory.mktemp(path.stem)) for path in CHAPTERS}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs(path, running):
    try:
        done = running[path].result()
    except subprocess.TimeoutExpired:
        pytest.fail(f"{path.name} did not end within {SECONDS} s")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Success" in done.stdout + done.stderr
