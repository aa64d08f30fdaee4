"""Kinds of change are told apart, and told in words that a person can act on."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.drift.diagnose import Evidence, Live, class_shift, diagnose
from edge_sdk.drift.quality import Finding
from edge_sdk.drift.ranks import rank_channels
from edge_sdk.drift.reference import Reference, output_channels

NAMES = ("acc_x", "acc_y", "acc_z", "heat", "flow", "load")
LABELS = ("idle", "walk", "run")
CENTRES = np.random.default_rng(3).normal(0, 1.5, (3, 6))
SHARE = (0.6, 0.3, 0.1)


class World:
    """Three classes of six features, a classifier that knows them, and a latent that is a map of the features."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.map = np.random.default_rng(7).normal(size=(6, 24))

    def rows(self, count, *, share=SHARE, offset=0.0):
        y = self.rng.choice(3, count, p=share)
        x = (CENTRES[y] + self.rng.normal(size=(count, 6)) + offset).astype(np.float32)
        logits = -((x[:, None] - CENTRES) ** 2).sum(axis=2) / 2 + np.log(SHARE)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        latents = np.clip(128 + 15 * (x @ self.map), 0, 255).astype(np.uint8)
        return x, (p / p.sum(axis=1, keepdims=True)).astype(np.float32), latents

    def reference(self, count=2_000):
        x, p, latents = self.rows(count)
        return Reference.build(x, p, np.ones(count, bool), names=NAMES, latents=latents)

    def evidence(self, reference, alarms, *, count=300, live=True, **changes):
        x, p, latents = self.rows(count, **changes)
        return Evidence(
            alarms,
            count,
            inputs=rank_channels(x, reference.edges).mean(axis=0),
            outputs=output_channels(p, reference.output_edges, "classification").mean(axis=0),
            latents=reference.latent.channels(latents).mean(axis=0),
            live=Live.of(x) if live else None,
        )


@pytest.fixture(scope="module")
def reference():
    return World(0).reference()


def test_no_alarm_no_diagnosis(reference):
    assert diagnose(reference, World(1).evidence(reference, [])) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [(0.2, 0.2, 0.6), (0.2, 0.7, 0.1), (1.0, 0.0, 0.0)], ids=str)
def test_other_class_shares_are_a_prior_shift_and_are_told(reference, share, seed):
    evidence = World(10 + seed).evidence(reference, {"input", "output", "latent"}, share=share)
    found = diagnose(reference, evidence, labels=LABELS)
    assert found.kind == "prior"
    top = int(np.argmax(np.abs(np.array(share) - SHARE)))
    assert LABELS[top] in found.suspects[:2]  # what one class gains another loses
    assert f"{LABELS[top]!r} {100 * reference.class_share[top]:.0f} % -> " in found.words
    np.testing.assert_allclose(class_shift(reference, evidence), share, atol=0.1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [(1, 0, 0, 0, 0, 0), (0, 0, -2, 0, 0, 0), (0.5,) * 6], ids=str)
def test_a_feature_that_moved_is_a_covariate_shift_and_is_named(reference, offset, seed):
    evidence = World(20 + seed).evidence(reference, {"input", "output", "latent", "accuracy"}, offset=np.array(offset))
    found = diagnose(reference, evidence, labels=LABELS)
    assert found.kind == "covariate"
    if sum(value != 0 for value in offset) == 1:
        moved = int(np.flatnonzero(offset)[0])
        assert found.suspects[0] == NAMES[moved]
        assert found.words.startswith(f"{NAMES[moved]}: mean {reference.feature_mean[moved]:.3g} -> ")
        assert "of its usual spread)" in found.words


def test_chance_is_not_taken_for_other_shares(reference):
    found = [World(30 + seed).evidence(reference, {"output"}, count=60) for seed in range(20)]
    assert sum(class_shift(reference, evidence) is not None for evidence in found) <= 2


def test_worse_answers_on_usual_inputs_are_a_change_of_concept(reference):
    evidence = World(2).evidence(reference, {"accuracy"})
    found = diagnose(reference, replace(evidence, accuracy=0.7))
    assert (found.kind, found.suspects) == ("concept", ("accuracy",))
    assert found.words == "inputs look as they did, but answers are right less often than before: 1.00 -> 0.70"
    assert "more or less often" in diagnose(reference, replace(evidence, accuracy=math.nan)).words


def test_broken_data_explains_whatever_else_is_up(reference):
    evidence = World(3).evidence(reference, {"quality", "input", "accuracy"}, offset=3.0)
    evidence = replace(evidence, findings=[Finding("heat", "missing", "40 % of the values missing (usually 0 %)")])
    found = diagnose(reference, evidence)
    assert (found.kind, found.suspects) == ("quality", ("heat",))
    assert found.words == "heat: 40 % of the values missing (usually 0 %)"


def test_values_out_of_range_are_part_of_a_large_shift_but_alone_are_broken_data(reference):
    findings = [Finding("heat", "range", "9 % of the values outside -4 to 4 (usually 0 %)")]
    evidence = replace(World(3).evidence(reference, {"quality", "input"}, offset=3.0), findings=findings)
    assert diagnose(reference, evidence).kind == "covariate"
    assert diagnose(reference, replace(evidence, alarms={"quality"})).kind == "quality"
    assert diagnose(reference, Evidence({"quality"}, 10)).kind == "quality"


def test_another_unit_is_broken_data(rng):
    reference = Reference.from_rows(rng.normal([20, 0], [5, 1], (1000, 2)).astype(np.float32), ["oven", "flow"])
    live = Live.of(rng.normal([68, 0], [9, 1], (200, 2)).astype(np.float32))
    found = diagnose(reference, Evidence({"input"}, 200, live=live))
    assert (found.kind, found.suspects) == ("quality", ("oven",))
    assert found.words == "oven: values look like degrees Fahrenheit, no longer like degrees Celsius"


def test_shift_spread_and_missing_values_are_told_in_the_features_own_unit(rng):
    at = (np.argsort(rng.permutation(4000)) + 0.5) / 4000 - 0.5  # of mean 0
    usual = np.stack([2.1 + at * 12**0.5, rng.permutation(at) * 12**0.5, np.ones(4000)], axis=1)
    reference = Reference.from_rows(usual.astype(np.float32), ["acc_x", "acc_y", "mode"])
    x = np.stack([3.4 + at * 12**0.5, rng.permutation(at) * 3 * 12**0.5, np.full(4000, 2.0)], axis=1).astype(np.float32)
    x[np.argsort(np.abs(at))[:480], 0] = np.nan
    inputs = rank_channels(x, reference.edges).mean(axis=0)
    found = diagnose(reference, Evidence({"input"}, 4000, inputs=inputs, live=Live.of(x)))
    assert found.kind == "covariate"
    told = dict(part.split(": ") for part in found.words.replace("); 1", ") and 1").split("; "))
    assert told["acc_x"] == "mean 2.1 -> 3.4 (+1.3 of its usual spread) and 12 % of the values missing (usually 0 %)"
    assert told["acc_y"] == "spread 1 -> 3 (3.0 times the usual)"
    assert told["mode"] == "mean 2, was always 1"


def test_without_recent_rows_ranks_are_told_and_without_ranks_rows(rng):
    reference = Reference.from_rows(rng.normal(size=(1000, 2)).astype(np.float32), ["a", "b"])
    ranks = diagnose(reference, Evidence({"input"}, 100, inputs=np.array([0.5, 0.8])))
    assert ranks.words.startswith("b: usual rank 0.50 -> 0.80")
    rows = diagnose(
        reference, Evidence({"input"}, 100, live=Live.of(rng.normal([0, 3], 1, (100, 2)).astype(np.float32)))
    )
    assert rows.suspects[0] == "b"


def test_outputs_are_told_where_inputs_look_as_they_did(reference):
    evidence = World(5).evidence(reference, {"output"})
    outputs = np.array([*evidence.outputs[:2], 0.1, 0.1, 0.8])
    found = diagnose(reference, replace(evidence, outputs=outputs), labels=LABELS)
    assert found.kind == "covariate"
    assert found.suspects[0] == "probability of 'run'"
    assert found.words.startswith("probability of 'run': mean 0.")
    alone = diagnose(reference, Evidence({"latent"}, 100))
    assert alone.words == "what the network makes of the inputs has changed"


def test_a_model_with_another_label_has_no_class_shift(reference):
    evidence = World(6).evidence(reference, {"output"}, share=(0.1, 0.1, 0.8))
    grown = replace(reference, output_mean=np.full(6, 0.5), output_std=np.full(6, 0.5))
    assert class_shift(grown, replace(evidence, outputs=np.full(6, 0.5))) is None
    assert class_shift(grown, evidence) is None


def test_live_rows_may_be_few_or_missing():
    live = Live.of(np.array([[np.nan, 1.0], [np.nan, np.nan]], np.float32))
    np.testing.assert_array_equal(live.mean, [np.nan, 1])
    np.testing.assert_array_equal(live.missing, [1, 0.5])
    assert np.isnan(live.quantiles).all()
