#!/bin/bash
# Installs the Debian packages that holdfast needs. Does nothing, quickly, if nothing is missing.
#
#   packaging/setup.sh              the packages that the agent needs
#   packaging/setup.sh --develop    the same, and .venv with the packages for tests and checks (`make setup`)
#   packaging/setup.sh --list       print these packages, install nothing
#   packaging/setup.sh PACKAGE…     install these packages only
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

packages=(
    crun runc conmon                          # run and watch containers
    nftables libnftables1 iproute2            # published ports, and tools to inspect networks
    golang-github-containers-common           # the default seccomp profile
    catatonit                                 # `init = true`
    git ca-certificates                       # the source of the state
    skopeo buildah                            # images: from registries, and from Dockerfiles
    busybox-static                            # the image of the demo and of the tests
    e2fsprogs mount                           # examples/plugin: volumes in ext4 images
    python3 python3-venv
)

install() {
    local missing=() package
    for package in "$@"; do
        # The file list exists if the package is installed; asking dpkg-query would be slower.
        compgen -G "/var/lib/dpkg/info/${package}.list" >/dev/null \
            || compgen -G "/var/lib/dpkg/info/${package}:*.list" >/dev/null || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    if ! command -v apt-get >/dev/null; then
        echo "setup: these Debian packages are missing, and this is not Debian: ${missing[*]}" >&2
        return 1
    fi
    if ((EUID != 0)); then
        echo "setup: not root; install what is missing with: sudo apt-get install ${missing[*]}" >&2
        return 1
    fi
    echo "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update </dev/null
    apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 install --yes --no-install-recommends "${missing[@]}" </dev/null >/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: no python3 is 3.11 or newer and has venv (Debian 12: apt-get install python3-venv)" >&2
    return 1
}

# Debian starts a service when it is installed, unless this file forbids it. The bench starts what it measures.
forbid_starting() {
    local policy=/usr/sbin/policy-rc.d
    [[ -e $policy ]] && return
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
}

case ${1:-} in
    --list) printf '%s\n' "${packages[@]}"; exit ;;
    --develop | "") install "${packages[@]}" ;;
    -*) echo "setup: no such option: $1 (--develop, --list)" >&2; exit 64 ;;
    *) ((EUID != 0)) || forbid_starting; install "$@"; exit ;;
esac
[[ ${1:-} == --develop ]] || exit 0
stamp=.venv/.setup
if [[ -x .venv/bin/holdfast && $stamp -nt pyproject.toml ]] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi
echo "setup: making .venv"
.venv/bin/python -c '' 2>/dev/null || "$(find_python)" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --editable '.[dev]' </dev/null
.venv/bin/python -m compileall -q agent plugins # commands start faster, also where Python may not write its cache
touch "$stamp"
