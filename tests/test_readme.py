"""The README's table of keys is the models' own; its commands are those that CI runs."""

import os
import re
import typing
from pathlib import Path

import annotated_types
import pytest
from click.testing import CliRunner
from pydantic.fields import FieldInfo

from vodpoller.cli.app import main
from vodpoller.config.tables import TABLES
from vodpoller.settlement import ConfirmResult, Reason
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.registry import available_sinks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HEADS = {"sources": "`[[sources]]`", "routes": "`[[routes]]`", "sinks": "`[sinks.NAME]`, every type"}


def _bounds(field: FieldInfo) -> str:
    metadata = list(field.metadata)
    for part in typing.get_args(field.annotation):
        for inner in getattr(part, "__metadata__", ()):
            metadata += getattr(inner, "metadata", [])
    signs = {annotated_types.Ge: ("≥", "ge"), annotated_types.Gt: (">", "gt"), annotated_types.Le: ("≤", "le")}
    said = [f"{signs[type(m)][0]} {getattr(m, signs[type(m)][1]):,}" for m in metadata if type(m) in signs]
    return "".join(f", {bound}" for bound in said)


def _type(field: FieldInfo) -> str:
    text = str(field.annotation)
    if literals := re.search(r"Literal\[([^\]]*)\]", text):
        return ", ".join(f'`"{literal.strip()[1:-1]}"`' for literal in literals[1].split(","))
    names = {
        "tuple": "list of strings",
        "dict": "table of strings",
        "float": "number",
        "int": "integer",
        "bool": "boolean",
    }
    return next((name for word, name in names.items() if word in text), "string")


def _default(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    value = extra.get("default", field.default) if isinstance(extra, dict) else field.default
    if field.default_factory is dict:
        value = {}
    if field.is_required():
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:.10g}`"
    return f"`{value}`" if isinstance(value, int | dict) else f'`"{value}"`'


def _rows(head: str, fields: typing.Mapping[str, FieldInfo]) -> list[str]:
    rows = [f"| {head} | type, bounds | default | what it is |", "|---|---|---|---|"]
    for name, field in fields.items():
        rows.append(f"| `{name}` | {_type(field)}{_bounds(field)} | {_default(field)} | {field.description} |")
    return [*rows, ""]


def table_of_keys() -> str:
    rows: list[str] = []
    for name, model in TABLES.items():
        rows += _rows(HEADS.get(name, f"`[{name}]`"), model.model_fields)
        if model is SinkConfig:
            for sink, point in sorted(available_sinks().items()):
                if point.dist is None or point.dist.name != "vodpoller":
                    continue
                fields = {k: f for k, f in point.load().Config.model_fields.items() if k not in SinkConfig.model_fields}
                if fields:
                    rows += _rows(f'`type = "{sink}"`', fields)
    return "\n".join(rows)


def test_the_table_of_keys_is_that_of_the_models() -> None:
    text = README.read_text()
    begin, end = "<!-- keys: begin -->\n", "<!-- keys: end -->"
    before, rest = text.split(begin)
    written, after = rest.split(end)
    wanted = table_of_keys()
    if os.environ.get("VODPOLLER_WRITE_README"):
        README.write_text(f"{before}{begin}{wanted}\n{end}{after}")
    assert written.strip() == wanted.strip(), "run VODPOLLER_WRITE_README=1 pytest tests/test_readme.py"


@pytest.mark.parametrize(("name", "values"), [("reasons", Reason), ("confirm results", ConfirmResult)])
def test_every_reason_has_its_row_in_its_order(name, values) -> None:
    text = README.read_text()
    _, rest = text.split(f"<!-- {name}: begin -->\n")
    table, _ = rest.split(f"<!-- {name}: end -->")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[-len(values) :] == [value.value for value in values]


def test_every_command_line_option_of_the_readme_exists() -> None:
    text = README.read_text()
    for command in sorted(set(re.findall(r"\bvodpoller (run|once|check|status|schema|demo|simulate)\b", text))):
        options = CliRunner().invoke(main, [command, "--help"]).output
        for line in re.findall(rf"vodpoller {command}( [^\n`]*)", text):
            for option in re.findall(r"(?<= )(--[a-z-]+)", line):
                assert option in options, f"vodpoller {command} {option}"


@pytest.mark.parametrize("part", ["-m venv .venv", "--editable '.[dev]'", "-m pytest"])
def test_ci_calls_the_readmes_test_command(part: str) -> None:
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", README.read_text(), re.MULTILINE)
    assert part in command
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_recipe_for_a_video_finds_what_was_delivered_later() -> None:
    (recipe,) = re.findall(r"^journalctl .*\.file_id == .*$", README.read_text(), re.MULTILINE)
    assert {"event.settled", "pending.delivered", "event.dead"} == set(re.findall(r'"([a-z]+\.[a-z]+)"', recipe))


@pytest.mark.parametrize("command", ["list", "show", "export", "replay", "purge"])
def test_what_the_readme_says_of_stored_events_is_there(command: str) -> None:
    options = CliRunner().invoke(main, ["deadletters", command, "--help"]).output
    assert "--pending" in options
    for line in re.findall(rf"vodpoller deadletters {command}( [^\n`#]*)", README.read_text()):
        for option in re.findall(r"(?<= )(--[a-z-]+)", line):
            assert option in options, f"vodpoller deadletters {command} {option}"
