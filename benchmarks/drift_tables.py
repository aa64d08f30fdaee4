"""The tables of the drift benchmark: a function of its results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Line = dict[str, Any]
Row = Sequence[object]
Target = tuple[str, str, str, bool | None]
"""What, the target, what was found, and whether that is enough."""
KINDS = ("noise", "rotation", "brightness", "contrast")
NULL_TARGETS = {"iid": 1.0, "AR": 1.5, "seasonal": 1.5}
LATENT_PER_ADWIN = 12
HOW = """\
## How it was measured

One thread; all of a table in one run, and what is divided by something else in turns with it. Ours goes through
`DriftMonitors` in blocks of 32 rows, with every monitor at work: the delay includes the wait for a block to fill, and
begins at any place in a block. Seeds begin at 1000; the monitors were tuned with seeds below 100.

**Budget.** One false alarm in 10 000 rows, for all monitors together and for every peer that has such a setting:
windows of W rows are tested at the level W / 10 000, corrected for the number of channels (Bonferroni). river's
detectors run with their defaults and with stronger settings, one for each channel; any channel's alarm counts. They
have seen 1000 rows before the shift. Peers get the channels that ours look at: ranks of features within the reference,
outputs, cosines of the latent. alibi-detect's and evidently's verdicts follow from scipy's p-values, which are asked
for directly; the lines "checked" say how often the libraries themselves disagreed. whylogs has profiles, and no alarm.
A method that has more than one false alarm in a run length is shown, and does not count as the best.

**Dummies.** "Never" raises no alarm: it has no false alarm, and its delay is the length of what was shown. "Always"
raises one at every block, or at every label.

**Nulls.** Features of which a quarter each is normal, lognormal, counts with ties, and one in ten, with a common
factor; scores of ten classes; 128 latents; labels of which 0.9 are right. AR(1): each row remembers half of the one
before, the reference's too. Seasonal: all of it moves by ±0.5 of a standard deviation over the day, 2000 rows a day for
50 days; the reference is a random sample of the two weeks before. What is known of the season begins at nothing. An
alarm is counted and taken down at once, so that it may come again with the next block; of the season also as a device
tells it, where it stays up until it is cleared.

**Images.** A small network (`fashion.py`) trained on 12 000 training images; reference and stream are drawn from the
test images, which it has not seen. "Class prior" makes half of the classes four times as frequent as the others.

**Concepts.** A tree trained on 1000 rows of the concept before; one label in ten is wrong; labels come 500 rows late,
which counts; ours are folded as they come, as on a device. Every change from one concept to the next, SEA with
thresholds 8, 9, 7, 9.5. river's detectors get the errors one by one; the settings of the best one are chosen on these
very rows, in its favour.

Rerun: `make bench-drift`; `--quick` is a smoke test. The peers' environments: `peers/drift-*-requirements.txt`.
"""


def markdown(results: Line) -> str:
    """All tables that the results allow for."""
    facts = results["facts"]
    peers = ", ".join(f"{name} {number}" for name, number in facts["peers"].items()) or "no peers in this run"
    parts = ["# What the drift monitors cost and see\n"]
    if facts["quick"]:
        parts.append("**A smoke test: two seeds on the digits. Its numbers say nothing.**\n")
    parts.append(f"{facts['cpu']}, one thread; Python {facts['python']}, numpy {facts['numpy']}; {peers}.\n")
    parts.append(targets(results))
    for name, make in (("cost", cost), ("state", state), ("nulls", nulls), ("shifts", shifts), ("concepts", concepts)):
        if name in results:
            parts.append(make(results[name]))
    if missing := [name for name in ("cost", "state", "nulls", "shifts", "concepts") if name not in results]:
        parts.append(f"**Not measured yet:** {', '.join(missing)}. What stands here is from a run that did without.\n")
    return "\n".join([*parts, HOW])


def table(head: Row, rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines) + "\n"


def targets(results: Line) -> str:
    """What the issue asks for, and what was found."""
    rows = [*_cost_targets(results), *_null_targets(results), *_delay_targets(results)]
    return "## Targets\n\n" + table(
        ("", "target", "measured", "met"),
        [(what, target, said, {True: "yes", False: "**no**", None: ""}[met]) for what, target, said, met in rows],
    )


def _cost_targets(results: Line) -> Iterable[Target]:
    found = results.get("cost", {})
    for ours, theirs, what, least in (
        ("input", "river 64", "64 features against river's ADWIN x 64", 5),
        ("output", "river 12", "12 output channels against ADWIN x 12", 6),
        ("latent", "river 128", "latent of 128 against ADWIN x 128", LATENT_PER_ADWIN),
    ):
        if ours in found and theirs in found:
            ratio = found[theirs] / found[ours]
            yield (
                what,
                f">= {least}x",
                f"{ratio:.1f}x ({found[ours]:.2f} and {found[theirs]:.1f} us a row)",
                ratio >= least,
            )
    if "input" in found:
        yield "64 features, a row", "<= 8 us", f"{found['input']:.2f} us", found["input"] <= 8
        yield (
            "64 features, a fold of 32 rows",
            "<= 300 us",
            f"{found['fold']['input']:.0f} us",
            found["fold"]["input"] <= 300,
        )
    if "whylogs" in found:
        ratio = found["whylogs"] / found["input"]
        said = f"{ratio:.0f}x ({found['input']:.2f} and {found['whylogs']:.0f} us a row of 64)"
        yield "a dict row against whylogs' track(row)", ">= 300x", said, ratio >= 300
    if "state" in results:
        first, last = results["state"][0], results["state"][-1]
        yield "state, 64 features, 1 M rows", "<= 72 kB", f"{last['inputs'] / 1000:.1f} kB", last["inputs"] <= 72_000
        yield "the same with 12 outputs, a latent of 128 and labels", "-", f"{last['bytes'] / 1000:.1f} kB", None
        for key, name in (("inputs", "64 features"), ("bytes", "with outputs, latent and labels")):
            settled = [line[key] for line in results["state"][1:]]
            grown = max(settled) - min(settled)
            said = f"{grown} bytes more ({first[key] / 1000:.1f} kB at 1000 rows)"
            yield f"state, {name}, from 10 000 rows to 1 M", "flat", said, grown <= 0.02 * last[key]


def _null_targets(results: Line) -> Iterable[Target]:
    for line in results.get("nulls", []):
        if line["who"].startswith("ours"):
            most = next(value for key, value in NULL_TARGETS.items() if line["null"].startswith(key))
            rate = line["alarms"] / line["run_lengths"]
            told = line["who"].partition(", ")[2]
            # a season is met as a device meets it: an alarm that stays up while it learns is one alarm
            judged = "seasonal" not in line["null"] or "device" in line["who"]
            what = f"false alarms, {line['null']}, {told}"
            yield what, f"<= {most}" if judged else "-", f"{rate:.2f}", rate <= most if judged else None


def _delay_targets(results: Line) -> Iterable[Target]:
    if found := results.get("shifts"):
        asked = [line for line in found["lines"] if line["kind"] in KINDS]
        if names := [name for name in asked[0]["delay"] if name.startswith("KS")]:
            # a window is chosen before the shift is known: the one with the least mean delay over all of them
            best = min(names, key=lambda name: sum(line["delay"][name][0] for line in asked))
            beaten = [line["shift"] for line in asked if line["delay"]["ours"][0] <= line["delay"][best][0]]
            what = f"image shifts: no later than KS + Bonferroni ({best.split()[-1]} rows, its best window)"
            yield what, f"all {len(asked)}", f"{len(beaten)}", len(beaten) == len(asked)
            each = [line for line in asked if line["delay"]["ours"][0] <= min(line["delay"][n][0] for n in names)]
            yield "the same, had it the best window for each shift", "-", f"{len(each)} of {len(asked)}", None
            won = [kind for kind in KINDS if _wins(found, [line for line in asked if line["kind"] == kind])]
            yield ("kinds of shift: no later than the best peer in budget", "3 of 4",
                   f"{len(won)} of 4 ({', '.join(won)})", len(won) >= 3)  # fmt: skip
    if found := results.get("concepts"):
        for stream in dict.fromkeys(line["stream"] for line in found["lines"]):
            lines = {line["who"]: line["delay"] for line in found["lines"] if line["stream"] == stream}
            kept = {who: delay for who, delay in lines.items() if "river" in who and found["rate"][who][0] <= 1}
            if kept:
                best = min(kept, key=lambda who: kept[who][0])
                yield (f"{stream}: no later than the best of river in budget", f"<= {kept[best][0]:.0f} ({best})",
                       f"{lines['ours'][0]:.0f}", lines["ours"][0] <= kept[best][0])  # fmt: skip


def _wins(found: Line, lines: list[Line]) -> bool:
    peers = [name for name in lines[0]["delay"]
             if name != "ours" and not name.startswith("dummy") and found["rate"][name] <= 1]  # fmt: skip
    ours = sum(line["delay"]["ours"][0] for line in lines)
    return all(ours <= sum(line["delay"][name][0] for line in lines) for name in peers)


def cost(found: Line) -> str:
    """Microseconds."""
    names = {
        "input": "ours: 64 features: ranks, season, thinning, both detectors, data quality",
        "input 256": "the same in blocks of 256 rows (`block_rows`), for many predictions a second",
        "output": "ours: 12 output channels",
        "latent": "ours: latent of 128", "all": "ours: all monitors together (64 features, 12 outputs, latent of 128)",
        "check": "that check itself, `InputSpec.check`",
        "river 64": "river: ADWIN x 64", "river 12": "river: ADWIN x 12",
        "river 128": "river: ADWIN x 128", "whylogs": "whylogs: `track(row)` of a dict of 64",
        "alibi": "alibi-detect: KSDrift on a window of 32 rows of 64", "evidently": "evidently: a report on the same",
    }  # fmt: skip
    rows = [(name, f"{found[key]:.2f}" if found[key] < 100 else f"{found[key]:.0f}")
            for key, name in names.items() if key in found]  # fmt: skip
    return "## Cost\n\n" + table(("", "us a row"), [*rows, ("dummy", "0")])


def state(lines: list[Line]) -> str:
    """Bytes."""
    rows = [
        (f"{x['rows']:,}", f"{x['inputs'] / 1000:.1f}", f"{x['bytes'] / 1000:.1f}", f"{x['peak_rss_mb']:.0f}")
        for x in lines
    ]
    text = table(
        (
            "rows",
            "64 features, kB on disk",
            "with 12 outputs, a latent of 128, labels",
            "most memory of the process, MB",
        ),
        rows,
    )
    more = [
        f"{name}: {lines[-1][name] / 1000:.0f} kB"
        for name in ("river ADWIN x 64", "whylogs profile")
        if name in lines[-1]
    ]
    size = f"{lines[-1]['reference'] / 1000:.1f} kB"
    before = (
        f"The state holds means, spreads and levels in use; the rest of the reference ({size}) is in the checkpoint. "
    )
    return "## State\n\n" + text + "\n" + before + "; ".join(more) + "\n"


def nulls(lines: list[Line]) -> str:
    """False alarms."""
    rows = []
    for line in lines:
        detail = ", ".join(f"{name} {count}" for name, count in sorted(line.get("by_monitor", {}).items()))
        if detail:
            detail += f"; {line['after two run lengths']} after the first two run lengths"
        rows.append((line["null"], line["who"], f"{line['alarms'] / line['run_lengths']:.2f}", line["alarms"],
                     f"{line['run_lengths']:.0f}", detail))  # fmt: skip
    head = ("null", "", "false alarms in a run length", "alarms", "run lengths", "by monitor")
    return "## False alarms where nothing drifts\n\n" + table(head, rows)


def shifts(found: Line) -> str:
    """Delays."""
    lines = found["lines"]
    rows: list[Row] = [
        (name, f"{found['rate'][name]:.2f}", *(_delay([*x["delay"][name], x["missed"][name]]) for x in lines))
        for name in lines[0]["delay"]
    ]
    first = (", ".join(f"{k} {v}" for k, v in sorted(x["by_monitor"].items())) for x in lines)
    head = ("rows to the alarm", "false alarms in a run length", *(x["shift"] for x in lines))
    text = table(head, [*rows, ("ours: monitors that saw it first", "", *first)])
    said = (
        f"{found['data']}, model right on {found['accuracy']:.1%}; {found['seeds']} streams of ours, "
        f"{found['peer_seeds']} of the peers; {found['channels']} channels; mean ± standard error."
    )
    checked = ", ".join(f"{name} {count}" for name, count in found["checks"].items()) or "no peers"
    differed = f"Checked: verdicts of the libraries themselves that differed: {checked}."
    return f"## Shifts of images\n\n{said}\n\n{text}\n{differed}\n"


def _delay(found: Sequence[float]) -> str:
    mean, error, missed = found
    return f"{mean:.0f} ± {error:.0f}" + (f" ({missed:.0%} missed)" if missed else "")


def concepts(found: Line) -> str:
    """Delays by labels."""
    streams = list(dict.fromkeys(line["stream"] for line in found["lines"]))
    by_who: dict[str, Line] = {}
    for line in found["lines"]:
        by_who.setdefault(line["who"], {})[line["stream"]] = line["delay"]
    rows = []
    for who, delays in by_who.items():
        rate, lengths = found["rate"][who]
        rows.append((who, f"{rate:.2f}", f"{lengths:.0f}", *(_delay(delays[stream]) for stream in streams)))
    head = ("rows to the alarm", "false alarms in 10 000 rows", "of so many times", *streams)
    return f"## Changes of concept, labels {found['label_delay']} rows late\n\n" + table(head, rows)
