import pytest

ORIGIN = "http://127.0.0.1:8080"


def error(response):
    assert response.headers["content-type"] == "application/json"
    return response.status_code, response.json()["error"]["type"]


class TestUpdates:
    """What devices with `update.url` fetch; without keys there is nothing signed."""

    def test_files_come_whole_or_by_range(self, get, coordinator, checkpoint):
        coordinator.push(checkpoint(1))
        record = coordinator.registry.releases()[0]
        data = coordinator.registry.blobs.read(record.digest)
        assert get(f"/updates/blobs/{record.digest}").content == data
        part = get(f"/updates/blobs/{record.digest}", headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, data[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(data)}"

    def test_metadata_comes_under_its_own_names(self, get, coordinator, tmp_path):
        coordinator.registry.repository.init(tmp_path / "away", count=2, threshold=2, passphrase=None)
        for name in ("timestamp", "1.root", "1.snapshot", "1.targets"):
            assert get(f"/updates/tuf/{name}.json").json()["signed"]["_type"] == name.rpartition(".")[2]

    @pytest.mark.parametrize(
        "path",
        ["blobs/abc", "blobs/" + "0" * 64, "blobs/..%2Fcoordinator.db", "tuf/2.root.json", "tuf/..%2F1.root.json"],
    )
    def test_there_is_nothing_else(self, get, path):
        assert get(f"/updates/{path}").status_code == 404


class TestReading:
    def test_health(self, get):
        assert get("/healthz").json() == {"status": "ok"}

    def test_fleet(self, get, small_fleet):
        body = get("/api/v1/fleet").json()
        assert body["devices"] == body["online"] == 3
        assert (body["in_drift"], body["accuracy"], body["releases"]) == (1, 0.9, {"1": 3})
        assert body["counters"]["accepted"] == 6

    def test_devices_in_pages(self, get, small_fleet):
        first = get("/api/v1/devices?limit=2").json()
        assert [device["name"] for device in first["devices"]] == ["a", "b"]
        second = get(f"/api/v1/devices?limit=2&after={first['next']}").json()
        assert [device["name"] for device in second["devices"]] == ["c"]
        assert second["next"] is None
        assert get("/api/v1/devices?group=nobody").json() == {"devices": [], "next": None}

    def test_a_device_with_its_last_report(self, get, small_fleet):
        body = get("/api/v1/devices/a").json()
        assert (body["health"], body["release"], body["alarms"]) == ("drift", 1, 1)
        assert body["last_report"]["predicted"] == {"a": 100}

    def test_a_device_that_never_reported(self, get, coordinator, tmp_path):
        coordinator.registry.enrol("new", group="default", out=tmp_path / "b.json", actor="test")
        body = get("/api/v1/devices/new").json()
        assert (body["health"], body["last_report"], body["enrolled"]) == ("new", None, True)

    def test_releases_rollouts_and_events_in_pages(self, get, small_fleet):
        for kind, key in (("releases", "release"), ("rollouts", "id"), ("events", "id")):
            numbers, following = [], None
            while True:
                query = "" if following is None else f"&before={following}"
                page = get(f"/api/v1/{kind}?limit=1{query}").json()
                numbers += [entry[key] for entry in page[kind]]
                following = page["next"]
                if following is None:
                    break
            assert numbers == sorted(numbers, reverse=True)
            assert len(numbers) == (3 if kind == "events" else 2)

    def test_events_of_one_device_by_name(self, get, small_fleet):
        events = get("/api/v1/events?device=b&name=boot").json()["events"]
        assert [event["device"] for event in events] == ["b"]

    def test_a_rollout_with_plan_state_and_history(self, get, small_fleet):
        body = get("/api/v1/rollouts/2").json()
        assert body["plan"]["stages"] == [10, 100]
        assert body["state"]["status"] == "running"
        assert len(body["state"]["history"]) == 1


class TestBadInput:
    @pytest.mark.parametrize("kind", ["devices", "releases", "rollouts", "events"])
    @pytest.mark.parametrize("limit", ["0", "-1", "501", "ten", "1e2", "", "٣", "9" * 30])
    def test_page_sizes_out_of_range_are_refused(self, get, kind, limit):
        assert error(get(f"/api/v1/{kind}", params={"limit": limit})) == (400, "BadRequestError")

    @pytest.mark.parametrize(
        "path",
        [
            "releases?before=x",
            "rollouts?before=-3",
            "events?before=99999999999999999999",
            "events?device=a/b",
            "events?name=" + "x" * 257,
            "devices?group=%00",
            "devices?after=" + "x" * 257,
            "devices?unknown=1",
            "devices/%3Cscript%3E",
            "rollouts/abc",
            "rollouts/0",
        ],
    )
    def test_parameters_that_make_no_sense_are_refused(self, get, path):
        assert error(get("/api/v1/" + path)) == (400, "BadRequestError")

    def test_what_is_not_there_is_not_found(self, get):
        assert error(get("/api/v1/devices/nobody")) == (404, "UnknownDeviceError")
        assert error(get("/api/v1/rollouts/7")) == (404, "UnknownRolloutError")
        assert error(get("/api/v1/nothing")) == (404, "HTTPError")
        assert get("/static/../app.py").status_code == 404

    def test_wrong_methods_are_refused(self, post, get):
        assert error(post("/api/v1/fleet")) == (405, "HTTPError")
        assert error(get("/api/v1/rollouts/1/abort")) == (405, "HTTPError")

    def test_a_database_that_fails_is_said_to_be_unavailable(self, get, coordinator):
        coordinator.registry.store.conn.execute("DROP TABLE events")
        assert error(get("/api/v1/events")) == (503, "StoreError")

    def test_what_nobody_foresaw_is_a_typed_error_without_details(self, get, coordinator, monkeypatch):
        monkeypatch.setattr(coordinator.registry, "fleet", lambda: 1 / 0)
        response = get("/api/v1/fleet")
        assert error(response) == (500, "InternalError")
        assert "division" not in response.text


class TestAbort:
    def test_it_withdraws_the_release(self, post, small_fleet, rows):
        response = post("/api/v1/rollouts/2/abort", json={"reason": "wrong labels"})
        assert response.json()["state"]["reason"] == "aborted: wrong labels"
        assert rows("SELECT actor FROM audit ORDER BY id DESC LIMIT 1") == [("api",)]
        assert error(post("/api/v1/rollouts/2/abort")) == (409, "RolloutError")

    def test_a_page_of_another_site_cannot_order_it(self, post, small_fleet):
        path = "/api/v1/rollouts/2/abort"
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            response = post(path, json=None, content=b"{}", headers={"content-type": content_type})
            assert error(response) == (415, "HTTPError")
        for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
            assert error(post(path, headers={"origin": origin})) == (403, "HTTPError")
        assert post(path, headers={"origin": ORIGIN}).status_code == 200

    @pytest.mark.parametrize(
        "body", [b"{", b"[]", b'"x"', b'{"reason": 1}', b'{"raeson": "x"}', b'{"reason": "\xff"}', b"\x00"]
    )
    def test_a_body_that_cannot_be_read_is_refused(self, post, small_fleet, body):
        headers = {"content-type": "application/json"}
        response = post("/api/v1/rollouts/2/abort", json=None, content=body, headers=headers)
        assert error(response) == (400, "BadRequestError")

    def test_texts_and_bodies_too_long_are_refused(self, post, small_fleet):
        assert error(post("/api/v1/rollouts/2/abort", json={"reason": "x" * 501})) == (400, "BadRequestError")
        assert error(post("/api/v1/rollouts/2/abort", json={"reason": "x" * 20_000})) == (413, "HTTPError")

    def test_unknown_rollouts_are_not_found(self, post):
        assert error(post("/api/v1/rollouts/9/abort")) == (404, "UnknownRolloutError")


class TestGuard:
    @pytest.mark.parametrize("path", ["/", "/healthz", "/api/v1/nothing", "/static/dashboard.css"])
    def test_every_response_has_the_security_headers(self, get, path):
        headers = get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("base", ["http://evil.example", "http://127.0.0.1.evil.example:8080"])
    def test_a_foreign_name_for_this_machine_is_refused(self, get, base):
        assert error(get("/api/v1/fleet", base=base)) == (400, "HTTPError")

    @pytest.mark.parametrize("host", ["[", "a]b", ""])
    def test_a_host_header_that_is_none_is_refused(self, get, host):
        assert error(get("/api/v1/fleet", headers={"host": host})) == (400, "HTTPError")

    @pytest.mark.parametrize("base", ["http://localhost:8080", "http://127.0.0.1", "http://[::1]:8080"])
    def test_this_machines_own_names_are_served(self, get, base):
        assert get("/healthz", base=base).status_code == 200


class TestGuardBeyondLoopback:
    """With TLS it may be reached by its address, by the machine's name, and by the name in the settings."""

    @pytest.fixture
    def coordinator(self, make_coordinator):
        from edge_server.settings import HttpSettings

        return make_coordinator(
            http=HttpSettings(host="0.0.0.0", cert_file="c", key_file="k", public_url="https://fleet.example.org:8443")
        )

    @pytest.mark.parametrize("host", ["10.1.2.3:8080", "[2001:db8::1]", "fleet.example.org:8443", "localhost"])
    def test_its_own_names_are_served(self, get, host):
        response = get("/healthz", headers={"host": host})
        assert response.status_code == 200
        assert response.headers["strict-transport-security"] == "max-age=31536000"

    @pytest.mark.parametrize("host", ["evil.example", "fleet.example.org.evil.example", "10.1.2.3.evil.example"])
    def test_other_names_are_refused(self, get, host):
        assert error(get("/healthz", headers={"host": host})) == (400, "HTTPError")


def test_names_that_a_proxy_stands_for_are_served_on_loopback():
    from edge_server.guard import _names
    from edge_server.settings import HttpSettings

    knows = _names(HttpSettings(public_url="https://fleet.example.org"))
    assert [knows(name) for name in ("fleet.example.org", "127.0.0.1", "10.1.2.3")] == [True, True, False]
