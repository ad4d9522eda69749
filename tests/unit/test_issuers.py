"""Keys from the metadata service and STS: invalid answers, no answers and valid ones."""

import json
import time
from contextlib import closing
from email.utils import formatdate

import pytest

from tests.receiver import Answer, Receiver, black_hole, raw_server, read_request, running_receiver
from vodpoller.errors import NoAnswerError, OperatorError, TransientError
from vodpoller.secret import Secret
from vodpoller.simulator.issuing import ROLE
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator
from vodpoller.vod.credentials import AssumedRole, CvmRole, StaticCredentials
from vodpoller.vod.issuers import LIFE_MAX_SECS, METADATA_SECS, MetadataService, Sts

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
ROLE_ARN = "qcs::cam::uin/1:roleName/r"
KEY = {"TmpSecretId": "tmp-id-of-test", "TmpSecretKey": "tmp-key-of-test", "Token": "tmp-token-of-test"}
LASTING = {"secret_id": "AKIDsimulated", "secret_key": "a-key-of-no-worth"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in (*PROXY_VARIABLES, *map(str.upper, PROXY_VARIABLES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def receiver():
    with running_receiver(Receiver()) as running:
        yield running


def base_of(receiver):
    return receiver.url.removesuffix("/callback")


def metadata(url, role="r", **settings):
    return MetadataService(CvmRole(role=role, metadata_endpoint=url.rstrip("/")), **settings)


def sts(url, *, external_id="", secret_key=LASTING["secret_key"], **settings):
    role = AssumedRole(
        role_arn=ROLE_ARN,
        role_session_name="vodpoller",
        duration_secs=7200,
        external_id=external_id,
        sts_endpoint=url.rstrip("/"),
        sts_region="ap-guangzhou",
    )
    key = StaticCredentials(
        secret_id=Secret(value=LASTING["secret_id"]), secret_key=Secret(value=secret_key), token=None
    )
    return Sts(role, key=key, key_renewal="send SIGHUP", **settings)


def metadata_body(**changes):
    return json.dumps({**KEY, "ExpiredTime": time.time() + 100, "Code": "Success", **changes}).encode()


def sts_body(key=KEY, **changes):
    response = {"Credentials": key, "ExpiredTime": time.time() + 100, "RequestId": "r-1", **changes}
    return json.dumps({"Response": response}).encode()


def problem_of(issuer, kind=TransientError):
    with closing(issuer), pytest.raises(kind) as caught:
        issuer()
    shown = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert not [part for part in ("tmp-", "-of-test", LASTING["secret_key"]) if part in shown], shown
    return str(caught.value)


# --- invalid answers --------------------------------------------------------------------------------------------------

GARBAGE = [
    (b"", "it is not JSON"),
    (b"\xff\xfe tmp-key-of-test", "it is not text"),
    (b'{"TmpSecretKey":"tmp-key-of-test', "it is not JSON"),
    (b"[1]", "it is not an object"),
    (b'{"TmpSecretKey":"tmp-key-of-test"}' + b" " * 70_000, "far too long"),
]


@pytest.mark.parametrize(("body", "reason"), GARBAGE)
def test_garbage_is_not_quoted_because_it_may_hold_part_of_a_key(receiver, body, reason):
    receiver.answer = Answer(status=200, body=body)
    for issuer in (metadata(base_of(receiver)), sts(base_of(receiver))):
        message = problem_of(issuer)
        assert reason in message or "too long" in reason


BAD_KEYS = [
    ({"Token": None}, "it lacks a part of the key"),
    ({"Token": ""}, "it lacks a part of the key"),
    ({"TmpSecretId": "tmp-id\r\nX-Other: 1"}, "it lacks a part of the key"),
    ({"TmpSecretKey": ["tmp-key-of-test"]}, "it lacks a part of the key"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD_KEYS)
def test_a_key_without_all_its_parts_is_refused(receiver, changes, reason):
    receiver.answer = Answer(status=200, body=metadata_body(**changes))
    assert reason in problem_of(metadata(base_of(receiver)))
    receiver.answer = Answer(status=200, body=sts_body({**KEY, **changes}))
    assert reason in problem_of(sts(base_of(receiver)))


@pytest.mark.parametrize(
    ("ends_at", "reason"),
    [
        (None, "does not say when the key ends"),
        ("soon", "does not say when the key ends"),
        (True, "does not say when the key ends"),
        (0, "key ended"),
        pytest.param(-(10**400), "key ended", id="long ago"),
    ],
)
def test_a_missing_or_past_expiry_is_a_failure(receiver, ends_at, reason):
    receiver.answer = Answer(status=200, body=metadata_body(ExpiredTime=ends_at))
    assert reason in problem_of(metadata(base_of(receiver)))
    receiver.answer = Answer(status=200, body=sts_body(ExpiredTime=ends_at))
    assert reason in problem_of(sts(base_of(receiver)))


@pytest.mark.parametrize("ends_at", [time.time() * 1000, 10**400], ids=["milliseconds", "never"])
def test_an_expiry_that_is_too_far_away_is_limited(receiver, ends_at):
    receiver.answer = Answer(status=200, body=metadata_body(ExpiredTime=ends_at))
    with closing(metadata(base_of(receiver))) as issuer:
        assert issuer().life_secs == LIFE_MAX_SECS


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 500, 503])
def test_errors_of_answers_other_than_200_name_the_status(receiver, status):
    receiver.answer = Answer(status=status, headers={"Location": "http://127.0.0.1:1/"}, body=metadata_body())
    for issuer in (metadata(base_of(receiver)), sts(base_of(receiver))):
        message = problem_of(issuer)
        assert f"answered {status}" in message
        assert ("not followed" in message) == (status < 400)
    assert len(receiver.received) == 2


def test_a_code_of_the_metadata_service_is_reported(receiver):
    receiver.answer = Answer(status=200, body=metadata_body(Code="InternalError"))
    assert "returned no key of role r: InternalError" in problem_of(metadata(base_of(receiver)))
    receiver.answer = Answer(status=200, body=metadata_body(Code="tmp-key-of-test"))
    assert "an answer without a code" in problem_of(metadata(base_of(receiver)))


@pytest.mark.parametrize("body", [b"", b"\n"])
def test_a_machine_without_a_role_is_an_operator_error(receiver, body):
    receiver.answer = Answer(status=200 if body else 404, body=body)
    assert "bind a role to the instance" in problem_of(metadata(base_of(receiver), role=""), OperatorError)


def test_a_role_that_the_machine_does_not_have_is_an_operator_error(receiver):
    receiver.answer = Answer(status=404)
    assert "correct credentials.role" in problem_of(metadata(base_of(receiver)), OperatorError)


def test_a_page_in_place_of_the_roles_name_is_not_a_role(receiver):
    receiver.answer = Answer(status=200, body=b"<html><body>log in</body></html>")
    assert "not the name of a role" in problem_of(metadata(base_of(receiver), role=""))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UnauthorizedOperation", OperatorError),
        ("ResourceNotFound.RoleNotFound", OperatorError),
        ("AuthFailure.SignatureFailure", OperatorError),
        ("RequestLimitExceeded", TransientError),
        ("InternalError.SystemError", TransientError),
        ("tmp-key-of-test", TransientError),
    ],
)
def test_a_refusal_of_sts_is_an_operator_or_a_transient_error(receiver, code, kind):
    receiver.answer = Answer(status=200, body=sts_body(Error={"Code": code, "Message": "no"}))
    message = problem_of(sts(base_of(receiver)), kind)
    assert ("trust" in message) == (kind is OperatorError)


# --- no answer --------------------------------------------------------------------------------------------------------


@pytest.mark.system
def test_a_call_to_a_metadata_service_that_hangs_ends_after_2_s(receiver):
    receiver.answer = Answer(hangs=True)
    began = time.monotonic()
    assert "did not answer within 2 s" in problem_of(metadata(base_of(receiver)), NoAnswerError)
    assert METADATA_SECS <= time.monotonic() - began < METADATA_SECS + 10.0


def test_two_calls_share_the_two_seconds():
    def slow(connection, _stopping):
        read_request(connection)
        times[0] += 2.5
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nr")

    times = [0.0]
    with raw_server(slow) as url:
        assert "did not answer within 2 s" in problem_of(metadata(url, role="", monotonic=lambda: times[0]))


@pytest.mark.system
def test_an_address_where_nothing_answers_is_a_no_answer_error(receiver):
    with black_hole() as port:
        assert "127.0.0.1" in problem_of(metadata(f"http://127.0.0.1:{port}"), NoAnswerError)
    with raw_server(lambda connection, _stopping: None) as url:
        assert "without a whole answer" in problem_of(metadata(url), NoAnswerError)
    assert "refused the connection" in problem_of(metadata(url), NoAnswerError)
    assert "refused the connection" in problem_of(sts(url), NoAnswerError)


def test_the_metadata_service_is_never_called_through_a_proxy(receiver, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, base_of(receiver))
    receiver.answer = Answer(status=200, body=metadata_body())
    with raw_server(lambda connection, _stopping: None) as url:
        problem_of(metadata(url), NoAnswerError)
    assert receiver.received == []


def test_sts_is_called_through_the_proxy_of_the_environment(receiver, monkeypatch):
    monkeypatch.setenv("http_proxy", base_of(receiver))
    receiver.answer = Answer(status=200, body=sts_body())
    with closing(sts("http://sts.invalid")) as issuer:
        assert issuer().credentials.token == KEY["Token"]
    (request,) = receiver.received
    assert request.headers["Host"] == "sts.invalid"


# --- valid answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["", ROLE])
def test_the_role_of_the_machine_is_requested_if_it_is_not_given(role):
    with Simulator(SimulatorOptions(credential_secs=60)) as simulator, closing(metadata(simulator.url, role)) as issuer:
        issued = issuer()
    assert issued.role == f"role {ROLE} of this machine"
    assert 55 < issued.life_secs < 60


def test_sts_accepts_the_signature_of_the_permanent_key():
    options = SimulatorOptions(credential_secs=60, **LASTING)
    with Simulator(options) as simulator:
        with closing(sts(simulator.url, external_id="partner")) as issuer:
            assert issuer().role == f"role {ROLE_ARN}"
        message = problem_of(sts(simulator.url, secret_key="another-key"), OperatorError)
        assert "AuthFailure.SignatureFailure" in message
        assert "send SIGHUP" in message


@pytest.mark.parametrize("skew_secs", [-3600.0, 3600.0])
def test_the_life_of_a_key_is_measured_by_the_issuers_clock(skew_secs):
    options = SimulatorOptions(credential_secs=60, clock_skew_secs=skew_secs, **LASTING)
    with Simulator(options) as simulator:
        for issuer in (metadata(simulator.url, ROLE), sts(simulator.url)):
            with closing(issuer):
                assert 55 < issuer().life_secs < 60


def test_without_a_date_this_machines_clock_counts(receiver):
    body = metadata_body(ExpiredTime=1_000_100)
    with (
        raw_server(
            lambda connection, _stopping: (
                read_request(connection),
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                ),
            )
        ) as url,
        closing(metadata(url, wall=lambda: 1_000_000.0)) as issuer,
    ):
        assert issuer().life_secs == 100


def test_a_request_to_sts_names_role_life_and_external_id(receiver):
    receiver.answer = Answer(status=200, body=sts_body(), headers={"Date": formatdate(time.time(), usegmt=True)})
    with closing(sts(base_of(receiver), external_id="partner")) as issuer:
        issuer()
    (request,) = receiver.received
    assert json.loads(request.body) == {
        "RoleArn": ROLE_ARN,
        "RoleSessionName": "vodpoller",
        "DurationSeconds": 7200,
        "ExternalId": "partner",
    }
    assert (request.headers["X-TC-Action"], request.headers["X-TC-Version"]) == ("AssumeRole", "2018-08-13")
    assert request.headers["X-TC-Region"] == "ap-guangzhou"
    assert "/sts/tc3_request" in request.headers["Authorization"]
