"""The URLs to which a request can be sent."""

import pytest

from vodpoller.httpclient.url import http_parts


@pytest.mark.parametrize(
    "url",
    [
        "",
        "vod.example",
        "//vod.example",
        "ftp://vod.example/",
        "file:///etc/passwd",
        "http://",
        "http:///path",
        "https://:443/",
        "https://vod.example:0/",
        "https://vod.example:65536/",
        "https://vod.example:https/",
        "https://[::1/",
        "https://[nonsense]/",
    ],
)
def test_a_url_to_which_no_request_can_be_sent_is_refused(url):
    with pytest.raises(ValueError, match=r"(?i)address|port|ipv6"):
        http_parts(url)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://vod.example", "vod.example", None),
        ("HTTPS://VOD.example:8443/a?b#c", "vod.example", 8443),
        ("https://user:pass@[::1]:1/", "::1", 1),
    ],
)
def test_the_parts_are_those_of_the_standard_library(url, host, port):
    parts = http_parts(url)
    assert (parts.hostname, parts.port) == (host, port)
