"""The card: everything counted is in it, everything else is marked, and the same facts give the same text."""

import msgspec
import numpy as np
import pytest

from edge_quantize.calibrate import Calibration
from edge_quantize.card import FILL_IN, CardFacts, CardText, render_card
from edge_quantize.metrics import Accuracy, Estimate, Score
from edge_sdk.manifest import HeadSpec, LatentSpec, Manifest, StateSpec, TargetSpec
from edge_sdk.schema import Column, Impute, InputSpec, OneHot, Scale

pytestmark = pytest.mark.torch  # the calibration's settings stand beside its code, which needs onnx

SCALED = InputSpec(shape=[1, 8, 8], low=0, high=16, preprocess=[Scale(mean=[0.0], std=[16.0])])
TABLE = InputSpec(
    shape=[2],
    columns=[Column("age"), Column("site", "category", values=["n", "s"])],
    preprocess=[OneHot(columns=["site"]), Impute(values=[41.5])],
)


def share(hits, rows):
    return Accuracy.of(np.arange(rows) < hits)


def manifest(**changes):
    arguments = {
        "name": "demo", "release": 3, "created": "2026-01-01", "labels": ["cat", "dog"], "input": SCALED,
        "latent": LatentSpec(32, 0.25, 3), "head": HeadSpec([16]), "files": {},
        "toolchain": {"onnx": "1.2", "numpy": "2.3"}, **changes,
    }  # fmt: skip
    return Manifest(**arguments)


def facts(**changes):
    arguments = {
        "train_rows": 900, "memory_rows": 80, "int8": share(380, 400), "fp32": share(384, 400),
        "agreement": share(392, 400), "by_label": {"cat": share(190, 200), "dog": share(190, 200)}, **changes,
    }  # fmt: skip
    return CardFacts(**arguments)


def card(*, of=None, text=None, **changes):
    return render_card(of or manifest(), facts(**changes), text or CardText())


def test_gaps_for_a_person_are_marked_and_say_what_belongs_there():
    text = card()
    marked = [line for line in text.splitlines() if FILL_IN in line]
    assert len(marked) == 4
    assert "TO BE FILLED IN BY A PERSON" in FILL_IN
    assert marked[0].endswith(": what the model is for, who uses it, and what happens with what it says.")
    told = CardText(data="Photos.", intended_use="Doors.", limits="Night.", contact="The team.")
    full = card(text=told)
    assert FILL_IN not in full
    for said in ("Photos.", "Doors.", "Night.", "The team."):
        assert f"\n\n{said}\n\n" in full + "\n"


def test_what_was_measured_stands_with_its_interval():
    text = card()
    assert "| INT8 | 0.950 | 0.924 to 0.967 | 400 |" in text
    assert "| FP32 | 0.960 | 0.936 to 0.975 | 400 |" in text
    assert "| INT8, label cat | 0.950 | 0.910 to 0.973 | 200 |" in text
    assert "INT8 and FP32 predict the same label on 98.0% of these rows (95 % interval 96.1% to 99.0%)." in text
    assert "98.0% of these rows." in card(agreement=0.98)


def test_how_it_was_made_stands_there():
    text = card(recipe="uint8, per channel, minmax", calibration=Calibration(method="percentile", percentile=99.9),
                calibration_rows=512, adapt_reason="a dense head on 32 values",
                sqnr_db={"latent": 33.21, "logits": None}, selftest_rows=32,
                label_rows={"cat": 450, "dog": 450})  # fmt: skip
    for line in (
        "- quantization: uint8, per channel, minmax",
        "- calibration: percentile 99.9, on 512 rows",
        "- adapt level head: a dense head on 32 values",
        "- input 'input': float32 [1, 8, 8], values 0 to 16",
        "- preprocessing of 'input': scale, mean (0), std (16), axis -1",
        "- latent: 32 x uint8, scale 0.25, zero point 3",
        "- head: dense layers 32, 16, 2",
        "- made with numpy 2.3, onnx 1.2",
        "- first of its line",
    ):
        assert line in text.splitlines()
    assert "Signal to quantization noise: latent 33.2 dB, logits equal." in text
    assert "Training rows of each label: cat 450, dog 450." in text
    assert "32 held-out rows ship as they are" in text


def test_what_learning_starts_from_stands_with_its_size():
    sizes = {"memory.npz": 6400, "fisher.npz": 2350}
    text = card(moments_rows=900, learning_bytes={**sizes, "moments.npz": 10_049})
    assert "80 training rows ship as latents (factory memory); 900 training rows go into sums that ship" in text
    assert "- learning starts from fisher.npz 2.4 kB, memory.npz 6.4 kB, moments.npz 10.0 kB" in text.splitlines()
    without = card(no_moments="too wide", learning_bytes=sizes)
    assert "(moments)" not in without
    assert "- no moments ship (too wide): devices take them from the factory memory" in without.splitlines()


def test_tabular_preprocessing_names_its_columns():
    text = card(of=manifest(input=TABLE))
    assert "- columns: age (number), site (category)" in text
    assert "- preprocessing of 'input': one_hot, columns (site)" in text
    assert "- preprocessing of 'input': impute, values (41.5)" in text


def test_same_facts_give_the_same_text_and_well_formed_tables():
    by_slice = {"site=n": share(90, 100), "night": share(28, 30)}
    assert card(by_slice=by_slice) == card(by_slice=by_slice)
    tables = [block.splitlines() for block in card(by_slice=by_slice).split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table}) == 1, table


def test_limits_that_the_facts_show_are_listed():
    text = card(
        by_label={"cat": share(190, 200), "dog": share(11, 12)},
        by_slice={"night": share(70, 100), "day": share(297, 300)},
        label_rows={"cat": 870, "dog": 30},
        int8=share(360, 400), fp32=share(392, 400), leaked_rows=5,
    )  # fmt: skip
    limits = text.partition("Found by counting:")[2].partition("## How")[0]
    assert "cannot mend what the trunk no longer sees" in limits
    assert "Fewer than 40 held-out rows, so that the figures say little: label dog (12)." in limits
    assert "Fewer than 40 training rows: dog (30)" in limits
    assert (
        "Accuracy is known to no better than 10% for: label dog (0.65 to 0.99), slice night (0.60 to 0.78)." in limits
    )
    assert "INT8 is less accurate than FP32, 0.900 against 0.980, beyond chance." in limits
    assert "Slice night is worse than the whole, 0.700 against 0.900." in limits
    assert "5 held-out rows are among the rows it was made from" in limits


def test_a_healthy_model_has_the_ceiling_as_its_only_counted_limit():
    limits = card().partition("Found by counting:")[2].partition("## How")[0].strip().splitlines()
    assert len(limits) == 1
    assert limits[0].startswith("- The trunk is frozen")


def test_label_without_held_out_rows_is_shown_as_such():
    text = card(by_label={"cat": share(190, 200), "dog": share(0, 0)})
    assert "| INT8, label dog | no rows | | 0 |" in text
    assert "label dog (0)" in text


def test_multilabel_card_tells_rows_that_have_the_label_and_thresholds():
    wet = Score(rows=400, accuracy=share(390, 400), precision=share(20, 21), recall=share(20, 25))
    overall = Score(rows=400, accuracy=share(350, 400), hamming=Estimate(0.05, 0.04, 0.07))
    text = card(of=manifest(task="multilabel", thresholds=[0.5, 0.35]), int8=overall, fp32=overall,
                by_label={"cat": wet, "dog": wet})  # fmt: skip
    assert "| accuracy | 95 % interval | precision | 95 % interval | recall | 95 % interval | Hamming loss |" in text
    assert "| INT8 | 0.875 | 0.839 to 0.904 | | | | | 0.05 | 0.04 to 0.07 | 400 |" in text
    assert "cat 0.5, dog 0.35" in text
    assert "label cat (25)" in text  # not the 400 rows it was looked for in
    assert "same set of labels" in text


def test_regression_card_tells_units_and_tolerances():
    load = Score(rows=400, accuracy=share(350, 400), rmse=Estimate(1234.5, 1200, 1300), r2=Estimate(0.9, 0.88, 0.92))
    text = card(of=manifest(task="regression", labels=["load"], targets=[TargetSpec(0, 1, 2.5)]), int8=load, fp32=load,
                by_label={"load": load})  # fmt: skip
    assert "| RMSE | 95 % interval | R² | 95 % interval | rows |" in text
    assert "(load 2.5, in the target's units, as RMSE and MAE)" in text
    assert "- targets: load" in text


def test_raw_card_has_no_accuracy_and_says_that_nothing_tells_right_from_wrong():
    raw = manifest(task="raw", adapt="none", labels=[], latent=LatentSpec(), more_inputs=[InputSpec([1], name="rate")],
                   state=[StateSpec(input="h", output="h2", shape=[2, 1, 64])])  # fmt: skip
    text = render_card(
        raw,
        CardFacts(train_rows=0, memory_rows=0, int8=None, fp32=None, agreement=None, by_label={}, holdout_rows=250,
                  sqnr_db={"p": 31.0}, adapt_reason="the graph ends in LSTM"),
        CardText(),
    )  # fmt: skip
    assert "## Accuracy" not in text
    assert "250 held-out rows" in text
    assert "factory memory" not in text
    assert "No truth was compared with the outputs" in text
    assert "does not learn on the device" in text
    assert "- adapt level none: the graph ends in LSTM" in text
    assert "- state 'h': float32 [2, 1, 64], carried from call to call, zeros at first" in text
    assert "- input 'rate': float32 [1], values any finite" in text
    assert "latent" not in text.partition("How it is made")[2]


def test_names_bring_no_markup_of_their_own():
    evil = "<script>|*x*\n# y"
    text = card(of=manifest(labels=[evil, "dog"]), by_label={evil: share(190, 200)}, by_slice={evil: share(10, 20)})
    assert "<script>" not in text
    assert r"&lt;script&gt;\|\*x\* \# y" in text
    assert not any(line.startswith("# y") for line in text.splitlines())
    rows = [line for line in text.splitlines() if line.startswith("| INT8, label")]
    assert rows[0].replace(r"\|", "").count("|") == 5


def test_facts_are_plain_values():
    assert msgspec.to_builtins(facts(by_slice={"a": share(1, 2)}))["by_slice"]["a"]["value"] == 0.5
