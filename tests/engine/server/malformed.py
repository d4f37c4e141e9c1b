"""Malformed requests and frames, the same ones for the same seed.

Everything is made so that it cannot be right: what is cut off is never whole, and what is random stands where a value is
needed.
"""

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

GENERATIONS, EDITS, STREAM = "/v1/images/generations", "/v1/images/edits", "/v1/stream"
LONGEST_MESSAGE = 65_536  # bytes that the server takes
COMMON = {"prompt": "a cat", "seed": 7, "steps": 1}
DRAWING = COMMON | {"n": 1, "size": "64x64", "output_format": "png", "user": "somebody"}
TYPING = COMMON | {"seq": 1, "format": "png", "preview": False}


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """Bytes for one connection. what: kind of fault; stream: after a WebSocket's handshake; answer_due: False where the
    client hangs up first, so that no answer need come."""

    what: str
    data: bytes
    stream: bool = False
    answer_due: bool = True


def malformed(count: int, seed: int) -> Iterator[Malformed]:
    """As many, the kinds in turn."""
    rng = random.Random(seed)
    for i in range(count):
        yield KINDS[i % len(KINDS)](rng)


def _json_fault(rng: random.Random, good: dict[str, object]) -> tuple[str, bytes]:
    """A kind of fault and a JSON body with it."""
    text, field = json.dumps(good), rng.choice(list(good))

    def having(value: str, name: str = field) -> bytes:
        rest = {key: good[key] for key in good if key != name}
        return f'{json.dumps(rest)[:-1]}, "{name}": {value}}}'.encode()

    deep = rng.randrange(100, 30_000)
    digits = rng.choice(["1" * rng.randrange(20, 6000), "-2", "1e999", "-1e999", "NaN", "Infinity", "1.5", "9.3e18"])
    long = json.dumps("".join(rng.choices("ab é\U0001f98a", k=rng.randrange(32_001, 40_000))))
    faults: dict[str, Callable[[], bytes]] = {
        "truncated JSON": lambda: text[: rng.randrange(len(text))].encode(),
        "wrong type": lambda: having(rng.choice(["[]", "{}", "[null]", '{"a": "b"}', "0.5", "[[[[1]]]]"])),
        "unknown field": lambda: having("1", rng.choice(["sead", "__class__", "image", "\\ud800", "a" * 5000, ""])),
        "lone surrogate": lambda: having(r'"\ud800"'),
        "huge number": lambda: having(digits, rng.choice([name for name in ("seed", "steps", "n") if name in good])),
        "huge string": lambda: having(long, "prompt"),
        "deep nesting": lambda: b"[" * deep if rng.random() < 0.5 else having("[" * deep + "]" * deep)[:60_000],
        "deep objects": lambda: b'{"prompt":' * (deep // 6),
        "broken UTF-8": lambda: having('"a cat"', "prompt").replace(b"cat", rng.choice(BROKEN)),
        "control characters": lambda: having('"a\x00\x1bcat"', "prompt"),
        "no object": lambda: rng.choice([b"null", b"1", b"[]", b'"a"', b"true", b"{}", b"[{}]", b"\xef\xbb\xbf{}"]),
        "impossible value": lambda: having(*rng.choice(IMPOSSIBLE)),
    }
    what = rng.choice(list(faults))
    return what, faults[what]()


BROKEN = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xe2\x82", b"\xc0\xaf")
IMPOSSIBLE = (
    ("999", "steps"),
    ("0", "steps"),
    ('"0x0"', "size"),
    ('"99999x99999"', "size"),
    ('"xxx"', "size"),
    ('"   "', "prompt"),
    ('""', "prompt"),
    ('"../../x"', "size"),
    ("null", "prompt"),
)


def _head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode("latin-1")


def _post(path: str, body: bytes, kind: str = "application/json", *lines: str) -> bytes:
    return _head(path, f"Content-Type: {kind}", f"Content-Length: {len(body)}", *lines) + body


def _json_body(rng: random.Random) -> Malformed:
    what, body = _json_fault(rng, DRAWING)
    return Malformed(what=what, data=_post(GENERATIONS, body))


def _headers(rng: random.Random) -> Malformed:
    """What is wrong before any body, or with its length."""
    body = json.dumps(DRAWING).encode()
    rubbish = rng.choice(["-1", "+5", "1e3", "abc", "\xb2", "5, 6", "0x10", "9" * 40, "1 2", ""])
    faults = {
        "content-length": _head(GENERATIONS, f"Content-Length: {rubbish}") + body[:5],
        "two lengths": _head(GENERATIONS, "Content-Length: 5", "Content-Length: 6") + body[:6],
        "length and chunks": _head(GENERATIONS, "Content-Length: 5", "Transfer-Encoding: chunked") + body,
        "too large a length": _head(GENERATIONS, f"Content-Length: {rng.randrange(65_537, 10**12)}"),
        "content type": _post(GENERATIONS, body, rng.choice(["text/plain", "image/png", "a;b=c;;", "\xff"])),
        "no such coding": _head(GENERATIONS, "Transfer-Encoding: rubbish") + body,
        "header without a colon": _head(GENERATIONS, "Rubbish"),
        "control characters in a header": _head(GENERATIONS, "X-A: \x00\x01b"),
        "header without a name": _head(GENERATIONS, ": b"),
        "huge header": _post(GENERATIONS, b"{", "application/json", "X-A: " + "a" * rng.randrange(10_000, 60_000)),
        "many headers": _post(GENERATIONS, b"{", "application/json", *["X-A: b"] * rng.randrange(100, 2000)),
        "foreign page": _post(GENERATIONS, body, "application/json", "Origin: https://example.org"),
        "path": _head(rng.choice(PATHS), method="GET"),
        "method": _head(rng.choice([GENERATIONS, "/", STREAM]), method=rng.choice(["DELETE", "PUT", "PATCH"])),
        "no such method": _head("/", method=rng.choice(["FROB", "get", "\xff", ""])),
        "version": _head("/healthz").replace(b"HTTP/1.1", rng.choice([b"HTTP/9.9", b"HTTP/", b"ICY/1.0", b"1.1"])),
        "another protocol": rng.choice(PROTOCOLS),
        "handshake": handshake(**rng.choice(HANDSHAKES)),
    }
    what = rng.choice(list(faults))
    return Malformed(what=what, data=faults[what])


PATHS = (
    "/nowhere",
    "//",
    "/../../etc/passwd",
    "/page/../app.py",
    "/page/..%2fapp.py",
    "/page/%00",
    "/page/" + "a" * 5000,
    "/v1/models/" + "a" * 9000,
    "/v1/models/%ff%fe",
    "/v1/images/generations/x",
    "/v1/models/..%2f..",
    "/%c0%af",
)
PROTOCOLS = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) + b"\r\n\r\n",
    b"SSH-2.0-x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x00" * 100,
    b"*1\r\n$4\r\nPING\r\n\r\n",
)
HANDSHAKES = (
    {"path": "/nowhere"},
    {"version": "1"},
    {"version": "x"},
    {"key": ""},
    {"key": "dG9vIHNob3J0"},
    {"key": "\xff" * 24},
    {"extra": "Origin: https://example.org\r\n"},
)


def handshake(path: str = STREAM, version: str = "13", key: str = "AAAAAAAAAAAAAAAAAAAAAA==", extra: str = "") -> bytes:
    lines = ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Version: {version}"]
    return _head(path, *lines, f"Sec-WebSocket-Key: {key}", *extra.split("\r\n")[:-1], method="GET")


def _cut_off(rng: random.Random) -> Malformed:
    """Bodies and chunks that end before they should, and chunks that are none."""
    body = json.dumps(DRAWING).encode()
    whole, chunked = _post(GENERATIONS, body), _head(GENERATIONS, "Transfer-Encoding: chunked")
    size = f"{len(body) + 9:x}\r\n".encode()
    cut = {
        "truncated request": whole[: rng.randrange(1, len(whole))],
        "truncated chunk": chunked + size + body,
        "no last chunk": chunked + f"{len(body):x}\r\n".encode() + body + b"\r\n",
        "truncated upload": _upload(rng, _bomb(50, 50, 9))[: rng.randrange(200, 400)],
    }
    wrong = {
        "chunk size": chunked + rng.choice([b"xyz", b"-5", b"f" * 40, b"5 5", b"\xff"]) + b"\r\n" + body,
        "longer than its chunk": chunked + b"2\r\n" + body + b"\r\n0\r\n\r\n",
        "too many bytes in chunks": chunked + b"10000\r\n" + b" " * 65_536 + b"\r\n1\r\n \r\n0\r\n\r\n",
    }
    what = rng.choice([*cut, *wrong])
    return Malformed(what=what, data={**cut, **wrong}[what], answer_due=what in wrong)


def _edit(rng: random.Random) -> Malformed:
    """Pictures to edit that are none, or far too large once unpacked; and forms that are none."""
    image = _bomb(50, 50, 50 * 151)
    noise = rng.randbytes(rng.randrange(500))
    pictures = {
        "picture of many pixels": _bomb(rng.randrange(5000, 60_000), rng.randrange(5000, 60_000), 10**6),
        "picture with little data": _bomb(1000, 1000, 100),
        "picture with too much data": _bomb(1, 100_000_000, 10**6),
        "text that unpacks to 50 MB": _png(_chunk(b"zTXt", b"a\0\0" + _zeros(50_000_000))),
        "truncated picture": image[: rng.randrange(1, len(image) - 40)],
        "rubbish as a picture": rng.choice(SIGNATURES) + noise,
    }
    fields = [{"strength": "2"}, {"strength": "nan"}, {"strength": "1e-400"}, {"n": "0"}, {"seed": "1" * 5000}]
    fields += [{"prompt": ""}, {"steps": "x"}, {"output_format": "exe"}, {"size": "1x"}, {"response_format": "file"}]
    forms = {
        "wrong field": _upload(rng, image, **rng.choice(fields)),
        "too many fields": _upload(rng, image, **{f"f{i}": "1" for i in range(1100)}),
        "no boundary": _post(EDITS, b"--x\r\n" + noise, "multipart/form-data"),
        "another boundary": _upload(rng, image).replace(b"boundary=", b"boundary=z"),
        "no form": _post(EDITS, noise, "application/json"),
        "parts of rubbish": _post(EDITS, b"--x\r\n" + noise + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    }
    what = rng.choice([*pictures, *forms])
    return Malformed(what=what, data=forms[what] if what in forms else _upload(rng, pictures[what]))


SIGNATURES = (
    b"",
    b"GIF89a",
    b"\xff\xd8\xff\xe0",
    b"RIFF\xff\xff\xff\xffWEBPVP8L",
    b"RIFF\x00\x00\x00\x00WEBPVP8X",
    b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n",
    b"%!PS-Adobe",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"II*\x00",
    b"BM",
    b"8BPS",
)


def _upload(rng: random.Random, image: bytes, **fields: str) -> bytes:
    """A form with a prompt and a picture."""
    edge = f"{rng.getrandbits(64):016x}"
    disposition = f'--{edge}\r\nContent-Disposition: form-data; name="'
    parts = [f'{disposition}{name}"\r\n\r\n{value}\r\n' for name, value in ({"prompt": "a cat"} | fields).items()]
    picture = f'{disposition}image"; filename="../../a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = "".join([*parts, picture]).encode() + image + f"\r\n--{edge}--\r\n".encode()
    return _post(EDITS, body, f"multipart/form-data; boundary={edge}")


@lru_cache
def _zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(*chunks: bytes, width: int = 8, height: int = 8) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, _chunk(b"IEND", b"")))


def _bomb(width: int, height: int, data: int) -> bytes:
    """A PNG that says how large it is, with that many zeros packed inside."""
    return _png(_chunk(b"IDAT", _zeros(data)), width=width, height=height)


def frame(payload: bytes, *, first: int = 0x81, masked: bool = True, length: int | None = None) -> bytes:
    """first: FIN, reserved bits and opcode; the mask is zeros, so the payload is what it was; length: a lie."""
    length, mask = len(payload) if length is None else length, 0x80 if masked else 0
    size = (
        bytes([mask | length])
        if length < 126
        else bytes([mask | 126]) + length.to_bytes(2, "big")
        if length < 65_536
        else bytes([mask | 127]) + length.to_bytes(8, "big")
    )
    return bytes([first]) + size + (bytes(4) if masked else b"") + payload


def _message(rng: random.Random) -> Malformed:
    what, body = _json_fault(rng, TYPING)
    return Malformed(what=f"{what} in a message", data=frame(body), stream=True)


def _frames(rng: random.Random) -> Malformed:
    text, noise = json.dumps(TYPING).encode(), rng.randbytes(rng.randrange(1, 200))
    faults = {
        "no picture": frame(noise, first=0x82) + frame(json.dumps({**TYPING, "strength": 0.5}).encode()),
        "too long a picture": frame(bytes(270_000), first=0x82),
        "too long a message": frame(b" " * (LONGEST_MESSAGE + rng.randrange(1, 1000))),
        "frame of 2^62 bytes": frame(b"", length=2**62),
        "frame of 2^63 bytes": frame(b"", length=2**63),
        "unknown opcode": frame(text, first=0x80 | rng.choice([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])),
        "reserved bits": frame(text, first=0x81 | rng.choice([0x10, 0x20, 0x30, 0x40])),
        "frame without a mask": frame(text, masked=False),
        "ping in pieces": frame(b"a", first=0x09),
        "long ping": frame(b"a" * 126, first=0x89),
        "continuation of nothing": frame(text, first=0x80),
        "message inside a message": frame(text[:9], first=0x01) + frame(text),
        "pieces that are too much": frame(b" " * 40_000, first=0x01) + frame(b" " * 40_000, first=0x80),
        "close of one byte": frame(b"\x03", first=0x88),
        "close with a wrong code": frame(struct.pack(">H", rng.choice([0, 999, 1005, 1006, 65_535])), first=0x88),
        "close with broken UTF-8": frame(b"\x03\xe8" + rng.choice(BROKEN), first=0x88),
        "deflate bomb": frame(_deflated(20_000_000), first=0xC1),
        "deflate rubbish": frame(b"\xff" * 50, first=0xC1),
        "random bytes": noise,
        "truncated frame": frame(text)[: rng.randrange(1, len(text))],
    }
    what = rng.choice(list(faults))
    hangs_up = what in ("random bytes", "truncated frame")
    return Malformed(what=what, data=faults[what], stream=True, answer_due=not hangs_up)


@lru_cache
def _deflated(count: int) -> bytes:
    """So many spaces as permessage-deflate sends them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (packer.compress(b" " * count) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


KINDS = (_json_body, _headers, _cut_off, _edit, _message, _frames)
