"""The page's recipes for services of Tencent Cloud, with a stub that verifies signatures."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import vodpoller
from tests.helpers import sink_context
from tests.receiver import running_receiver
from tests.tencent_api import SECRET_ID, SECRET_KEY, TencentApi
from vodpoller.config.load import from_dict
from vodpoller.errors import RejectedError
from vodpoller.events.event import make_event

PAGE = Path(vodpoller.__file__).parent / "sinks" / "README.md"
SAMPLE = Path(__file__).parents[1] / "samples" / "normal-callback.json"
RECIPES = {
    name: sink
    for block in re.findall(r"^```toml\n(\[sinks\..*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for name, sink in tomllib.loads(block)["sinks"].items()
    if sink["type"] == "tencent"
}
SNAPSHOTS = json.loads(SAMPLE.read_text())
DELETED = {"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["5285890784246869930", "7"]}}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def built(tmp_path, log):
    """Makes the sink of a recipe as the daemon does, with the stub as its endpoint."""
    sinks = []

    def build(name, api):
        config = from_dict(
            {
                "credentials": {"secret_id": SECRET_ID, "secret_key": SECRET_KEY},
                "sources": [{"name": "main"}],
                "routes": [{"name": "all", "sinks": [name]}],
                "sinks": {name: {**RECIPES[name], "endpoint": api.endpoint}},
                "journal": {"path": str(tmp_path / "journal.db")},
            },
            where="recipe",
            base=tmp_path,
            env={},
        )
        context = sink_context(log, credentials=config.credentials)
        sinks.append(config.sink_classes[name](name, config.sinks[name], context))
        return sinks[-1]

    yield build
    for sink in sinks:
        sink.close()


def of(content):
    return make_event(content, source="main", sub_app_id=None)


def test_each_recipe_of_the_page_is_tried_here():
    assert {name: (sink["service"], sink["action"]) for name, sink in RECIPES.items()} == {
        "eventbridge": ("eb", "PutEvents"),
        "function": ("scf", "Invoke"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_s_service_refuses_is_rejected(built, name):
    with running_receiver(TencentApi(RECIPES[name]["service"])) as api:
        api.refuse_with = "InvalidParameterValue"
        with pytest.raises(RejectedError):
            built(name, api).deliver([of(DELETED)], 5.0)


@pytest.mark.parametrize(("content", "subject"), [(SNAPSHOTS, None), (DELETED, "//vod.tencentcloudapi.com/0")])
def test_eventbridge_gets_a_cloudevent_with_the_event_s_key(built, content, subject):
    sent = of(content)
    with running_receiver(TencentApi("eb")) as api:
        built("eventbridge", api).deliver([sent], 5.0)
    (call,) = api.calls
    assert call.headers["X-TC-Region"] == "ap-guangzhou"
    params = json.loads(call.body)
    (item,) = params.pop("EventList")
    assert params == {"EventBusId": "eb-12345678"}
    document = json.loads(item.pop("Data"))
    assert document["id"] == sent.key.hex()
    assert document["data"] == content
    assert item == {"Source": "vodpoller", "Type": document["type"], "Subject": subject or document["subject"]}


@pytest.mark.parametrize("content", [SNAPSHOTS, DELETED])
def test_a_function_gets_the_body_of_the_normal_callback(built, content):
    with running_receiver(TencentApi("scf")) as api:
        built("function", api).deliver([of(content)], 5.0)
    (call,) = api.calls
    params = json.loads(call.body)
    assert json.loads(params.pop("ClientContext")) == content
    assert params == {"FunctionName": "on-vod-event", "Namespace": "default", "InvocationType": "Event"}
