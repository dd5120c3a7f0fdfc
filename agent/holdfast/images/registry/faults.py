"""What skopeo says when it fails → one line of ours, with a class and the time until a retry makes sense. Pure.

The texts are those of containers/image, docker/distribution and Go's net and crypto/x509 packages: chains of causes,
the last of which is what a person can do something about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from holdfast.errors import HoldfastError, NotFound, Throttled, TryAgain, UnfitHost, Unreachable, WrongState

REFUSED = 60.0  # seconds: nothing changes within them, unless somebody does something
UNFIT = 300.0  # seconds: the image has to be pushed again
LONGEST = 240  # characters of a text that we have no words for
ENDED = "skopeo ended with"  # what we say for a process that had no time to say anything
CRASH = re.compile(r"^(?:panic|fatal error|SIG[A-Z]+): .*", re.MULTILINE)  # of Go; all its stacks follow
FATAL = re.compile(r'level=fatal msg=("(?:[^"\\]|\\.)*"|\S+)')


def failure(kind: type[HoldfastError], message: str, wait: float = 0.0) -> HoldfastError:
    """An error that is worth a retry, but not before wait seconds have passed."""
    error = kind(message)
    error.retry, error.wait = True, wait
    return error


@dataclass(frozen=True, slots=True)
class _Cause:
    """pattern: of the text, in any case; groups of it go into the words."""

    pattern: str
    kind: type[HoldfastError]
    words: str | Callable[[re.Match[str]], str]
    wait: float = 0.0


def _status(match: re.Match[str]) -> str:
    return f"the registry answered {match[1]}{STATUS.get(match[1], '')}"


STATUS = {"500": " Internal Server Error", "502": " Bad Gateway", "503": " Service Unavailable", "504": " Timeout"}
_CODE = r"(?:status(?: ?code)?(?: from registry)?:?|fetching blob:?|error parsing http) ?"

CAUSES = (
    _Cause(
        r"too many requests|toomanyrequests", Throttled, "the registry says 429: too many requests from here", REFUSED
    ),
    _Cause(
        r"certificate signed by unknown authority|certificate is not trusted|self.signed certificate",
        UnfitHost,
        "the registry's certificate is signed by an authority that is not known here (expected the authority's in "
        "/etc/containers/certs.d/HOST:PORT/ca.crt)",
        REFUSED,
    ),
    _Cause(
        r"certificate has expired or is not yet valid: (current time .* is (after|before) (\S+?)T)?",
        UnfitHost,
        lambda match: (
            "the registry's certificate "
            + (f"is not valid before {match[3]}" if match[2] == "before" else f"has expired on {match[3]}")
            if match[1]
            else "the registry's certificate has expired or is not yet valid"
        )
        + " (or this host's clock is wrong)",
        REFUSED,
    ),
    _Cause(
        r"x509: (?:certificate is valid for|cannot validate certificate for|certificate is not valid for)[^\"\n]*",
        UnfitHost,
        lambda match: f"the registry's certificate is made out to another name: {match[0].removeprefix('x509: ')}",
        REFUSED,
    ),
    _Cause(r"x509: ([^\"\n]{1,200})", UnfitHost, lambda match: f"the registry's certificate: {match[1]}", REFUSED),
    _Cause(
        r"server gave http response to https client|first record does not look like a tls handshake",
        UnfitHost,
        "the registry speaks plain HTTP (expected TLS, or insecure = true for it in registries.conf)",
        REFUSED,
    ),
    _Cause(r"lookup ([^\s:]+).*no such host", Unreachable, lambda match: f"no host is called '{match[1]}' (DNS)"),
    _Cause(
        r"lookup ([^\s:]+).*(?:server misbehaving|i/o timeout|temporary failure|connection refused|unreachable)",
        Unreachable,
        lambda match: f"the name '{match[1]}' can't be looked up: no DNS server answers",
    ),
    _Cause(r"connection refused", Unreachable, "nobody listens there (connection refused)"),
    _Cause(r"no route to host|network is unreachable", Unreachable, "the registry can't be reached (no route to it)"),
    _Cause(r"tls handshake timeout|i/o timeout|deadline exceeded", Unreachable, "the registry does not answer"),
    _Cause(
        r"source image rejected: ([^\n]{1,200})|(running image [^\n]{1,200} is rejected by policy)",
        WrongState,
        lambda match: f"policy.json does not allow it: {(said := match[1] or match[2])[:1].lower()}{said[1:]}",
        UNFIT,
    ),
    _Cause(
        r"(?:loading trust policy|policy\.json)[^\n]*",
        UnfitHost,
        lambda match: f"no signature policy that can be read: {_last(match[0])}",
        REFUSED,
    ),
    _Cause(
        r"registry (\S+) is blocked in ([^\n]{1,200})",
        UnfitHost,
        lambda match: f"registries.conf blocks '{match[1]}'",
        REFUSED,
    ),
    _Cause(
        r"(?:loading registries|registries\.conf)[^\n]*",
        UnfitHost,
        lambda match: f"registries.conf can't be read: {_last(match[0])}",
        REFUSED,
    ),
    _Cause(
        r"(?s:getting username and password.{0,600})|error (?:getting|reading) credentials[^\n]*|auth\.json[^\n]*",
        UnfitHost,
        lambda match: f"no credentials: {_last(match[0])}",
        REFUSED,
    ),
    _Cause(
        r"blob unknown|blob_unknown|(?:fetching|reading) blob[^\n]*404",
        NotFound,
        "the registry lacks a part of the image (404)",
        REFUSED,
    ),
    _Cause(r"invalid reference format", WrongState, "skopeo can't read this name", UNFIT),
    _Cause(
        r"manifest unknown|name unknown|repository name not known|name_unknown|manifest_unknown"
        rf"|{_CODE}404|404 \(not found\)|404 not found",
        NotFound,
        "the registry has no such image (404)",
        REFUSED,
    ),
    _Cause(
        rf"invalid username/password|unauthorized|authentication required|{_CODE}401|401 \(unauth",
        UnfitHost,
        "the registry wants a login and has none, or a wrong one, from here (401; `skopeo login`, or authfile in "
        "[images] of agent.toml)",
        REFUSED,
    ),
    _Cause(
        rf"denied: |access to the resource is denied|insufficient_scope|{_CODE}403|403 \(forbidden",
        UnfitHost,
        "the registry forbids it to who we log in as (403)",
        REFUSED,
    ),
    _Cause(rf"{_CODE}(5\d\d)|(?<!\d)(?=5\d\d \()(5\d\d)", TryAgain, lambda match: _server_error(match)),
    _Cause(
        r"corrupted blob(?:, expecting (sha256:[0-9a-f]{12}))?|digest (?:did|does) not match",
        WrongState,
        lambda match: "its content is damaged" + (f": {match[1]}… is something else" if match[1] else ""),
        UNFIT,
    ),
    _Cause(
        r"expected (\d+) bytes in blob, got (\d+)",
        WrongState,
        lambda match: f"a blob has {match[2]} bytes, its manifest says {match[1]}",
        UNFIT,
    ),
    _Cause(
        r"unexpected eof|connection reset|broken pipe|http2: server sent goaway|use of closed|: eof\b|^eof\b",
        TryAgain,
        "the connection broke off",
    ),
    _Cause(
        r"invalid character '<'|text/html|<!doctype|<html",
        TryAgain,
        "the answer is a web page (is there a proxy, or a page to log in, in between?)",
        REFUSED,
    ),
    _Cause(r"stopped after \d+ redirects", TryAgain, "the registry redirects in circles", REFUSED),
    _Cause(
        r"no space left on device", UnfitHost, "no space left on this host's disk", REFUSED
    ),
    _Cause(rf"{_CODE}(4\d\d)", TryAgain, _status, REFUSED),
    _Cause(rf"{ENDED} (-?\d+)", TryAgain, lambda match: f"skopeo was ended from outside ({match[1]})"),
)  # fmt: skip


def _server_error(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return f"the registry answered {code}{STATUS.get(code, '')}"


def explain(text: str, operation: str, reference: str, noise: tuple[str, ...] = ()) -> HoldfastError:
    """The error for what skopeo wrote. operation: a verb; reference: as the caller wrote it.

    noise: what is part of the text whatever happens, such as names, and must not be taken for a cause.
    """
    said = message_of(text)
    mirrors = " (its mirrors failed as well)" if "Mirrors also failed" in said else ""
    said = re.sub(r"\(Mirrors also failed: .*\): ", "", said, flags=re.DOTALL)
    names = sorted(filter(None, noise), key=len, reverse=True)
    plain = said
    for number, name in enumerate(names):
        plain = plain.replace(name, f"\0{number}\0")
    for cause in CAUSES:
        if match := re.search(cause.pattern, plain, re.IGNORECASE):
            words = cause.words if isinstance(cause.words, str) else cause.words(match)
            words = re.sub(r"\0(\d+)\0", lambda found: names[int(found[1])], words)
            return failure(cause.kind, f"{operation} {reference!r}: {_line(words)}{mirrors}", cause.wait)
    words = _last(said) or "skopeo failed without a word"
    return failure(TryAgain, f"{operation} {reference!r}: {_line(words)}{mirrors}", REFUSED / 2)


def message_of(text: str) -> str:
    """The message of the log line with which skopeo ends; without one, all that is no line of its log."""
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


def _last(text: str) -> str:
    """The end of a chain of causes: the last two links say what was tried and why it failed."""
    links = [link for link in re.split(r":\s+", text.strip()) if link]
    return ": ".join(links[-2:])


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
