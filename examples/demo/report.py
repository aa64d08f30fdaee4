"""One self-contained HTML page with plots of a run."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from edge_sdk import FleetReport

_SMOOTH = 3


def write_html(path: Path, report: FleetReport, rollouts: list[dict[str, Any]], comparison: str) -> None:
    """Write the page; its only script is plotly's own, from the installed package."""
    figures = [_accuracy(report, rollouts), _before_after(report), _events(report)]
    plots = "\n".join(
        figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)
    )
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Edge SDK: a fleet that learns</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;padding:1rem}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}td,th{{padding:.2rem .6rem;text-align:right}}
td:first-child,th:first-child{{text-align:left}}tr:nth-child(even){{background:#8881}}pre{{overflow-x:auto}}</style>
<h1>A fleet that learns</h1>
<p>{len(report.devices)} simulated devices, {report.ticks} ticks, seed {report.seed}. Accuracies in the table are on
handwriting that no model has seen; the curves show what the devices answered to their own stream.</p>
<h2>Result</h2>{_table(report)}
<h2>Releases</h2>{_rollouts(rollouts)}
{plots}
<h2>INT8 against FP32</h2><pre>{html.escape(comparison)}</pre></html>""",
        encoding="utf-8",
    )


def _table(report: FleetReport) -> str:
    columns = report.devices[0].__struct_fields__
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    rows = []
    for device in report.devices:
        values = (getattr(device, name) for name in columns)
        cells = "".join(f"<td>{html.escape(f'{v:.3f}' if isinstance(v, float) else str(v))}</td>" for v in values)
        rows.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _rollouts(rollouts: list[dict[str, Any]]) -> str:
    items = []
    for rollout in rollouts:
        steps = "".join(f"<li>tick {tick}: {html.escape(str(reason))}</li>" for tick, _, reason in rollout["history"])
        items.append(f"<h3>Release {rollout['release']}: {html.escape(str(rollout['status']))}</h3><ul>{steps}</ul>")
    return "".join(items)


def _accuracy(report: FleetReport, rollouts: list[dict[str, Any]]) -> go.Figure:
    figure = go.Figure()
    for device, points in report.timeline.items():
        ticks = [point[0] for point in points]
        shares = [sum(p[1] for p in points[max(0, i - _SMOOTH + 1) : i + 1]) / min(i + 1, _SMOOTH)
                  for i in range(len(points))]  # fmt: skip
        figure.add_scatter(x=ticks, y=shares, name=device, mode="lines")
    for rollout in rollouts:
        for tick, _, _ in rollout["history"][-1:]:
            figure.add_vline(x=tick, line_dash="dot", annotation_text=f"release {rollout['release']}", opacity=0.5)
    title = f"Share of right answers (mean of {_SMOOTH} ticks)"
    figure.update_layout(title=title, xaxis_title="tick", yaxis_range=[0, 1.02])
    return figure


def _before_after(report: FleetReport) -> go.Figure:
    figure = go.Figure()
    names = [device.device for device in report.devices]
    for field, label in (("before", "before drift"), ("under", "under drift"), ("after", "after learning"),
                         ("original", "original data afterwards")):  # fmt: skip
        figure.add_bar(x=names, y=[getattr(device, field) for device in report.devices], name=label)
    figure.update_layout(title="Accuracy on held-out handwriting", barmode="group", yaxis_range=[0, 1.02])
    return figure


def _events(report: FleetReport) -> go.Figure:
    figure = go.Figure()
    shown = ("drift_alarm", "promoted", "rejected", "confirmed", "head_rolled_back", "release_activated",
             "release_rolled_back")  # fmt: skip
    for name in shown:
        found = [(tick, device, detail) for tick, device, event, detail in report.events if event == name]
        hover = ["<br>".join(f"{k}: {html.escape(str(v))}" for k, v in detail.items()) for _, _, detail in found]
        figure.add_scatter(
            x=[tick for tick, _, _ in found], y=[device for _, device, _ in found], name=name, mode="markers",
            marker={"size": 11}, text=hover,
        )  # fmt: skip
    figure.update_layout(title="What happened", xaxis_title="tick", height=520)
    return figure
