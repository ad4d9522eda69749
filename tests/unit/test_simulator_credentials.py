"""The simulator as the metadata service of a CVM and as STS, with the official SDK as the client."""

import contextlib
import json
import time
import urllib.request
from urllib.error import HTTPError

import pytest
from tencentcloud.common import credential
from tencentcloud.common.exception.tencent_cloud_sdk_exception import TencentCloudSDKException
from tencentcloud.common.profile.client_profile import ClientProfile
from tencentcloud.common.profile.http_profile import HttpProfile
from tencentcloud.vod.v20180717 import models
from tencentcloud.vod.v20180717.vod_client import VodClient

from tests.polling import until
from vodpoller.simulator.issuing import METADATA_PATH, ROLE
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator

LASTING = {"secret_id": "AKIDsimulated", "secret_key": "a-key-of-no-worth"}

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")


@pytest.fixture
def run():
    with contextlib.ExitStack() as opened:

        def start(**options):
            chosen = SimulatorOptions(**{"poll_secs": 0.0, "credential_secs": 60.0, "seed": 7, **options})
            return opened.enter_context(Simulator(chosen))

        yield start


def pull(simulator, key):
    profile = ClientProfile(httpProfile=HttpProfile(protocol="http", endpoint=simulator.url.removeprefix("http://")))
    return VodClient(key, "", profile).PullEvents(models.PullEventsRequest())


def code_of(simulator, key):
    with pytest.raises(TencentCloudSDKException) as caught:
        pull(simulator, key)
    return caught.value.code


def metadata(simulator, name=ROLE):
    with urllib.request.urlopen(simulator.url + METADATA_PATH + name, timeout=10) as answer:
        return answer.read()


def key_of(simulator):
    found = json.loads(metadata(simulator))
    assert found["Code"] == "Success"
    return credential.Credential(found["TmpSecretId"], found["TmpSecretKey"], found["Token"])


def assumed_role(simulator, monkeypatch, **changes):
    """The SDK's provider for an assumed role, changed to use http instead of https."""
    monkeypatch.setattr(credential, "HttpProfile", lambda: HttpProfile(protocol="http"))
    given = {**LASTING, **changes}
    return credential.STSAssumeRoleCredential(
        given["secret_id"],
        given["secret_key"],
        "qcs::cam::uin/1:roleName/r",
        "sdk",
        endpoint=simulator.url.removeprefix("http://"),
    )


def test_without_the_option_no_key_is_issued(run):
    simulator = run(credential_secs=0.0)
    with pytest.raises(HTTPError, match="404"):
        metadata(simulator)


def test_a_missing_role_is_not_found(run):
    with pytest.raises(HTTPError, match="404"):
        metadata(run(), "other")


def test_a_key_that_was_not_issued_is_not_found(run):
    assert code_of(run(), credential.Credential("made-up", "key", "token")) == "AuthFailure.SecretIdNotFound"


def test_parts_of_two_issued_keys_cannot_be_mixed(run):
    simulator = run()
    one, other = key_of(simulator), key_of(simulator)
    mixed = credential.Credential(one.secret_id, one.secret_key, other.token)
    assert code_of(simulator, mixed) == "AuthFailure.TokenFailure"
    mixed = credential.Credential(one.secret_id, other.secret_key, one.token)
    assert code_of(simulator, mixed) == "AuthFailure.SignatureFailure"


@pytest.mark.system
def test_a_key_that_has_ended_is_refused(run):
    simulator = run(credential_secs=1.0)
    key = key_of(simulator)
    ended_at = time.time() + 1
    until(lambda: time.time() > ended_at)
    assert code_of(simulator, key) == "AuthFailure.TokenFailure"


def test_a_wrong_permanent_key_may_not_assume_a_role(run, monkeypatch):
    simulator = run(**LASTING)
    provider = assumed_role(simulator, monkeypatch, secret_key="another-key")
    with pytest.raises(TencentCloudSDKException, match="SignatureFailure"):
        assert provider.token


def test_the_sdks_assumed_role_can_pull(run, monkeypatch):
    simulator = run(**LASTING)
    assert pull(simulator, assumed_role(simulator, monkeypatch)).EventSet is None
    assert simulator.stats()["credentials_issued"] == 1


def test_the_sdks_cvm_role_can_pull(run, monkeypatch):
    simulator = run()
    monkeypatch.setattr(credential.CVMRoleCredential, "_role_endpoint", simulator.url + METADATA_PATH)
    assert pull(simulator, credential.CVMRoleCredential()).EventSet is None
    assert simulator.stats()["credentials_issued"] >= 1
