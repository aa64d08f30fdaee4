// Keeps a page up to date: the server says what changed, and the page fetches itself and takes over the parts that differ.
"use strict";

(() => {
  const topics = (document.body.dataset.live || "").split(" ").filter(Boolean);
  if (!topics.length) return;
  const LEAST_MS = 1500;
  const SHARE = 10; // and ten times as long as the last look took: a large fleet is not asked all the time
  const status = document.getElementById("live-status");
  let last = 0;
  let took = 0;
  let timer = 0;
  let busy = false;

  const say = (text) => { if (status.textContent !== text) status.textContent = text; };

  const focusables = (part) => [...part.querySelectorAll("a, button, input, select, textarea, [tabindex]")];

  function replace(part, fresh) {
    const active = document.activeElement;
    const within = part.contains(active);
    if (within && active.matches("input, select, textarea")) return false; // somebody is typing
    const at = within ? focusables(part).indexOf(active) : -1;
    const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    part.replaceWith(fresh);
    [...fresh.querySelectorAll(".scroll")].forEach((box, i) => { box.scrollLeft = scrolled[i] || 0; });
    if (at >= 0) (focusables(fresh)[at] || document.getElementById("main")).focus({ preventScroll: true });
    return true;
  }

  function takeOver(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    const news = [];
    for (const part of document.querySelectorAll("[data-part]")) {
      const fresh = page.getElementById(part.id);
      if (!fresh || fresh.outerHTML === part.outerHTML) continue;
      const told = (box) => (box.matches("[data-announce]") ? box : box.querySelector("[data-announce]"));
      const before = told(part);
      const after = told(fresh);
      const said = before && after && before.textContent !== after.textContent ? after.textContent : "";
      if (replace(part, document.importNode(fresh, true)) && said) news.push(said.replace(/\s+/g, " ").trim());
    }
    if (news.length) say(`Updated: ${news.join("; ")}`);
    document.dispatchEvent(new CustomEvent("updated"));
  }

  async function refresh() {
    timer = 0;
    if (busy || document.hidden) return;
    busy = true;
    last = performance.now();
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" } });
      if (answer.redirected) location.reload(); // the session is over
      else if (answer.ok) takeOver(await answer.text());
    } catch {
      say("The coordinator cannot be reached; the page shows what was last known.");
    } finally {
      busy = false;
      took = performance.now() - last;
    }
  }

  const soon = () => {
    if (!timer) timer = setTimeout(refresh, Math.max(0, last + Math.max(LEAST_MS, SHARE * took) - performance.now()));
  };

  const source = new EventSource(`/live?topics=${topics.join("+")}&seen=${document.body.dataset.seen}`);
  let lost = false;
  source.addEventListener("change", (event) => {
    if (event.data.split(" ").some((topic) => topics.includes(topic))) soon();
  });
  source.addEventListener("open", () => { if (lost) { lost = false; say("Live again."); soon(); } });
  source.addEventListener("error", () => {
    if (!lost) { lost = true; say("Live updates are interrupted; trying again."); }
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) soon(); });
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
})();
