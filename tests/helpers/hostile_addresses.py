"""Addresses of recordings that nobody may get read or fetched by writing them into a row."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any

LOOPBACK = [
    *("127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "2130706433", "0x7f000001", "0x7f.1"),
    *("0177.0.0.1", "017700000001", "0x7F.0x0.0x0.0x1", "127.0.0.1.", "0", "0.0.0.0", "0x0"),
    *("localhost", "LOCALHOST", "localhost.", "localtest.me", "sub.localtest.me", "one.private"),
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::ffff:0:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]"),
    *("[2002:7f00:1::]", "[2002:7f00:0001::1]", "[::ffff:a9fe:a9fe]"),
]
"""This machine, in every form in which a resolver takes it."""

PRIVATE = [
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.170.2"),
    *("[fd00:ec2::254]", "[fe80::1]", "[fc00::1]", "[fec0::1]", "[64:ff9b::a9fe:a9fe]"),
    *("10.0.0.1", "10.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.1", "3232235777"),
    *("100.64.0.1", "100.100.100.200", "198.18.0.1", "192.0.0.192", "192.0.2.1", "203.0.113.7"),
    *("224.0.0.1", "239.255.255.250", "[ff02::1]", "240.0.0.1", "255.255.255.255", "[2001:db8::1]"),
    *("metadata.private", "mixed.private"),
]
"""Hosts beside this one, metadata servers, and ranges that are nobody's."""

_AMBIGUOUS = [
    "http://good@127.0.0.1/a", "http://good:secret@127.0.0.1/a", "http://127.0.0.1@public.test/a",
    "http://public.test@127.0.0.1/a", "http://public.test%40127.0.0.1/a", "http://@127.0.0.1/a",
    "http://public.test\\@127.0.0.1/a", "http://127.0.0.1\\@public.test/a", "http:\\\\127.0.0.1\\a",
    "http://public.test#@127.0.0.1/a", "http://public.test?@127.0.0.1/a", "http://:80/a",
    "http://127.0.0.1 /a", "http:// 127.0.0.1/a", " http://127.0.0.1/a", "http://127.0.0.1\t/a",
    "http://127.0.0.1\n/a", "http://127.0.0.1/a\r\nHost: public.test", "http://127.0.0.1\x00/a",
    "http://public.test\x00.127.0.0.1/a", "http://127.0.0.1:80:80/a", "http://127.0.0.1:x/a",
    "http://127.0.0.1:99999/a", "http://127.0.0.1:-1/a", "http://[127.0.0.1]/a", "http://[::1/a",
    "http://::1/a", "http://[::1%25lo]/a", "http://[fe80::1%25eth0]/a", "http://[v1.x]/a",
    "http://127\u30020\u30020\u30021/a", "http://127\uff0e0\uff0e0\uff0e1/a",
    "http://127\uff610\uff610\uff611/a", "http://\u2460\u2461\u2466.0.0.1/a",
    "http://\uff11\uff12\uff17.0.0.1/a", "http://loc\u00adalhost/a", "http://\u24d8ocalhost/a",
    "http://l\u043ecalhost/a", "http://localho\u017ft/a", "http://", "http:///a", "http://./a",
    "http://../a", "http://.localhost/a", "http://localhost../a", "http://%31%32%37.0.0.1/a",
    "http://127.0.0.1%2f@public.test/a", "http://127.0.0.1;public.test/a", "http://$HOST/a",
    "http://127.0.0.1&@public.test/a", "HTTP://127.0.0.1/a", "hTtPs://127.0.0.1/a",
    "http:/127.0.0.1/a", "http:127.0.0.1/a", "http:////127.0.0.1/a", "https://localhost:22/a",
]  # fmt: skip

_SCHEMES = [
    "ftp://127.0.0.1/a", "ftps://127.0.0.1/a", "sftp://127.0.0.1/etc/passwd", "ssh://127.0.0.1/a",
    "scp://127.0.0.1/a", "smb://127.0.0.1/share/a", "webhdfs://127.0.0.1:80/a", "dbfs://x/a",
    "webdav://127.0.0.1/a", "dav://127.0.0.1/a", "gopher://127.0.0.1:80/_GET", "dict://127.0.0.1/a",
    "ldap://127.0.0.1/a", "tftp://127.0.0.1/a", "telnet://127.0.0.1/", "ws://127.0.0.1/a",
    "reference://k.wav", "reference:///etc/passwd", "memory://a", "memory:///etc/passwd",
    "local:///etc/passwd", "local://etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd",
    "file://localhost/etc/passwd", "file:///%65tc/passwd", "file:////etc/passwd", "file://../a",
    "github://owner:repo@main/a", "git://127.0.0.1/a", "git:///etc:main@a", "hg://127.0.0.1/a",
    "blockcache://127.0.0.1/a", "simplecache://a", "filecache://a", "cached://a", "dir:///etc/passwd",
    "jupyter://127.0.0.1/a", "jlab://127.0.0.1/a", "libarchive://a", "zip:///etc/passwd", "tar://a",
    "gdrive://a", "box://a", "wandb://a", "dvc://a", "lakefs://a", "asynclocal:///etc/a",
    "arrow_hdfs://127.0.0.1/a", "generic://a", "async_wrapper://a", "dask://a", "oci://a", "ocilake://a",
    "data:audio/wav;base64,UklGRg==", "data://a", "jar:http://127.0.0.1/a!/b", "about:blank",
    "php://filter/resource=/etc/passwd", "expect://id", "javascript:1", "view-source:http://127.0.0.1/",
    "pipe:0", "fd://0", "concat:/etc/passwd|/etc/hosts", "subfile,,start,0,end,9,,:/etc/passwd",
    "crypto:/etc/passwd", "hls+http://127.0.0.1/a", "rtsp://127.0.0.1/a", "rtmp://127.0.0.1/a",
    "unix:///var/run/docker.sock", "http+unix://%2Fvar%2Frun%2Fdocker.sock/a", "://127.0.0.1/a",
    "s3+http://127.0.0.1/a", "+://a", "\u017f3://bucket/a", "h\u0442tp://127.0.0.1/a",
]  # fmt: skip

_CHAINS = [
    "reference://k.wav::http://127.0.0.1/refs.json", "reference://k::file:///etc/refs.json",
    "simplecache::file:///etc/passwd", "simplecache::http://127.0.0.1/a", "filecache::local:///etc/a",
    "blockcache::http://127.0.0.1/a", "zip://a::http://127.0.0.1/a.zip", "zip://a::ftp://127.0.0.1/a",
    "zip://a::/etc/passwd", "zip://a::../../a.zip", "zip://a::file:///etc/passwd", "tar://a::/etc/a",
    "zip://a::zip://b::http://127.0.0.1/a", "zip://a::reference://k::http://127.0.0.1/refs.json",
    "gzip://a::reference://k", "gzip://::/etc/passwd", "xz://::local:///etc/passwd", "::", "a::b",
    "zip://x::y", "::http://127.0.0.1/a", "http://127.0.0.1/a::zip://b", "file:///etc/passwd::zip://a",
    "s3://bucket/a::http://127.0.0.1/", "oss://x::file:///etc/passwd", "gs://x::memory://a",
    "file:///etc/passwd::http://127.0.0.1/a", "dir://passwd::file:///etc", "libarchive://a::/etc/a",
]  # fmt: skip

_PATHS = [
    "/etc/passwd", "//etc/passwd", "///etc/passwd", "//host/path", "\\\\host\\share\\a.wav",
    "../../../../../../etc/passwd", "clips/../../secret.wav", "/proc/self/environ",
    "/proc/self/fd/0", "/dev/zero", "/dev/stdin", "..", "../secret.wav", "~/.ssh/id_rsa", "$HOME/a",
    "%2e%2e/secret.wav", "..\\secret.wav", "\uff0e\uff0e/secret.wav", "a\x00.wav", "s3://../a",
    "s3://KEY:SECRET@bucket/a", "s3://bucket/a?endpoint_override=127.0.0.1&scheme=http",
    "abfs://box:SECRET@account.host/a", "gs://bucket/../../a", "hdfs://127.0.0.1:80/a", "s3://bucket/a",
]  # fmt: skip

HOSTILE = [
    *(f"http://{host}:PORT/a.wav" for host in LOOPBACK),
    *(f"http://{host}/latest/meta-data/" for host in PRIVATE),
    *_AMBIGUOUS,
    *_SCHEMES,
    *_CHAINS,
    *_PATHS,
]
"""All of them; PORT stands for the port of a server on loopback."""


def naming(secret: Path, folder: Path) -> list[str]:
    """Addresses that name a file outside `folder`, in whatever way a row of that folder could."""
    relative, plain = os.path.relpath(secret, folder), str(secret)
    return [
        *(
            plain,
            relative,
            f"./{relative}",
            f"sub/../{relative}",
            f"{folder}/{relative}",
            f"/{plain}",
        ),
        *(f"file://{plain}", f"FILE://{plain}", f"file://localhost{plain}", f"file:{plain}"),
        *(f"file://{relative}", f"file:///..{plain}", f"local://{plain}", f"dir://{plain}"),
        *(
            f"zip://{secret.name}::{plain}",
            f"zip://{secret.name}::{relative}",
            f"gzip://a::{plain}",
        ),
        *(f"gzip://a::file://{plain}", f"tar://a::{relative}", f"xz://a::{relative}"),
        *(f"simplecache::file://{plain}", f"filecache::{plain}", f"reference://a::{plain}"),
        *(f"{plain}\x00.wav", f"{relative}\x00", f"{plain}?a", f"{plain}#a", f"{plain}::a"),
        *(plain.replace("/", "//"), plain.replace("/", "\\"), plain.replace("/", "%2f")),
        *(f"s3://../../..{plain}", f"hdfs://{plain}", f"cat {plain} |", f"| cat {plain}"),
        *(f"concat:{plain}", f"subfile,,start,0,end,9,,:{plain}", f"pipe:{plain}", f"~/..{plain}"),
    ]


NAMES = {
    "localtest.me": ["127.0.0.1"],
    "sub.localtest.me": ["127.0.0.1"],
    "one.private": ["10.0.0.1"],
    "metadata.private": ["169.254.169.254"],
    "mixed.private": ["93.184.215.14", "127.0.0.1"],
    "public.test": [],
}
"""What a name server says of the names in them."""

_NUMBERS = re.compile(r"[0-9][0-9a-fx.]*|.*:.*|localhost")
_getaddrinfo = socket.getaddrinfo


def resolver(host: str, port: int, *flags: Any, **options: Any) -> list[Any]:
    """The system's resolver for what needs no network, and names of the tests.

    Public addresses, which anybody's row may name, are as unknown as they are without a network.
    """
    name = host.rstrip(".").lower()
    if name not in NAMES and _NUMBERS.fullmatch(name):
        found = _getaddrinfo(host, port, *flags, **options)
        numbers = [entry[4][0] for entry in found if entry[0] == socket.AF_INET]
        if not any(ipaddress.ip_address(number).is_global for number in numbers):
            return found
    if name not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "no such host")
    known = NAMES[name]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known]
