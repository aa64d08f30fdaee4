import pytest

from edge_server.errors import UnknownUserError, UserError
from edge_server.users import may


@pytest.fixture
def users(coordinator):
    return coordinator.registry.users


def test_a_token_is_its_users_until_it_is_revoked(users):
    token = users.add("ann", "viewer", actor="test")
    assert (users.by_token(token).name, users.by_token(token).role) == ("ann", "viewer")
    users.revoke("ann", actor="test")
    assert users.by_token(token) is None


def test_neither_tokens_nor_session_secrets_are_in_the_database(users, rows):
    token = users.add("ann", "viewer", actor="test")
    secret = users.log_in(token)
    kept = str(rows("SELECT * FROM users") + rows("SELECT * FROM sessions") + rows("SELECT * FROM audit"))
    assert token not in kept
    assert secret not in kept


def test_what_the_database_keeps_is_no_token(users, rows):
    users.add("ann", "viewer", actor="test")
    [(digest,)] = rows("SELECT digest FROM users")
    assert users.by_token(digest) is None


def test_tokens_have_256_random_bits(users):
    tokens = [users.add(f"user-{i}", "viewer", actor="test") for i in range(3)]
    assert len(set(tokens)) == 3
    assert all(len(token.removeprefix("edge-")) == 43 for token in tokens)


def test_a_session_ends_by_itself_when_its_user_is_revoked_or_logs_out(users, clock, coordinator):
    token = users.add("ann", "operator", actor="test")
    hours = coordinator.registry.settings.http.session_hours
    first = users.log_in(token)
    clock.advance(hours * 3600 - 1)
    assert users.by_session(first).name == "ann"
    clock.advance(1)
    assert users.by_session(first) is None
    second, third = users.log_in(token), users.log_in(token)
    users.log_out(second)
    assert users.by_session(second) is None
    assert users.by_session(third).name == "ann"
    users.revoke("ann", actor="test")
    assert users.by_session(third) is None


def test_a_wrong_token_begins_no_session(users):
    users.add("ann", "viewer", actor="test")
    assert users.log_in("edge-" + "x" * 43) is None
    assert users.log_in("") is None


def test_a_name_may_come_again_once_it_was_revoked(users):
    old = users.add("ann", "viewer", actor="test")
    with pytest.raises(UserError, match="revoke it first"):
        users.add("ann", "releaser", actor="test")
    users.revoke("ann", actor="test")
    new = users.add("ann", "releaser", actor="test")
    assert users.by_token(old) is None
    assert users.by_token(new).role == "releaser"


@pytest.mark.parametrize("name", ["", "a/b", "cli", "api", "dashboard", "coordinator", "library"])
def test_names_that_cannot_stand_in_the_audit_log_are_refused(users, name):
    with pytest.raises(UserError):
        users.add(name, "viewer", actor="test")


def test_unknown_roles_and_users_are_refused(users):
    with pytest.raises(UserError, match="no role"):
        users.add("ann", "admin", actor="test")
    with pytest.raises(UnknownUserError, match="no user 'bob'"):
        users.revoke("bob", actor="test")


def test_a_fleet_whose_last_user_was_revoked_is_not_open_again(users):
    assert not users.exist()
    users.add("ann", "releaser", actor="test")
    users.revoke("ann", actor="test")
    assert users.exist()


def test_each_role_may_do_what_those_before_it_may():
    order = ("viewer", "operator", "releaser")
    assert [[may(role, wanted) for wanted in order] for role in order] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_who_was_added_revoked_or_logged_in_is_in_the_audit_log(users, rows):
    token = users.add("ann", "viewer", actor="boss")
    users.log_in(token)
    users.revoke("ann", actor="boss")
    assert rows("SELECT actor, action FROM audit ORDER BY id") == [
        ("boss", "user added"),
        ("ann", "logged in"),
        ("boss", "user revoked"),
    ]
