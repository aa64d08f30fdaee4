import itertools
import math

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_quantize import CalibrationWarning, DataError, ExportError
from edge_quantize.quantize import QuantRecipe
from edge_quantize.search import FP32, Budget, SearchResult, Trial, choose, hold_back, paired_loss, search
from edge_sdk.errors import RuntimeUnavailableError

LOSS = 0.01


def trial(name, p50_ms, loss=0.0, spread=0.002, **changes):
    fields = {"recipe": QuantRecipe(), "loss": loss, "loss_low": loss - spread, "loss_high": loss + spread, **changes}
    return Trial(name=name, p50_ms=p50_ms, **fields)


def base(p50_ms=10.0):
    return trial(FP32, p50_ms, spread=0, recipe=None)


times = st.floats(0.01, 100)
losses = st.floats(-0.2, 0.5)


@st.composite
def trials(draw):
    made = [
        trial(
            str(i), draw(times), draw(losses), draw(st.floats(0, 0.1)), error=draw(st.sampled_from(["", "", "broken"]))
        )
        for i in range(draw(st.integers(0, 8)))
    ]
    return draw(st.permutations([base(draw(times)), *made]))


@given(trials(), st.floats(0.001, 0.1), st.floats(1, 2))
def test_choice_is_fast_enough_right_enough_and_the_fastest_of_its_kind(tried, max_loss, speedup):
    choice = choose(tried, max_loss=max_loss, min_speedup=speedup)
    fp32 = next(t for t in tried if t.recipe is None)
    fast = [t for t in tried if t is not fp32 and not t.error and t.p50_ms * speedup <= fp32.p50_ms]
    sure = [t for t in fast if t.loss_high <= max_loss]
    likely = [t for t in fast if t.loss <= max_loss]
    assert choice.reason.startswith((choice.trial.name, "FP32"))
    if choice.trial is fp32:
        assert not likely
        assert choice.proven
    else:
        group = sure or likely
        assert choice.trial in group
        assert choice.proven == bool(sure)
        assert choice.trial.p50_ms <= min(t.p50_ms for t in group) * 1.03


@given(trials(), st.randoms())
def test_choice_does_not_depend_on_the_order_of_the_trials(tried, random):
    shuffled = list(tried)
    random.shuffle(shuffled)
    assert choose(tried, max_loss=LOSS).trial.p50_ms == choose(shuffled, max_loss=LOSS).trial.p50_ms


@given(trials())
def test_allowing_more_loss_never_makes_a_proven_choice_slower(tried):
    strict, lax = (choose(tried, max_loss=loss, min_speedup=1) for loss in (0.01, 0.05))
    if strict.proven and lax.proven:
        assert lax.trial.p50_ms <= strict.trial.p50_ms * 1.03


def test_of_equally_fast_recipes_the_one_that_loses_least_is_chosen():
    tried = [base(), trial("a", 5.00, 0.004), trial("b", 5.05, 0.001), trial("c", 5.5, 0.0)]
    assert choose(tried, max_loss=LOSS).trial.name == "b"


def test_faster_recipe_that_is_not_surely_right_enough_yields_to_one_that_is():
    tried = [base(), trial("unsure", 4, 0.002, 0.02), trial("sure", 6, 0.002, 0.004)]
    choice = choose(tried, max_loss=LOSS)
    assert (choice.trial.name, choice.proven) == ("sure", True)


def test_too_few_rows_fall_back_on_the_estimate_and_say_so():
    choice = choose([base(), trial("unsure", 4, 0.002, 0.02)], max_loss=LOSS)
    assert (choice.trial.name, choice.proven) == ("unsure", False)
    assert "too few rows to say" in choice.reason
    assert "give more validation rows" in choice.reason


@pytest.mark.parametrize(
    ("tried", "reason"),
    [
        ([trial("a", 9.5)], "no INT8 recipe is 1.10 times as fast; a takes 9.500 ms of 10.000"),
        ([trial("a", 5, 0.2), trial("b", 4, 0.1)], r"loses more than 0.01; b 0.1000"),
        ([trial("a", math.nan, error="cannot")], "no INT8 recipe works"),
        ([], "no INT8 recipe works"),
    ],
)
def test_fp32_is_chosen_with_the_reason(tried, reason):
    choice = choose([base(), *tried], max_loss=LOSS)
    assert choice.trial.name == FP32
    assert reason in choice.reason


def test_choosing_without_fp32_is_refused():
    with pytest.raises(ValueError, match="no trial of FP32"):
        choose([trial("a", 1)], max_loss=LOSS)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_bounds_of_the_loss_hold_its_estimate_and_swap_with_the_models(rows):
    before, after = (np.array(column) for column in zip(*rows, strict=True))
    loss, low, high = paired_loss(before, after)
    assert loss == pytest.approx(before.mean() - after.mean())
    assert low <= loss <= high
    assert paired_loss(after, before) == pytest.approx((-loss, -high, -low))


def test_upper_bound_of_the_loss_is_rarely_too_low():
    rng = np.random.default_rng(0)
    below = 0
    for _ in range(2000):
        kind = rng.choice(4, 400, p=[0.9, 0.03, 0.02, 0.05])  # both right, lost, won, both wrong
        below += paired_loss((kind == 0) | (kind == 1), (kind == 0) | (kind == 2))[2] < 0.01
    assert below / 2000 <= 0.06


def test_equal_answers_on_few_rows_prove_nothing_and_on_many_do():
    few, many = np.ones(100, bool), np.ones(400, bool)
    assert paired_loss(few, few)[2] > LOSS > paired_loss(many, many)[2]


def test_loss_of_errors_is_their_rise_as_a_share():
    rng = np.random.default_rng(0)
    before = rng.random(1000).astype(np.float32) + 1
    loss, low, high = paired_loss(before, before * np.float32(1.05))
    assert low < loss < high
    assert loss == pytest.approx(0.05, rel=1e-4)
    assert paired_loss(before[:1], before[:1])[1:] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones(0, bool), np.ones(0, bool)),
        (np.ones(3, bool), np.ones(3)),
        (np.ones((3, 2)), np.ones((3, 2))),
        (np.ones(3), np.array([1, np.nan, 1])),
    ],
)
def test_scores_that_do_not_fit_are_refused(before, after):
    with pytest.raises(DataError, match="a score must be"):
        paired_loss(before, after)


@given(st.integers(3, 300), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_held_back_rows_and_the_rest_are_all_rows_once(count, max_rows, seed):
    y = np.random.default_rng(seed).integers(0, 3, count)
    for labels in (None, y):
        rest, taken = hold_back(count, max_rows=max_rows, rng=np.random.default_rng(seed), y=labels)
        assert np.array_equal(np.sort(np.concatenate([rest, taken])), np.arange(count))
        assert len(taken) <= min(max_rows, count // 3)


def test_held_back_rows_have_every_label():
    y = np.repeat(np.arange(10), [3] * 9 + [500])
    _, taken = hold_back(len(y), max_rows=50, rng=np.random.default_rng(0), y=y)
    assert set(y[taken]) == set(range(10))


@pytest.mark.parametrize("field", ["max_seconds", "max_trials", "repeats"])
def test_budget_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=field):
        Budget(**{field: 0})


def network(*, hidden=1.0):
    """A trunk of three layers of 64 channels, float32 [N, 64]; `hidden` blows one channel up and down again."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 1, 8, 8] x) => (float[batch, 64] features) {
            [first] a = Conv<pads = [1, 1, 1, 1]>(x, w1)
            [relu1] b = Relu(a)
            [last] c = Conv<pads = [1, 1, 1, 1]>(b, w2)
            [relu2] d = Relu(c)
            [third] e = Conv<pads = [1, 1, 1, 1]>(d, w3)
            [relu3] f = Relu(e)
            [pool] g = GlobalAveragePool(f)
            [flat] features = Flatten(g)
        }"""
    )
    big = np.where(np.arange(64) == 3, hidden, 1.0)
    weights = {
        "w1": rng.normal(size=(64, 1, 3, 3)) * big[:, None, None, None],
        "w2": rng.normal(size=(64, 64, 3, 3)) / big[None, :, None, None] / 24,
        "w3": rng.normal(size=(64, 64, 3, 3)) / 24,
    }
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    return model


def images(rows, seed):
    """Noise whose strength says which of two classes an image is of."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, rows)
    return (rng.normal(size=(rows, 1, 8, 8)) * (1 + y[:, None, None, None])).astype(np.float32), y


@pytest.fixture(scope="module")
def setting():
    x, _ = images(100, 0)
    held, y = images(400, 1)
    return x, held, lambda latents: (latents.mean(axis=1) > 0.46) == y


class Ticks:
    """A clock that goes on by a fixed step whenever it is read."""

    def __init__(self, step):
        self._times = itertools.count(0.0, step)

    def __call__(self):
        return next(self._times)


def run(setting, model=None, **changes):
    x, held, score = setting
    options = {"score": score, "budget": Budget(repeats=10), **changes}
    return search(model or network(), x, held, **options)


@pytest.fixture(scope="module")
def found(setting):
    return run(setting, min_speedup=0.01)


def test_every_recipe_is_tried_and_kept_with_its_numbers(found, setting):
    assert found.trials[0].name == FP32
    recipes = [t.recipe for t in found.trials[1:]]
    for activation, per_channel, method in itertools.product(
        ("uint8", "int8"), (True, False), ("minmax", "percentile", "entropy")
    ):
        assert any(
            (r.activation, r.per_channel, r.calibration.method, r.float_nodes) == (activation, per_channel, method, ())
            for r in recipes
        )
    assert any(r.float_nodes for r in recipes)
    for t in found.trials:
        assert t.error == ""
        assert t.p50_ms > 0
        assert t.size_bytes > 1000
        assert t.loss_low <= t.loss <= t.loss_high
    assert found.trials[1].size_bytes < found.trials[0].size_bytes / 3
    assert found.rows == 400
    assert found.stopped == ""


def test_chosen_recipe_is_right_enough_and_in_the_table(found):
    assert found.recipe == found.choice.trial.recipe
    assert found.choice.trial.loss_high <= LOSS
    lines = found.table().splitlines()
    assert [line[2:].startswith(t.name) for line, t in zip(lines[1:], found.trials, strict=False)] == [True] * len(
        found.trials
    )
    assert sum(line.startswith("*") for line in lines) == 1
    assert found.choice.reason in lines[-1]


def test_result_is_json_and_back_the_same_but_for_missing_numbers(found):
    assert msgspec.json.decode(found.to_json(), type=SearchResult) == found


def test_progress_runs_to_the_end(setting):
    seen = []
    result = run(setting, progress=lambda *step: seen.append(step), budget=Budget(repeats=1, max_trials=3))
    done, total, names = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1]
    assert names[0] == FP32
    assert names[1] == result.trials[1].name


def test_fp32_is_chosen_if_nothing_is_fast_enough_and_the_best_recipe_is_packed(setting):
    result = run(setting, min_speedup=1e6, budget=Budget(repeats=1))
    assert result.choice.trial.name == FP32
    assert result.recipe == min((t for t in result.trials[1:]), key=lambda t: (t.loss, t.p50_ms)).recipe


def test_number_of_trials_is_kept(setting):
    result = run(setting, budget=Budget(max_trials=2, repeats=3))
    assert [t.name for t in result.trials] == [FP32, "uint8, per channel, minmax", "uint8, per channel, percentile"]
    assert result.stopped == "2 recipes allowed"
    assert "stopped: 2 recipes allowed" in result.table()


def test_time_is_kept_but_one_recipe_is_tried_and_timed_in_any_case(setting):
    result = run(setting, budget=Budget(max_seconds=100, repeats=1000), clock=Ticks(60.0), min_speedup=0.01)
    assert len(result.trials) == 3  # the clock is read once a recipe: at 60 s one may begin, at 120 s none
    assert result.stopped == "100 s allowed"
    late = run(setting, budget=Budget(max_seconds=0.001, repeats=1000), clock=Ticks(60.0), min_speedup=0.01)
    assert len(late.trials) == 2
    assert late.trials[1].p50_ms == 60_000


def test_sensitive_layers_in_float_rescue_a_network_that_int8_breaks(setting):
    x, held, _ = setting
    right = None

    def score(latents):
        nonlocal right
        wide = latents[:, ::2] > latents[:, 1::2]
        right = wide if right is None else right
        return (wide == right).mean(axis=1) > 0.9

    result = search(network(hidden=3000.0), x, held, score=score, min_speedup=0.01, budget=Budget(repeats=3))
    plain = [t for t in result.trials[1:] if not t.recipe.float_nodes]
    assert min(t.loss for t in plain) > 0.1
    assert result.choice.trial.recipe.float_nodes
    assert {"first", "last"} <= set(result.recipe.float_nodes)
    assert result.choice.trial.loss < 0.02


def test_too_few_rows_to_say_are_warned_of(setting):
    x, held, score = setting
    with pytest.warns(CalibrationWarning, match=r"search on 50 rows: .* too few rows to say"):
        result = search(
            network(),
            x,
            held[:50],
            score=lambda latents: score(np.pad(latents, ((0, 350), (0, 0))))[:50],
            min_speedup=0.01,
            budget=Budget(repeats=2, max_trials=1),
        )
    assert not result.choice.proven


def test_network_served_whole_is_searched_by_its_outputs():
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 64] x, float[1, batch, 32] state) => (float[batch, 32] values, float[1, batch, 32] next) {
            a = MatMul(x, w1)
            b = MatMul(state, w2)
            next = Add(a, b)
            axes = Constant<value_ints = [0]>()
            values = Squeeze(next, axes)
        }"""
    )
    for name, shape in {"w1": (64, 32), "w2": (32, 32)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    rows = [{"x": rng.normal(size=(1, 64)), "state": rng.normal(size=(1, 1, 32))} for _ in range(120)]
    truth = np.concatenate([row["x"] for row in rows[40:]]).sum(axis=1)

    def score(outputs):
        assert outputs["values"].shape == (80, 32)
        assert outputs["next"].shape == (80, 1, 32)
        return np.abs(outputs["values"].sum(axis=1) - truth)

    result = search(
        model, rows[:40], rows[40:], score=score, whole=True, min_speedup=0.001, max_loss=0.5, budget=Budget(repeats=2)
    )
    assert result.choice.trial.name != FP32
    assert result.trials[0].score > 1


def test_recipe_that_fails_is_kept_with_its_error_and_nothing_else_is_lost(setting):
    _, _, score = setting
    calls = itertools.count()

    def failing(latents):
        if next(calls) == 2:
            raise RuntimeUnavailableError("the engine\nbroke")
        return score(latents)

    result = run(setting, score=failing, budget=Budget(repeats=2, max_trials=3), min_speedup=0.01)
    assert [bool(t.error) for t in result.trials] == [False, False, True, False]
    assert math.isnan(result.trials[2].p50_ms)
    assert "the engine" in result.table()
    assert "null" in result.to_json().decode()


def test_search_without_any_recipe_that_works_is_an_error():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 4] x) => (float[batch, 4] y) { y = Tanh(x) }'
    )
    x = np.random.default_rng(0).random((90, 4)).astype(np.float32)
    with pytest.raises(ExportError, match=r"no INT8 recipe works; .*: nothing in the network can be quantized"):
        search(model, x[:30], x[30:], score=lambda outputs: outputs["y"][:, 0] > 0, whole=True)


def test_validating_on_calibration_rows_is_refused(setting):
    x, _, score = setting
    with pytest.raises(DataError, match="100 of 100 validation rows are calibration rows as well"):
        search(network(), x, x, score=score)
