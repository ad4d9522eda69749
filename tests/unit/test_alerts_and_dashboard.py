"""The alerts and the dashboard of `vodpoller.examples`: they use only metrics and labels that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.listening import NOW, Shown, running_listener
from tests.processes import needs
from vodpoller.status import CredentialsStatus, SourceStatus, StoredStatus
from vodpoller.telemetry import Gauge

EXAMPLES = Path(__file__).parents[2] / "vodpoller" / "examples"
ALERTS = EXAMPLES / "alerts.yml"
DASHBOARD = EXAMPLES / "dashboard.json"
RULES_TEST = Path(__file__).parents[1] / "data" / "alerts-test.yml"


@pytest.fixture(scope="module")
def samples():
    """The labels of each sample of `/metrics`, by the sample's name."""
    shown = Shown(clock_offset_secs=0.0)
    shown.change(
        stored=[StoredStatus(sink="hook", state="pending", events=1, oldest_at=NOW)],
        sources=[*shown.status.sources, SourceStatus(name="pushed", type="callback")],
        credentials=CredentialsStatus(provider="cvm_role", expires_at=NOW),
    )
    shown.telemetry.set(Gauge.QUEUE_EVENTS, {(("source", "main"),): 1})
    with running_listener(shown) as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {it.name: {"instance", "job", *it.labels} for family in families for it in family.samples}


def expressions(path):
    """The expressions of a file, as PromQL."""
    if path is ALERTS:
        folded = re.sub(r">-\n((?: {10,}.*\n)+)", lambda found: " ".join(found[1].split()) + "\n", path.read_text())
        return re.findall(r"^ +expr: (.*)$", folded, re.MULTILINE)
    panels = json.loads(path.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize(("path", "number"), [(ALERTS, 10), (DASHBOARD, 30)], ids=["alerts", "dashboard"])
def test_each_metric_and_label_that_is_used_exists(samples, path, number):
    found = expressions(path)
    assert len(found) >= number
    for expression in found:
        used = re.findall(r"\b((?:vodpoller|process)_\w+)", expression)
        assert used, expression
        assert set(used) <= set(samples), expression
        known = set.union(*(samples[name] for name in used))
        grouped = ",".join(re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)).replace(" ", "").split(",")
        matched = re.findall(r"(\w+)[=!]~?\"", expression)
        assert {*grouped, *matched} - {""} <= known, expression


def test_the_legends_of_the_dashboard_name_labels_that_exist(samples):
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"\b((?:vodpoller|process)_\w+)", target["expr"])
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert wanted <= set.union(*(samples[name] for name in names)), panel["title"]


def test_the_panels_of_the_dashboard_do_not_overlap():
    taken = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.system
def test_prometheus_accepts_the_alerts():
    needs("promtool")
    done = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 rules found" in done.stdout


@pytest.mark.system
def test_each_alert_fires_when_it_should_and_not_before(tmp_path):
    needs("promtool")
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text())
    path = tmp_path / "test.yml"
    path.write_text(RULES_TEST.read_text())
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
