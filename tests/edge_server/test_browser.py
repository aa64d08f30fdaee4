"""The dashboard in a real Chromium, as a person uses it. What it looked like is left in build/screenshots."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from edge_server.plan import RolloutRules
from tests.edge_server.conftest import keep_candidate, live, serving

pytestmark = pytest.mark.browser
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
QUICK = RolloutRules(stages=(25, 100), soak_s=20.0, timeout_s=600.0, min_labelled=100, max_accuracy_drop=0.05)
PAGES = (
    "/", "/devices", "/devices/d0", "/segments", "/drift", "/rollouts", "/rollouts/1", "/releases", "/releases/1",
    "/candidates", "/candidates/" + "ab" * 32,
    "/alerts", "/alerts/1", "/audit", "/users",
)  # fmt: skip
WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        yield browser
        browser.close()


@pytest.fixture
def coordinator(make_coordinator):
    return make_coordinator(rollout=QUICK)


@pytest.fixture
def site(coordinator, fleet):
    """The address of a dashboard of eight devices on release 1."""
    with serving(coordinator.registry) as address:
        yield address


class Desk:
    """A page of a person's own browser, and what went wrong in it."""

    def __init__(self, chromium, site, **options):
        self._context = chromium.new_context(base_url=site, **options)
        self._context.set_default_timeout(WAIT_MS)
        self.page = self._context.new_page()
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))

    def log_in(self, token):
        self.page.goto("/login")
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("button", name="Log in").click()
        expect(self.page.get_by_role("heading", level=1)).to_have_text("Fleet")
        return self.page

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def close(self):
        self._context.close()


@pytest.fixture
def desk(chromium, site):
    opened = []

    def sit_down(**options):
        opened.append(Desk(chromium, site, **options))
        return opened[-1]

    yield sit_down
    for each in opened:
        each.close()


@pytest.fixture
def releaser(desk, token):
    mine = desk()
    mine.log_in(token("releaser", "rita"))
    return mine


def badge(page):
    return page.locator("#state h2 .badge")


def test_the_wrong_role_is_refused_and_so_is_a_wrong_token(desk, token, fleet, coordinator, checkpoint):
    number = coordinator.push(checkpoint(2))
    mine = desk()
    token("viewer", "vic")
    mine.page.goto(f"/rollouts/{number}")
    expect(mine.page.get_by_role("heading", name="Log in")).to_be_visible()
    mine.page.get_by_label("Token").fill("edge-wrong")
    mine.page.keyboard.press("Enter")
    expect(mine.page.get_by_role("alert")).to_contain_text("nobody's")
    mine.shot("login-refused")
    mine.page.get_by_label("Token").fill(token("viewer", "vera"))
    mine.page.keyboard.press("Enter")
    expect(mine.page.get_by_role("heading", level=1)).to_contain_text(f"Rollout {number}")
    expect(mine.page.get_by_role("button", name="Abort")).to_have_count(0)
    expect(mine.page.get_by_role("link", name="Users")).to_have_count(0)
    mine.page.goto("/users")
    expect(mine.page.get_by_role("alert")).to_contain_text("needs the role releaser; vera is viewer")
    mine.shot("role-refused")
    form_token = mine.page.locator("input[name=form_token]").first.input_value()
    answer = mine.page.request.post(f"/rollouts/{number}/abort", form={"form_token": form_token, "reason": "mine"})
    assert answer.status == 403
    assert coordinator.registry.rollout(number).state.status == "running"


def test_a_rollout_is_started_and_watched_to_its_end_without_loading_the_page_again(
    releaser, coordinator, fleet, clock, settle, checkpoint
):
    coordinator.push(checkpoint(2), group="lab")
    page = releaser.page
    page.goto("/releases/2")
    page.get_by_label("Group").fill("default")
    page.get_by_label("Strategy").select_option("ab")
    page.get_by_role("button", name="Calculate the test").press("Enter")
    expect(page.get_by_role("status", name="What the test could see")).to_contain_text("Labelled predictions needed")
    releaser.shot("test-calculated")
    page.get_by_label("Strategy").select_option("canary")
    page.get_by_role("button", name="Start").click()
    expect(badge(page)).to_have_text("running")
    page.evaluate("window.same = true")
    coordinator.pump()
    for device in fleet:
        device.receive()
    live(coordinator, fleet, clock, settle, turns=2)
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "2")
    expect(page.locator("#gates-table")).to_contain_text("accuracy")
    releaser.shot("rollout-running")
    live(coordinator, fleet, clock, settle, turns=8)
    expect(badge(page)).to_have_text("completed")
    expect(page.locator("#live-status")).to_contain_text("completed")
    assert page.evaluate("window.same") is True
    releaser.shot("rollout-completed")
    assert {device.release for device in fleet} == {2}
    assert releaser.problems == [], releaser.problems


def test_a_bad_release_is_seen_to_halt(releaser, coordinator, fleet, clock, settle, checkpoint):
    number = coordinator.push(checkpoint(2))
    page = releaser.page
    page.goto(f"/rollouts/{number}")
    for device in fleet:
        device.receive()
    live(coordinator, fleet, clock, settle)
    for device in fleet:
        device.accuracy = 0.4 if device.release == 2 else 0.9
    live(coordinator, fleet, clock, settle)
    expect(badge(page)).to_have_text("rolling back")
    expect(page.locator("#gates-table")).to_contain_text("harm")
    expect(page.locator("#state")).to_contain_text("accuracy on release 2")
    expect(page.get_by_role("button", name="Abort")).to_have_count(0)
    releaser.shot("rollout-halted")
    live(coordinator, fleet, clock, settle, turns=2)
    expect(badge(page)).to_have_text("rolled back")
    assert {device.release for device in fleet} == {1}


def test_a_person_rolls_back_and_the_reason_is_kept(releaser, coordinator, fleet, clock, settle, checkpoint):
    number = coordinator.push(checkpoint(2))
    for device in fleet:
        device.receive()
    live(coordinator, fleet, clock, settle)
    page = releaser.page
    page.goto(f"/rollouts/{number}")
    form = page.locator("form.act", has=page.get_by_role("button", name="Abort"))
    form.get_by_label("Reason").fill("smells of burning")
    page.evaluate("document.addEventListener('updated', () => { document.body.dataset.taken = 'yes'; })")
    live(coordinator, fleet, clock, settle)
    # the page takes over what changed, and leaves alone what is being typed
    expect(page.locator("body[data-taken]")).to_have_count(1)
    expect(form.get_by_label("Reason")).to_have_value("smells of burning")
    form.get_by_role("button", name="Abort").click()
    expect(badge(page)).to_have_text("rolling back")
    coordinator.pump()
    for device in fleet:
        device.receive()
    live(coordinator, fleet, clock, settle, turns=2)
    expect(badge(page)).to_have_text("rolled back")
    page.goto("/audit")
    expect(page.locator("#audit-table")).to_contain_text("smells of burning")
    expect(page.get_by_role("row").filter(has_text="rollout aborted")).to_contain_text("rita")


@pytest.fixture
def busy(coordinator, fleet, clock, settle, summary):
    """Something to see on every page."""
    from edge_sdk.messages import MonitorState, to_counts

    monitors = [MonitorState("inputs", 30.0, 20.0, True, True)]
    for device in fleet:
        device.event("drift_alarm", monitor="inputs", evidence=30.0, threshold=20.0)
        device.event("promoted", to=1, outcome="promoted")
        device.event("head_rolled_back", to=0, reason="worse")
        device.report(start=clock.now(), monitors=monitors)
        device.put(summary(start=clock.now() - 3600, end=clock.now(), bins=8, counts=to_counts([7] * 16)))
    settle(fleet)
    from edge_server.retention import tend

    while tend(coordinator.registry.store, coordinator.registry.settings.retention, clock.now()):
        pass
    for _ in range(2):
        clock.advance(60.0)
        coordinator.registry.alerts.look()
    assert coordinator.registry.alerts.find(status="firing")
    keep_candidate(coordinator.registry)


@pytest.mark.parametrize(("name", "options"), [
    ("narrow", {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}),
    ("wide", {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}),
])  # fmt: skip
def test_every_page_fits_its_screen_and_nothing_goes_wrong_in_it(desk, token, busy, name, options):
    mine = desk(**options)
    mine.log_in(token("releaser"))
    for path in PAGES:
        mine.page.goto(path)
        expect(mine.page.get_by_role("heading", level=1)).to_be_visible()
        expect(mine.page.locator("[aria-busy]")).to_have_count(0)
        wide = mine.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= options["viewport"]["width"], f"{path} is {wide} px wide"
        mine.shot(f"{name}{path.replace('/', '-').rstrip('-') or '-fleet'}")
        if path in ("/devices/d0", "/drift"):
            expect(mine.page.locator(".main-svg").first).to_be_visible()
    # neither errors nor anything that the content security policy had to stop
    assert mine.problems == [], mine.problems


def test_it_can_be_used_with_the_keyboard_alone(desk, token, busy):
    mine = desk()
    mine.log_in(token("releaser"))
    page = mine.page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    for path in ("/", "/rollouts/1", "/alerts", "/releases/1", "/segments"):
        page.goto(path)
        missed = page.evaluate("""() => {
            const kinds = 'a[href], button, input:not([type=hidden]), select, [tabindex="0"]';
            const all = [...document.querySelectorAll(kinds)].filter((element) => element.checkVisibility());
            return all.filter((element) => { element.focus(); return document.activeElement !== element; }).length;
        }""")
        assert missed == 0, path
        unnamed = page.evaluate("""() => [...document.querySelectorAll('input:not([type=hidden]), select')]
            .filter((field) => !field.labels.length).length""")
        assert unnamed == 0, path


def test_a_link_from_another_site_leads_to_its_page_with_the_session_there_is(releaser, site):
    page = releaser.page
    page.goto(f"{site.replace('127.0.0.1', 'localhost')}/login")  # to browsers, another site
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
    page.evaluate("address => { location.href = address; }", f"{site}/rollouts")
    expect(page.get_by_role("heading", level=1)).to_have_text("Rollouts")


def test_a_square_of_the_map_leads_to_its_device(releaser):
    page = releaser.page
    page.goto("/")
    page.locator("#map").hover(position={"x": 5, "y": 5})
    expect(page.locator("#map-name")).to_contain_text("d0: ")
    page.locator("#map").click(position={"x": 5, "y": 5})
    expect(page.get_by_role("heading", level=1)).to_have_text("d0")


def test_the_map_follows_a_device_that_goes_away(releaser, fleet, coordinator, settle):
    page = releaser.page
    page.goto("/")
    expect(page.locator("#legend")).to_contain_text("offline: 0")
    fleet[0].state(online=False, reason="stopped")
    settle(fleet)
    expect(page.locator("#legend")).to_contain_text("offline: 1")
