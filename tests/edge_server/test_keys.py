"""Keys and signatures of the coordinator: made, changed, revoked, renewed, published; and the commands for it."""

import contextlib
import json
import os
import shutil
import stat

import pytest
from click.testing import CliRunner
from tuf.api.metadata import Metadata, Root, TargetFile

from edge_sdk.files import set_crash_hook
from edge_sdk.messages import MetadataSet, Topics, decode
from edge_sdk.transport import MemoryTransport
from edge_sdk.trust import Trust, target_path
from edge_server.cli import main
from edge_server.errors import SigningError
from edge_server.keys import Repository
from edge_server.settings import Settings, SigningSettings
from edge_server.verify import list_releases, verify_releases

DAY = 86_400.0
TOPICS = Topics()


@pytest.fixture
def away(tmp_path):
    return tmp_path / "away"


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir(exist_ok=True)
    return tmp_path / "home"


@pytest.fixture
def repository(home, clock):
    return Repository(home, settings=SigningSettings(), clock=clock)


@pytest.fixture
def ready(repository, away):
    repository.init(away, count=3, threshold=2, passphrase=None)
    return repository


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of small files are written here, and no power is cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def root_of(repository):
    return Metadata[Root].from_bytes(repository.root()).signed


class TestInit:
    def test_root_keys_are_away_and_the_others_here_for_their_owner_only(self, repository, home, away):
        repository.init(away, count=3, threshold=2, passphrase=b"secret")
        assert len(list(away.iterdir())) == 3
        assert len(list((home / "keys").iterdir())) == 3
        files = [*away.iterdir(), *(home / "keys").iterdir()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert all(b"ENCRYPTED" in path.read_bytes() for path in away.iterdir())
        records = repository.keys()
        assert [(key.role, key.here, key.threshold) for key in records] == [
            *[("root", False, 2)] * 3,
            *[(role, True, 1) for role in ("targets", "snapshot", "timestamp")],
        ]

    def test_nothing_secret_is_in_the_public_folder(self, ready, home):
        assert not any(b"PRIVATE" in path.read_bytes() for path in (home / "tuf").iterdir())

    @pytest.mark.parametrize(("count", "threshold"), [(1, 1), (3, 1), (2, 3), (17, 2), (0, 2)])
    def test_one_key_alone_can_never_be_enough(self, repository, away, count, threshold):
        with pytest.raises(SigningError, match="threshold"):
            repository.init(away, count=count, threshold=threshold, passphrase=None)
        assert not repository.exists

    def test_root_keys_never_lie_beside_the_others(self, repository, home):
        with pytest.raises(SigningError, match="own folder"):
            repository.init(home / "away", count=3, threshold=2, passphrase=None)

    def test_a_folder_in_use_is_left_alone(self, repository, away):
        away.mkdir()
        (away / "photo").write_text("x")
        with pytest.raises(SigningError, match="is not empty"):
            repository.init(away, count=3, threshold=2, passphrase=None)

    def test_twice_is_refused(self, ready, tmp_path):
        with pytest.raises(SigningError, match="there are keys already"):
            ready.init(tmp_path / "other", count=3, threshold=2, passphrase=None)


class TestChange:
    def test_too_few_root_keys_change_nothing(self, ready, away, tmp_path):
        (tmp_path / "one").mkdir()
        some = min(away.iterdir())
        some.rename(tmp_path / "one" / some.name)
        with pytest.raises(SigningError, match="1 of the 2 root keys"):
            ready.rotate("targets", [tmp_path / "one"], passphrase=None)
        assert root_of(ready).version == 1
        assert ready.rotate("targets", [tmp_path / "one", away], passphrase=None) == 2

    def test_a_wrong_passphrase_changes_nothing(self, repository, away):
        repository.init(away, count=2, threshold=2, passphrase=b"right")
        with pytest.raises(SigningError, match="wrong passphrase"):
            repository.revoke(repository.keys()[0].key, [away], passphrase=b"wrong", new=away.parent / "new")
        with pytest.raises(SigningError, match="wrong passphrase"):
            repository.renew_root([away], passphrase=None)
        assert root_of(repository).version == 1

    def test_a_revoked_online_key_is_gone_from_root_and_disk(self, ready, home, away):
        key = ready.keys()[-1].key
        assert ready.revoke(key[:8], [away], passphrase=None) == 2
        assert key not in root_of(ready).keys
        assert not (home / "keys" / f"{key[:16]}.pem").exists()
        assert not ready.renew(), "everything is signed with the new key already"

    def test_a_revoked_root_key_is_replaced_and_the_threshold_stays(self, ready, away, tmp_path):
        key = ready.keys()[0].key
        with pytest.raises(SigningError, match="--new-root-keys"):
            ready.revoke(key, [away], passphrase=None)
        ready.revoke(key, [away], passphrase=None, new=tmp_path / "new")
        role = root_of(ready).roles["root"]
        assert (len(role.keyids), role.threshold, key in role.keyids) == (3, 2, False)

    @pytest.mark.parametrize("key", ["", "zz", "no such key"])
    def test_a_key_that_is_not_there_cannot_be_revoked(self, ready, away, key):
        with pytest.raises(SigningError, match="0 keys begin"):
            ready.revoke(key, [away], passphrase=None)

    def test_after_all_root_keys_changed_the_old_ones_sign_nothing(self, ready, away, tmp_path):
        ready.rotate("root", [away], passphrase=None, new=tmp_path / "new")
        with pytest.raises(SigningError, match="0 of the 2 root keys"):
            ready.rotate("targets", [away], passphrase=None)
        assert ready.rotate("targets", [tmp_path / "new"], passphrase=None) == 3


class PowerCut(BaseException):
    pass


@pytest.fixture
def cut_at():
    """Cuts the power at the n-th file that is written."""

    def cut(number):
        seen = []

        def hook(name):
            seen.append(name)
            if len(seen) == number:
                raise PowerCut

        set_crash_hook(hook)

    yield cut
    set_crash_hook(None)


class TestPowerCuts:
    @pytest.mark.parametrize("number", range(1, 9))
    def test_what_was_signed_before_stays_whole_and_signing_goes_on(self, ready, cut_at, home, number):
        ready.sign({target_path(1): TargetFile(1, {"sha256": "ab" * 32}, target_path(1))})
        before = ready.published().versions
        cut_at(number)
        with contextlib.suppress(PowerCut):
            ready.sign({})
        set_crash_hook(None)
        versions = ready.published().versions
        assert versions.timestamp in (before.timestamp, before.timestamp + 1)
        assert versions.targets == before.targets + versions.timestamp - before.timestamp
        ready.sign({})
        assert ready.targets() == {}

    @pytest.mark.parametrize("number", range(1, 13))
    def test_new_keys_are_in_force_or_the_old_ones_still_are(self, ready, cut_at, away, number, tmp_path, clock):
        cut_at(number)
        with contextlib.suppress(PowerCut):
            ready.rotate("targets", [away], passphrase=None)
        set_crash_hook(None)
        ready.renew()  # as the running service does
        trust = Trust(tmp_path / "device", (tmp_path / "home" / "tuf" / "1.root.json").read_bytes())
        published = ready.published()
        for name, data in published.files.items():
            trust.take(name, data)
        trust.announce(published.versions)
        trust.refresh(clock.now())
        assert trust.state(clock.now()) == "trusted"

    @pytest.mark.parametrize("number", [1, 7, 9, 13, 15])
    def test_half_a_beginning_is_none(self, repository, cut_at, away, number):
        cut_at(number)
        with contextlib.suppress(PowerCut):
            repository.init(away, count=2, threshold=2, passphrase=None)
        set_crash_hook(None)
        if not repository.exists:
            shutil.rmtree(away)
            repository.init(away, count=2, threshold=2, passphrase=None)
        assert repository.published().versions == MetadataSet(root=1, timestamp=1, snapshot=1, targets=1)


class TestRenewal:
    def test_each_part_is_renewed_at_half_its_time(self, ready, clock):
        assert not ready.renew()
        clock.advance(3.4 * DAY)
        assert not ready.renew()
        clock.advance(0.2 * DAY)
        assert ready.renew()
        assert ready.published().versions == MetadataSet(root=1, timestamp=2, snapshot=1, targets=1)
        clock.advance(12 * DAY)
        assert ready.renew()
        assert ready.published().versions == MetadataSet(root=1, timestamp=3, snapshot=2, targets=1)
        clock.advance(90 * DAY)
        assert ready.renew()
        assert ready.published().versions == MetadataSet(root=1, timestamp=4, snapshot=3, targets=2)

    def test_a_root_that_has_expired_signs_nothing_until_it_is_renewed(self, ready, away, clock):
        clock.advance(731 * DAY)
        with pytest.raises(SigningError, match="keys renew"):
            ready.renew()
        assert ready.renew_root([away], passphrase=None) == 2
        assert not ready.renew()

    def test_a_lost_online_key_is_told_with_what_helps(self, ready, home):
        for path in (home / "keys").iterdir():
            path.unlink()
        with pytest.raises(SigningError, match="keys rotate targets"):
            ready.sign({})

    def test_old_versions_are_thrown_away(self, ready, home):
        for _ in range(8):
            ready.sign({})
        assert len(list((home / "tuf").glob("*.targets.json"))) <= 4

    def test_damaged_metadata_is_told(self, ready, home):
        (home / "tuf" / "timestamp.json").write_text("{")
        with pytest.raises(SigningError, match=r"timestamp.json is damaged"):
            ready.published()


@pytest.fixture
def signing(make_coordinator, away):
    coordinator = make_coordinator()
    coordinator.registry.repository.init(away, count=2, threshold=2, passphrase=None)
    return coordinator


class TestPublishing:
    def listen(self, broker):
        listener = MemoryTransport(broker)
        listener.connect()
        listener.subscribe(TOPICS.metadata("+"))
        return listener

    def test_all_metadata_is_retained_before_the_group_hears_of_it(self, signing, broker, checkpoint):
        listener = MemoryTransport(broker)
        listener.connect()
        listener.subscribe("#")
        signing.push(checkpoint(1))
        topics = [message.topic for message in listener.receive()]
        assert topics.index(TOPICS.metadata("set")) < topics.index(TOPICS.desired("default"))
        late = {TOPICS.parse_metadata(message.topic) for message in self.listen(broker).receive()}
        assert late == {"set", "timestamp", "snapshot", "targets", "1.root"}

    def test_a_broker_that_forgot_gets_it_again(self, signing, broker, checkpoint):
        signing.push(checkpoint(1))
        broker._retained.clear()
        broker.stop()
        broker.start()
        signing.pump()
        assert len(self.listen(broker).receive()) == 5

    def test_the_running_service_renews_and_publishes(self, signing, broker, clock, checkpoint):
        signing.push(checkpoint(1))
        listener = self.listen(broker)
        listener.receive()
        clock.advance(4 * DAY)
        signing.step()
        topics = {message.topic: message.payload for message in listener.receive()}
        assert decode(topics[TOPICS.metadata("set")], MetadataSet).timestamp == 3
        assert set(topics) == {TOPICS.metadata("set"), TOPICS.metadata("timestamp")}, "and only what changed"

    def test_what_another_process_signed_is_published(self, signing, broker, clock, home):
        signing.pump()
        listener = self.listen(broker)
        listener.receive()
        Repository(home, settings=SigningSettings(), clock=clock).sign({})
        signing.pump()
        assert listener.receive()

    def test_a_root_that_is_near_its_end_is_told_once_a_day(self, signing, clock, caplog):
        clock.advance(660 * DAY)
        signing.step()
        assert "more days" not in caplog.text
        clock.advance(15 * DAY)
        for _ in range(3):
            signing.step()
            clock.advance(61)
        assert caplog.text.count("good for 55 more days: edge-coordinator keys renew") == 1

    def test_a_root_that_expired_stops_nothing_else(self, signing, clock, checkpoint, caplog):
        clock.advance(800 * DAY)
        for _ in range(3):
            signing.step()
            clock.advance(61)
        assert caplog.text.count("devices will soon install nothing") == 1


class TestReleases:
    def test_a_release_that_cannot_be_signed_is_not_offered(self, signing, home, checkpoint):
        for path in (home / "keys").iterdir():
            path.unlink()
        with pytest.raises(SigningError):
            signing.push(checkpoint(1))
        assert (signing.desired_revision(), signing.rollouts(), signing.registry.releases()) == (0, [], [])

    def test_without_keys_nothing_is_signed_and_all_goes_on(self, coordinator, checkpoint):
        coordinator.push(checkpoint(1))
        assert [state.signed for state in list_releases(coordinator.registry)] == [False]
        with pytest.raises(SigningError, match="keys init"):
            verify_releases(coordinator.registry)

    def test_a_withdrawn_release_is_signed_no_longer(self, signing, checkpoint):
        signing.push(checkpoint(1))
        rollout = signing.push(checkpoint(2))
        signing.abort(rollout)
        assert signing.registry.sign_all() == 1
        assert [state.signed for state in list_releases(signing.registry)] == [False, True]

    def test_only_the_newest_stay_signed_and_what_a_group_runs(self, make_coordinator, away, checkpoint):
        coordinator = make_coordinator(signing=SigningSettings(keep_releases=1))
        coordinator.registry.repository.init(away, count=2, threshold=2, passphrase=None)
        coordinator.push(checkpoint(1), group="old")
        for number in (2, 3):
            coordinator.push(checkpoint(number), group=f"new-{number}")
        assert [state.signed for state in list_releases(coordinator.registry)] == [True, True, True]

    def test_a_bundle_has_the_newest_root(self, signing, away, tmp_path):
        registry = signing.registry
        registry.repository.rotate("snapshot", [away], passphrase=None)
        bundle = registry.enrol("pump-1", group="g", out=tmp_path / "bundle.json", actor="test")
        assert Metadata[Root].from_bytes(bundle.root.encode()).signed.version == 2


def test_the_commands_from_the_first_key_to_the_last(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run(*arguments, expect=0, **options):
        result = runner.invoke(main, [*map(str, arguments), "--home", "coordinator"], **options)
        assert result.exit_code == expect, (result.output, result.exception)
        return result.output

    secret = {"env": {"EDGE_ROOT_PASSPHRASE": "correct horse"}}
    run("init")
    run("push", checkpoint(1))
    assert "no keys" in run("releases", "verify", expect=1)
    assert "1 releases signed" in run("keys", "init", "--root-keys", "away", input="one\none\n", expect=0)
    listed = json.loads(run("keys", "list", "--json"))
    assert [entry["role"] for entry in listed] == ["root"] * 3 + ["targets", "snapshot", "timestamp"]
    assert "good" in run("releases", "verify")
    assert "wrong passphrase" in run("keys", "rotate", "timestamp", "--root-keys", "away", **secret, expect=1)
    assert "root 2" in run("keys", "rotate", "timestamp", "--root-keys", "away", "--passphrase", "one")
    assert "root 3" in run(
        "keys", "revoke", listed[0]["key"][:12], "--root-keys", "away", "--new-root-keys", "new", "--passphrase", "one"
    )
    assert "root 4" in run("keys", "renew", "--root-keys", "away", "--passphrase", "one")
    run("push", checkpoint(2))
    assert run("releases", "verify").count("good") == 2
    assert "yes" in run("releases", "list")
    run("releases", "export", "www")
    blob = next((tmp_path / "coordinator" / "blobs").iterdir())
    blob.write_bytes(b"x")
    assert "would be refused" in run("releases", "verify", expect=3)
    assert json.loads((tmp_path / "www" / "tuf" / "timestamp.json").read_text())["signed"]["_type"] == "timestamp"


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"timestamp_days": 0}, {"root_days": 1e9}, {"keep_releases": 0}, {"patches_from": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SigningSettings(**wrong)
    assert Settings().signing == SigningSettings()
