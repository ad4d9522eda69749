"""systemd/: the settings of the units, and the checks of systemd itself."""

import ipaddress
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.processes import needs
from vodpoller.cli.app import main
from vodpoller.cli.configuration import DEFAULT_CONFIG
from vodpoller.cli.exits import EXIT_CONFIG
from vodpoller.config.tables import TABLES

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "vodpoller.service"
JOB = UNIT.with_name("once.conf")
TIMER = UNIT.with_name("vodpoller.timer")
SOCKET = UNIT.with_name("vodpoller.socket")
INSTANCES = UNIT.with_name("vodpoller@.service")
SECS = {"": 1, "s": 1, "sec": 1, "min": 60}


def parsed(text):
    """All values of each setting by (section, name); an empty one resets, as in systemd.syntax(7)."""
    settings = defaultdict(list)
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            section = line.strip("[] ")
            continue
        name, _, value = line.partition("=")
        settings[section, name] += [value]
    return settings


@pytest.fixture(scope="module")
def unit():
    return parsed(UNIT.read_text())


def secs(unit, name):
    number, measure = re.fullmatch(r"(\d+)(\w*)", unit["Service", name][-1]).groups()
    return int(number) * SECS[measure]


def systemd_analyze(*words):
    needs("systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *words], capture_output=True, text=True, check=False, timeout=60
    )


def with_stub(text):
    """The unit as it can be verified on a machine where vodpoller is not installed."""
    return re.sub(r"^(ExecStart|ExecReload)=\S+", r"\1=/bin/true", text, flags=re.MULTILINE)


# --- failures, stops and starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ExecStartPre", "ExecCondition"])
def test_no_command_runs_before_the_program(unit, name):
    """Its failure would be repeated without end."""
    assert ("Service", name) not in unit


def test_an_error_that_a_person_must_fix_causes_no_restart(unit):
    assert unit["Service", "RestartPreventExitStatus"] == [f"{EXIT_CONFIG} 243"]


def test_any_other_failure_is_restarted_without_limit(unit):
    assert unit["Service", "Restart"] == ["on-failure"]
    assert unit["Service", "RestartSec"] == ["5"]
    assert unit["Unit", "StartLimitIntervalSec"] == ["0"]


def test_the_time_limit_of_a_stop_is_longer_than_shutdown_secs(unit):
    assert secs(unit, "TimeoutStopSec") == 40
    assert TABLES["daemon"]().shutdown_secs + 10 <= secs(unit, "TimeoutStopSec")


def test_programs_of_a_sink_may_finish_during_a_stop(unit):
    assert unit["Service", "KillMode"] == ["mixed"]


def test_the_watchdog_allows_for_a_busy_machine(unit):
    assert secs(unit, "WatchdogSec") == 60


def test_a_start_may_take_minutes(unit):
    assert secs(unit, "TimeoutStartSec") == 300


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RestartSec", "starts it again after {} s"),
        ("StateDirectory", "can write nothing but `/var/lib/{}`"),
        ("RestartPreventExitStatus", "exit code {}"),
        ("RestartPreventExitStatus", "status {}"),
    ],
)
def test_the_readme_agrees_with_the_unit(unit, name, message):
    readme = " ".join((ROOT / "systemd" / "README.md").read_text().split())
    assert any(message.format(value) in readme for value in unit["Service", name][-1].split())


def test_a_core_dump_cannot_leak_the_key(unit):
    assert unit["Service", "LimitCORE"] == ["0"]


def test_journald_drops_no_line_at_full_speed(unit):
    assert unit["Service", "LogRateLimitIntervalSec"] == ["0"]


@pytest.mark.parametrize("name", ["StandardOutput", "StandardError", "SyslogLevelPrefix"])
def test_lines_go_to_journald_which_reads_their_priority(unit, name):
    assert ("Service", name) not in unit


# --- how it runs ------------------------------------------------------------------------------------------------------


def test_it_runs_the_daemon_with_the_documented_paths(unit):
    assert unit["Service", "ExecStart"] == ["/opt/vodpoller/venv/bin/vodpoller run -c /etc/vodpoller/config.toml"]
    assert str(DEFAULT_CONFIG) in unit["Service", "ExecStart"][0]


def test_systemd_waits_until_it_is_ready(unit):
    assert unit["Service", "Type"] == ["notify"]


def test_reload_asks_the_daemon_so_that_it_can_fail(unit):
    (run,) = unit["Service", "ExecStart"]
    assert unit["Service", "ExecReload"] == [run.replace(" run ", " reload ")]


def test_it_has_a_user_and_a_state_directory_of_its_own(unit):
    assert unit["Service", "DynamicUser"] == ["yes"]
    assert unit["Service", "StateDirectory"] == ["vodpoller"]
    assert Path(TABLES["journal"]().path).parent == Path("/var/lib/vodpoller")


def test_the_key_comes_as_credentials(unit):
    assert unit["Service", "LoadCredential"] == [
        "secret_id:/etc/vodpoller/secret_id",
        "secret_key:/etc/vodpoller/secret_key",
    ]


def test_it_starts_at_boot_once_the_network_is_there(unit):
    assert unit["Install", "WantedBy"] == ["multi-user.target"]
    assert unit["Unit", "Wants"] == unit["Unit", "After"] == ["network-online.target"]


def test_it_may_use_the_network(unit):
    assert set(unit["Service", "RestrictAddressFamilies"][0].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert ("Service", "PrivateNetwork") not in unit


def denies(unit, address):
    networks = map(ipaddress.ip_network, unit["Service", "IPAddressDeny"][-1].split())
    return any(ipaddress.ip_address(address) in network for network in networks)


@pytest.mark.parametrize("address", ["169.254.0.23", "100.100.100.200", "fd00:ec2::254"])
def test_it_cannot_reach_a_metadata_service(unit, address):
    assert denies(unit, address)


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("127.0.0.53", id="resolver of this machine"),
        pytest.param("183.60.83.19", id="name server of Tencent Cloud"),
        pytest.param("169.254.169.254", id="name server of Google and Oracle"),
        pytest.param("169.254.20.10", id="name server of a Kubernetes node"),
        pytest.param("10.0.0.1", id="receiver in a private network"),
        pytest.param("fe80::1", id="router"),
    ],
)
def test_it_may_connect_to_all_that_it_needs(unit, address):
    assert not denies(unit, address)


@pytest.mark.parametrize("name", ["MemoryDenyWriteExecute", "ProcSubset", "NoExecPaths"])
def test_a_sink_may_run_any_program(unit, name):
    assert ("Service", name) not in unit


@pytest.mark.parametrize("name", ["MemoryMax", "TasksMax", "LimitNOFILE", "OOMPolicy"])
def test_it_has_a_limit(unit, name):
    assert len(unit["Service", name]) == 1


# --- a job instead of the service -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job():
    """The settings of the unit with the drop-in that makes it a job."""
    return parsed(UNIT.read_text() + JOB.read_text())


def test_the_job_runs_once_with_the_services_configuration(unit, job):
    (command,) = unit["Service", "ExecStart"]
    assert job["Service", "ExecStart"] == [command, "", command.replace(" run ", " once ")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("Type", "exec", id="neither notifies nor has to end within the time of a start"),
        pytest.param("Restart", "no", id="is started again by the timer only"),
        pytest.param("WatchdogSec", "0", id="sends nothing to the watchdog"),
        pytest.param("RuntimeMaxSec", "1h", id="ends, even if it hangs"),
    ],
)
def test_the_job_has_no_setting_that_only_a_daemon_needs(job, name, value):
    assert job["Service", name][-1] == value


def test_all_other_settings_of_the_job_are_those_of_the_service(unit, job):
    changed = {name for name in job if job[name] != unit.get(name)}
    names = ("Type", "ExecStart", "Restart", "WatchdogSec", "RuntimeMaxSec")
    assert changed == {("Service", name) for name in names}


def test_the_timer_starts_the_unit_of_its_name_every_5_minutes():
    timer = parsed(TIMER.read_text())
    assert ("Timer", "Unit") not in timer
    assert timer["Timer", "OnCalendar"] == ["*:0/5"]
    assert timer["Install", "WantedBy"] == ["timers.target"]


@pytest.mark.parametrize("path", [JOB, TIMER], ids=lambda path: path.name)
def test_the_readme_installs_the_files_of_the_job(path):
    assert f" systemd/{path.name} /etc/systemd/system/" in (ROOT / "systemd" / "README.md").read_text()


# --- several instances ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances():
    return parsed(INSTANCES.read_text())


@pytest.mark.parametrize("name", ["ExecStart", "StateDirectory", "LoadCredential"])
def test_an_instance_shares_nothing_with_another(instances, name):
    assert all("%i" in value for value in instances["Service", name])


def test_the_folder_of_an_instance_is_not_inside_that_of_the_service(unit, instances):
    (of_service,), (of_instance,) = unit["Service", "StateDirectory"], instances["Service", "StateDirectory"]
    assert of_instance == f"{of_service}-%i"


def test_all_other_settings_of_an_instance_are_as_in_the_service(unit, instances):
    """A change of one unit must be made in the other too."""
    text = INSTANCES.read_text()
    for of_instance, of_service in (
        ("vodpoller %i,", "vodpoller,"),
        ("/etc/vodpoller/%i.toml", "/etc/vodpoller/config.toml"),
        ("/etc/vodpoller/%i/", "/etc/vodpoller/"),
        ("=vodpoller-%i\n", "=vodpoller\n"),
    ):
        assert of_instance in text
        text = text.replace(of_instance, of_service)
    assert parsed(text) == unit
    assert [*parsed(text)] == [*unit]


def test_the_readme_names_the_paths_of_an_instance(instances):
    readme = (ROOT / "systemd" / "README.md").read_text()
    (state,) = instances["Service", "StateDirectory"]
    assert f"/var/lib/{state.replace('%i', 'NAME')}/journal.db" in readme
    for credential in instances["Service", "LoadCredential"]:
        assert credential.partition(":")[2].replace("%i", "NAME") in readme
    assert f" systemd/{INSTANCES.name} /etc/systemd/system/" in readme


@pytest.mark.system
@pytest.mark.parametrize(
    ("edit", "message"), [(lambda text: text, ""), (lambda text: text.replace("\nKill", "\nUnKill"), "UnKill")]
)
def test_systemd_checks_the_unit_of_an_instance(tmp_path, edit, message):
    path = tmp_path / INSTANCES.name.replace("@", "@one")
    path.write_text(edit(with_stub(INSTANCES.read_text())))
    checked = systemd_analyze("verify", "--recursive-errors=yes", str(path))
    assert message in checked.stderr
    assert (checked.stderr == "") == (message == "")


# --- the socket of callbacks ------------------------------------------------------------------------------------------


@pytest.mark.system
@pytest.mark.parametrize(
    ("edit", "message"), [(lambda text: text, ""), (lambda text: text.replace("\nBacklog", "\nUnBacklog"), "UnBacklog")]
)
def test_systemd_checks_the_socket_of_callbacks(tmp_path, edit, message):
    (tmp_path / UNIT.name).write_text(with_stub(UNIT.read_text()))
    (tmp_path / SOCKET.name).write_text(edit(SOCKET.read_text()))
    checked = systemd_analyze("verify", "--recursive-errors=yes", *(str(it) for it in tmp_path.iterdir()))
    assert message in checked.stderr
    assert (checked.stderr == "") == (message == "")


# --- systemd's own checks ---------------------------------------------------------------------------------------------


def verified(folder, edit=lambda text: text):
    """systemd's check of the service, and of the job that replaces it with the timer; `edit` changes their texts."""
    (folder / "vodpoller.service.d").mkdir()
    for path in (UNIT, TIMER):
        (folder / path.name).write_text(edit(with_stub(path.read_text())))
    alone = systemd_analyze("verify", "--recursive-errors=yes", str(folder / UNIT.name))
    (folder / "vodpoller.service.d" / JOB.name).write_text(edit(with_stub(JOB.read_text())))
    both = systemd_analyze("verify", "--recursive-errors=yes", *(str(folder / path.name) for path in (UNIT, TIMER)))
    return alone.returncode, both.returncode, alone.stdout + alone.stderr + both.stdout + both.stderr


@pytest.mark.system
@pytest.mark.parametrize("name", ["TimeoutStopSec", "Type=exec", "OnCalendar"])
def test_the_check_finds_a_misspelled_setting_in_each_file(tmp_path, name):
    """This shows that the check can fail."""
    assert (
        f"Un{name.partition('=')[0]}" in verified(tmp_path, lambda text: text.replace(f"\n{name}", f"\nUn{name}"))[-1]
    )


@pytest.mark.system
def test_systemd_accepts_all_units(tmp_path):
    assert verified(tmp_path) == (0, 0, "")


@pytest.mark.system
def test_the_exposure_level_is_at_most_1_5():
    checked = systemd_analyze("security", "--offline=true", "--threshold=15", str(UNIT))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", checked.stdout)[1]) <= 1.5


# --- assumptions of the unit ------------------------------------------------------------------------------------------


def test_an_unreadable_configuration_ends_with_exit_code_78(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setattr(os, "access", lambda *_words, **_named: False)
    monkeypatch.setattr(Path, "read_text", denied)
    ended = CliRunner().invoke(main, ["check", "-c", str(path)])
    assert ended.exit_code == EXIT_CONFIG
    assert f"{path}: cannot be read: Permission denied" in ended.output


def denied(path, *_words, **_named):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.system
@pytest.mark.parametrize("in_journald", [True, False])
def test_a_failed_start_is_an_error_in_journald(tmp_path, in_journald):
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8") as stderr, os.fdopen(writer, "wb") as sent:
        status = os.fstat(sent.fileno())
        env = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not in_journald)}"}
        command = [sys.executable, "-m", "vodpoller", "run", "-c", str(tmp_path / "none.toml")]
        assert subprocess.run(command, stderr=sent, env=env, check=False, timeout=60).returncode == EXIT_CONFIG
        sent.close()
        assert stderr.read().startswith("<3>vodpoller: " if in_journald else "vodpoller: ")
