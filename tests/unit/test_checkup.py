"""`check --connect` says what it found of the API."""

from pathlib import Path

import pytest

from tests.receiver import raw_server, read_request
from vodpoller.checkup.checks import check_connections
from vodpoller.config.load import from_dict

REFUSED = b'{"Response":{"Error":{"Code":"UnauthorizedOperation","Message":"no"}%b}}'


def answers(body, *headers):
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers]

    def serve(connection, stopping):
        while read_request(connection):
            connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)

    return serve


def found_at(url, tmp_path, log, **credentials):
    config = from_dict(
        {
            "api": {"endpoint": url, "timeout_secs": 5},
            "credentials": {"secret_id": "AKIDexample", "secret_key": "the-secret-key", **credentials},
            "sources": [{"name": "main"}],
            "routes": [{"name": "all", "sinks": ["archive"]}],
            "sinks": {"archive": {"type": "file", "path": str(tmp_path / "events.jsonl")}},
            "journal": {"path": str(tmp_path / "journal.db")},
        },
        where="test",
        base=Path(),
        env={},
    )
    return {finding.what: finding for finding in check_connections(config, log)}


@pytest.mark.parametrize(
    ("member", "says"),
    [(b"", "grant vod:"), (b',"RequestId":""', "grant vod:"), (b',"RequestId":"r-1"', "(RequestId r-1)")],
)
def test_a_request_id_is_shown_if_there_is_one(tmp_path, log, member, says):
    with raw_server(answers(REFUSED % member)) as url:
        found = found_at(url, tmp_path, log)["source main"]
    assert not found.good
    assert says in found.text
    assert ("RequestId" in found.text) == ("r-1" in found.text)


@pytest.mark.parametrize("headers", [[], [b"Date: yesterday"], [b"Date: Fri, 31 Dec 99999999999 23:59:59 GMT"]])
def test_an_answer_without_a_date_is_told_from_none(tmp_path, log, headers):
    with raw_server(answers(REFUSED % b"", *headers)) as url:
        clock = found_at(url, tmp_path, log)["clock"]
    assert not clock.good
    assert clock.text.startswith("not compared: the answer has no Date that can be read")


def test_what_cannot_be_reached_is_told_by_its_name_alone(tmp_path, log):
    found = found_at("http://127.0.0.1:1", tmp_path, log)
    assert "127.0.0.1:1 refused the connection" in found["source main"].text
    assert "_Connection" not in found["source main"].text
    assert "RequestId" not in found["source main"].text
    assert found["clock"].text == "not compared: VOD did not answer"
