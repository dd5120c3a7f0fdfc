"""Turn what skopeo says when it fails into one line, with the kind of the error and how long to wait. Pure.

skopeo tells its errors as text only: a chain of causes, of which the end says what a person can act on. That end is
the message. FAULTS is the one place where its words decide: what kind of error it is, and when a retry makes sense.
The texts are those of containers/image, docker/distribution and Go's net and crypto/x509 packages.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from holdfast.errors import HoldfastError, NotFound, Throttled, TryAgain, UnfitHost, Unreachable, WrongState

REFUSED = 60.0  # seconds: nothing changes before, unless somebody does something
UNFIT = 300.0  # seconds: the image has to be pushed again
LONGEST = 240  # characters of a message
CRASH = re.compile(r"^(?:panic|fatal error|SIG[A-Z]+): .*", re.MULTILINE)  # of Go; all its stacks follow
FATAL = re.compile(r'level=fatal msg=("(?:[^"\\]|\\.)*"|\S+)')
REQUEST = re.compile(r'(?:Get|Head|Put|Post|Patch) \\?"')  # a link that is an address, at times with a key in it


@dataclass(frozen=True, slots=True)
class Fault:
    """What fails, as far as a caller must know. pattern: of skopeo's text, in any case. hint: what would be right.

    words: what is said where skopeo was given up and has said nothing.
    """

    kind: type[HoldfastError]
    wait: float
    pattern: str
    hint: str = ""
    words: str = ""


BUSY = Fault(Throttled, REFUSED, r"too ?many ?requests", "429", words="too many requests")
SILENT = Fault(Unreachable, 0.0, r"timeout|deadline exceeded", words="the registry does not answer")
_CODE = r"(?:status(?: ?code)?(?: from registry)?:?|fetching blob:?|error parsing http) ?"

FAULTS = (
    BUSY,
    Fault(UnfitHost, REFUSED, r"x509: |certificate is not trusted|self.signed certificate",
          "expected its authority in /etc/containers/certs.d/HOST:PORT/ca.crt, and this host's clock to be right"),
    Fault(UnfitHost, REFUSED, r"server gave http response to https client|first record does not look like a tls",
          "expected TLS, or insecure = true for the registry in registries.conf"),
    Fault(Unreachable, 0.0, r"no such host|server misbehaving|temporary failure|connection refused|no route to host"
          r"|is unreachable"),
    SILENT,
    Fault(WrongState, UNFIT, r"source image rejected|is rejected by policy", "policy.json does not allow it"),
    Fault(UnfitHost, REFUSED, r"trust policy|policy\.json|is blocked in|registries\.conf|loading registries"
          r"|auth\.json|credentials|getting username and password"),
    Fault(UnfitHost, REFUSED, r"no space left on device", "see 'holdfast system df'"),
    Fault(WrongState, UNFIT, r"invalid reference format|corrupted blob|digest d\w+ not match|bytes in blob, got"),
    Fault(NotFound, REFUSED, rf"(?:blob|manifest|name).unknown|repository name not known|{_CODE}404|404 \(not found\)"
          r"|404 not found|(?:fetching|reading) blob[^\n]*404", "404: the registry does not have it"),
    Fault(UnfitHost, REFUSED, rf"invalid username/password|unauthorized|authentication required|{_CODE}401",
          "401: `skopeo login`, or authfile in [images] of agent.toml"),
    Fault(UnfitHost, REFUSED, rf"denied: |is denied|insufficient_scope|{_CODE}403|403 \(forbidden", "403"),
    Fault(TryAgain, 0.0, rf"{_CODE}5\d\d|(?<!\d)5\d\d \("),
    Fault(TryAgain, 0.0, r"unexpected eof|connection reset|broken pipe|server sent goaway|use of closed|(: |^)eof\b"),
    Fault(TryAgain, REFUSED, r"invalid character '<'|text/html|<!doctype|<html", "is there a proxy in between?"),
    Fault(TryAgain, REFUSED, rf"stopped after \d+ redirects|{_CODE}4\d\d"),
    Fault(TryAgain, 0.0, r"^skopeo ended with"),
    Fault(TryAgain, REFUSED / 2, ""),
)  # fmt: skip


class SkopeoError(Exception):
    """What skopeo said. fault: what it is, where that is known without its words."""

    def __init__(self, said: str, fault: Fault | None = None) -> None:
        super().__init__(said)
        self.fault = fault


def failure(kind: type[HoldfastError], message: str, wait: float = 0.0) -> HoldfastError:
    """Make an error that is worth a retry, but not before wait seconds have passed."""
    error = kind(message)
    error.retry, error.wait = True, wait
    return error


def explain(error: SkopeoError, operation: str, reference: str, noise: tuple[str, ...] = ()) -> HoldfastError:
    """Make the error for what skopeo wrote. operation: a verb; reference: as the caller wrote it.

    noise: what is part of the text whatever happens, such as names, and must not be taken for a cause.
    """
    said = message_of(str(error))
    mirrors = " (its mirrors failed as well)" if "Mirrors also failed" in said else ""
    said = re.sub(r"\(Mirrors also failed: .*\): ", "", said, flags=re.DOTALL)
    fault = error.fault or fault_of(said, noise)
    hint = f" ({fault.hint})" if fault.hint else ""
    return failure(fault.kind, f"{operation} {reference!r}: {last_cause(said)}{hint}{mirrors}", fault.wait)


def fault_of(said: str, noise: tuple[str, ...] = ()) -> Fault:
    """Find what skopeo's words mean."""
    for name in sorted(filter(None, noise), key=len, reverse=True):
        said = said.replace(name, "\0")
    return next(fault for fault in FAULTS if re.search(fault.pattern, said, re.IGNORECASE))


def message_of(text: str) -> str:
    """Find the message of the log line with which skopeo ends; without one, all that is no line of its log."""
    found = FATAL.findall(text)
    if not found and (crash := CRASH.search(text)):
        return f"skopeo crashed, {crash[0].replace(': ', ', ')}"
    if not found:
        return re.sub(r"^time=.*(?:\n|$)", "", text, flags=re.MULTILINE).strip()
    last: str = found[-1]
    if not last.startswith('"'):
        return last
    try:
        return str(json.loads(last))
    except ValueError:  # Go escapes what JSON does not know
        return last[1:-1].replace('\\"', '"').replace("\\n", "\n")


def last_cause(text: str) -> str:
    """Cut a chain of causes to its end, on one line: the last two links say what was tried and why it failed."""
    links = [link for link in re.split(r":\s+", text.strip()) if link and not REQUEST.match(link)]
    text = (
        ": ".join(" ".join(link.split()) for link in dict.fromkeys(links[-2:])).rstrip(".")
        or "it failed without a word"
    )
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
