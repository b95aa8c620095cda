"""A tag becomes a release only where every file speaks of its version; a chapter installs what it belongs to."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from check_release import problems
from conftest import HOUR, ROOT, environment
from contract import RUNNER, constraints, on_colab
from first_cell import first_cell, reference, settings, write

CONFIG = settings(ROOT)
FILES = ["settings.ini", "CITATION.cff", "CHANGELOG.md", "README.md", "_config.yml"]
FIVE_LINES = '''from convmixer_edu.model import ConvMixer
from convmixer_edu.data import load_images
model = ConvMixer(256, 8, 5, 2, 10)
data = load_images("digits", "test")
reveal_type(data.labels)
'''


def edit(path, old, new):
    """Replace something that is there."""
    text = path.read_text("utf8")
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, 1), "utf8")


@pytest.fixture
def released(tmp_path):
    """A copy of what carries the version, made ready for the release of 3.1.4."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("nbs", "convmixer_edu"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("settings.ini", "CITATION.cff", "convmixer_edu/__init__.py"):
        edit(tmp_path / name, CONFIG.version, "3.1.4")
    edit(tmp_path / "CHANGELOG.md", f"## {CONFIG.version.replace('.dev0', ' (under way)')}", "## 3.1.4")
    assert len(write(tmp_path, settings(tmp_path))) > 30
    return tmp_path


def test_a_release_agrees_and_running_the_tool_again_changes_nothing(released):
    assert problems("v3.1.4", released) == []
    assert write(released, settings(released)) == []
    cells = json.loads((released / "nbs" / "04_anatomy.ipynb").read_text("utf8"))["cells"]
    assert "".join(cells[1]["source"]) == first_cell(settings(released))
    assert "convmixer-edu==3.1.4" in first_cell(settings(released))


@pytest.mark.parametrize(("name", "old", "new", "told"), [
    ("settings.ini", "version = 3.1.4", "version = 3.1.5", "settings.ini says version = 3.1.5"),
    ("CITATION.cff", "3.1.4", "3.1.3", "CITATION.cff says 3.1.3"),
    ("CHANGELOG.md", "## 3.1.4", "## 3.1.4 (under way)", "first heading of CHANGELOG.md"),
    ("README.md", "/blob/v3.1.4/", "/blob/main/", "README.md opens"),
    ("_config.yml", "branch: v3.1.4", "branch: main", "_config.yml opens main"),
    ("convmixer_edu/__init__.py", "3.1.4", "3.1.4.dev1", "the package calls itself 3.1.4.dev1"),
    ("nbs/W1_data.ipynb", "convmixer-edu==3.1.4", "convmixer-edu", "the first cell of W1_data.ipynb"),
])
def test_what_disagrees_is_named(released, name, old, new, told):
    edit(released / name, old, new)
    assert any(told in sentence for sentence in problems("v3.1.4", released))


def test_another_tag_is_no_release(released):
    assert any("settings.ini says" in sentence for sentence in problems("v3.1.5", released))
    assert any("three numbers" in sentence for sentence in problems("nightly", released))


def test_a_version_under_way_installs_the_branch_and_is_no_release():
    if ".dev" not in CONFIG.version:
        assert not problems(f"v{CONFIG.version}")
        return
    cell = first_cell(CONFIG)
    scope = {"sys": type(sys)("sys")}
    assert reference(CONFIG) == CONFIG.branch
    lines = [line.strip() for line in cell.split("\n")]
    exec("\n".join(lines[lines.index(next(x for x in lines if x.startswith("package"))):][:2]), scope)
    assert scope["package"] == f"{CONFIG.git_url}/archive/refs/heads/{CONFIG.branch}.zip"
    assert "%pip install -q --no-deps {package}" in lines and lines[-1] == "import convmixer_edu"
    assert any("three numbers" in sentence for sentence in problems(f"v{CONFIG.version}"))


def test_the_command_says_what_is_wrong():
    command = [sys.executable, ROOT / "tools" / "check_release.py", "v99.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HOUR)
    assert done.returncode == 1 and "the tag is v99.0.0, settings.ini says" in done.stderr
    assert "Traceback" not in done.stderr


def test_workflows_keep_no_credentials_and_publish_without_a_password():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        told = yaml.safe_load(path.read_text("utf8"))
        assert told["permissions"] == {"contents": "read"}, f"{path.name}: a job that needs more says so itself"
        jobs = told["jobs"]
        for job in jobs.values():
            assert job["timeout-minutes"] and "pull_request_target" not in path.read_text("utf8")
            for step in job["steps"]:
                if step.get("uses", "").startswith("actions/checkout"):
                    assert step["with"]["persist-credentials"] is False, path.name
                if "uses" in step:
                    assert len(step["uses"].split("@")[1].split()[0]) == 40, f"{path.name}: not pinned to a commit"
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text("utf8"))["jobs"]
    assert release["publish"]["permissions"] == {"id-token": "write"}
    book = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text("utf8"))["jobs"]
    assert book["deploy"]["if"] == "github.ref == 'refs/heads/main'", "pages come from main alone"
    assert all(job == "publish" or "id-token" not in told.get("permissions", {}) for job, told in release.items())


def test_the_contract_holds_colabs_versions_or_the_lower_bounds():
    there, wanted = on_colab(), ["torch>=2.10", "pillow>=10,<13", "numpy"]
    assert set(RUNNER) <= set(there)
    colab, lower = constraints(False, wanted), constraints(True, wanted)
    assert {f"torch=={there['torch']}", f"numpy=={there['numpy']}"} <= set(colab) and "+" not in there["torch"]
    assert {"torch==2.10", "pillow==10", f"numpy=={there['numpy']}"} <= set(lower)
    assert len(lower) == len({*RUNNER, "torch", "pillow", "numpy"})


def test_types_are_for_users_too(tmp_path):
    """mypy on a user's five lines, where there is mypy."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy, and the types are checked too")
    (tmp_path / "user.py").write_text(FIVE_LINES)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", tmp_path / "cache", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(MYPYPATH=ROOT), capture_output=True, text=True,
                          timeout=HOUR)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'note: Revealed type is "torch._tensor.Tensor"' in done.stdout
