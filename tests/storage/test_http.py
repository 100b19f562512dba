"""Downloads end at their limits, and only hosts that are public or allowed are asked."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from omni.storage import http
from omni.storage.http import DownloadError, DownloadLimits, download, is_public
from tests.helpers.hostile_addresses import LOOPBACK, PRIVATE, resolver
from tests.helpers.hostile_server import BODY, hostile_server

pytestmark = pytest.mark.unit
ALLOWED = DownloadLimits(megabytes=1, seconds=20, allow_private_hosts=True)


@pytest.fixture
def server() -> Iterator[Any]:
    with hostile_server() as found:
        yield found


@pytest.mark.parametrize("path", ["small", "chunked", "to?/small", "to?/to?/chunked"])
def test_an_allowed_server_serves(path: str, server: Any) -> None:
    assert download(f"{server.url}/{path}", ALLOWED) == BODY


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("endless", "too large"),
        ("long", "too large"),
        ("headers", "no HTTP"),
        ("header", "no HTTP"),
        ("packed", "encoding"),
        ("loop", "redirects"),
        ("gone", "missing"),
        ("to?file:///etc/passwd", "address"),
        ("to?ftp://127.0.0.1/a", "address"),
        ("to?//me:secret@127.0.0.1/a", "address"),
        ("to?http://[", "address"),
    ],
)
def test_what_is_too_large_or_no_file_is_one_reason(path: str, reason: str, server: Any) -> None:
    with pytest.raises(DownloadError) as caught:
        download(f"{server.url}/{path}", ALLOWED)
    assert caught.value.reason == reason
    assert server.sent < 32 << 20, "the body is stopped at the limit, but for buffers of the system"
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["drip", "drip-head", "long"])
def test_a_slow_server_is_given_up(path: str, server: Any) -> None:
    limits = DownloadLimits(megabytes=1 << 21, seconds=0.3, allow_private_hosts=True)
    began = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        download(f"{server.url}/{path}", limits)
    assert caught.value.reason == "slow download"
    assert time.monotonic() - began < 4


def test_a_silent_server_may_answer_later(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_SILENCE_SECONDS", 0.2)
    with pytest.raises(OSError, match="timed out"):
        download(f"{server.url}/long", DownloadLimits(1 << 21, 20, True))


@pytest.mark.parametrize("path", ["cut", "overloaded"])
def test_what_may_pass_is_an_error_of_the_system(path: str, server: Any) -> None:
    with pytest.raises(OSError, match=rf"^{server.url}/{path}: "):
        download(f"{server.url}/{path}", ALLOWED)


@pytest.mark.parametrize("host", LOOPBACK + PRIVATE)
def test_private_hosts_are_not_asked(
    host: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(address: Any, *rest: Any) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(socket, "create_connection", connect)
    url = f"http://{host}:{server.server_address[1]}/small"
    try:
        download(url, DownloadLimits())
    except DownloadError as error:
        assert error.reason in ("private host", "address")
    except OSError as error:  # a resolver that does not take this form of an address
        assert isinstance(error, OSError) and "connected" not in str(error)
    else:
        raise AssertionError("it was downloaded")
    assert server.asked == []


def test_a_redirect_to_a_private_host_is_refused(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host counts as public here; the second one is the metadata server."""
    monkeypatch.setattr(http, "is_public", lambda a: a == "127.0.0.1" or is_public(a))
    for target in ("http://169.254.169.254/latest/", "http://2852039166/", "//10.0.0.1/small"):
        with pytest.raises(DownloadError) as caught:
            download(f"{server.url}/to?{target}", DownloadLimits())
        assert caught.value.reason == "private host"
    assert [path.partition("?")[0] for path in server.asked] == ["/to"] * 3


def test_a_name_is_resolved_once_and_its_checked_address_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    connected: list[str] = []

    def resolve(host: str, port: int, **options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in next(answers)]

    def connect(address: tuple[str, int], *rest: Any) -> None:
        connected.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(OSError, match="rebinding.test/a: refused"):
        download("http://rebinding.test/a", DownloadLimits())
    assert connected == ["93.184.215.14"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),  # what an IPv6 network with NAT64 has for 8.8.8.8
        ("64:ff9b::7f00:1", False),
        ("2002:a9fe:a9fe::1", False),
        ("100.64.0.1", False),
        ("168.63.129.16", False),  # Azure's own server
        ("fe80::1%lo", False),
    ],
)
def test_addresses_stand_for_their_ipv4_address(address: str, public: bool) -> None:
    assert is_public(address) is public
