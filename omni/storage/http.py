"""Download a file whose http address a stranger wrote: bounded, and from public hosts only.

A name is resolved once, all of its addresses are checked, and the connection goes to one of them: a
name server that answers differently a moment later is not asked again. Redirects are checked alike.
Proxies of the environment are not used, since they would resolve the name anew.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from omni.storage.uri import redact

PORTS = {"http": 80, "https": 443}
_REDIRECTS = 5
_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 30.0  # A server that sends nothing for so long is given up.
_BLOCK = 1 << 18  # bytes read at a time
_HOST = re.compile(r"([A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]+\.?")
_AMBIGUOUS = re.compile(r"[\x00-\x20\x7f\\]")  # Parsers of addresses disagree on these.
_METADATA = (  # Metadata servers of clouds at addresses that the standard library takes for public.
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("168.63.129.16/32"),
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class DownloadLimits:
    """Limits of the download of one recording."""

    megabytes: int = 1024
    seconds: float = 300.0
    allow_private_hosts: bool = False


DEFAULT_LIMITS = DownloadLimits()


class DownloadError(Exception):
    """The file cannot be downloaded, now or later; neither text holds credentials."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def too_large(shown: str, megabytes: int) -> DownloadError:
    """Make the error of a file that is larger than may be fetched."""
    return DownloadError(
        "too large",
        f"{shown}: more than {megabytes:,} MiB; data.download_mb or --download_mb admits larger "
        "recordings",
    )


def download(url: str, limits: DownloadLimits) -> bytes:
    """Return the file at an http or https address.

    Raises DownloadError, and OSError for a failure that may pass.
    """
    with _deadline(limits.seconds) as deadline:
        try:
            for _ in range(_REDIRECTS + 1):
                found = _request(_Target.of(url), limits, deadline)
                if isinstance(found, bytes):
                    return found
                url = _joined(url, found)
        except (OSError, http.client.HTTPException) as error:
            if deadline.passed:
                took = f"{redact(url)}: it took longer than {limits.seconds:g} s"
                raise DownloadError("slow download", took) from None
            raise _named(error, redact(url)) from None
    raise DownloadError("redirects", f"{redact(url)}: more than {_REDIRECTS}")


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise DownloadError("address", f"{redact(url)}: redirect: {error}") from None


def _named(error: Exception, shown: str) -> Exception:
    """Name the address in an error of the connection."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        return DownloadError("certificate", f"{shown}: {error.verify_message}")
    if isinstance(error, (OSError, http.client.IncompleteRead)):
        return OSError(f"{shown}: {reason}")
    return DownloadError("no HTTP", f"{shown}: {reason}")


@dataclass(frozen=True)
class _Target:
    """An address taken apart. shown: without credentials, for messages."""

    scheme: str
    host: str
    port: int
    path: str
    shown: str

    @classmethod
    def of(cls, url: str) -> _Target:
        """Take an address apart. Raises DownloadError for one that may be read in several ways."""
        shown = redact(url)
        try:
            if _AMBIGUOUS.search(url):
                raise ValueError("expected no spaces, backslashes or control characters")
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            if parts.scheme not in PORTS:
                raise ValueError("expected http or https")
            if "@" in parts.netloc:
                raise ValueError("expected no user or password in it")
            if ":" in host:
                ipaddress.IPv6Address(host)
            elif not _HOST.fullmatch(host) or parts.netloc.startswith("["):
                raise ValueError("expected a host's name in ASCII")
            path = quote(parts.path or "/", safe="/%!$&'()*+,;=:@~")
            query = f"?{quote(parts.query, safe='/%!$&()*+,;=:@~?')}" if parts.query else ""
        except ValueError as error:
            raise DownloadError("address", f"{shown!r}: {error}") from None
        return cls(parts.scheme, host, port or PORTS[parts.scheme], path + query, shown)

    @property
    def header(self) -> str:
        """Value of the header `Host`."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == PORTS[self.scheme] else f"{name}:{self.port}"


def _addresses(target: _Target, allow_private: bool) -> list[str]:
    """Resolve the host. Raises DownloadError if any of its addresses is not public, or OSError."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # A label of a name is empty or too long.
        raise DownloadError("address", f"{target.shown!r}: {error}") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not allow_private and not is_public(address):
            raise DownloadError(
                "private host",
                f"{target.shown}: {address} is not a public address; data.allow_private_hosts or "
                "--allow_private_hosts admits such hosts",
            )
    return addresses


def is_public(address: str) -> bool:
    """Check that an IP address, and the IPv4 address that it may stand for, is a public one."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None or found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.sixtofour is not None and not is_public(str(found.sixtofour)):
            return False
        if found.is_site_local:
            return False
    special = found.is_multicast or found.is_reserved or any(found in net for net in _METADATA)
    return found.is_global and not special


class _Deadline:
    """Shuts a connection when its time is up, however slowly the server sends its bytes."""

    def __init__(self) -> None:
        self.passed = False
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()

    def watch(self, sock: socket.socket) -> None:
        with self._lock:
            self._sock = sock
        if self.passed:
            self.end()

    def end(self) -> None:
        with self._lock:
            self.passed = True
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    # The method of SSLSocket would replace the state that a reader is using.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[_Deadline]:
    deadline = _Deadline()
    timer = threading.Timer(seconds, deadline.end)
    timer.daemon = True
    timer.start()
    try:
        yield deadline
    finally:
        timer.cancel()


def _request(target: _Target, limits: DownloadLimits, deadline: _Deadline) -> bytes | str:
    """Return the body, or where the server redirects to."""
    connection = http.client.HTTPConnection(target.host, target.port)
    addresses = _addresses(target, limits.allow_private_hosts)
    with contextlib.closing(_connect(target, addresses, deadline)) as sock:
        connection.sock = sock
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        for name, value in (
            ("Host", target.header), ("User-Agent", "omni"), ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ):  # fmt: skip
            connection.putheader(name, value)
        connection.endheaders()
        with connection.getresponse() as response:
            return _answer(response, target, limits.megabytes, deadline)


def _connect(target: _Target, addresses: list[str], deadline: _Deadline) -> socket.socket:
    """Connect to the first of the checked addresses that answers. Raises OSError."""
    refused: OSError = OSError("the host has no address")
    for address in addresses:
        try:
            sock = socket.create_connection((address, target.port), _CONNECT_SECONDS)
        except OSError as error:
            refused = error
            continue
        sock.settimeout(_SILENCE_SECONDS)
        deadline.watch(sock)
        if target.scheme == "http":
            return sock
        context = ssl.create_default_context()
        try:
            secure = context.wrap_socket(
                sock, server_hostname=target.host, do_handshake_on_connect=False
            )
        except OSError:
            sock.close()
            raise
        deadline.watch(secure)
        try:
            secure.do_handshake()
        except OSError:
            secure.close()
            raise
        return secure
    raise refused


def _answer(
    response: http.client.HTTPResponse, target: _Target, megabytes: int, deadline: _Deadline
) -> bytes | str:
    status, location = response.status, response.getheader("Location")
    if status in (301, 302, 303, 307, 308) and location:
        return location
    if status in (408, 429) or status >= 500:
        raise OSError(f"HTTP {status}")
    if status != 200:
        raise DownloadError("missing", f"{target.shown}: HTTP {status}")
    if (encoding := response.getheader("Content-Encoding", "identity")) != "identity":
        raise DownloadError("encoding", f"{target.shown}: expected none, got {encoding[:20]!r}")
    most, length = megabytes << 20, response.length
    body = bytearray()
    while length is None or length <= most:
        block = response.read(min(_BLOCK, most + 1 - len(body)))
        body += block
        if len(body) > most:
            break
        if not block:
            if deadline.passed or (length is not None and len(body) != length):
                raise http.client.IncompleteRead(
                    b"", None if length is None else length - len(body)
                )
            return bytes(body)
    raise too_large(target.shown, megabytes)
