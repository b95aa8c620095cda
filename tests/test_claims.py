"""The claims: a sound file, texts as the file says, verdicts that can go either way."""

import csv
import html
import re
from dataclasses import replace
from pathlib import Path

import prose
import pytest

import convmixer_edu
from convmixer_edu import claims as module
from convmixer_edu.claims import MARKS, NUMBER, Claim, Verdict, claim, claims, compared, verdict
from convmixer_edu.compare import images_on_gpu, published
from convmixer_edu.exercises import check, same

FILE = Path(convmixer_edu.__file__).with_name("claims.csv")


SOUND = {  # column: (pattern, what it is), checked in this order
    "id": (r"[a-z0-9]+(-[a-z0-9]+)+", "small letters, digits and hyphens"),
    "confidence": ("|".join(MARKS), f"one of {', '.join(MARKS)}"),
    **dict.fromkeys(("section", "subject", "quantity", "value", "chapter"), (r"(?s).*\S.*", "some words")),
    "source": (r"(?s).*[^\s;].*", "a source, or recalled as confidence"),
    "number": (NUMBER, "a number, as its unit says")}


def check_row(row, line, before):
    """Fail naming the first thing that is wrong with a row."""
    where, text = f"line {line} of the claims ({row.get('id')})", dict(row)
    assert None not in row and None not in row.values(), (
        f"{where} has more or fewer values than columns: quote values that hold a comma")
    assert row["id"] not in before, f"{where}: the id is taken, choose another one"
    if row["confidence"] in ("recalled", "derived"):
        text["source"] = "needs none"
    text["number"] = row["value"] if row["unit"] in ("%", "points", "img/s", "M") else "0"
    for name, (pattern, what) in SOUND.items():
        assert re.fullmatch(pattern, text[name]), f"{where}: {name} is {text[name]!r}, expected {what}"


def test_every_claim_can_be_read():
    with open(FILE, encoding="utf8", newline="") as lines:
        reader, found = csv.DictReader(lines), {}
        assert reader.fieldnames == list(Claim.__dataclass_fields__), "keep the columns in the order of `Claim`"
        for row in reader:
            check_row(row, reader.line_num, found)
            found[row["id"]] = row
    assert len(found) > 80 and {id: vars(c) for id, c in claims().items()} == found


@pytest.mark.parametrize("change, told", [
    ({"confidence": "sure"}, "confidence is 'sure'"), ({"id": "Bad id"}, "id is .Bad id., expected small letters"),
    ({"value": "some"}, "expected a number"), ({"source": " "}, "source is . ., expected a source"), ({"subject": ""}, "subject is .., expected some words"),
    ({"chapter": None}, "more or fewer values than columns"), ({"id": "params-768-32"}, "is taken"),
])
def test_a_broken_row_is_named(change, told):
    row = {**vars(claim("t1-1536-20")), **change}
    with pytest.raises(AssertionError, match=told):
        check_row(row, 7, {"params-768-32": None})


def test_an_unknown_claim_is_answered_with_its_neighbours():
    with pytest.raises(KeyError, match="t1-1536-20"):
        claim("t1-1536-2")


def test_a_link_shows_the_value_and_its_title_says_what_is_weak():
    for c in claims().values():
        link, weak = c.link(), c.confidence in ("recalled", "derived")
        title, shown = link.partition(">")[0], link.partition(">")[2]
        assert shown.replace("\xa0", " ") == f"{html.escape(c.text)}</a>" and f"#{c.id}" in title
        assert c.number is None or " " not in shown  # a number and its unit stay on one line
        assert (html.escape(MARKS[c.confidence]) in title) == weak
        assert not weak or not any(word in c.text for word in ("recalled", "derived"))


@pytest.mark.parametrize("id", list(claims()))
def test_verdicts_follow_from_rules(id):
    assert verdict(id).word in {"match", "differs", "holds", "open", "not run"}


def test_a_verdict_can_be_the_other_one(monkeypatch):
    assert compared(1.0, 1.04, 0.05, "").word == "match" and compared(1.0, 1.06, 0.05, "").word == "differs"
    wrong = {**module.IMAGENET_FLAGS, "lr": (0.02, "setup-lr")}
    monkeypatch.setattr(module, "IMAGENET_FLAGS", wrong)
    assert verdict("setup-lr").word == "differs" and verdict("setup-ra").word == "match"
    monkeypatch.setattr(module, "count_parameters", lambda *sizes, **more: 1)
    assert verdict("params-1536-20") == Verdict("differs", "0", "counted by the formula, tolerance 0")
    assert verdict("m-formula").word == "differs"
    monkeypatch.setattr(module, "count_macs", lambda *sizes, **more: 1e9)
    assert verdict("m-macs").word == "differs"
    monkeypatch.setattr(module, "_equal_to_timm", lambda: (1e-3, {(1,), (2,)}))
    assert verdict("p-block").word == "fails" and verdict("p-isotropic").word == "fails"


def test_speeds_are_compared_at_equal_images_and_a_page_is_held_to_its_code(monkeypatch):
    row = published("resnet50.a1_in1k")  # timed at 288 pixels
    assert images_on_gpu(row, "RTX 4090") == row.img_per_s_rtx4090_amp_nhwc * (288 / 224) ** 2
    assert verdict("a-throughput").ours == "5.9 to 9.4 times slower" and verdict("a-throughput").word == "holds"
    assert verdict("o-keras").word == "differs" and verdict("o-keras").ours == "0.594"
    monkeypatch.setattr(module, "images_on_gpu", lambda row, gpu: 1.0)
    assert verdict("a-throughput").word == "fails"


def test_answers_are_compared_as_people_would():
    assert same(1, 1.0) and same([1, (2, 3)], (1, [2, 3])) and same("Yes ", "yes") and same({"a": 1}, {"a": 1})
    assert not same(1, True) and not same(1, "1") and not same([1], [1, 2]) and not same(None, 0)


def test_an_answer_is_open_right_or_wrong():
    def state(answer, **more):
        return check(answer, 4, {2: "two", 8: "eight"}, **more)

    assert state(...).state == "open" and state((1, ...)).state == "open" and state(4.0).state == "right"
    assert state(8).sentence == "eight" and state(5).state == "wrong" and "not a mistake" in state(5).sentence
    assert check(lambda x: 1 / x, 1, by=lambda f: f(0)).sentence.endswith("division by zero")
    assert check(3, lambda a: a % 2 == 1).state == "right"


def test_the_check_of_prose_finds_what_it_should():
    page = prose.values("x = 224\n81.382 and 2,517,630,976 of 0.857")
    fine = "In 2020 ConvMixer-256/8 saw 224 pixels, 81.4 of 2.5 billion, 85.7 %, two and a half billion, three of `99`."
    assert prose.unbound(fine, page) == []
    bad = "It takes 31 seconds, twenty-five steps, 5 % and 4.5 million; [81.37 %](claims.ipynb#t1-1536-20) is free."
    assert prose.unbound(bad, page) == ["31 seconds", "5 %", "4.5 million", "twenty-five"]
    assert prose.wrong_claims("[81.37 %](claims.ipynb#t1-1536-20), [the largest one](claims.ipynb#t1-1536-20)") == []
    assert prose.wrong_claims("[81.4 %](claims.ipynb#t1-1536-20)") and prose.wrong_claims("[206 img/s, recalled](claims.ipynb#thr-768-32)")


def test_the_light_script_is_judged_by_the_interval_of_our_runs(monkeypatch):
    seen = verdict("c-light-25")
    assert seen.word == "match" and "±" in seen.ours and "3 runs" in seen.how
    far = replace(claim("c-light-25"), value="93.5")
    assert module._light(far).word == "differs"
    monkeypatch.setattr(module, "list_records", lambda: ["light25-seed0"])
    assert module._light(far).word == "not run"  # one run has no interval


def test_the_largest_scale_counts_and_a_single_run_of_each_arm_does_not_hide_an_interval(monkeypatch):
    assert verdict("b3-no-scale").how.startswith("n = 2, scale light25")
    read = module._records
    monkeypatch.setattr(module, "_records", lambda scale: {
        arm: runs[:1] if scale == "light25" else runs for arm, runs in read(scale).items()})
    assert module._ablated(claim("b3-no-scale")).how.startswith("n = 3, scale small:")
