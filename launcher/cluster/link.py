"""One authenticated conversation between two launchers, as bytes in and bytes out; opens and reads nothing.

Each side first says a nonce. After that every line is `mac json`, where the mac is HMAC-SHA256 (RFC 2104) of who
speaks, both nonces, the number of the line and the text: a line can neither be made up, nor changed, nor repeated, nor
taken into another conversation. What is said is not secret: no line holds any.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from typing import Any, Literal

LONGEST_LINE = 1 << 20
Side = Literal["head", "node"]


class LinkError(Exception):
    """The other side does not speak as one that knows the run's token; the text says how."""


class Link:
    """Keeps the state of one conversation. `out` is what is still to be sent."""

    def __init__(self, key: bytes, side: Side) -> None:
        self._key = key
        self._side: Side = side
        self._other: Side = "node" if side == "head" else "head"
        self._nonce = secrets.token_hex(16)
        self._their_nonce = ""
        self._sent = self._received = 0
        self._partial = b""
        self._early: list[dict[str, Any]] = []
        self.authenticated = False  # a line with a good mac has come
        self.out = bytearray(json.dumps({"samestep": 1, "nonce": self._nonce}).encode() + b"\n")

    def say(self, message: dict[str, Any]) -> None:
        """Add a message to `out`, or keep it until the other side's nonce is known."""
        if not self._their_nonce:
            self._early.append(message)
            return
        text = json.dumps(message, separators=(",", ":")).encode()
        mac = self._mac(self._side, self._sent, text)
        self._sent += 1
        self.out += mac.encode() + b" " + text + b"\n"

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages that are complete with `data`.

        Raises:
            LinkError: this is not somebody who knows the token.
        """
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > LONGEST_LINE:
            raise LinkError("a line is too long")
        found = []
        for line in lines:
            if self._their_nonce:
                found.append(self._message(line))
            else:
                self._greet(line)
        return found

    def _greet(self, line: bytes) -> None:
        try:
            greeting = json.loads(line)
            version, nonce = greeting["samestep"], greeting["nonce"]
        except (ValueError, KeyError, TypeError, RecursionError):  # brackets in brackets, from anybody
            raise LinkError("the other side is not samestep") from None
        if version != 1 or not isinstance(nonce, str) or not (nonce.isascii() and 32 <= len(nonce) <= 64):
            raise LinkError("the other side is another version of samestep")
        self._their_nonce = nonce
        early, self._early = self._early, []
        for message in early:
            self.say(message)

    def _message(self, line: bytes) -> dict[str, Any]:
        mac, _, text = line.partition(b" ")
        if not hmac.compare_digest(mac, self._mac(self._other, self._received, text).encode()):
            raise LinkError("the other side has another token")
        self._received += 1
        self.authenticated = True
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise LinkError("a line is no JSON object")
        return message

    def _mac(self, speaker: Side, number: int, text: bytes) -> str:
        nonces = (self._nonce, self._their_nonce) if speaker == self._side else (self._their_nonce, self._nonce)
        head = f"{speaker} {nonces[0]} {nonces[1]} {number} ".encode()
        return hmac.new(self._key, head + text, hashlib.sha256).hexdigest()
