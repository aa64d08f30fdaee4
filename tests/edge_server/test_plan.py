import calendar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_server.plan import Gate, RolloutPlan, RolloutRules, load_rules, opens_at, stage_size

SATURDAY = float(calendar.timegm((2026, 11, 21, 0, 0, 0)))
HOUR = 3600.0


class TestRules:
    @pytest.mark.parametrize(
        "rules",
        [
            {"stages": ()},
            {"stages": (50,)},
            {"stages": (50, 10, 100)},
            {"stages": (0, 100)},
            {"stages": (10, 110)},
            {"stages": ("5 devices",)},
            {"stages": ("5 devices", "3 devices", 100)},
            {"stages": ("some", 100)},
            {"soak_s": -1.0},
            {"soak_s": float("nan")},
            {"timeout_s": 0.0},
            {"max_accuracy_drop": 1.5},
            {"max_failures": -1},
            {"max_parallel": -1},
            {"control_percent": 95},
            {"shadow_percent": 0},
            {"alpha": 0.0},
            {"hours": ("22-04",)},
            {"hours": ("22:00-22:00",)},
            {"gates": (Gate(metric="drift"), Gate(metric="drift"))},
        ],
    )
    def test_rules_out_of_range_are_refused(self, rules):
        with pytest.raises(ValueError, match="must "):
            RolloutRules(**rules)

    @pytest.mark.parametrize("gate", [{"metric": "speed"}, {"metric": "metric:"}, {"metric": "drift", "margin": -1.0}])
    def test_a_gate_that_cannot_be_judged_is_refused(self, gate):
        with pytest.raises(ValueError, match="must "):
            Gate(**gate)

    def test_a_plan_survives_being_written_down(self):
        plan = RolloutPlan(
            release=2, stages=("5 devices", 50, 100), gates=(Gate(metric="metric:clicks", better="lower"),)
        )
        assert msgspec.json.decode(msgspec.json.encode(plan), type=RolloutPlan) == plan

    def test_a_gate_of_the_plan_takes_the_place_of_the_usual_one(self):
        own = Gate(metric="accuracy", margin=0.1, proof="not_worse")
        rules = RolloutRules(gates=(own, Gate(metric="crashes")))
        assert [gate.metric for gate in rules.judged_by()] == ["errors", "accuracy", "crashes"]
        assert own in rules.judged_by()
        assert [gate.proof for gate in rules.judged_by(shadowing=True)] == ["no_harm", "no_harm"]

    def test_an_ab_test_has_to_be_shown_better_and_holds_half_out(self):
        rules = RolloutRules(strategy="ab")
        assert rules.held_out == 50
        assert rules.judged_by()[0].proof == "better"
        assert rules.judged_by(last=False)[0].proof == "no_harm"

    def test_the_gates_of_all_stages_share_the_error_level(self):
        assert RolloutRules(stages=(10, 50, 100)).level == pytest.approx(0.05 / 6)
        assert RolloutRules(strategy="shadow", stages=(100,)).level == pytest.approx(0.05 / 4)

    def test_a_file_of_rules_changes_what_it_names(self, tmp_path):
        path = tmp_path / "plan.toml"
        path.write_text(
            'stages = ["5 devices", 100]\nhours = ["22:00-04:00"]\n[[gates]]\nmetric = "p99_ms"\nmargin = 0.2\n'
        )
        rules = load_rules(path, RolloutRules(soak_s=7.0))
        assert (rules.stages, rules.soak_s, rules.gates[0].metric) == (("5 devices", 100), 7.0, "p99_ms")

    @pytest.mark.parametrize("text", ["soak = 3", "stages = [1]", "stages =", "[[gates]]\nmetric = 'speed'"])
    def test_a_file_that_is_none_is_refused_by_name(self, tmp_path, text):
        path = tmp_path / "plan.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"plan\.toml"):
            load_rules(path, RolloutRules())
        with pytest.raises(ConfigError, match="cannot be read"):
            load_rules(tmp_path / "none.toml", RolloutRules())


class TestStages:
    @pytest.mark.parametrize(("devices", "size"), [(0, 0), (1, 1), (4, 1), (5, 1), (6, 2), (100, 20)])
    def test_a_stage_has_its_share_and_at_least_one(self, devices, size):
        assert stage_size(RolloutRules(stages=(20, 100)), 0, devices) == size

    def test_a_stage_may_be_a_number_of_devices(self):
        rules = RolloutRules(stages=("5 devices", 10, 100))
        assert [stage_size(rules, stage, 100) for stage in range(3)] == [5, 10, 100]
        assert [stage_size(rules, stage, 3) for stage in range(3)] == [3, 3, 3]

    @given(st.integers(0, 200), st.sampled_from([("5 devices", 1, 100), (1, "50 devices", 30, 100), (10, 100)]))
    def test_a_stage_never_has_fewer_than_the_one_before(self, devices, stages):
        sizes = [stage_size(RolloutRules(stages=stages), stage, devices) for stage in range(len(stages))]
        assert sizes == sorted(sizes)
        assert sizes[-1] == devices

    def test_who_is_held_out_does_not_depend_on_the_others(self):
        plan = RolloutPlan(release=2, control_percent=30)
        held_out = [plan.in_control(f"d{i}") for i in range(2000)]
        assert 500 < sum(held_out) < 700
        assert not any(RolloutPlan(release=2).in_control(f"d{i}") for i in range(100))


class TestHours:
    def test_without_hours_it_is_always_open(self):
        assert opens_at(RolloutRules(), SATURDAY) == SATURDAY

    @pytest.mark.parametrize(("hour", "opens"), [(0, 0), (3.9, 3.9), (4, 22), (12, 22), (22, 22), (23.5, 23.5)])
    def test_hours_may_pass_midnight(self, hour, opens):
        rules = RolloutRules(hours=("22:00-04:00",))
        assert opens_at(rules, SATURDAY + hour * HOUR) == SATURDAY + opens * HOUR

    def test_a_weekday_is_that_on_which_the_hours_begin(self):
        rules = RolloutRules(hours=("22:00-04:00",), weekdays=("sat",))
        assert opens_at(rules, SATURDAY + 2 * HOUR) == SATURDAY + 22 * HOUR, "friday's night is not meant"
        assert opens_at(rules, SATURDAY + 26 * HOUR) == SATURDAY + 26 * HOUR
        assert opens_at(rules, SATURDAY + 28 * HOUR) == SATURDAY + (7 * 24 + 22) * HOUR

    def test_days_alone_are_whole_days(self):
        rules = RolloutRules(weekdays=("sun", "mon"))
        assert opens_at(rules, SATURDAY + HOUR) == SATURDAY + 24 * HOUR
        assert opens_at(rules, SATURDAY + 71.5 * HOUR) == SATURDAY + 71.5 * HOUR
        assert opens_at(rules, SATURDAY + 72 * HOUR) == SATURDAY + 8 * 24 * HOUR

    @given(
        st.lists(st.sampled_from(["22:00-04:00", "01:30-02:00", "00:00-23:59"]), max_size=2),
        st.lists(st.sampled_from(["mon", "wed", "sun"]), max_size=3, unique=True),
        st.floats(0, 1e6),
    )
    def test_it_opens_within_a_week_and_is_open_then(self, hours, weekdays, after):
        rules = RolloutRules(hours=tuple(hours), weekdays=tuple(weekdays))
        now = SATURDAY + after
        opens = opens_at(rules, now)
        assert now <= opens <= now + 8 * 24 * HOUR
        assert opens_at(rules, opens) == opens
