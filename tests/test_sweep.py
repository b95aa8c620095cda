"""The sweep: in a fair order, in time, killed and merged with the same ledger, and tables that follow the records."""

import html
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import HOUR, offline

from convmixer_edu import ledger, sweep
from convmixer_edu.ablate import ARMS, arms, records
from convmixer_edu.claims import claim, verdict
from convmixer_edu.sweep import Task, decisive, pending, merge, plan, work
from convmixer_edu.train import Diverged, TrainingError

TASKS = plan(3, "try", 1)


def ledger_of(folder, tasks=TASKS):
    """All that decides, of every record."""
    return {task.name: decisive(ledger.read_record(task.name, folder/task.scale)) for task in tasks}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The folder of a sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("sweep")/"quiet"
    told, exitcode = forked.Process(child, folder).end()
    assert exitcode == 0 and told[-1] is True
    return folder


def child(tell, out, tasks=TASKS, seconds=float("inf")):
    """A sweep in a process of its own, as the others: one thread."""
    tell(work(tasks, out, "digits", "cpu", seconds, tell=lambda run: tell(run["name"])))


def reseal(run):
    """Seal a record anew, as a forger would."""
    note = json.loads((run/"record.json").read_text())
    (run/"record.json").write_text(json.dumps({**note, "sha256": ledger._seal(run)}))


def edit(run, old, new):
    """Change something in what a run came to."""
    text = (run/"run.json").read_text()
    assert text.count(old) >= 1
    (run/"run.json").write_text(text.replace(old, new, 1))


# the order


@pytest.mark.parametrize("table", [3, 4, None])
def test_any_stop_leaves_every_arm_with_as_many_runs_but_one(table):
    tasks, names = plan(table, "tiny", 5), [arm.name for arm in arms(table, "tiny")]
    assert len({t.name for t in tasks}) == len(tasks) == 5*len(names)
    for stop in range(len(tasks) + 1):
        counts = [sum(t.arm == name for t in tasks[:stop]) for name in names]
        assert max(counts) - min(counts) <= 1
    assert [t.seed for t in tasks] == sorted(t.seed for t in tasks)


def test_some_arms_only():
    tasks = plan(3, "tiny", 2, ["relu", "no-mix"])
    assert [t.name for t in tasks] == [f"{arm}-seed{seed}" for seed in (0, 1) for arm in ("baseline", "relu", "no-mix")]
    with pytest.raises(ValueError, match="no arm 'tanh': expected some of baseline, no-residual"):
        plan(3, "tiny", 2, ["tanh"])


def test_work_grows_with_the_network_and_the_images():
    size = {t.arm: t.work for t in plan(4, "tiny", 1)}
    assert size["128-4"] < size["baseline"] < size["k15"] < size["p1"] and size["p4"] < size["baseline"]
    assert Task("light25", "baseline", 0).work > 20*Task("tiny", "baseline", 0).work


# killed


def test_killed_ten_times_at_random_the_ledger_is_the_same(quiet, tmp_path):
    draw, kills = random.Random(7), 0
    while kills < 10:
        process = forked.Process(child, tmp_path)
        time.sleep(draw.uniform(0.05, 0.6))
        rest, exitcode = process.end(signal.SIGKILL)
        if exitcode == 0:  # it was faster: begin again with the last runs
            shutil.rmtree(tmp_path/"try"/TASKS[-1].name)
            shutil.rmtree(tmp_path/"try"/TASKS[-2].name)
        kills += exitcode == -signal.SIGKILL
    told, exitcode = forked.Process(child, tmp_path).end()
    assert told[-1] is True and exitcode == 0
    assert ledger_of(tmp_path) == ledger_of(quiet)
    assert sorted(ledger.list_records(tmp_path/"try")) == sorted(t.name for t in TASKS)


def test_killed_while_a_record_is_written(quiet, tmp_path, monkeypatch):
    """A half-written record is no record; the run is sealed again from what training left."""
    shutil.copytree(quiet, tmp_path/"out")
    task, out = TASKS[3], tmp_path/"out"
    shutil.rmtree(out/"try"/task.name)
    half = out/"try"/f".{task.name}.part"
    half.mkdir()
    (half/"record.json").write_text("{")
    assert work(TASKS, out, "digits", "cpu")
    assert not half.exists() and ledger_of(out).keys() == ledger_of(quiet).keys()


def test_stopped_by_a_signal_it_goes_on_where_it_was(quiet, tmp_path):
    process = forked.Process(child, tmp_path)
    first = next(iter(process))
    rest, _ = process.end(signal.SIGTERM)
    assert first == TASKS[0].name and pending(TASKS, tmp_path)
    assert forked.Process(child, tmp_path).end()[0][-1] is True
    assert ledger_of(tmp_path) == ledger_of(quiet)


def test_a_budget_ends_the_work_in_time_and_nothing_is_lost(quiet, tmp_path):
    rounds = 0
    while not forked.Process(child, tmp_path, TASKS, 0.6).end()[0][-1]:
        rounds += 1
        assert rounds < 500  # each round does a step at least
    assert rounds > 0 and ledger_of(tmp_path) == ledger_of(quiet)


def test_nothing_finished_is_run_again(quiet, tmp_path, monkeypatch):
    shutil.copytree(quiet, tmp_path/"out")
    monkeypatch.setattr(sweep, "train", None)  # it could not
    assert work(TASKS, tmp_path/"out", "digits", "cpu")


# several


def test_two_processes_share_the_runs_and_do_none_twice(quiet, tmp_path):
    both = [forked.Process(child, tmp_path) for _ in range(2)]
    told = [process.end()[0] for process in both]
    assert told[0][-1] is told[1][-1] is True
    done = [name for lines in told for name in lines[:-1]]
    assert sorted(done) == sorted(t.name for t in TASKS) and min(map(len, told)) > 1
    assert ledger_of(tmp_path) == ledger_of(quiet)


@pytest.fixture
def crowd(tmp_path):
    """The command with two processes, running."""
    words = [Path(sys.executable).with_name("convmixer"), "ablate", "--scale", "try", "--seeds", "8", "--jobs", "2",
             "--out", tmp_path/"out", "--data", "digits", "--device", "cpu"]
    process = subprocess.Popen(words, env=offline(CONVMIXER_CACHE=tmp_path/"cache"), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    yield process, tmp_path/"out"
    process.kill()
    process.communicate()


def workers(parent=None):
    """The processes that joblib started: all that run, or those of one parent."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, stat = (process/"cmdline").read_bytes(), (process/"stat").read_text()
        except OSError:
            continue
        if b"LokyProcess" in words and parent in (None, int(stat.rpartition(")")[2].split()[1])):
            found.add(int(process.name))
    return found


def wait_for(condition, seconds=HOUR):
    """Wait until something is true; fail if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_crowd_works_and_dies_with_its_parent(crowd):
    process, out = crowd
    wait_for(lambda: len(ledger.list_records(out/"try")) >= 2)
    crowd = workers(process.pid)
    assert len(crowd) == 2
    process.kill()  # no goodbye: the others must notice
    wait_for(lambda: not crowd & workers())
    found = records("try", out)  # all that is there is whole
    assert sum(map(len, found.values())) >= 2 and {run["threads"] for runs in found.values() for run in runs} == {
        max(1, len(os.sched_getaffinity(0))//2)}
    assert pending(plan(3, "try", 8), out)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_crowd_that_is_told_to_stop_saves_where_it_is(crowd):
    process, out = crowd
    wait_for(lambda: len(ledger.list_records(out/"try")) >= 1)
    crowd = workers(process.pid)
    process.terminate()
    _, said = process.communicate(timeout=HOUR)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in said and len(said.strip().split("\n")) == 1
    assert not list((out/"work").glob(".stop*")) and sum(map(len, records("try", out).values())) >= 1
    for run in (out/"work").glob("try-*-seed?"):  # what was under way went on to its next step and is on the disk
        assert list(run.glob("checkpoint*")) or not (run/"config.json").exists()
    wait_for(lambda: not crowd & workers())


def test_two_commands_share_a_plan(tmp_path):
    """A run in other hands is passed over, not waited for."""
    from convmixer_edu.checkpoint import claimed
    (tmp_path/"work").mkdir()
    with claimed(tmp_path/"work"/f"try-{TASKS[0].name}.lock") as own:
        other = forked.Process(child, tmp_path, TASKS[:2])
        assert own and next(iter(other)) == TASKS[1].name and pending(TASKS[:2], tmp_path) == TASKS[:1]
    assert other.end()[0] == [TASKS[0].name, True]


def test_what_goes_wrong_in_a_crowd_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="^device .cuda:9. cannot be used here"):
        work(TASKS, tmp_path, "digits", "cuda:9", jobs=2)


# a loss that is no number


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, quiet):
    real = sweep.train

    def train(config, *args, **options):
        if config.activation == "relu":
            (tmp_path/"out/work").mkdir(parents=True, exist_ok=True)
            run = args[1]
            run.mkdir()
            (run/"config.json").write_text("{}")
            raise Diverged("the loss became nan in epoch 1, step 3")
        return real(config, *args, **options)

    monkeypatch.setattr(sweep, "train", train)
    assert work(TASKS, tmp_path/"out", "digits", "cpu")
    (run,) = records("try", tmp_path/"out")["relu"]
    assert "nan" in run["failed"] and not pending(TASKS, tmp_path/"out")
    shown = sweep.runs(3, "try", tmp_path/"out").data
    assert "not run, 1 failed" in next(line for line in shown.split("\n") if "ReLU" in line)
    row = next(r for r in sweep.rows(3, "try", tmp_path/"out") if r.contrast.arm == "relu")
    assert row.ours is None and row.word == "not run"


def test_an_infinite_loss_on_the_test_set_is_a_divergence_too(tmp_path, monkeypatch):
    from convmixer_edu import train
    real = train.score
    monkeypatch.setattr(train, "score", lambda *args: real(*args) | {"loss": float("inf")})
    assert work(TASKS[:1], tmp_path, "digits", "cpu")
    ((run,),) = records("try", tmp_path).values()
    assert "the loss became inf on the test set: expected a finite number" in run["failed"]


def test_the_trainer_says_which_errors_are_divergence(tmp_path):
    from convmixer_edu.recipe import Config
    from convmixer_edu.train import train
    wild = Config(dim=8, depth=1, kernel_size=3, patch_size=1, epochs=3, batch_size=64, lr=1e30, clip=0.0, limit=300,
                  flip=False, depthwise="library", precision="float32")
    with pytest.raises(Diverged, match="the loss became (nan|inf)"):
        train(wild, "digits", tmp_path/"run", device="cpu")


# merged


def test_two_folders_merged_are_one_run_of_both(quiet, tmp_path):
    for name, part in (("a", TASKS[:6]), ("b", TASKS[4:])):  # two are in both
        assert forked.Process(child, tmp_path/name, part).end()[0][-1] is True
    assert merge([tmp_path/"a", tmp_path/"b"], tmp_path/"both") == len(TASKS)
    assert ledger_of(tmp_path/"both") == ledger_of(quiet)
    assert merge([tmp_path/"a", quiet], tmp_path/"both") == 0


def test_a_result_edited_by_hand_is_not_merged(quiet, tmp_path):
    shutil.copytree(quiet, tmp_path/"a")
    edit(tmp_path/"a/try/relu-seed0", '"test_accuracy": ', '"test_accuracy": 1')
    with pytest.raises(ValueError, match="relu-seed0 was changed after it was made"):
        merge([tmp_path/"a"], tmp_path/"both")


def test_one_task_with_two_results_is_refused(quiet, tmp_path):
    shutil.copytree(quiet, tmp_path/"a")
    run = tmp_path/"a/try/relu-seed0"
    edit(run, '"test_accuracy": ', '"test_accuracy": 1')
    reseal(run)
    with pytest.raises(ValueError, match="relu-seed0 are one task with two results"):
        merge([tmp_path/"a", quiet], tmp_path/"both")


# of strangers


def files(folder):
    """What lies in a folder, whatever it is."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()) if folder.exists() else []


def test_a_strangers_folder_gives_its_records_and_nothing_else(quiet, tmp_path):
    strange, secret = tmp_path/"strange", tmp_path/"secret"
    shutil.copytree(quiet, strange)
    secret.write_text("PRIVATE KEY")
    run = strange/"try/relu-seed0"
    (run/"stolen").symlink_to(secret)
    (run/"extra.pth").write_text("not sealed")
    os.mkfifo(run/"pipe")
    shutil.copytree(quiet/"try/relu-seed0", strange/".github/workflows")
    shutil.copytree(quiet/"try/relu-seed0", strange/"no-scale/relu-seed0")
    assert merge([strange], tmp_path/"out") == len(TASKS)
    kept = ["config.json", "metrics.jsonl", "record.json", "run.json"]
    assert files(tmp_path/"out") == sorted(f"try/{task.name}/{name}" for task in TASKS for name in kept)
    assert ledger_of(tmp_path/"out") == ledger_of(quiet)


def linked(run):
    """A file of the record is a link to another file, with the right content even."""
    (run/"run.json").rename(run/"elsewhere")
    (run/"run.json").symlink_to(run/"elsewhere")


def linked_folder(run):
    run.rename(run.parent.parent/"elsewhere")
    run.symlink_to(run.parent.parent/"elsewhere")


def piped(run):
    (run/"metrics.jsonl").unlink()
    os.mkfifo(run/"metrics.jsonl")


def another_seed(run):
    """A record that stands for another run than it is."""
    run.rename(run.with_name("relu-seed1"))


def same_seed(run):
    """The run of seed 0 once more, under another name of the number."""
    shutil.copytree(run, run.with_name("relu-seed00"))


def no_arm(run):
    run.rename(run.with_name("[red]-seed0"))


def other_images(run):
    edit(run, '"train_fingerprint": "', '"train_fingerprint": "0')
    reseal(run)


def no_number(run):
    record = json.loads((run/"run.json").read_text())
    (run/"run.json").write_text(json.dumps({**record, "test_accuracy": "<b>"}))
    reseal(run)


def not_finite(run):
    record = json.loads((run/"run.json").read_text())
    (run/"run.json").write_text(json.dumps({**record, "seconds": float("nan")}))
    reseal(run)


def nested(run):
    (run/"run.json").write_text("["*100_000)
    reseal(run)


@pytest.mark.parametrize("spoil", [linked, linked_folder, piped, another_seed, same_seed, no_arm, other_images, no_number,
                                   not_finite, nested], ids=lambda spoil: spoil.__name__)
def test_one_bad_record_and_nothing_is_merged(quiet, tmp_path, spoil):
    """The good ones, before and behind it, stay out as well: one sentence, and the folder is as it was."""
    shutil.copytree(quiet, tmp_path/"strange")
    shutil.copytree(quiet/"try/baseline-seed0", tmp_path/"out/try/baseline-seed0")
    before = files(tmp_path/"out")
    spoil(tmp_path/"strange/try/relu-seed0")
    with pytest.raises(ValueError) as told:
        merge([quiet, tmp_path/"strange"], tmp_path/"out")
    assert "\n" not in str(told.value) and files(tmp_path/"out") == before
    assert len(records("try", tmp_path/"out")) == 1  # and it reads


def test_a_record_spoiled_while_it_is_copied_is_not_there(quiet, tmp_path, monkeypatch):
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b" "*(path.parent.name == "relu-seed0"
                        and path.name == "run.json" and ".part" not in str(path) and bool(files(tmp_path/"out"))))
    with pytest.raises(ValueError, match="was changed after it was made"):
        merge([quiet], tmp_path/"out")
    assert not (tmp_path/"out/try/relu-seed0").exists()


def test_what_a_record_says_is_text_in_the_tables(quiet, tmp_path):
    shutil.copytree(quiet, tmp_path/"a")
    run = tmp_path/"a/try/relu-seed0"
    told = json.loads((run/"run.json").read_text())
    sly = "<img src=x onerror=alert(2)> | [x](https://e.org) `a` *b* $c$ \x1b[31m"
    (run/"run.json").write_text(json.dumps({**told, "device": sly, "commit": sly, "torch": sly, "precision": sly}))
    reseal(run)
    shown = sweep.runs(3, "try", tmp_path/"a").data
    last = shown.split("\n")[-1]
    assert shown.count("\n") == sweep.runs(3, "try", quiet).data.count("\n") and "\x1b" not in shown
    assert not set(last.replace("`", "", last.split("Run on")[0].count("`"))) & set("<>|*$[]`\"")
    assert html.unescape(last).count(sly.replace("\x1b", "\\x1b")) == 4


def test_time_and_place_do_not_decide_but_everything_else_does(quiet):
    run = ledger.read_record("relu-seed0", quiet/"try")
    other = {**run, "seconds": 9e9, "device": "another", "threads": 77, "images_per_second": 1, "commit": "x",
             "date": "1999-12-31"}
    other["metrics"] = [{**line, "seconds": 1.0} for line in run["metrics"]]
    assert decisive(other) == decisive(run)
    for key, value in (("test_accuracy", 1.0), ("test_loss", 1.0), ("train_fingerprint", "x"), ("steps", 1),
                       ("config", {}), ("test_confusion", [])):
        assert decisive({**run, key: value}) != decisive(run)
    wrong = [{**line, "loss": 0.0} for line in run["metrics"]]
    assert decisive({**run, "metrics": wrong}) != decisive(run)


# tables


def test_a_table_follows_its_records(quiet, tmp_path):
    shutil.copytree(quiet, tmp_path/"a")
    before = sweep.runs(3, "try", tmp_path/"a").data, sweep.differences(3, "try", tmp_path/"a").data
    was = ledger.read_record("relu-seed0", quiet/"try")["test_accuracy"]
    run = tmp_path/"a/try/relu-seed0"
    edit(run, f'"test_accuracy": {was}', f'"test_accuracy": {was + 1:.3f}')
    reseal(run)
    after = sweep.runs(3, "try", tmp_path/"a").data, sweep.differences(3, "try", tmp_path/"a").data
    for old, new in zip(before, after):
        changed = [b for a, b in zip(old.split("\n"), new.split("\n"), strict=True) if a != b]
        assert len(changed) == 1 and "ReLU" in changed[0]
    assert f"{was + 1:.2f}" in after[0]


@pytest.mark.parametrize("table", [3, 4])
def test_no_arm_is_missing_from_a_table_run_or_not(tmp_path, table):
    shown = sweep.runs(table, "tiny", tmp_path).data.split("\n")
    own = [arm for arm in ARMS.values() if arm.table == table or arm.name == "baseline"]
    assert len(shown) == 2 + len(own) + 2 and all("| not run | 0 |" in line for line in shown[2:-2])
    assert shown[-1].startswith("The scale tiny differs from the paper's recipe in `dim=64`") and "Run on" not in shown[-1]
    for arm, line in zip(own, shown[2:-2]):
        assert line.startswith(f"| {arm.words} |") and (not arm.claim or f"#{arm.claim}" in line)
    told = sweep.differences(table, "tiny", tmp_path).data
    assert told.count("not run") == len(sweep.rows(table, "tiny", tmp_path))
    assert all(line.split(" | ")[1] in ("verdict", ":--", "not run") for line in told.split("\n")[::2])  # what matters stands second


def test_the_papers_effects_are_the_claims():
    for row in sweep.rows(3, "try", "nowhere") + sweep.rows(4, "try", "nowhere"):
        c = row.contrast
        if c.claim:
            assert row.paper == claim(c.claim).number
        elif row.paper is not None:
            a, b = (claim(ARMS[name].claim).number for name in (c.arm, c.against))
            assert abs(a - b - row.paper) < 0.006
    assert any(row.paper is None for row in sweep.rows(4, "try", "nowhere")) is False


def test_the_books_runs_are_linked_to_where_they_lie():
    line = next(line for line in sweep.runs(3, "tiny").data.split("\n") if line.startswith("| no residual |"))
    assert "bfloat16, PyTorch 2" in sweep.runs(3, "tiny").data.split("\n")[-1]
    for seed in range(5):
        assert f"/tree/main/results/ablations/tiny/no-residual-seed{seed})" in line
        assert (ledger.results_folder()/f"ablations/tiny/no-residual-seed{seed}/metrics.jsonl").exists()


def test_a_claim_that_ran_at_another_scale_only_stays_not_run():
    told = verdict("b3-no-mix")
    assert told.word == "not run" and "scale small" in told.ours + told.how and "±" in told.ours
    assert verdict("b4-256-8-p1-k13").word == "not run"
