"""Ask a registry with HEAD what a tag leads to: unlike the GET of a manifest, that counts against no rate limit.

skopeo does not offer HEAD, so this speaks the registry's HTTP API itself (OCI distribution spec 1.1, "Checking if
content exists"), with logins of auth.json (containers-auth.json(5)), mirrors of registries.conf(5), certificates of
containers-certs.d(5) and proxies of the environment. Whatever does not go well is answered with "": `pull` then asks
skopeo, which explains it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    ProxyHandler,
    Request,
    build_opener,
    getproxies_environment,
)

from holdfast.errors import TryAgain
from holdfast.grammar.images import DIGEST, Reference
from holdfast.images.formats.layout import INDEXES, MANIFEST
from holdfast.images.registry.skopeo import entry_of, is_loopback, prefix_of

ACCEPT = ", ".join((*INDEXES, MANIFEST, "application/vnd.docker.distribution.manifest.v2+json"))
DOCKER_HUB, HUB_HOST = "docker.io", "registry-1.docker.io"
CERTIFICATES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
REFUSALS = (429, 503)  # statuses whose Retry-After says when to come again
PATIENCE = 20.0  # seconds that one request may take
LARGEST_ANSWER = 1 << 20
LEAST_WAIT, LONGEST_WAIT = 60.0, 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where to ask for an image: the registry itself, or a mirror. insecure: without TLS, or by any certificate."""

    host: str
    path: str
    insecure: bool


@dataclass(slots=True)
class RateLimits:
    """Until when registries must not be asked, by host (seconds since the epoch)."""

    until: dict[str, float] = field(default_factory=dict)

    def left(self, host: str, now: float) -> float:
        """Count the seconds until a registry may be asked again."""
        return max(self.until.get(host, 0.0) - now, 0.0)

    def heed(self, host: str, status: int, headers: Mapping[str, str], now: float) -> None:
        """Keep what an answer says about when to ask again."""
        if wait := waiting(status, headers, now):
            self.until[host] = now + wait


def waiting(status: int, headers: Mapping[str, str], now: float) -> float:
    """Read how many seconds to wait after an answer; 0: none. Pure.

    Retry-After (RFC 9110) of a 429 or 503; else the reset of RateLimit headers (Docker Hub's `0;w=21600`, the IETF
    draft's `RateLimit-Reset` and `r=0;t=30`) once nothing remains.
    """
    if status in REFUSALS and (said := headers.get("retry-after", "").strip()):
        if said.isdecimal():
            return min(max(float(said), 1.0), LONGEST_WAIT)
        with suppress(ValueError, TypeError):
            return min(max(parsedate_to_datetime(said).timestamp() - now, 1.0), LONGEST_WAIT)
    remaining, reset = headers.get("ratelimit-remaining", ""), headers.get("ratelimit-reset", "")
    if (match := re.search(r"\br=(\d+)(?:.*?\bt=(\d+))?", headers.get("ratelimit", ""))) is not None:
        remaining, reset = match[1], match[2] or ""
    count, _, window = remaining.partition(";w=")
    if count.strip() == "0":
        text = next((each.strip() for each in (reset, window) if each.strip().isdecimal()), "")
        return min(max(float(text or LEAST_WAIT), 1.0), LONGEST_WAIT)
    return LEAST_WAIT if status == 429 else 0.0


def places(reference: Reference, documents: Iterable[Mapping[str, Any]], *, loopback: bool) -> list[Place]:
    """List where to ask, mirrors first; nowhere if registries.conf blocks it or has an unknown kind of rewrite. Pure.

    loopback: whether the registry is on this host, and so may be without TLS where registries.conf does not name it.
    """
    entry = entry_of(reference.repository, documents)
    prefix = prefix_of(entry)
    if entry.get("blocked") or prefix.startswith("*."):
        return []
    rest = reference.repository.removeprefix(prefix) if entry else ""
    mirrors = [] if entry.get("mirror-by-digest-only") else entry.get("mirror") or ()
    usable = (each for each in mirrors if each.get("pull-from-mirror", "all") != "digest-only")
    found = [_place(f"{each['location']}{rest}", insecure=bool(each.get("insecure"))) for each in usable]
    location = f"{entry.get('location') or prefix}{rest}" if entry else reference.repository
    return [*found, _place(location, insecure=bool(entry.get("insecure")) if entry else loopback)]


def _place(name: str, *, insecure: bool) -> Place:
    host, _, path = name.partition("/")
    return Place(HUB_HOST if host == DOCKER_HUB else host, path, insecure)


def ask(reference: Reference, where: Iterable[Place], authfile: Path | None, limits: RateLimits) -> str:
    """Ask for the digest of a reference; "" where there is no plain answer.

    Raises TryAgain, with the time to wait, where a registry that might know asks to wait.
    """
    busy: TryAgain | None = None
    for place in where:
        if left := limits.left(place.host, time.time()):
            busy = busy or _busy(place.host, left)
            continue
        try:
            status, headers = _head(place, reference, login_of(place, authfile))
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            continue
        limits.heed(place.host, status, headers, time.time())
        digest = headers.get("docker-content-digest", "")
        if status == 200 and DIGEST.fullmatch(digest):
            return digest
        if status in REFUSALS and (left := limits.left(place.host, time.time())):
            busy = busy or _busy(place.host, left)
    if busy:
        raise busy
    return ""


def _busy(host: str, wait: float) -> TryAgain:
    error = TryAgain(f"ask '{host}': it asks to wait {wait:.0f} s (429, 503, or its limit is used up)")
    error.wait = wait
    return error


def _head(place: Place, reference: Reference, login: str) -> tuple[int, dict[str, str]]:
    """Ask, with a token if one is wanted; without TLS only where that is allowed and TLS is not spoken."""
    path = f"/v2/{place.path}/manifests/{reference.digest or reference.tag}"
    headers = {"Accept": ACCEPT, "User-Agent": "holdfast"}
    scheme = "https"
    try:
        status, said, _ = _request("HEAD", f"{scheme}://{place.host}{path}", headers, insecure=place.insecure)
    except (OSError, http.client.HTTPException):
        if not place.insecure:
            raise
        scheme = "http"
        status, said, _ = _request("HEAD", f"{scheme}://{place.host}{path}", headers, insecure=True)
    if status == 401:
        granted, status, said = _permit(said.get("www-authenticate", ""), login, insecure=place.insecure)
        if not granted:
            return status, said
        headers["Authorization"] = granted
        status, said, _ = _request("HEAD", f"{scheme}://{place.host}{path}", headers, insecure=place.insecure)
    return status, said


def _permit(challenge: str, login: str, *, insecure: bool) -> tuple[str, int, dict[str, str]]:
    """Get the Authorization that a challenge asks for (RFC 9110; distribution's tokens); "" where the server that
    gives out tokens asks to wait, in its answer."""
    scheme, _, rest = challenge.partition(" ")
    if scheme.lower() == "basic" and login:
        return f"Basic {login}", 200, {}
    if scheme.lower() != "bearer":
        raise ValueError(f"a login of kind {scheme!r}")
    given = {key.lower(): value for key, value in re.findall(r'(\w+)="([^"]*)"', rest)}
    realm = urlsplit(given["realm"])
    if realm.scheme not in (("https", "http") if insecure else ("https",)):
        raise ValueError(f"a token from {realm.scheme}")
    query = urlencode({key: given[key] for key in ("service", "scope") if key in given})
    address = realm._replace(query="&".join(filter(None, (realm.query, query)))).geturl()
    headers = {"User-Agent": "holdfast"} | ({"Authorization": f"Basic {login}"} if login else {})
    status, said, body = _request("GET", address, headers, insecure=insecure)
    if status in REFUSALS:
        return "", status, said
    if status != 200:
        raise ValueError(f"no token ({status})")
    answer = json.loads(body)
    return f"Bearer {answer.get('token') or answer['access_token']}", status, said


def _request(
    method: str, address: str, headers: dict[str, str], *, insecure: bool
) -> tuple[int, dict[str, str], bytes]:
    """Send a request, by the proxy of the environment; this host itself is never behind one, as with skopeo."""
    place = urlsplit(address)
    proxies = {} if is_loopback(place.hostname or "") else getproxies_environment()
    kind, _, rest = proxies.get(place.scheme, "").rpartition("://")
    if rest and kind not in ("", "http"):
        raise ValueError(f"a proxy of kind {kind!r}")
    context = _context(place.netloc, insecure=insecure)
    opener = build_opener(ProxyHandler(proxies), HTTPSHandler(context=context), _NoRedirects)
    try:
        answer = opener.open(Request(address, headers=headers, method=method), timeout=PATIENCE)
    except HTTPError as error:
        answer = error
    with answer:
        said = {key.lower(): value for key, value in answer.headers.items()}
        return answer.status, said, answer.read(LARGEST_ANSWER)


class _NoRedirects(HTTPRedirectHandler):
    """Leaves it to skopeo to go where a registry points to."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _context(host: str, *, insecure: bool) -> ssl.SSLContext:
    """Set up TLS: whom to trust, and with which certificate to log in."""
    context = ssl.create_default_context()
    own = Path(os.environ.get("HOME") or "/root", ".config/containers/certs.d")
    folder = next((each / host for each in (own, *CERTIFICATES) if (each / host).is_dir()), None)
    if folder is not None:
        for path in sorted(folder.glob("*.crt")):
            context.load_verify_locations(path)
        for path in sorted(folder.glob("*.cert")):
            context.load_cert_chain(path, path.with_suffix(".key"))
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def login_of(place: Place, authfile: Path | None) -> str:
    """Find `user:password` in base64 for a place in auth.json; "". Raises ValueError where a helper keeps it."""
    host = DOCKER_HUB if place.host == HUB_HOST else place.host
    steps = [host, *place.path.split("/")]
    keys = ["/".join(steps[:end]) for end in range(len(steps), 0, -1)]
    keys += ["https://index.docker.io/v1/", "index.docker.io"] if host == DOCKER_HUB else [f"https://{host}"]
    for document in _logins(authfile):
        if host in (document.get("credHelpers") or {}) or document.get("credsStore"):
            raise ValueError("a credential helper has the login")
        for key in keys:
            if found := ((document.get("auths") or {}).get(key) or {}).get("auth"):
                base64.b64decode(found, validate=True)
                return str(found)
    return ""


def _logins(authfile: Path | None) -> Iterator[dict[str, Any]]:
    home, run = Path(os.environ.get("HOME") or "/root"), os.environ.get("XDG_RUNTIME_DIR")
    own = Path(run) / "containers/auth.json" if run else Path(f"/run/containers/{os.getuid()}/auth.json")
    usual = (own, home / ".config/containers/auth.json", home / ".docker/config.json")
    for path in (authfile,) if authfile else usual:
        with suppress(OSError):
            yield json.loads(path.read_text())
