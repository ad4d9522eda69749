"""A signature is correct if the official SDK computes the same one for the same request."""

import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from requests import PreparedRequest, Request
from tencentcloud.common import abstract_client
from tencentcloud.common.credential import Credential
from tencentcloud.common.exception.tencent_cloud_sdk_exception import TencentCloudSDKException
from tencentcloud.common.http.request import ApiRequest
from tencentcloud.common.profile.client_profile import ClientProfile
from tencentcloud.common.profile.http_profile import HttpProfile
from tencentcloud.vod.v20180717 import models
from tencentcloud.vod.v20180717.vod_client import VodClient as OfficialClient

from vodpoller.vod.credentials import Credentials
from vodpoller.vod.signature import Tc3Auth

MIDNIGHT = datetime(2024, 3, 1, tzinfo=UTC).timestamp()
PERMANENT = Credentials("AKIDexample", "secret-key")


@dataclass(frozen=True, kw_only=True)
class Case:
    scheme: str = "https"
    endpoint: str = "vod.tencentcloudapi.com"
    region: str = ""
    credentials: Credentials = PERMANENT
    now: float = MIDNIGHT + 12_345.678
    action: str = "PullEvents"
    params: tuple[tuple[str, object], ...] = ()


CASES = {
    "without anything": Case(),
    "SubAppId": Case(params=(("SubAppId", 1_500_000_001),)),
    "region": Case(region="ap-guangzhou", params=(("SubAppId", 7),)),
    "temporary credentials": Case(credentials=Credentials("AKIDtemporary", "key", "a-token/with+all==")),
    "international": Case(endpoint="vod.intl.tencentcloudapi.com"),
    "port in the endpoint": Case(scheme="http", endpoint="127.0.0.1:8977"),
    "https on another port": Case(endpoint="vod.tencentcloudapi.com:8443"),
    "confirm": Case(action="ConfirmEvents", params=(("EventHandles", ("h1", "h2")), ("SubAppId", 7))),
    "Unicode in the body": Case(action="ConfirmEvents", params=(("EventHandles", ("句柄\U0001f4a1", "ü")),)),
    "Unicode in the key": Case(credentials=Credentials("AKIDü", "schlüssel-密钥")),
    "last second of a day": Case(now=MIDNIGHT - 1),
    "a moment before midnight": Case(now=MIDNIGHT - 0.001),
    "midnight": Case(now=MIDNIGHT),
    "a moment after midnight": Case(now=MIDNIGHT + 0.001),
    "leap day": Case(now=MIDNIGHT - 86_400),
}


def official_request(case, monkeypatch):
    """The headers and the body that the SDK would send."""
    sent = []

    def keep(_api, request):
        sent.append((dict(request.header), request.data))
        raise ConnectionError

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its utcfromtimestamp, from Python 3.12 on
        patch.setattr(abstract_client, "time", SimpleNamespace(time=lambda: case.now))
        patch.setattr(ApiRequest, "send_request", keep)
        profile = ClientProfile(httpProfile=HttpProfile(endpoint=case.endpoint, protocol=case.scheme))
        keys = case.credentials
        client = OfficialClient(Credential(keys.secret_id, keys.secret_key, keys.token), case.region, profile)
        request = getattr(models, f"{case.action}Request")()
        for name, value in case.params:
            setattr(request, name, list(value) if isinstance(value, tuple) else value)
        with pytest.raises(TencentCloudSDKException, match="ConnectionError"):
            getattr(client, case.action)(request)
    return sent[0]


def post(url, body, **headers):
    return Request("POST", url, data=body, headers={"Content-Type": "application/json", **headers}).prepare()


def signed(url, body, *, credentials=PERMANENT, now=MIDNIGHT):
    return Tc3Auth(lambda: credentials, wall=lambda: now)(post(url, body))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_signs_as_the_official_sdk_does(case, monkeypatch):
    headers, body = official_request(case, monkeypatch)
    prepared = signed(f"{case.scheme}://{case.endpoint}/", body, credentials=case.credentials, now=case.now)
    for name in ("Authorization", "Host", "X-TC-Timestamp", "X-TC-Token"):
        assert prepared.headers.get(name) == headers.get(name), name


def test_one_auth_follows_changes_of_day_and_credentials(monkeypatch):
    day, keys = MIDNIGHT - 1, PERMANENT
    auth = Tc3Auth(lambda: keys, wall=lambda: day)
    for day in (MIDNIGHT - 1, MIDNIGHT, MIDNIGHT - 1):
        for keys in (PERMANENT, Credentials("AKIDexample", "another-key")):
            headers, body = official_request(Case(credentials=keys, now=day), monkeypatch)
            prepared = auth(post("https://vod.tencentcloudapi.com/", body))
            assert prepared.headers["Authorization"] == headers["Authorization"]


def test_the_token_of_former_credentials_is_removed():
    keys = Credentials("id", "key", "token")
    auth = Tc3Auth(lambda: keys, wall=lambda: MIDNIGHT)
    prepared = auth(post("https://vod.tencentcloudapi.com/", "{}"))
    assert prepared.headers["X-TC-Token"] == "token"
    keys = PERMANENT
    assert "X-TC-Token" not in auth(prepared).headers


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://vod.tencentcloudapi.com:443/", "vod.tencentcloudapi.com"),
        ("http://vod.tencentcloudapi.com:80/", "vod.tencentcloudapi.com"),
        ("http://vod.tencentcloudapi.com:443/", "vod.tencentcloudapi.com:443"),
        ("http://[::1]:8977/", "[::1]:8977"),
        ("https://[::1]/", "[::1]"),
    ],
)
def test_host_has_the_port_unless_it_is_the_default_of_the_scheme(url, host):
    assert signed(url, "{}").headers["Host"] == host


def test_one_auth_serves_two_endpoints():
    auth = Tc3Auth(lambda: PERMANENT, wall=lambda: MIDNIGHT)
    for host in ("a.example", "b.example:8443", "a.example"):
        assert auth(post(f"https://{host}/", "{}")).headers["Host"] == host


def test_text_and_bytes_sign_alike_and_no_body_as_an_empty_one():
    url = "https://vod.tencentcloudapi.com/"
    assert signed(url, "ü").headers["Authorization"] == signed(url, "ü".encode()).headers["Authorization"]
    bare = PreparedRequest()
    bare.prepare(method="POST", url=url, headers={"Content-Type": "application/json"})
    auth = Tc3Auth(lambda: PERMANENT, wall=lambda: MIDNIGHT)
    assert auth(bare).headers["Authorization"] == signed(url, b"").headers["Authorization"]


def test_the_name_of_the_service_is_part_of_the_signature():
    prepared = Tc3Auth(lambda: PERMANENT, service="sts", wall=lambda: MIDNIGHT)(post("https://sts.example/", "{}"))
    assert "/sts/tc3_request," in prepared.headers["Authorization"]


def test_repr_hides_key_and_token():
    shown = repr(Credentials("AKIDexample", "the-key", "the-token"))
    assert "AKIDexample" in shown
    assert "the-key" not in shown
    assert "the-token" not in shown
