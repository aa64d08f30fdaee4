"""Who gets in over HTTP, and what a browser of somebody who is in cannot be made to do."""

import pytest

from edge_server.app import ENDPOINTS
from edge_server.forms import FORMS
from edge_server.openapi import PREFIX
from edge_server.users import ROLES
from edge_server.views import DATA, VIEWS

FORM = {"content-type": "application/x-www-form-urlencoded"}


def bearer(token):
    return {"authorization": f"Bearer {token}"}


class TestTokens:
    def test_without_users_everybody_on_the_machine_may_look_and_stop_but_not_ship(self, get, post, small_fleet):
        assert get("/api/v1/me").json() == {"name": "api", "role": "operator"}
        assert post("/api/v1/rollouts/2/pause").status_code == 200
        assert post("/api/v1/rollouts/2/resume").status_code == 403
        assert post("/api/v1/users", json={"name": "mallory", "role": "releaser"}).status_code == 403

    def test_from_the_first_user_on_a_token_is_needed(self, get, token):
        secret = token("viewer")
        refused = get("/api/v1/fleet")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert get("/api/v1/fleet", headers=bearer(secret)).status_code == 200
        assert get("/metrics").status_code == 401
        assert get("/metrics", headers=bearer(secret)).status_code == 200

    @pytest.mark.parametrize("header", ["Bearer wrong", "Bearer ", "Basic dXNlcjpwYXNz", "x", "Bearer " + "x" * 5000])
    def test_a_wrong_token_is_refused_even_where_none_is_needed(self, get, header):
        assert get("/api/v1/fleet", headers={"authorization": header}).status_code == 401

    def test_what_devices_and_watchdogs_ask_for_needs_no_token(self, get, token, coordinator, checkpoint):
        token("viewer")
        coordinator.push(checkpoint(1))
        digest = coordinator.registry.releases()[0].digest
        for path in ("/healthz", "/readyz", f"/updates/blobs/{digest}", "/api/v1/openapi.json"):
            assert get(path).status_code == 200, path

    @pytest.mark.parametrize("role", ROLES)
    def test_every_endpoint_asks_for_its_role(self, request_, token, role):
        headers = bearer(token(role))
        for endpoint in ENDPOINTS:
            path = PREFIX + endpoint.path.replace("{name}", "nobody").replace("{number}", "999")
            status = request_(endpoint.method, path, headers=headers, json={"x": 1}).status_code
            allowed = endpoint.role is None or ROLES.index(role) >= ROLES.index(endpoint.role)
            assert (status != 403) == allowed, (endpoint.method, path, status)
            assert request_(endpoint.method, path, json={}).status_code == 401, path

    def test_acts_are_in_the_audit_log_under_the_users_name(self, post, get, small_fleet, token):
        headers = bearer(token("releaser", "rita"))
        post("/api/v1/rollouts/2/abort", json={"reason": "wrong labels"}, headers=headers)
        newest = get("/api/v1/audit?limit=1", headers=headers).json()["audit"][0]
        assert (newest["actor"], newest["action"]) == ("rita", "rollout aborted")
        assert newest["detail"]["reason"] == "wrong labels"

    def test_a_revoked_token_is_refused_at_once(self, get, request_, token):
        boss, victim = bearer(token("releaser")), bearer(token("viewer"))
        assert get("/api/v1/me", headers=victim).status_code == 200
        assert request_("DELETE", "/api/v1/users/the-viewer", headers={**boss, "content-type": "application/json"})
        assert get("/api/v1/me", headers=victim).status_code == 401


class TestLimits:
    @pytest.fixture
    def coordinator(self, make_coordinator):
        from edge_server.settings import HttpSettings

        return make_coordinator(http=HttpSettings(requests_per_minute=20, logins_per_minute=3))

    def test_one_address_is_slowed_down_and_others_are_not(self, get, clock):
        answers = [get("/api/v1/me") for _ in range(21)]
        assert [answer.status_code for answer in answers] == [200] * 20 + [429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert get("/api/v1/me", client=("127.0.0.2", 1)).status_code == 200
        clock.advance(int(answers[-1].headers["retry-after"]))
        assert get("/api/v1/me").status_code == 200

    def test_one_user_is_slowed_down_wherever_the_requests_come_from(self, get, token):
        headers = bearer(token("viewer"))
        answers = [get("/api/v1/me", headers=headers, client=(f"10.0.0.{i}", 1)).status_code for i in range(21)]
        assert answers == [200] * 20 + [429]

    def test_wrong_tokens_are_limited_by_themselves_and_shut_nobody_else_out(self, get, token, clock):
        good = bearer(token("viewer"))
        answers = [get("/api/v1/me", headers=bearer("wrong")).status_code for _ in range(4)]
        assert answers == [401, 401, 401, 429]
        assert (
            get("/api/v1/me", headers=good).status_code == 200
        )  # a scraper that was set up wrong has the same address
        assert get("/api/v1/me", headers=bearer("wrong"), client=("10.0.0.9", 1)).status_code == 401
        clock.advance(20)
        assert get("/api/v1/me", headers=bearer("wrong")).status_code == 401

    def test_logins_count_as_such(self, browser, token):
        token("viewer")
        answers = [browser.log_in("wrong").status_code for _ in range(4)]
        assert answers == [401, 401, 401, 429]

    def test_devices_that_fetch_updates_are_not_counted(self, get):
        assert {get("/updates/blobs/" + "0" * 64).status_code for _ in range(50)} == {404}


class TestSessions:
    def test_somebody_without_a_session_is_sent_to_the_login_and_then_back(self, browser, token):
        secret = token("viewer")
        answer = browser.get("/rollouts")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/rollouts")
        assert browser.log_in(secret, next="/rollouts").headers["location"] == "/rollouts"
        assert browser.get("/rollouts").status_code == 200

    def test_a_link_from_elsewhere_is_followed_again_from_here_first(self, browser, token):
        token("viewer")
        answer = browser.get("/rollouts", headers={"sec-fetch-site": "cross-site"})
        assert answer.status_code == 200
        assert 'http-equiv="refresh" content="0"' in answer.text
        assert browser.get("/rollouts", headers={"sec-fetch-site": "same-origin"}).status_code == 303

    @pytest.mark.parametrize("next_", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x", ""])
    def test_the_login_leads_nowhere_else(self, browser, token, next_):
        assert browser.log_in(token("viewer"), next=next_).headers["location"] == "/"

    def test_a_wrong_token_is_told_so(self, browser, token):
        token("viewer")
        answer = browser.log_in("wrong")
        assert answer.status_code == 401
        assert 'role="alert"' in answer.text
        assert "edge_session" not in browser.cookies

    def test_the_cookie_is_kept_from_scripts_and_other_sites(self, browser, token):
        cookie = browser.log_in(token("viewer")).headers["set-cookie"]
        assert cookie.startswith("edge_session=")
        for word in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
            assert word in cookie
        assert "Secure" not in cookie

    def test_under_tls_it_is_sent_over_tls_only(self, make_coordinator, tmp_path):
        from edge_server.settings import HttpSettings

        coordinator = make_coordinator(http=HttpSettings(public_url="https://fleet.example.org"))
        from edge_server.access import Access

        access = Access(coordinator.registry)
        from starlette.responses import Response

        response = Response()
        access.greet(response, "x")
        assert response.headers["set-cookie"].startswith("__Host-edge_visitor=x")
        assert "Secure" in response.headers["set-cookie"]

    def test_logging_out_ends_the_session_on_the_server(self, browser, token):
        browser.log_in(token("viewer"))
        browser.get("/")
        stolen = dict(browser.cookies)
        assert browser.send("/logout").headers["location"] == "/login"
        browser.cookies = stolen
        assert browser.get("/").status_code == 303

    @pytest.mark.parametrize("role", ROLES)
    def test_every_page_and_form_asks_for_its_role(self, browser, token, role, small_fleet):
        browser.log_in(token(role))
        browser.get("/")
        for view in (*VIEWS, *DATA):
            path = view.path.replace("{name}", "nobody").replace("{number}", "999")
            allowed = ROLES.index(role) >= ROLES.index(view.role)
            assert (browser.get(path).status_code != 403) == allowed, path
        for form in FORMS:
            path = form.path.replace("{name}", "nobody").replace("{number}", "999")
            status = browser.send(path).status_code
            assert (status != 403) == (ROLES.index(role) >= ROLES.index(form.role)), (path, status)

    def test_the_wrong_role_sees_no_buttons(self, browser, token, small_fleet):
        browser.log_in(token("viewer"))
        assert "/rollouts/2/abort" not in browser.get("/rollouts/2").text
        assert 'action="/releases/1/ship"' not in browser.get("/releases/1").text


class TestForms:
    def test_a_form_without_the_token_of_its_page_is_refused(self, browser, token, small_fleet):
        browser.log_in(token("operator"))
        browser.get("/rollouts/2")
        for forged in ("", "0" * 64):
            browser.form_token = forged
            assert browser.send("/rollouts/2/abort").status_code == 403
        assert browser.get("/api/v1/rollouts/2").json()["state"]["status"] == "running"

    def test_the_token_of_one_session_is_no_use_in_another(self, make_browser, token, small_fleet):
        mine, theirs = make_browser(), make_browser()
        mine.log_in(token("operator", "me"))
        mine.get("/rollouts/2")
        theirs.log_in(token("operator", "they"))
        theirs.form_token = mine.form_token
        assert theirs.send("/rollouts/2/abort").status_code == 403

    def test_forms_of_other_sites_are_refused(self, browser, token, small_fleet):
        browser.log_in(token("operator"))
        browser.get("/rollouts/2")
        for origin in ("http://evil.example", "null"):
            assert browser.send("/rollouts/2/abort", headers={**FORM, "origin": origin}).status_code == 403
        assert browser.send("/rollouts/2/abort", headers={"content-type": "text/plain"}).status_code == 415

    def test_without_users_forms_are_tied_to_the_browser_too(self, browser, small_fleet):
        assert browser.send("/rollouts/2/abort").status_code == 403
        browser.get("/rollouts/2")
        assert browser.send("/rollouts/2/abort").status_code == 303
        assert browser.get("/api/v1/audit?limit=1").json()["audit"][0]["actor"] == "dashboard"

    def test_a_session_cannot_be_used_for_the_api_from_another_site(self, browser, token, small_fleet):
        browser.log_in(token("operator"))
        answer = browser._send("POST", "/api/v1/rollouts/2/abort", json={}, headers={"origin": "http://evil.example"})
        assert answer.status_code == 403

    def test_a_form_that_is_too_large_is_refused(self, browser, small_fleet):
        browser.get("/rollouts/2")
        assert browser.send("/rollouts/2/abort", reason="x" * 20_000).status_code == 413
