"""The documentation cannot lie: settings, commands and links are checked against the code."""

import ast
import re
import textwrap
import typing
from pathlib import Path

import click
import msgspec
import pytest

import edge_quantize.cli
import edge_sdk.cli
import edge_sdk.config
import edge_server.cli

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "edge": edge_sdk.cli.main,
    "edge-coordinator": edge_server.cli.main,
    "edge-quantize": edge_quantize.cli.main,
}
GUIDE = ROOT / "docs" / "learning.md"
SIMULATION_GUIDE = ROOT / "docs" / "simulation.md"
DRIFT_GUIDE = ROOT / "docs" / "drift.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


def settings_page():
    """What docs/configuration.md must say."""
    source = ast.parse((ROOT / "edge_sdk" / "config.py").read_text())
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    page = (ROOT / "docs" / "configuration.md").read_text().split("## ")[0]
    top = edge_sdk.config.DeviceConfig
    sections = {name: type(getattr(top(), name)) for name in top.__struct_fields__}
    sections = {name: kind for name, kind in sections.items() if issubclass(kind, msgspec.Struct)}
    dicts = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(top).items() if "dict" in str(hint)}
    tables = {name: kind for name, (_, kind) in dicts.items() if issubclass(kind, msgspec.Struct)}
    headings = {f"[{name}]": kind for name, kind in sections.items()}
    headings |= {f"[{name}.NAME]": kind for name, kind in tables.items()}
    for heading, kind in {"Top level": top, **headings}.items():
        page += f"## {heading}\n\n{ast.get_docstring(classes[kind.__name__])}\n\n"
        page += "| key | default | meaning |\n|---|---|---|\n"
        body, hints = classes[kind.__name__].body, typing.get_type_hints(kind)
        for field, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or field.target.id in {**sections, **tables}:
                continue
            assert isinstance(following, ast.Expr), f"{kind.__name__}.{field.target.id} has no docstring"
            meaning = " ".join(following.value.value.split())
            choices = [repr(value) for value in typing.get_args(hints[field.target.id]) if isinstance(value, str)]
            default = getattr(kind(), field.target.id)
            meaning = f"{' / '.join(choices)}. {meaning}" if choices else meaning
            page += f"| `{field.target.id}` | `{default!r}` | {meaning} |\n"
        page += "\n"
    return page.rstrip() + "\n"


def commands_page():
    """What docs/commands.md must say: every program's own help."""
    page = (ROOT / "docs" / "commands.md").read_text().split("## ")[0]
    for program, command in PROGRAMS.items():
        page += f"## {program}\n\n" + "".join(helps(command, program))
    return page.rstrip() + "\n"


def helps(command, name, parent=None):
    settings = {**command.context_settings, "max_content_width": 100, "terminal_width": 100}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield (
        f"    $ {context.command_path} --help\n"
        + "".join(f"    {line}".rstrip() + "\n" for line in command.get_help(context).splitlines())
        + "\n"
    )
    for subname, sub in sorted(getattr(command, "commands", {}).items()):
        yield from helps(sub, subname, context)


@pytest.mark.parametrize(("page", "expected"), [("configuration.md", settings_page), ("commands.md", commands_page)])
def test_reference_page_says_what_the_code_does(page, expected):
    path = ROOT / "docs" / page
    assert path.read_text() == expected(), f"run: python tests/test_docs.py, then look at the change of {path.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_decisions_are_numbered_without_gaps():
    numbers = [int(path.name[:4]) for path in sorted((ROOT / "docs" / "adr").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.torch
def test_python_blocks_of_the_guide_to_learning_run_one_after_another(tmp_path, checkpoint, digits):
    names = {
        "folder": tmp_path,
        "checkpoint": checkpoint,
        "x": digits.life.x,
        "y": [str(digit) for digit in digits.life.y],
    }
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(GUIDE), "exec"), names)
    status = names["status"]
    assert (status.head, status.phase, status.labels) == (1, "idle", list("0123456789"))  # as the guide says
    assert names["erased"] == 1


@pytest.mark.torch
def test_python_blocks_of_the_guide_to_drift_run_one_after_another(tmp_path, checkpoint, digits):
    names = {"folder": tmp_path, "checkpoint": checkpoint, "x": digits.life.only(set(range(8))).x}
    for block in re.findall(r"```python\n(.*?)```", DRIFT_GUIDE.read_text(), flags=re.DOTALL):
        exec(compile(block, str(DRIFT_GUIDE), "exec"), names)
    assert names["status"].alarms
    assert names["status"].diagnosis
    assert 2880 < names["found"].alarms[0].row < 3000  # as the guide says
    assert names["detector"].drift_detected
    assert (tmp_path / "week.html").exists()


@pytest.mark.torch
def test_python_block_of_the_guide_to_simulations_runs(tmp_path, checkpoint, capsys):
    scenario = tmp_path / "small.toml"
    scenario.write_text(
        f'fleet = {{ checkpoint = "{checkpoint}", devices = 9, duration_h = 1, tick_s = 1200 }}\n'
        'data = { source = "digits", labels = ["0", "1", "2", "3"] }\n'
        'expect.min_accuracy = 1.0\n[[cohort]]\nname = "all"\nlabel = { share = 0.5 }\n'
    )
    (block,) = re.findall(r"```python\n(.*?)```", SIMULATION_GUIDE.read_text(), flags=re.DOTALL)
    names = {"scenario": scenario, "folder": tmp_path}
    exec(compile(block, str(SIMULATION_GUIDE), "exec"), names)
    assert len(names["report"].devices) == 4
    assert "<html" in (tmp_path / "report.html").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 3 + 1  # a line a tick, and the last one


@pytest.mark.parametrize("guide", [GUIDE, DRIFT_GUIDE], ids=lambda path: path.stem)
def test_settings_that_a_guide_shows_or_names_exist(guide):
    text = re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL)
    for block in re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE):
        if block.lstrip().startswith("["):
            msgspec.toml.decode(textwrap.dedent(block), type=edge_sdk.config.DeviceConfig)
    config = msgspec.to_builtins(edge_sdk.config.DeviceConfig())
    for section, key in re.findall(r"`(\w+)\.([a-z_]+)`", text):
        if isinstance(config.get(section), dict):
            assert key in config[section], f"{section}.{key}"


def test_every_benchmark_that_is_quoted_exists():
    for page in PAGES:
        for name in re.findall(r"benchmarks/[\w./-]+", page.read_text()):
            assert (ROOT / name.rstrip(".")).exists(), f"{page.name} quotes {name}"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(settings_page())
    (ROOT / "docs" / "commands.md").write_text(commands_page())
