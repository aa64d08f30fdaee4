"""What labels are worth on a real device: by source, by number, by reward, by rule; and those nobody acted on."""

import json

import msgspec
import numpy as np
import pytest

from edge_sdk.config import FeedbackConfig, JoinConfig, LearnConfig, PolicyConfig, ReplayConfig, ReportConfig
from edge_sdk.device import EdgeDevice
from edge_sdk.errors import ConfigError, LabelError, UnknownLabelError
from edge_sdk.labelling import LabellingFunction, LabellingFunctions
from edge_sdk.resources import FixedReader
from edge_sdk.stats import share_of
from edge_sdk.streams import rotation
from edge_sdk.transport import MemoryBroker, MemoryTransport

pytestmark = pytest.mark.torch
BASE = set(range(8))
TURN = rotation(30)
LONG = "s" * 65
SWAP = """
from edge_sdk.learn.base import LearnResult, nothing_between

def train(job, *, between=nothing_between):
    '''The champion, with the outputs of 3 and 5 exchanged.'''
    between()
    head, last = job.champion, job.champion.depth - 1
    order = [{3: 5, 5: 3}.get(i, i) for i in range(len(head.labels))]
    return head.with_last(head.weights[f"W{last}"][:, order], head.weights[f"b{last}"][order]), LearnResult(steps=1)
"""


@pytest.fixture
def credulous(config):
    """It promotes whatever looks the least bit better: what was learned can be seen."""
    gate = msgspec.structs.replace(
        config.gate, alpha=0.9999, class_margin=1.0, slice_margin=1.0, factory_margin=1.0, calibration_margin=1.0
    )
    return msgspec.structs.replace(config, gate=gate)


@pytest.fixture
def known(digits):
    return digits.life.only(BASE)


@pytest.fixture
def score(digits):
    """Turned digits that no device has seen, and their names."""
    pool = digits.score.only(BASE)
    return TURN(pool.x, None), names(pool.y)


def names(numbers):
    return [str(number) for number in numbers]


def next_of(label):
    """Another label than the right one, always the same."""
    return str((int(label) + 1) % 8)


def kept(device, columns="label, role"):
    return device._store.read(f"SELECT {columns} FROM samples ORDER BY key")


def outcome(device):
    return device.lineage()[-1]


def learn(device):
    device.learn_now()
    assert device.step().problem == ""
    return outcome(device)


# ---- sources


def test_a_source_without_weight_is_counted_and_neither_learned_from_nor_judged_by(make_device, known):
    device = make_device(feedback=FeedbackConfig(sources={"poison": 0.0}))
    for x in known.x[:60]:
        device.observe(device.predict(x).id, "5", source="poison")
    device.learn(known.x[60:80], ["5"] * 20, source="poison")
    report = device.step()
    status = device.status()
    assert (report.labelled, status.counters.labelled) == (60, 80)
    assert kept(device) == []
    assert (status.accuracy, device._reporter.window.labelled) == (None, 0)
    assert status.alarms == []


def test_a_source_without_weight_cannot_have_a_promoted_head_rolled_back(make_device, credulous, known, score):
    device = make_device(config=credulous, feedback=FeedbackConfig(sources={"poison": 0.0}))
    turned = TURN(known.x, None)
    for prediction, y in zip(device.predict_batch(turned[:200]), names(known.y), strict=False):
        device.observe(prediction.id, y)
    assert learn(device).outcome == "promoted"
    for prediction in device.predict_batch(turned[200:400]):
        device.observe(prediction.id, next_of(prediction.label), source="poison")
    device.step()
    assert (device.status().head, device.status().phase) == (1, "probation")


def test_a_label_weighs_what_its_source_does_and_an_unnamed_source_the_default(make_device, known):
    device = make_device(feedback=FeedbackConfig(sources={"nurse": 0.9}, default_weight=0.5))
    for x, source in zip(known.x, ["nurse", "passer-by", ""], strict=False):
        device.observe(device.predict(x).id, "3", source=source)
    device.learn(known.x[3:4], ["3"], source="nurse")
    device.step()
    assert kept(device, "source, weight") == [("nurse", 0.9), ("passer-by", 0.5), ("", 0.5), ("nurse", 0.9)]


def test_a_poisoned_source_does_the_less_harm_the_less_it_counts(make_device, credulous, known, score):
    """Half of all labels are wrong, always in the same way, and all of them come from one source."""
    accuracy = {}
    for weight in (0.0, 0.2, 1.0):
        device = make_device(f"weight-{weight}", config=credulous, feedback=FeedbackConfig(sources={"poison": weight}))
        for i, prediction in enumerate(device.predict_batch(TURN(known.x[:400], None))):
            truth = str(known.y[i])
            device.observe(prediction.id, truth if i % 2 else next_of(truth), source="" if i % 2 else "poison")
        assert learn(device).outcome == "promoted"
        accuracy[weight] = device.evaluate(*score)
    assert accuracy[0.0] >= 0.75
    assert accuracy[0.2] >= accuracy[0.0] - 0.1
    assert accuracy[1.0] <= accuracy[0.2] - 0.2


@pytest.mark.parametrize("name", [LONG, "line\nbreak", 7, None, "\ud800"])
def test_a_source_or_slice_that_is_no_short_text_is_refused_and_nothing_is_kept(make_device, known, name):
    device = make_device()
    device._labelling = LabellingFunctions([LabellingFunction("all", lambda _: "3")])
    prediction = device.predict(known.x[0])
    for call in (
        lambda: device.observe(prediction.id, "3", source=name),
        lambda: device.reward(prediction.id, 1.0, source=name),
        lambda: device.apply_rules(prediction.id, known.x[0], source=name),
        lambda: device.learn(known.x[:1], ["3"], source=name),
    ):
        with pytest.raises(LabelError, match="a source is"):
            call()
    for call in (
        lambda: device.predict(known.x[0], slice=name),
        lambda: device.predict_batch(known.x[:2], slice=name),
        lambda: device.learn(known.x[:1], ["3"], slice=name),
    ):
        with pytest.raises(LabelError, match="a slice is"):
            call()
    report = device.step()
    assert (report.predictions, report.labelled, report.problem) == (1, 0, "")
    assert kept(device) == []
    device.observe(device.predict(known.x[0], slice=LONG[:64]).id, "3", source=LONG[:64])
    device.step()
    assert kept(device, "source, slice") == [(LONG[:64], LONG[:64])]


# ---- how many an hour


def test_labels_beyond_the_cap_of_their_source_are_counted_and_neither_learned_from_nor_judged_by(
    make_device, known, clock
):
    options = {"feedback": FeedbackConfig(max_per_source_hour=10), "mode": "monitor"}
    device = make_device(**options)

    def send(source, count):
        for x in known.x[:count]:
            device.observe(device.predict(x).id, "3", source=source)
        device.step()
        return device.status().counters

    counters = send("flood", 25)
    assert (counters.labelled, counters.capped) == (25, 15)
    assert len(kept(device)) == device._reporter.window.labelled == 10
    assert send("other", 5).capped == 15
    device.learn(known.x[:4], ["3"] * 4, source="flood")
    device.step()
    assert device.status().counters.capped == 19
    device.stop()
    device = make_device(**options)
    assert send("flood", 1).capped == 20  # a restart is no way around it
    clock.advance(66 * 60)
    assert send("flood", 1).capped == 20
    assert len(kept(device)) == 10 + 5 + 1


# ---- rewards


def test_rewards_confirm_or_exclude_the_label_that_was_said_and_never_judge(make_device, known):
    device = make_device(replay=ReplayConfig(judge_share=1.0))
    said = []
    for x, value in zip(known.x, [1.0, 0.0, 0.5, 0.75], strict=False):
        said.append(device.predict(x))
        device.reward(said[-1].id, value, source="clicks")
    assert device.step().labelled == 4
    expected = [(said[0].label, "fresh", 1.0), (said[1].label, "fresh", -1.0), (said[3].label, "fresh", 0.5)]
    assert kept(device, "label, role, weight") == expected
    assert (device.status().accuracy, device._reporter.window.labelled) == (None, 0)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, "much", None])
def test_a_reward_that_is_no_share_is_refused(make_device, known, value):
    device = make_device()
    with pytest.raises(LabelError, match="a reward is a number from 0"):
        device.reward(device.predict(known.x[0]).id, value)


def test_a_truth_outranks_a_guess_about_the_same_row_that_came_with_it(make_device, known):
    device = make_device(mode="monitor")
    prediction = device.predict(known.x[0])
    device.reward(prediction.id, 0.0)
    device.observe(prediction.id, "4")
    device.step()
    assert kept(device, "label, weight") == [("4", 1.0)]
    assert (device.status().counters.labelled, device.status().counters.duplicates) == (1, 1)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("judge_share", [0.0, 1.0])
def test_a_truth_takes_the_place_of_a_guess_that_came_before_it(make_device, known, value, restarts, judge_share):
    options = {"mode": "monitor", "replay": ReplayConfig(judge_share=judge_share)}
    device = make_device(**options)
    prediction = device.predict(known.x[0])
    device.reward(prediction.id, value)
    device.reward(device.predict(known.x[1]).id, 1.0)
    device.step()
    if restarts:
        device.stop()
        device = make_device(**options)
    device.observe(prediction.id, "4", source="expert")
    assert device.step().unmatched == 0
    role = "judge" if judge_share else "fresh"
    assert kept(device, "label, role, weight, source")[1:] == [("4", role, 1.0, "expert")]
    counters = device.status().counters
    assert (counters.duplicates, counters.unmatched, counters.late_truths) == (0, 0, 0)
    assert device._reporter.window.labelled == 1
    for again in (lambda: device.observe(prediction.id, "5"), lambda: device.reward(prediction.id, 1.0)):
        again()
        device.step()
    assert device.status().counters.duplicates == 2
    assert [label for (label,) in kept(device, "label")][1:] == ["4"]


def test_a_second_guess_is_a_duplicate_also_after_a_restart(make_device, known):
    device = make_device(mode="monitor")
    name = device.predict(known.x[0]).id
    for restarts in (False, False, True):
        if restarts:
            device.stop()
            device = make_device(mode="monitor")
        device.reward(name, 0.0)
        device.step()
    assert kept(device, "weight") == [(-1.0,)]
    assert (device.status().counters.labelled, device.status().counters.duplicates) == (1, 2)


def test_an_id_that_met_a_guess_may_be_given_again(make_device, known):
    device = make_device(mode="monitor")
    for _ in range(2):
        device.predict(known.x[0], id="mine")
        device.reward("mine", 1.0)
        device.step()
    device.stop()
    device = make_device(mode="monitor")
    device.predict(known.x[1], id="mine")
    device.observe("mine", "4")
    device.step()
    assert [label for (label,) in kept(device, "label")][2:] == ["4"]  # of the latest alone


def test_a_truth_that_comes_after_its_guess_was_learned_from_is_counted_and_never_judges(make_device, credulous, known):
    device = make_device(config=credulous, replay=ReplayConfig(judge_share=1.0))
    for i, prediction in enumerate(device.predict_batch(TURN(known.x[:300], None))):
        if i % 3 == 0:
            device.observe(prediction.id, str(known.y[i]))
        else:
            device.reward(prediction.id, 1.0)
        last = prediction
    device.learn_now()
    device.step()
    assert kept(device, "role, label")[-1] == ("replay", last.label)
    device.observe(last.id, last.label)
    device.step()
    assert device.status().counters.late_truths == 1
    assert kept(device, "role, label")[-1] == ("replay", last.label)  # it says nothing new
    before = device._store.read("SELECT id FROM samples WHERE role = 'replay' AND id != ?", last.id)[-1][0]
    device.observe(before, "new")
    device.step()
    assert device.status().counters.late_truths == 2
    assert kept(device, "role, label")[-1] == ("fresh", "new")


def test_a_truth_whose_guess_is_being_learned_takes_its_place_and_never_judges(make_device, config, known, working):
    device = make_device(config=config, executor=working, replay=ReplayConfig(judge_share=1.0))
    said = device.predict_batch(known.x[:60])
    for prediction in said:
        device.reward(prediction.id, 1.0)
    device.learn_now()
    device.step()
    assert device.status().phase == "training"
    other = next_of(said[0].label)
    device.observe(said[0].id, other)
    device.observe(said[1].id, said[1].label)
    device.observe(device.predict(known.x[60]).id, "3")
    device.step()
    assert device.status().counters.late_truths == 2
    assert [label for (label,) in kept(device, "label")][:-2] == [row.label for row in said[1:]]
    assert kept(device, "label, role")[-2:] == [(other, "fresh"), ("3", "judge")]


def test_clicks_alone_teach_which_labels_were_wrong(make_device, credulous, known, score):
    """Every fourth row is labelled and judges; of the others it is only known whether the prediction was right."""
    device = make_device(config=credulous, replay=ReplayConfig(judge_share=1.0))
    for i, prediction in enumerate(device.predict_batch(TURN(known.x, None))):
        truth = str(known.y[i])
        if i % 4 == 0:
            device.observe(prediction.id, truth)
        else:
            device.reward(prediction.id, float(prediction.label == truth))

    def of_what_was_wrong():
        return np.mean([p.probabilities[wrong[i]] for i, p in enumerate(device.predict_batch(score[0])) if i in wrong])

    first = device.predict_batch(score[0])
    wrong = {i: p.labels.index(p.label) for i, p in enumerate(first) if p.label != score[1][i]}
    before, accuracy = of_what_was_wrong(), device.evaluate(*score)
    assert learn(device).outcome == "promoted"
    assert of_what_was_wrong() <= before - 0.25
    assert device.evaluate(*score) >= accuracy + 0.2


# ---- rules


@pytest.fixture
def ruled(tmp_path, checkpoint, config, clock):
    """Opens a device with these labelling functions."""
    opened = []

    def make(*functions, **settings):
        opened.append(
            EdgeDevice(
                tmp_path / "ruled", checkpoint=checkpoint, config=msgspec.structs.replace(config, **settings),
                clock=clock, resources=FixedReader(), labelling=LabellingFunctions(functions) if functions else None,
            )
        )  # fmt: skip
        return opened[-1]

    yield make
    for device in opened:
        device.stop()


def test_rules_label_in_proportion_to_their_votes_and_never_judge(ruled, known):
    device = ruled(
        LabellingFunction("dark", lambda x: "1" if x.mean() < 2 else None, weight=3.0),
        LabellingFunction("bright", lambda x: "8" if 0.9 < x.max() <= 1 else None),
        LabellingFunction("broken", lambda x: 1 / 0),
        feedback=FeedbackConfig(sources={"rules": 0.5}),
        replay=ReplayConfig(judge_share=1.0),
    )
    bright, dim = known.x[0], known.x[0] * 0.5
    assert device.apply_rules(device.predict(bright).id, bright) == "1"
    assert device.apply_rules(device.predict(dim).id, dim, source="sensor") == "1"
    assert device.apply_rules(device.predict(dim).id, dim + 2) is None
    report = device.step()
    assert (report.labelled, report.unmatched) == (2, 0)
    assert kept(device, "label, role, weight, source") == [
        ("1", "fresh", 0.375, "rules"), ("1", "fresh", 1.0, "sensor"),
    ]  # fmt: skip
    assert device._reporter.window.labelled == 0


def test_a_device_without_rules_says_so_and_one_whose_rules_name_no_label_refuses(ruled, known):
    with pytest.raises(ConfigError, match="labelling="):
        ruled().apply_rules("some", known.x[0])


def test_a_label_that_only_rules_know_is_refused_where_none_may_come(ruled, known):
    device = ruled(LabellingFunction("all", lambda _: "owl"), learn=LearnConfig(new_labels="refuse"))
    with pytest.raises(UnknownLabelError, match="unknown label 'owl'"):
        device.apply_rules(device.predict(known.x[0]).id, known.x[0])


# ---- labels the model does not know


def test_unknown_labels_are_refused_or_wait_until_they_are_many(make_device, known):
    device = make_device("refusing", learn=LearnConfig(executor="inline", new_labels="refuse"))
    with pytest.raises(UnknownLabelError, match="new_labels = refuse"):
        device.observe(device.predict(known.x[0]).id, "8")
    device = make_device("full", learn=LearnConfig(executor="inline", max_labels=8))
    with pytest.raises(UnknownLabelError, match="max_labels = 8"):
        device.observe(device.predict(known.x[0]).id, "8")
    device = make_device("open", replay=ReplayConfig(judge_share=0.0), mode="shadow")
    device.learn(known.x[:9], ["owl"] * 9)
    device.step()
    assert device.status().new_labels == {}
    device.learn(known.x[9:10], ["owl"])
    device.step()
    assert device.status().new_labels == {"owl": 10}
    assert "owl" not in device.labels


# ---- learning from feedback as it is


def test_smoothing_makes_the_learned_head_less_sure(make_device, credulous, known, score):
    sure = {}
    for smoothing in (0.0, 0.3):
        learning = LearnConfig(executor="inline", learner="sgd", label_smoothing=smoothing)
        device = make_device(f"smoothing-{smoothing}", config=credulous, learn=learning)
        for prediction, y in zip(device.predict_batch(TURN(known.x[:300], None)), names(known.y), strict=False):
            device.observe(prediction.id, y)
        assert learn(device).outcome == "promoted"
        sure[smoothing] = np.mean([prediction.confidence for prediction in device.predict_batch(score[0])])
    assert sure[0.3] <= sure[0.0] - 0.1


def test_labels_that_contradict_the_others_are_left_out_forgotten_and_counted(make_device, credulous, known):
    """Every fifth label is wrong."""
    device = make_device(config=credulous, learn=LearnConfig(executor="inline", filter_share=0.3))
    lies = set()
    for i, prediction in enumerate(device.predict_batch(TURN(known.x[:400], None))):
        truth = str(known.y[i])
        if i % 5 == 0:
            lies.add(prediction.id)
        device.observe(prediction.id, truth if i % 5 else next_of(truth))
    told = learn(device).detail
    left = {name for (name,) in kept(device, "id")}
    fresh = {name for (name,) in device._store.read("SELECT id FROM samples WHERE role != 'judge'")}
    assert told["wrong"] == told["fresh"] - told["used"] == 400 - len(left) > 20
    assert len(lies - left) >= 0.85 * told["wrong"]
    assert len(fresh & lies) <= 40


# ---- slices


@pytest.mark.parametrize("named", [True, False])
def test_a_challenger_that_harms_a_slice_is_rejected_and_no_one_hears_of_the_slice(
    make_device, config, digits, clock, tmp_path, monkeypatch, named
):
    """By day the threes are called five, by night they stay threes; the learner exchanges the two."""
    (tmp_path / "swapping_learner.py").write_text(SWAP)
    monkeypatch.syspath_prepend(tmp_path)
    gate = msgspec.structs.replace(config.gate, class_margin=1.0, factory_margin=1.0, calibration_margin=1.0)
    broker = MemoryBroker()
    listener = MemoryTransport(broker)
    listener.subscribe("#")
    listener.connect()
    device = make_device(
        transport=MemoryTransport(broker), gate=gate, report=ReportConfig(interval_s=300, min_count=1),
        learn=LearnConfig(executor="inline", learner="swapping_learner:train"), replay=ReplayConfig(judge_share=0.5),
        policy=PolicyConfig(min_fresh_rows=100),
    )  # fmt: skip
    device.connect()
    threes = digits.life.only({3}).x
    for turn in range(8):
        clock.advance(301)
        for i in range(40):
            night = i % 3 == 0
            part = ("night-shift" if night else "day-shift") if named else ""
            device.observe(device.predict(threes[(turn * 40 + i) % len(threes)], slice=part).id, "3" if night else "5")
        if turn == 4:
            device.learn_now()
        assert device.step().problem == ""
    told = outcome(device)
    assert told.outcome == ("rejected" if named else "promoted")
    assert (told.detail["worst_slice"] > 0.8) == named
    if named:
        assert told.detail["reason"].startswith("harms a slice: ")
    heard = b"".join(message.topic.encode() + bytes(message.payload) for message in listener.receive())
    assert told.outcome.encode() in heard
    assert b"shift" not in heard
    for said in (device.history(limit=1_000), device.lineage(), device.status(), device.skew()):
        assert "shift" not in str(said)


# ---- which predictions wait, and which nobody acts on


def test_a_share_of_predictions_waits_for_labels_each_for_as_many_as_it_stands_for(make_device, known):
    device = make_device(join=JoinConfig(log_fraction=0.25), mode="monitor")
    waits = [name for name in map("order-{}".format, range(40)) if share_of(name, "log") < 0.25]
    assert 4 <= len(waits) <= 16
    for i, x in enumerate(known.x[:40]):
        device.predict(x, id=f"order-{i}")
    assert device.step().predictions == 40
    assert sorted(device._store.waiting_ids(not_like="?")) == sorted(waits)
    for i in range(40):
        device.observe(f"order-{i}", "3")
    report = device.step()
    assert (report.labelled, report.unmatched) == (len(waits), 40 - len(waits))
    assert set(kept(device, "weight")) == {(4.0,)}
    for i in range(40):
        assert device.predict(known.x[i], id=f"order-{i}").id == f"order-{i}"  # free again, labelled or not


def test_logged_rows_judge_like_all_rows_would(make_device, credulous, known, score):
    device = make_device(config=credulous, join=JoinConfig(log_fraction=0.5))
    for prediction, y in zip(device.predict_batch(TURN(known.x, None)), names(known.y), strict=True):
        device.observe(prediction.id, y)
    before = device.evaluate(*score)
    told = learn(device)
    assert told.outcome == "promoted"
    assert told.detail["rows"] == device.status().judge_rows
    assert device.evaluate(*score) >= before + 0.3


def test_what_nobody_acts_on_follows_from_the_id_and_its_labels_judge(make_device, known):
    device = make_device(holdout_share=0.3, replay=ReplayConfig(judge_share=0.0), mode="monitor")
    said = [device.predict(x, id=f"order-{i}") for i, x in enumerate(known.x[:60])]
    assert [p.holdout for p in said] == [share_of(p.id, "holdout") < 0.3 for p in said]
    held = {p.id for p in said if p.holdout}
    assert 8 <= len(held) <= 30
    for prediction, y in zip(said, names(known.y), strict=False):
        device.observe(prediction.id, y)
    device.step()
    assert {name for name, role in kept(device, "id, role") if role == "judge"} == held
    score = device.skew().holdout
    assert score.rows == len(held)
    assert score.right == sum(p.label == y for p, y in zip(said, names(known.y), strict=False) if p.holdout)
    batch = device.predict_batch(known.x[:40])
    assert [p.holdout for p in batch] == [share_of(p.id, "holdout") < 0.3 for p in batch]
    assert not any(p.holdout for p in make_device("usual").predict_batch(known.x[:40]))


def test_what_nobody_acts_on_is_never_learned_from(make_device, known, monkeypatch):
    """Neither as a guess, nor when no more rows may judge."""
    device = make_device(holdout_share=1.0, mode="monitor")
    device.reward(device.predict(known.x[0]).id, 1.0)
    device.step()
    monkeypatch.setattr(type(device._adaptation), "judges_full", True)
    device.observe(device.predict(known.x[1]).id, "3")
    assert device.step().labelled == 1
    assert device.skew().holdout.rows == 1
    assert kept(device) == []


def test_counters_of_feedback_survive_a_restart(make_device, known):
    device = make_device(feedback=FeedbackConfig(max_per_source_hour=1), mode="monitor")
    for x in known.x[:3]:
        device.observe(device.predict(x).id, "3")
    device.stop()
    counters = json.loads(msgspec.json.encode(make_device(mode="monitor").status().counters))
    assert (counters["labelled"], counters["capped"]) == (3, 2)
