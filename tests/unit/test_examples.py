"""`vodpoller example`: what it prints is the one copy of each file, wherever the package is."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.processes import needs
from tests.system.containerfile import stages_of
from vodpoller import examples
from vodpoller.cli.app import main
from vodpoller.config.load import from_dict
from vodpoller.config.tables import TABLES
from vodpoller.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
FOLDER = Path(examples.__file__).parent
PLACES = {
    "config": ROOT / "config.example.toml",
    "unit": ROOT / "systemd" / "vodpoller.service",
    "unit@": ROOT / "systemd" / "vodpoller@.service",
}
CONTAINERFILE = EXAMPLES["containerfile"].read().decode()


def printed(name):
    done = CliRunner().invoke(main, ["example", name])
    assert done.exit_code == 0, done.output
    return done.stdout_bytes


@pytest.mark.parametrize("name", ["", "units", "../examples/__init__.py"])
def test_another_name_is_refused_with_those_that_there_are(name):
    done = CliRunner().invoke(main, ["example", name])
    assert done.exit_code == 2
    assert all(f"'{known}'" in done.output for known in EXAMPLES)


def test_every_file_has_its_entry_and_its_line_in_the_help():
    files = {path.name for path in FOLDER.iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert {example.file for example in EXAMPLES.values()} == files
    said = CliRunner().invoke(main, ["example", "--help"]).output
    for name, example in EXAMPLES.items():
        assert re.search(rf"^ *{re.escape(name)} +{re.escape(example.about[:30])}", said, re.MULTILINE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_printed_is_the_file_to_the_byte(name):
    wanted = PLACES.get(name, FOLDER / EXAMPLES[name].file).read_bytes()
    assert printed(name) == wanted
    assert wanted.endswith(b"\n")


@pytest.mark.system
@pytest.mark.parametrize("origin", ["these sources", "the archive of sources"])
def test_a_wheel_has_the_same_files(tmp_path, origin):
    source = ROOT
    if origin == "the archive of sources":
        with tarfile.open(built("sdist", ROOT, tmp_path)) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        (source,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(built("wheel", source, tmp_path)) as wheel:
        for name, example in EXAMPLES.items():
            wanted = PLACES.get(name, FOLDER / example.file).read_bytes()
            assert wheel.read(f"vodpoller/examples/{example.file}") == wanted


def built(kind, source, folder):
    """What the build backend makes of sources."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder / kind)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=60)
    (path,) = (folder / kind).iterdir()
    return path


# --- each of them -----------------------------------------------------------------------------------------------------


def test_the_configuration_is_one(tmp_path):
    key = {"secret_id": "an-id-of-a-key", "secret_key": "the-key-itself"}
    tables = {**tomllib.loads(printed("config").decode()), "credentials": key}
    assert from_dict(tables, where="example", base=tmp_path, env={}).warnings == ()


def test_the_rotation_is_that_of_the_sinks_page():
    text = printed("logrotate").decode()
    (block,) = re.findall(
        r"^```\n(/var/lib.*?)^```$", (ROOT / "vodpoller/sinks/README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert text.partition("\n\n")[2] == block
    assert "\n    copytruncate" not in text


@pytest.mark.system
def test_logrotate_takes_the_rotation(tmp_path):
    needs("logrotate")
    archive = tmp_path / "events.jsonl"
    archive.write_text("{}\n")
    rotation = tmp_path / "rotation"
    text = printed("logrotate").decode().replace("/var/lib/vodpoller/events.jsonl", str(archive))
    rotation.write_text(text.replace("systemctl reload vodpoller", f"touch {tmp_path}/reloaded"))
    rotation.chmod(0o644)
    command = ["logrotate", "--force", "--state", str(tmp_path / "state"), str(rotation)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "events.jsonl.1").read_text() == "{}\n"
    assert (tmp_path / "reloaded").exists()


@pytest.fixture(scope="module")
def stages():
    return stages_of(CONTAINERFILE)


def test_an_image_runs_as_a_user_with_a_number(stages):
    user, group = stages[-1].user.split(":")
    assert int(user) == int(group) >= 1000
    made = " ".join(words for _, words, _ in stages[-1].steps)
    state = TABLES["journal"]().path.parent
    assert f"install -d -o {user} -g {group} -m 700 {state}" in made


def test_an_image_stops_by_the_signal_that_settles(stages):
    assert stages[-1].stop_signal == "SIGTERM"


def test_an_image_runs_the_daemon_without_a_shell(stages):
    assert stages[-1].command == ["vodpoller", "run"]
    assert re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", CONTAINERFILE, re.MULTILINE) == ['["vodpoller"]', '["run"]']


def test_an_image_has_neither_a_secret_nor_what_built_it(stages):
    build, image = stages
    assert [words for instruction, words, _ in image.steps if instruction == "COPY"] == [
        f"--from={build.name} /opt/vodpoller /opt/vodpoller"
    ]
    assert not re.search(r"^(ARG|ENV) .*(KEY|TOKEN|SECRET_)", CONTAINERFILE, re.MULTILINE)


def test_an_image_is_built_of_all_that_the_wheel_needs(stages):
    copied = " ".join(words for instruction, words, _ in stages[0].steps if instruction == "COPY")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in (
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        "vodpoller",
        "systemd",
        PLACES["config"].name,
    ):
        assert re.search(rf"(^| ){re.escape(name)} ", copied), name


def test_the_script_that_carries_it_out_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="HEALTHCHECK is not known here"):
        stages_of(CONTAINERFILE + "HEALTHCHECK NONE\n")
