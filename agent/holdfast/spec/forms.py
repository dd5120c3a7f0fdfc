"""The short forms of the state language: one string → its parts or its canonical spelling.

Every reader takes what was written and returns plain values, or raises ValueError with a message that quotes it and
says what would be right. Called by the tables in `authored`.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import signal
from typing import Any

from holdfast.tables import LONGEST_NUMBER, shown, size
from holdfast.toml import suggestion

Parts = dict[str, Any]

MOST_CPUS = 8192  # NR_CPUS of Linux
MOST_PIDS = 4_194_304  # PID_MAX_LIMIT of Linux
LARGEST_ID = 2**32 - 2  # of users and groups; the next one means nobody in chown(2)
LONGEST_LOGIN = 256  # LOGIN_NAME_MAX of Linux
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")

# fmt: off
CAPABILITIES = frozenset({
    "CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER",
    "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
    "CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE",
    "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
})
"""capabilities(7), as of Linux 6.x, in the spelling of the OCI runtime spec."""

ULIMITS = frozenset({
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss",
    "rtprio", "rttime", "sigpending", "stack",
})
"""getrlimit(2), without RLIMIT_ and in lower case."""
# fmt: on


def name(value: str) -> str:
    """The name of an app, container, network, volume or config."""
    if not NAME.fullmatch(value):
        raise ValueError(
            f"'{value}' is not a name (expected a-z, 0-9, '_', '.', '-', at most 63, first a letter or digit)"
        )
    return value


def reference(value: str) -> str:
    """A name, or `app/name` for what another app defines."""
    app, slash, inner = value.rpartition("/")
    if slash:
        name(app)
    name(inner)
    return value


def words(value: Any) -> Any:
    """A command: a list stays, a string is split as a shell would and run by none."""
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as error:
        raise ValueError(f"'{value}': {str(error).lower()} (expected words as a shell reads them)") from None


def pairs(value: Any) -> Any:
    """`["K=V", …]` as a table; a table stays."""
    if not isinstance(value, list):
        return value
    table: dict[str, str] = {}
    for item in value:
        if not isinstance(item, str) or "=" not in item:
            raise ValueError(f"{shown(item)}: no value is given (expected NAME=VALUE)")
        key, _, text = item.partition("=")
        if key in table:
            raise ValueError(f"'{item}': {key} is given twice")
        table[key] = text
    return table


def variable(value: str) -> str:
    """The name of an environment variable."""
    if not value or "=" in value or "\0" in value:
        raise ValueError(f"'{value}' is not the name of a variable (expected no '=' and at least one character)")
    return value


def image(value: str) -> str:
    """A Docker-style reference, `[REGISTRY/]PATH[:TAG][@DIGEST]`, or an archive of the host, `oci:/path[:REF]`.

    `images.[APP/]NAME` is what the state files build. Sources: the distribution project's reference grammar;
    containers-transports(5).
    """
    if (ours := built(value)) is not None:
        reference(ours)
        return value
    transport, colon, path = value.partition(":")
    if colon and transport in ARCHIVES:
        if not path.startswith("/"):
            raise ValueError(f"'{value}': the path is not absolute (expected {transport}:/path[:REF])")
        return f"{transport}:{absolute(path)}"
    if colon and transport in _OTHER_TRANSPORTS and path.startswith(("/", ".")):
        raise ValueError(
            f"'{value}': the transport '{transport}' is not known (expected {_REFERENCE_FORM}, or oci:, oci-archive: "
            "or docker-archive: and an absolute path)"
        )
    if not _REFERENCE.fullmatch(value) or len(value) > 512:
        raise ValueError(f"'{value}' is not an image reference ({_better_image(value)})")
    return value


def _better_image(value: str) -> str:
    """What would be right instead of something that is no reference."""
    scheme, separator, rest = value.partition("://")
    if separator and _REFERENCE.fullmatch(rest):
        return f"leave '{scheme}://' out"
    name, separator, digest = value.partition("@")
    if separator and _REFERENCE.fullmatch(name):
        return f"'{digest}' is no digest: expected sha256: and 64 hexadecimal digits"
    host, separator, path = value.partition("/")
    lower = f"{host}/{path.lower()}" if separator and re.search("[.:]|^localhost$", host) else value.lower()
    if lower != value and _REFERENCE.fullmatch(lower):
        return f"expected '{lower}': a path is in lower case"
    return f"expected {_REFERENCE_FORM}, the path in lower case"


def not_of_a_registry(image: str) -> str:
    """What an image is that no registry has, in words; "" if one may have it."""
    if image.partition(":")[0] in ARCHIVES:
        return "an archive of the host"
    return "" if built(image) is None else "an image that is built here"


def built(image: str) -> str | None:
    """The `[app/]name` of an image that the state files build; None for any other.

    Without a tag or a digest: an image of a registry whose name begins with `images.` is written with its tag.
    """
    rest = image.removeprefix("images.")
    return rest if rest != image and not re.search("[:@]|/.*/", rest) else None


def tag(value: str) -> str:
    """A further name of an image that is built: `[REGISTRY/]PATH[:TAG]`."""
    if "@" in value or not _REFERENCE.fullmatch(value) or built(value) is not None or len(value) > 512:
        raise ValueError(f"'{value}' is not a name for an image (expected [REGISTRY/]PATH[:TAG], in lower case)")
    return value


def platform(value: str) -> str:
    """`linux/ARCHITECTURE[/VARIANT]`, as images name them (GOARCH, GOARM)."""
    if not re.fullmatch(r"linux/[a-z0-9]+(/v[0-9]+)?", value):
        raise ValueError(f"'{value}' is not a platform (expected linux/ARCHITECTURE[/VARIANT], as linux/amd64)")
    return value


def archive_path(image: str) -> str | None:
    """The path of the host that an image is read from; None for an image of a registry."""
    transport, _, path = image.partition(":")
    return path.partition(":")[0] if transport in ARCHIVES else None


def is_version(image: str) -> bool:
    """Whether the tag of a reference begins like a version."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return re.match(r"v?\d", tag) is not None


ARCHIVES = ("oci", "oci-archive", "docker-archive")
_OTHER_TRANSPORTS = ("docker", "docker-daemon", "containers-storage", "dir", "ostree", "sif")
_REFERENCE_FORM = "[REGISTRY/]PATH[:TAG][@DIGEST]"
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::\d+)?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:{_REGISTRY}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::[\w][\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", re.ASCII
)


def port(value: str) -> Parts:
    """`[HOST_IP:]HOST:CONTAINER[/PROTOCOL]`; HOST and CONTAINER may be ranges of one length."""
    form = "expected [HOST_IP:]HOST:CONTAINER[/PROTOCOL]"
    text, _, protocol = value.partition("/")
    match text.rsplit(":", 2):
        case [published, target]:
            host_ip = None
        case [host_ip, published, target]:
            host_ip = ipv4(host_ip, f"'{value}': host address", form)
        case _:
            raise ValueError(f"'{value}': the host port is missing ({form})")
    if protocol not in ("", "tcp", "udp"):
        raise ValueError(f"'{value}': protocol '{protocol}' is not known (expected tcp or udp)")
    host = ports(published, f"'{value}': host port", form)
    inner = ports(target, f"'{value}': container port", form)
    if len(host) != len(inner):
        raise ValueError(f"'{value}': {len(host)} host ports lead to {len(inner)} container ports (expected as many)")
    return {"host_ip": host_ip, "published": published, "target": target, "protocol": protocol or "tcp"}


def ports(value: str | int, what: str, form: str = "expected a port or a range as 8000-8010") -> range:
    """One port or a range of them; what and form go into the error."""
    first, dash, last = str(value).partition("-")
    last = last if dash else first
    if not (number(first) and number(last)):
        raise ValueError(f"{what} is not a number ({form})")
    found = range(int(first), int(last) + 1)
    if not found:
        raise ValueError(f"{what} range ends before it begins ({form})")
    if found.start < 1 or found.stop > 65536:
        raise ValueError(f"{what} is out of range (expected 1 to 65535)")
    return found


def number(text: str) -> bool:
    """Whether a text is a number in decimal digits, of a length that anything counts."""
    return text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER


def ipv4(value: str, what: str, form: str) -> str:
    try:
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise ValueError(f"{what} is not an IPv4 address ({form})") from None


def address(value: str) -> str:
    """An IPv4 address in canonical form."""
    return ipv4(value, f"'{value}'", "expected four numbers as 10.90.1.2")


def subnet(value: str) -> str:
    """An IPv4 network in canonical form; /30 is the smallest that holds a gateway and a container."""
    try:
        network = ipaddress.IPv4Network(value)
    except ValueError as error:
        host_bits = "host bits" in str(error)
        near = f"expected {ipaddress.IPv4Network(value, strict=False)}" if host_bits else "expected as 10.90.1.0/24"
        raise ValueError(f"'{value}' is not an IPv4 network ({near})") from None
    if network.prefixlen > 30:
        raise ValueError(f"'{value}' has no room for a gateway and a container (expected /30 or larger)")
    if network.prefixlen < 8 or any(network.overlaps(other) for other in _NOBODYS):
        raise ValueError(f"'{value}' is not for a network of containers (expected a private range as 10.90.1.0/24)")
    return str(network)


_NOBODYS = tuple(map(ipaddress.IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
"""This host, loopback, link-local (the cloud's metadata), multicast and reserved: RFC 6890."""


def mac(value: str) -> str:
    """A unicast MAC address in lower case."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        raise ValueError(f"'{value}' is not a MAC address (expected six hexadecimal pairs as 02:42:ac:11:00:02)")
    if int(value[:2], 16) & 1:
        raise ValueError(f"'{value}' is a multicast address (expected an even first pair, as 02)")
    return value.lower()


def hostname(value: str) -> str:
    """A host name: RFC 1123 labels, at most 64 characters in all (HOST_NAME_MAX of Linux)."""
    if len(value) > 64 or not all(re.fullmatch(rf"{_LABEL}", part) and len(part) <= 63 for part in value.split(".")):
        raise ValueError(f"'{value}' is not a host name (expected letters, digits, '-' and '.', at most 64)")
    return value


def alias(value: str) -> str:
    """A further name in a network: one word of a hosts file, which neighbours read."""
    if not re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?", value) or value == "localhost":
        raise ValueError(f"'{value}' is not a name for a network (expected letters, digits, '-', '_' and '.')")
    return value


def volume(value: str) -> Parts:
    """`SOURCE:TARGET[:ro|rw]`."""
    form = "expected SOURCE:TARGET[:ro]"
    match value.split(":"):
        case [source, target] if source and target:
            option = "rw"
        case [source, target, option] if source and target:
            pass
        case _:
            raise ValueError(f"'{value}' is not a volume ({form})")
    if option not in ("ro", "rw"):
        raise ValueError(f"'{value}': option '{option}' is not known (expected ro or rw)")
    try:
        return {"source": source, "target": absolute(target), "read_only": option == "ro"}
    except ValueError as error:
        raise ValueError(f"'{value}': target {error}") from None


def volumes_from(value: Any) -> Any:
    """`["db", "db:ro"]` as a table; a table stays."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        return value
    found: dict[str, str] = {}
    for each in value:
        container, _, access = each.partition(":")
        if access not in ("", "rw", "ro"):
            raise ValueError(f"'{each}': option '{access}' is not known (expected CONTAINER[:ro])")
        if container in found:
            raise ValueError(f"'{container}' is named twice")
        found[container] = access or "rw"
    return found


def tmpfs(value: str) -> Parts:
    """`TARGET[:size=…,mode=…,uid=…,gid=…,ro|rw]`, as Compose has it."""
    target, _, options = value.partition(":")
    parts: Parts = {"target": absolute(target)}
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        match key:
            case "size":
                parts["size"] = size(text)
            case "mode":
                parts["mode"] = mode(text)
            case "uid" | "gid" if text.isascii() and text.isdigit():
                _check_id(text)
                parts[key] = int(text)
            case "ro" | "rw" if not text:
                parts["read_only"] = key == "ro"
            case _:
                raise ValueError(f"'{value}': option '{option}' is not known (expected size, mode, uid, gid, ro, rw)")
    return parts


def absolute(value: str) -> str:
    """An absolute path, normalised."""
    if not value.startswith("/"):
        raise ValueError(f"'{value}' is not an absolute path (expected it to begin with /)")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError(f"{value!r} holds control characters (expected a path that can be printed)")
    return "/" + "/".join(_collapsed(value))


def _collapsed(path: str) -> list[str]:
    """The steps of a path without `.` and `..`; above the top there is the top."""
    steps: list[str] = []
    for step in path.split("/"):
        if step == "..":
            steps = steps[:-1]
        elif step not in ("", "."):
            steps.append(step)
    return steps


def mode(value: Any) -> Any:
    """Permission bits, as an octal string: a bare number would read as decimal."""
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{1,4}", value):
        return int(value.removeprefix("0o"), 8)
    raise ValueError(f'{shown(value)} is not a mode (expected an octal string as "0644")')


def device(value: str) -> Parts:
    """`SOURCE[:TARGET][:PERMISSIONS]`."""
    source, *rest = value.split(":")
    permissions = rest.pop() if rest and not rest[-1].startswith("/") else "rwm"
    if len(rest) > 1 or not source.startswith("/"):
        raise ValueError(f"'{value}' is not a device (expected /dev/NAME[:/dev/NAME[:rwm]])")
    try:
        return {"source": source, "target": rest[0] if rest else source, "permissions": access(permissions)}
    except ValueError as error:
        raise ValueError(f"'{value}': {error}") from None


def access(value: str) -> str:
    """What may be done with a device: some of r (read), w (write) and m (mknod)."""
    if not value or set(value) - set("rwm") or len(set(value)) != len(value):
        raise ValueError(f"permissions '{value}' are not known (expected some of r, w and m)")
    return value


def capability(value: str) -> str:
    """A capability as the OCI runtime spec spells it, CAP_X, or ALL."""
    found = value.upper()
    if found == "ALL":
        return found
    found = found if found.startswith("CAP_") else f"CAP_{found}"
    if found not in CAPABILITIES:
        known = {capability.removeprefix("CAP_") for capability in CAPABILITIES}
        near = suggestion(found.removeprefix("CAP_"), known) or " (expected a name of capabilities(7), or ALL)"
        raise ValueError(f"'{value}' is not a capability{near}")
    return found


def stop_signal(value: Any) -> Any:
    """A signal's name: `TERM`, `SIGTERM` and 15 are all SIGTERM; SIGRTMIN+N and SIGRTMAX-N stay as they are."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    text = str(value).upper()
    if number(text) and int(text) in {known.value for known in signal.Signals}:
        return signal.Signals(int(text)).name
    text = text if text.startswith("SIG") else f"SIG{text}"
    try:
        signal_number(text)
    except ValueError:
        near = suggestion(text, signal.Signals.__members__) or " (expected a name as SIGTERM, or its number)"
        raise ValueError(f"'{value}' is not a signal{near}") from None
    return text


def signal_number(text: str) -> int:
    """The number of a signal as `Container.stop_signal` names it; raise ValueError if there is none such."""
    match = re.fullmatch(r"(\w+?)(?:([+-])(\d{1,2}))?", text, re.ASCII)
    base = signal.Signals.__members__.get(match[1]) if match else None
    if match is None or base is None:
        raise ValueError(f"'{text}' is not a signal")
    number = base + int(f"{match[2] or '+'}{match[3] or 0}")
    if match[2] and not signal.SIGRTMIN <= min(base, number) <= max(base, number) <= signal.SIGRTMAX:
        raise ValueError(f"'{text}' is not a real-time signal (expected SIGRTMIN+N or SIGRTMAX-N)")
    return number


def on_change(value: str) -> str:
    """What follows when a mounted file changes: restart, none, or a signal's name."""
    if value in ("restart", "none"):
        return value
    try:
        return str(stop_signal(value))
    except ValueError:
        raise ValueError(f"'{value}' is not known (expected 'restart', 'none' or a signal as 'SIGHUP')") from None


def restart(value: str) -> Parts:
    """`no | on-failure[:N] | always | unless-stopped`."""
    policy, colon, attempts = value.partition(":")
    if policy not in ("no", "on-failure", "always", "unless-stopped"):
        known = "expected no, on-failure[:N], always or unless-stopped"
        raise ValueError(f"'{value}' is not known ({known})")
    if not colon:
        return {"policy": policy}
    if policy != "on-failure" or not number(attempts) or int(attempts) < 1:
        raise ValueError(
            f"'{value}': a number of attempts goes with on-failure only (expected on-failure:N, N from 1)"
        )
    return {"policy": policy, "max_attempts": int(attempts)}


def cpuset(value: str) -> str:
    """CPUs as cpuset(7) lists them: `0-3,6`."""
    for part in value.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (number(first) and number(last) and int(first) <= int(last)):
            raise ValueError(f"'{value}' is not a list of CPUs (expected as 0-3,6)")
        if int(last) >= MOST_CPUS:
            raise ValueError(f"'{part}' is out of range (expected CPUs from 0 to {MOST_CPUS - 1})")
    return value


def user(value: str) -> str:
    """`USER[:GROUP]`, names or numbers."""
    if not re.fullmatch(r"[^\s:/]+(:[^\s:/]+)?", value):
        raise ValueError(f"'{value}' is not a user (expected USER[:GROUP], names or numbers)")
    for part in value.split(":"):
        _check_id(part)
    return value


def group(value: str) -> str:
    """A group, name or number."""
    if not re.fullmatch(r"[^\s:/]+", value):
        raise ValueError(f"'{value}' is not a group (expected a name or a number)")
    _check_id(value)
    return value


def _check_id(text: str) -> None:
    """Refuse what can be neither the number nor the name of a user or group."""
    if text.isascii() and text.isdigit() and (not number(text) or int(text) > LARGEST_ID):
        raise ValueError(f"'{text}' is out of range (expected a number up to {LARGEST_ID})")
    if len(text) > LONGEST_LOGIN:
        raise ValueError(f"a name of {len(text)} characters is too long (expected at most {LONGEST_LOGIN})")


def ulimit(value: str) -> str:
    """A resource that getrlimit(2) limits."""
    if value not in ULIMITS:
        near = suggestion(value, ULIMITS) or f" (expected one of {', '.join(sorted(ULIMITS))})"
        raise ValueError(f"'{value}' is not a limit{near}")
    return value


def sysctl(value: str) -> str:
    """A kernel setting that is the container's own (namespaced); others would change the host."""
    # Runtimes make a path below /proc/sys of it, some of them with '/' and '.' exchanged.
    plain = re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+", value)
    if plain and (value.startswith(("net.", "fs.mqueue.")) or value in _IPC_SYSCTLS):
        return value
    near = suggestion(value, _IPC_SYSCTLS) or f" (expected net.*, fs.mqueue.* or one of {', '.join(_IPC_SYSCTLS)})"
    raise ValueError(f"'{value}' is not a setting that a container has of its own{near}")


_IPC_SYSCTLS = tuple(
    f"kernel.{inner}"
    for inner in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced", "domainname")
)


def several(value: Any) -> Any:
    """A string as a list of one; a list stays."""
    return [value] if isinstance(value, str) else value


def named(value: Any) -> Any:
    """A list of names as a table of them, each without settings."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(item, str) for item in value):
        raise ValueError("expected a list of names, or a table of them")
    twice = next((item for index, item in enumerate(value) if item in value[:index]), None)
    if twice is not None:
        raise ValueError(f"'{twice}' is named twice")
    return {item: {} for item in value}


def dependencies(value: Any) -> Any:
    """`["a", "b"]` as a table of what each must have reached: started."""
    table = named(value)
    if isinstance(value, list):
        return dict.fromkeys(table, "started")
    for other, condition in table.items() if isinstance(table, dict) else ():
        if isinstance(condition, dict):
            right = f'{other} = "started" or "completed"'
            raise ValueError(f"'{other}' leads to a table (expected {right})")  # noqa: TRY004 - pydantic's terms
    return table


def reached(value: str) -> str:
    """What a container waits for another to have reached."""
    if value == "healthy":
        raise ValueError("'healthy' is not supported yet (expected 'started' or 'completed')")
    if value not in ("started", "completed"):
        meant = {"service_started": "started", "service_completed_successfully": "completed"}.get(value)
        right = f"write '{meant}'" if meant else "expected 'started' or 'completed'"
        raise ValueError(f"'{value}' is not known ({right})")
    return value


def both(value: Any) -> Any:
    """One number as the soft and the hard limit."""
    return {"soft": value, "hard": value} if isinstance(value, int) and not isinstance(value, bool) else value


def unusable(address: str, subnet: ipaddress.IPv4Network) -> str:
    """Why an address can't be given to a machine of a subnet; empty if it can."""
    found = ipaddress.IPv4Address(address)
    if found not in subnet:
        return f"'{address}' is outside the subnet (expected an address of {subnet})"
    if found in (subnet.network_address, subnet.broadcast_address):
        return f"'{address}' is the subnet's own first or last address (expected one between them)"
    return ""


def swap(value: Any) -> Any:
    """A size, or -1 for no limit, which `unlimited` says too."""
    return -1 if value in ("unlimited", -1) else size(value)


def pids(value: Any) -> Any:
    """A number of processes, or -1 for no limit, which `max` says too."""
    return -1 if value == "max" else value
