"""Every chapter runs from top to bottom: offline, without CIFAR-10, from a folder of its own; its exercises answer."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import HOUR, ROOT, offline
from exercise_cells import exercises, with_answers

CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))


def run(path, folder):
    """Run a chapter, and every answer to its exercises, in a process of one thread."""
    (folder / "nbs").mkdir()
    notebook = with_answers(json.loads(path.read_text("utf8")))
    (folder / "nbs" / path.name).write_text(json.dumps(notebook))
    shutil.copy(ROOT / "settings.ini", folder)
    tool = Path(sys.executable).with_name("nbdev_test")
    return subprocess.run(
        [tool, "--path", f"nbs/{path.name}", "--n_workers", "0", "--do_print"], cwd=folder,
        env=offline(CONVMIXER_CACHE=folder / "cache", OMP_NUM_THREADS=1), capture_output=True, text=True,
        timeout=HOUR,
    )


@pytest.fixture(scope="session")
def running(request, tmp_path_factory):
    """The chapters that were asked for, two at a time: a future for each."""
    asked = [item.callspec.params["path"] for item in request.session.items if "running" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, path, tmp_path_factory.mktemp(path.stem)) for path in asked}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs(path, running):
    try:
        done = running[path].result()
    except subprocess.TimeoutExpired:
        pytest.fail(f"{path.name} did not end within an hour")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Success" in done.stdout + done.stderr


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.stem != "index"],
                         ids=lambda path: path.stem)
def test_chapter_has_exercises(path):
    notebook = json.loads(path.read_text("utf8"))
    posed = [cell for cell in notebook["cells"] if re.match(r"\*\*\d+\.", "".join(cell["source"]))]
    assert 3 <= len(posed) <= 5, f"{len(posed)} exercises, expected three to five: cells that begin with `**1. Predict, then run.**`"
    assert all("<details>" in "".join(cell["source"]) for cell in posed), "an exercise without a folded solution"
    assert len(exercises(notebook)) >= 2, "fewer than two exercises are checked"
