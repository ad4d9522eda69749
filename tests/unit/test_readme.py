"""The documentation pages: tables agree with the models, commands and options exist, links have targets."""

import dataclasses
import os
import re
import typing
from pathlib import Path

import annotated_types
import pytest
from click.testing import CliRunner
from pydantic.fields import FieldInfo

from vodpoller.cli.app import main
from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.load import load
from vodpoller.config.tables import TABLES, AnySource
from vodpoller.events.event import Event
from vodpoller.logs import CATALOGUE
from vodpoller.settlement import ConfirmResult, Reason
from vodpoller.simulator.service import Simulator, SimulatorOptions
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.registry import available_sinks

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
KEYS = ROOT / "vodpoller" / "config" / "README.md"
SINKS = ROOT / "vodpoller" / "sinks" / "README.md"
TESTS = ROOT / "tests" / "README.md"
OPERATING = ROOT / "systemd" / "README.md"
CHINESE = OPERATING.with_suffix(".zh.md")
LISTENER = ROOT / "vodpoller" / "listener" / "README.md"
PAGES = (README, KEYS, SINKS, LISTENER, TESTS, OPERATING, CHINESE)
TEXT = "\n".join(page.read_text() for page in PAGES)
HEADS = {"routes": "`[[routes]]`", "sinks": "`[sinks.NAME]`, every type"}


def _bounds(field: FieldInfo) -> str:
    metadata = list(field.metadata)
    for part in typing.get_args(field.annotation):
        for inner in getattr(part, "__metadata__", ()):
            metadata += getattr(inner, "metadata", [])
    signs = {annotated_types.Ge: ("≥", "ge"), annotated_types.Gt: (">", "gt"), annotated_types.Le: ("≤", "le")}
    bounds = [f"{signs[type(m)][0]} {getattr(m, signs[type(m)][1]):,}" for m in metadata if type(m) in signs]
    return "".join(f", {bound}" for bound in bounds)


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
        if name == "sources":
            rows += _rows("`[[sources]]`, every type", AnySource.model_fields)
            for kind, fields in (("pull", model.model_fields), ("callback", CallbackSource.model_fields)):
                own = {key: field for key, field in fields.items() if key not in AnySource.model_fields}
                rows += _rows(f'`[[sources]]` with `type = "{kind}"`', own)
            continue
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
    text = KEYS.read_text()
    begin, end = "<!-- keys: begin -->\n", "<!-- keys: end -->"
    before, rest = text.split(begin)
    written, after = rest.split(end)
    wanted = table_of_keys()
    if os.environ.get("VODPOLLER_WRITE_README"):
        KEYS.write_text(f"{before}{begin}{wanted}\n{end}{after}")
    assert written.strip() == wanted.strip(), "run VODPOLLER_WRITE_README=1 pytest tests/unit/test_readme.py"


@pytest.mark.parametrize("page", [OPERATING, CHINESE], ids=lambda page: page.name)
@pytest.mark.parametrize(("name", "values"), [("reasons", Reason), ("confirm results", ConfirmResult)])
def test_every_reason_has_a_row_in_the_order_of_the_enum(page, name, values) -> None:
    _, rest = page.read_text().split(f"<!-- {name}: begin -->\n")
    table, _ = rest.split(f"<!-- {name}: end -->")
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)[-len(values) :] == [value.value for value in values]


def test_every_command_line_option_of_the_pages_exists() -> None:
    for command in sorted(
        set(re.findall(r"\bvodpoller (run|once|check|route|status|schema|example|demo|simulate)\b", TEXT))
    ):
        options = CliRunner().invoke(main, [command, "--help"]).output
        for line in re.findall(rf"vodpoller {command}( [^\n`]*)", TEXT):
            for option in re.findall(r"(?<= )(--[a-z-]+)", line):
                assert option in options, f"vodpoller {command} {option}"


@pytest.mark.parametrize("part", ["-m venv .venv", "--editable '.[dev]'", "-m pytest"])
def test_ci_calls_the_readmes_test_command(part: str) -> None:
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", README.read_text(), re.MULTILINE)
    assert part in command
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_recipe_for_a_video_finds_what_was_delivered_later() -> None:
    (recipe,) = re.findall(r"^journalctl .*\.file_id == .*$", OPERATING.read_text(), re.MULTILINE)
    assert {"event.settled", "pending.delivered", "event.dead"} == set(re.findall(r'"([a-z]+\.[a-z]+)"', recipe))


@pytest.mark.parametrize("command", ["list", "show", "export", "replay", "purge"])
def test_the_deadletters_options_of_the_pages_exist(command: str) -> None:
    options = CliRunner().invoke(main, ["deadletters", command, "--help"]).output
    assert "--pending" in options
    for line in re.findall(rf"vodpoller deadletters {command}( [^\n`#]*)", TEXT):
        for option in re.findall(r"(?<= )(--[a-z-]+)", line):
            assert option in options, f"vodpoller deadletters {command} {option}"


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes for the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_first_page_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("command", ["demo", "pytest"])
def test_the_first_page_has_the_demo_and_the_test_command(command: str) -> None:
    assert len(re.findall(rf"^python3 -m venv .*{command}.*$", README.read_text(), re.MULTILINE)) == 1


@pytest.mark.parametrize("command", sorted(main.commands))
def test_the_first_page_names_every_command(command: str) -> None:
    assert f"| `vodpoller {command}` |" in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_log_event_of_a_page_is_in_the_catalogue(page: Path) -> None:
    prefixes = {name.partition(".")[0] for name in CATALOGUE}
    others = {f"{table}.{key}" for table, model in TABLES.items() for key in model.model_fields}
    others |= {f"event.{field.name}" for field in dataclasses.fields(Event)}
    text = page.read_text()
    named = {*re.findall(r"`([a-z]+\.(?!py`|db`)[a-z]+)`", text), *re.findall(r'"event": ?"([a-z.]+)"', text)}
    assert {name for name in named if name.partition(".")[0] in prefixes} - others <= set(CATALOGUE)


def test_every_log_event_that_needs_action_is_in_the_problem_table() -> None:
    _, rest = OPERATING.read_text().split("\n## When something is wrong\n")
    problems = rest.partition("\n## ")[0]
    wanted = {name for name in CATALOGUE if name.endswith((".failed", ".stuck", ".refused", ".unreadable", ".overdue"))}
    assert {name for name in wanted if f"`{name}`" not in problems} == set()


def _blocks(page: Path) -> list[str]:
    """The code blocks of a page, without their comments, which are translated."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(r" +# .*$", "", block, flags=re.MULTILINE) for block in blocks]


def test_the_chinese_page_has_the_commands_of_the_english_page() -> None:
    assert _blocks(CHINESE) == _blocks(OPERATING)
    assert len(_blocks(CHINESE)) > 15


def _names_by_section(page: Path) -> list[list[str]]:
    sections = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).split("\n## ")
    return [sorted(set(re.findall(r"`([^`]+)`", section))) for section in sections]


def test_the_chinese_sections_name_the_same_as_the_english_ones() -> None:
    assert _names_by_section(CHINESE) == _names_by_section(OPERATING)


def test_the_chinese_tables_have_the_rows_of_the_english_ones() -> None:
    rows = [re.findall(r"^\|.*$", page.read_text(), re.MULTILINE) for page in (CHINESE, OPERATING)]
    cells = [[sorted(re.findall(r"`[^`]+`", row.split("|")[1])) for row in found] for found in rows]
    assert cells[0] == cells[1]


def test_the_map_names_every_module() -> None:
    _, rest = TESTS.read_text().split("\n## Map of modules\n")
    rows = re.findall(r"^\| (`.*?) \|", rest.partition("\n## ")[0], re.MULTILINE)
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    there = {path.name for path in (ROOT / "vodpoller").glob("[a-z]*") if path.suffix == ".py" or path.is_dir()}
    assert named == there


@pytest.mark.parametrize("page", [README, SINKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_table_of_sinks_has_a_row_for_each_shipped_sink(page: Path) -> None:
    _, rest = page.read_text().split("| type | accepts an event when |")
    rows = re.findall(r"^\| `(\w+)` \|.*$", rest.partition("\n\n")[0], re.MULTILINE)
    assert rows == sorted(name for name, point in available_sinks().items() if point.value.startswith("vodpoller."))
    assert rest.partition("\n\n")[0] in README.read_text()


def _code(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_small_configuration_is_valid_without_warnings(tmp_path: Path) -> None:
    (text,) = _code(README, "toml")
    path = tmp_path / "config.toml"
    path.write_text(text)
    env = {"TENCENTCLOUD_SECRET_ID": "an-id-of-a-key", "TENCENTCLOUD_SECRET_KEY": "the-key-itself"}
    assert not load(path, env=env).all_warnings()


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fileds are useless:UserWarning")
def test_the_python_code_of_the_developers_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    own, official = _code(TESTS, "python")
    exec(own, {})
    with Simulator(SimulatorOptions(events=40)) as simulator:
        exec(official.replace("127.0.0.1:18080", simulator.url.removeprefix("http://")), {})
        assert simulator.stats()["confirmed"] == 16
    assert capsys.readouterr().out.endswith("16 events confirmed\n")
