"""Training: the recipe, the schedule, the draws, what stops a run, and what it leaves behind."""

import dataclasses
import datetime
import json
import signal
from unittest.mock import patch

import numpy as np
import pytest
import torch

from convmixer_edu import inference, machine, recipe
from convmixer_edu import train as t
from convmixer_edu.checkpoint import keyed_generator, read_checkpoint
from convmixer_edu.data import load_images, stratified_index
from convmixer_edu.loaders import make_loader

TINY = recipe.Config(dim=8, depth=2, kernel_size=3, patch_size=1, epochs=2, batch_size=64, lr=0.02, limit=300, flip=False,
                     depthwise="library")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    events = []
    record = t.train(TINY, "digits", out, device="cpu", report=events.append)
    return out, record, events


def test_a_run_folder_holds_what_the_run_was(finished):
    out, record, events = finished
    assert {f.name for f in out.iterdir()} == {"config.json", "metrics.jsonl", "model.safetensors", "run.json"}
    assert record == json.loads((out / "run.json").read_text())
    own = load_images("digits", "train", record["config"]["limit"])
    model, info = inference.load_run(out)
    seen = inference.score(model, own, info.stats, dtype=getattr(torch, record["precision"]))
    assert record["train_accuracy"] == round(seen["accuracy"], 3)
    for key in ("test_accuracy", "seconds", "images_per_second", "peak_memory_mb", "torch", "timm", "device",
                "train_fingerprint", "test_fingerprint"):
        assert record[key], key
    assert 0 <= (datetime.date.today() - datetime.date.fromisoformat(record["date"])).days <= 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[1]["loss"] < lines[0]["loss"]
    kinds = [e["event"] for e in events]
    assert kinds.count("epoch") == 2 and kinds[-1] == "done" and kinds.count("step") == 2 * (300 // 64)
    assert events[0]["seconds_left"] > 0 and record["steps"] == 2 * (300 // 64)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(finished, tmp_path):
    out, record, _ = finished
    torch.manual_seed(99)
    np.random.seed(99)
    again = t.train(TINY, "digits", tmp_path / "again", device="cpu")
    other = t.train(recipe.with_settings(TINY, {"seed": 1}), "digits", tmp_path / "other", device="cpu")
    a, b, c = (read_checkpoint(f / "model.safetensors")[0] for f in (out, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(a[k], b[k]) for k in a) and again["test_loss"] == record["test_loss"]
    assert not all(torch.equal(a[k], c[k]) for k in a) and other["steps"] == record["steps"]


def test_a_finished_run_is_read_not_repeated(finished):
    out, record, _ = finished
    with patch.object(t, "train_step", side_effect=AssertionError("trained again")):
        assert t.train(TINY, "digits", out, resume=True, device="cpu") == record


def test_evaluate_and_predict_agree_with_the_record(finished, tmp_path):
    from PIL import Image
    out, record, _ = finished
    seen = inference.evaluate(out, "digits", device="cpu")
    assert abs(seen["accuracy"] - record["test_accuracy"]) < 1e-2
    assert np.array_equal(seen["confusion"], record["test_confusion"])
    grey = load_images("digits", "test").images[0, 0].numpy()
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).resize((64, 48)).convert("RGBA").save(tmp_path / "b.png")
    answers = inference.predict(out, [tmp_path / "a.png", tmp_path / "b.png"], top=20)
    assert [len(a) for a in answers] == [10, 10]
    for answer in answers:
        assert abs(sum(p for _, p in answer) - 1) < 1e-5
        assert answer == sorted(answer, key=lambda pair: -pair[1])


@pytest.mark.parametrize("settings, message", [
    ({"dim": 0}, "dim"), ({"lr": -1}, "lr is -1"), ({"lr": float("nan")}, "lr is nan"), ({"epochs": 1.5}, "epochs"),
    ({"precision": "half"}, "precision is 'half'"), ({"smoothing": 1}, "smoothing is 1"),
    ({"crop_scale": 2}, "crop_scale"), ({"depthwise": "x"}, "depthwise is 'x'"), ({"holdout": -1}, "holdout is -1"),
    ({"checkpoint_seconds": -1}, "checkpoint_seconds is -1")])
def test_a_recipe_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        recipe.Config(**settings)


def test_every_preset_is_a_recipe():
    assert set(recipe.PRESETS) == {"quick", "digits", "light25", "light100", "paper200"}
    for c in recipe.PRESETS.values():
        assert recipe.with_settings(recipe.Config(), {k: str(v) for k, v in vars(c).items()}) == c


@pytest.mark.parametrize("name", recipe.SOURCES)
def test_every_value_of_a_published_recipe_has_a_source(name):
    told = recipe.sources(name)
    assert {"randaug_n", "randaug_m"} <= told.keys()
    assert set(recipe.SOURCES[name]) <= {f.name for f in dataclasses.fields(recipe.Config)}
    ours = {field for field, (_, source) in told.items() if source == "our choice"}
    assert ours == ({"batch_size"} if name == "paper200" else set())
    assert all(value == getattr(recipe.PRESETS[name], field) for field, (value, _) in told.items())


def test_the_schedule_is_three_straight_lines():
    rate = lambda x: recipe.learning_rate(x, 2.0)
    assert [rate(x) for x in (0, 0.2, 0.4, 0.8, 1)] == pytest.approx([0, 1, 2, 0.1, 0])
    for a, b in ((0, 0.4), (0.4, 0.8), (0.8, 1)):
        assert rate((a + b) / 2) == pytest.approx((rate(a) + rate(b)) / 2)


def test_weight_decay_spares_biases_and_norms():
    model = recipe.make_model(TINY, 10, 1)
    decayed, spared = recipe.make_optimizer(model, TINY).param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    assert decayed["weight_decay"] == TINY.weight_decay and spared["weight_decay"] == 0
    everything = recipe.make_optimizer(model, recipe.PRESETS["light25"]).param_groups[0]["params"]
    assert len(everything) == len(list(model.parameters()))


def test_training_works_in_bfloat16(tmp_path):
    c = recipe.with_settings(TINY, {"precision": "bfloat16", "epochs": 1})
    assert t.train(c, "digits", tmp_path / "half", device="cpu")["precision"] == "bfloat16"


@pytest.mark.parametrize("name", ["paper200", "light100"])
def test_the_full_recipes_train(name, tmp_path):
    c = recipe.with_settings(recipe.PRESETS[name], dict(dim=8, depth=1, kernel_size=3, patch_size=4, epochs=1, batch_size=16,
                                              limit=32, image_size=32, depthwise="library"))
    assert 0 <= t.train(c, "digits", tmp_path / name, device="cpu")["test_accuracy"] <= 100


def test_an_epoch_sees_every_image_once_and_each_epoch_another_order():
    def order(seed, epoch):
        return [i for _, rows in t.picks(100, recipe.with_settings(TINY, {"seed": seed, "batch_size": 10}), epoch)
                for i in rows.tolist()]

    orders = [order(0, epoch) for epoch in range(3)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert orders[0] != orders[1] and orders[2] == order(0, 2) and orders[0] != order(1, 0)


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 6, 6), dtype=torch.uint8, generator=keyed_generator(1))
    stats, plain = inference.statistics(images), images.double() / 255
    assert stats.mean == pytest.approx(plain.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert stats.std == pytest.approx(plain.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_score_counts_every_image_whatever_the_batch(finished):
    out, record, _ = finished
    model, info = inference.load_run(out)
    data = load_images("digits", "test")
    results = [inference.score(model, data, info.stats, batch) for batch in (1000, 7)]
    assert results[0]["confusion"] == results[1]["confusion"]
    assert sum(map(sum, results[1]["confusion"])) == len(data) == results[1]["images"]
    assert not model.training


class Small(torch.nn.Linear):
    """A network that computes for no more than seven images at a time."""

    def forward(self, x):
        self.asked.append(len(x))
        if len(x) > 7:
            raise self.error
        return super().forward(x.flatten(1))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")])
def test_score_halves_its_batch_where_memory_is_short(error):
    data, stats, model = load_images("digits", "test"), inference.Statistics((0.5,), (0.5,)), Small(64, 10)
    model.error, model.asked = error, []
    seen = inference.score(model, data, stats)
    tried = [n for n in model.asked if n > 7]
    assert tried == [min(500, len(data)) // 2**i for i in range(len(tried))]
    assert sum(map(sum, seen["confusion"])) == len(data)
    model.error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="do not fit"):
        inference.score(model, data, stats)


def test_memory_too_short_for_one_image_is_an_error():
    data, model = load_images("digits", "test"), Small(64, 10)
    model.asked, model.forward = [], lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        inference.score(model, data, inference.Statistics((0.5,), (0.5,)))


def test_evaluation_uses_no_larger_batches_than_training(tmp_path):
    with patch.object(t, "score", wraps=inference.score) as asked:
        t.train(recipe.with_settings(TINY, {"epochs": 1, "batch_size": 20}), "digits", tmp_path / "run", device="cpu")
    assert [call.args[3] for call in asked.call_args_list] == [20, 20]


def test_training_accuracy_is_of_all_classes_even_where_they_are_sorted(tmp_path):
    data = load_images("digits", "train", 300)
    order = data.labels.argsort(stable=True)
    with patch.object(t, "_both_sets", return_value=(data.subset(order), load_images("digits", "test"))), \
            patch.object(t, "stratified_index", wraps=lambda labels, n: stratified_index(labels, 100)), \
            patch.object(t, "score", wraps=inference.score) as asked:
        t.train(recipe.with_settings(TINY, {"epochs": 1}), "digits", tmp_path / "run", device="cpu")
    own = asked.call_args.args[1]
    assert len(own) == 100 and min(torch.bincount(own.labels, minlength=10)) >= 9


def test_a_loss_that_is_no_number_stops_the_run_with_a_sentence(tmp_path):
    c = recipe.with_settings(TINY, {"clip": 0})
    broken = torch.tensor(float("nan"))
    with patch.object(t, "train_step", return_value=broken):
        with pytest.raises(t.TrainingError, match="nan in epoch 1, step 1.*lower lr"):
            t.train(c, "digits", tmp_path / "nan", device="cpu")
    assert not list((tmp_path / "nan").glob("checkpoint*"))


def test_compiled_blocks_train_like_plain_ones(tmp_path):
    data = load_images("digits", limit=64)
    c = recipe.with_settings(TINY, {"compile": True, "limit": 64})
    stats = inference.statistics(data.images)
    losses = []
    for config in (c, recipe.with_settings(c, {"compile": False})):
        model = t.build_model(config, data, torch.device("cpu")).train()
        optimizer = recipe.make_optimizer(model, config)
        scaler = machine.make_scaler(torch.device("cpu"), torch.float32)
        loader = make_loader("batched", data, recipe.augmentation(config), stats.mean, stats.std)
        x, y = next(loader.batches(0, [(0, torch.arange(64))]))
        losses.append([float(t.train_step(model, optimizer, scaler, x, y, config.clip, torch.float32)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def interrupted(c, out, step, **more):
    """Train until a step, be told to stop there, and go on."""
    def tell(event):
        if event["event"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(t.TrainingError, match=f"after step {step} of"):
        t.train(c, "digits", out, device="cpu", report=tell, **more)
    return t.train(c, "digits", out, resume=True, device="cpu", **more)


def weights(out):
    return read_checkpoint(out / "model.safetensors")[0]


@pytest.mark.parametrize("settings", [
    {"engine": "timm", "workers": 0, "randaug_n": 2, "randaug_m": 9, "randaug_policy": "timm", "mixup": 0.5},
    {"engine": "timm", "workers": 1, "crop_scale": 0.8, "flip": True},
    {"engine": "batched", "flip": True, "erase": 0.5}], ids=str)
def test_each_engine_goes_on_where_it_was_stopped(settings, tmp_path):
    c = recipe.with_settings(TINY, settings)
    t.train(c, "digits", tmp_path / "whole", device="cpu")
    interrupted(c, tmp_path / "parts", 3)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_workers_may_change_on_resume_and_change_nothing(tmp_path):
    c = recipe.with_settings(TINY, {"engine": "timm", "workers": 0})
    t.train(c, "digits", tmp_path / "a", device="cpu")
    t.train(recipe.with_settings(c, {"workers": 2}), "digits", tmp_path / "b", device="cpu")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert t.train(recipe.with_settings(c, {"workers": 1}), "digits", tmp_path / "a", resume=True, device="cpu")


def test_how_to_run_is_chosen_once_noted_used_and_kept(tmp_path):
    found = t.RunSettings(channels_last=False, dtype="bfloat16", images_per_second=1.0)
    chosen = {"choice": dataclasses.asdict(found), "depthwise": "groups"}
    with patch.object(t, "_choose", return_value=chosen) as asked:
        record = interrupted(TINY, tmp_path / "run", 3)
    assert asked.call_count == 1
    assert json.loads((tmp_path / "run/config.json").read_text()).items() >= chosen.items()
    assert record["precision"] == "bfloat16"


def test_on_a_gpu_the_whole_setting_is_measured_but_the_type_is_the_recipes():
    found, data = t.RunSettings(True, True, dtype="bfloat16", depthwise="triton"), load_images("digits", "train", 100)
    c = recipe.with_settings(TINY, {"depthwise": "auto", "precision": "float32"})
    with patch.object(t, "choose", return_value=found) as asked:
        how = t._choose(c, data, torch.device("cuda"))
    work = asked.call_args.args[0]
    assert (work.batch_size, work.in_chans, work.num_classes, work.depthwise) == (64, 1, 10, "auto")
    assert how == {"choice": {**dataclasses.asdict(found), "dtype": "float32"}, "depthwise": "triton"}


def test_runs_for_the_ledger_stop_in_time_and_go_on(tmp_path, capsys):
    import record_runs as runs
    words = (f"digits:0 digits:1 --out {tmp_path} --data digits --device cpu --set dim=8 --set depth=1 --set epochs=1 "
             "--set limit=200 --seconds").split()
    runs.main([*words, "0"])
    assert "stopped" in capsys.readouterr().out and not (tmp_path / "digits-seed0/run.json").exists()
    runs.main([*words, "60"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["run"] for line in lines] == ["digits-seed0", "digits-seed1"]
    before = (tmp_path / "digits-seed0/run.json").read_bytes()
    runs.main([*words, "60"])
    assert (tmp_path / "digits-seed0/run.json").read_bytes() == before


def folders(root, shape, test=None):
    """Two classes of random pictures, (height, width), in train/ and test/."""
    from PIL import Image
    draw = np.random.default_rng(0)
    for split, name in [(a, b) for a in ("train", "test") for b in ("cat", "dog")]:
        (root / split / name).mkdir(parents=True)
        for i in range(6):
            size = test if test and split == "test" else shape
            noise = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("trained, given", [
    ((8, 8), (8, 8)), ((8, 8), (16, 20)), ((8, 6), (8, 6)), ((8, 6), (16, 12))])
def test_evaluate_sees_pictures_as_predict_does_or_refuses(tmp_path, monkeypatch, trained, given):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    root = folders(tmp_path / "d", given)
    stats = inference.Statistics((0.5,) * 3, (0.5,) * 3)
    info = inference.RunInfo(TINY, ("cat", "dog"), 3, trained, stats)
    model = recipe.make_model(TINY, 2, 3)
    with patch.object(inference, "load_run", return_value=(model, info)), \
            patch.object(inference, "score", wraps=inference.score) as asked:
        if trained == (8, 6) != given:
            told = "have 16 x 12 pixels, expected 8 x 6 as in training"
            with pytest.raises(ValueError, match=told):
                inference.evaluate("run", root, device="cpu")
            return
        inference.evaluate("run", root, device="cpu")
    size = 8 if trained == (8, 8) else None  # of another shape, they stay as they are
    found = inference.find_pictures([root / "test"])
    seen = [inference.read_image(path, size) for path in found]
    assert torch.equal(asked.call_args.args[1].images, torch.stack(seen))


def test_the_test_set_must_have_the_size_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    source = folders(tmp_path / "d", (8, 8), test=(8, 2))
    c = recipe.with_settings(TINY, {"epochs": 1, "batch_size": 4})
    told = "has images of 8 x 8 pixels, test of 8 x 2, expected one size: give image_size"
    with pytest.raises(ValueError, match=told):
        t.train(c, source, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    c = recipe.with_settings(c, {"image_size": 8})
    assert t.train(c, source, tmp_path / "run", device="cpu")["steps"] == 3


def test_a_run_and_its_backup_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    c = recipe.with_settings(TINY, {"epochs": 1})
    t.train(c, "digits", "~/mine", device="cpu", backup="~/other")
    assert inference.load_run("~/mine") and inference.load_run("~/other")
    assert not (tmp_path / "~").exists()


def test_numbers_of_numpy_are_numbers(tmp_path):
    settings = dict(seed=np.int64(1), lr=np.float32(0.25), batch_size=np.int64(64),
                    epochs=np.uint8(1), flip=np.bool_(False))
    c = recipe.with_settings(TINY, settings)
    assert c == recipe.with_settings(TINY, dict(seed=1, lr=0.25, batch_size=64, epochs=1))
    assert {type(getattr(c, name)) for name in settings} == {int, float, bool}
    assert t.train(c, "digits", tmp_path / "run", device="cpu")["config"]["lr"] == 0.25
    with pytest.raises(ValueError, match="epochs is 1.0, expected a value of type int"):
        recipe.Config(epochs=np.float64(1))


def test_a_clock_that_ticks_slowly_is_not_divided_by(tmp_path, monkeypatch):
    """Windows' monotonic clock stands still for some 15 ms."""
    monkeypatch.setattr(t.time, "monotonic", lambda: 0.0)
    c = recipe.with_settings(TINY, {"epochs": 1})
    assert t.train(c, "digits", tmp_path / "run", device="cpu")["images_per_second"] > 0


def test_a_run_of_one_step_is_told_that_it_learns_nothing(tmp_path):
    c = recipe.with_settings(TINY, {"epochs": 1, "batch_size": 512})
    told = "one step.* learns nothing; give more epochs or a smaller batch_size"
    with pytest.warns(UserWarning, match=told):
        t.train(c, "digits", tmp_path / "run", device="cpu")
    model = t.build_model(c, load_images("digits"), torch.device("cpu"))
    after = weights(tmp_path / "run")
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("settings", [
    {"norm": "layer"}, {"batch_size": 2}, {"patch_size": 4}, {}])
def test_batchnorm_needs_more_than_one_value(settings, tmp_path):
    small = {"batch_size": 1, "patch_size": 8, "limit": 4, "epochs": 1}
    c = recipe.with_settings(TINY, {**small, **settings})
    if settings:
        assert t.train(c, "digits", tmp_path / "run", device="cpu")["steps"]
        return
    told = "single value .*, expected a larger batch_size or a smaller patch_size"
    with pytest.raises(ValueError, match=told):
        t.train(c, "digits", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
