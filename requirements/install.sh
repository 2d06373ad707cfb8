#!/usr/bin/env bash
# Make .venv, install requirements/cpu.txt, build the native kernels.  Called by `make install`; see README.md.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0+cpu"
TORCH_INDEX="${TORCH_INDEX:-}"
LOG=out/install.log
started=$SECONDS

say() { printf '%s\n' "$*"; }
fail() { printf 'make install: %s\n' "$*" >&2; exit 1; }

# run <what> <command…>: one line, output to the log; on failure its last real lines
run() {
    local what=$1 begun=$SECONDS
    shift
    printf '  %s … ' "$what"
    if ! "$@" >>"$LOG" 2>&1; then
        printf 'failed\n'
        grep -v '^WARNING' "$LOG" | tail -n 12 >&2
        fail "$what failed; the whole log is $LOG"
    fi
    printf 'done in %d s\n' "$((SECONDS - begun))"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

find_compiler() {
    local candidate
    for candidate in ${CXX:-g++ clang++ c++}; do
        command -v "$candidate" && return
    done
    return 1
}

# A Chromium for the tests of the dashboard; without one they are skipped, so this never fails.  Only where it is
# asked for: a machine of yours gets no packages behind your back.
provide_browser() {
    local candidate
    for candidate in chromium chromium-browser google-chrome google-chrome-stable; do
        command -v "$candidate" >/dev/null && return
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
        timeout 60 sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium' >out/browser.log 2>&1
    then
        say "  Chromium for the tests of the dashboard … installed"
    else
        say "  no Chromium to be had: the tests of the dashboard will be skipped (out/browser.log)"
    fi
}

mkdir -p out
: >"$LOG"
browser=
if [ -n "${INSTALL_BROWSER:-}" ]; then
    DEBIAN_FRONTEND=noninteractive provide_browser & # beside everything else
    browser=$!
fi
python=$(find_python) || fail "Python 3.11 or 3.12 is needed; install one, or name it with PYTHON=/path/to/python3.11"
find_compiler >/dev/null || fail "no C++ compiler found; install g++ (Debian: apt-get install g++, Fedora: dnf install gcc-c++)"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; install it (Debian: apt-get install python3-venv)"

"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    fail "$python has no headers, and vLLM compiles its model; install them (Debian: apt-get install python3-dev)"
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "libnuma.so.1 is missing, and vLLM's CPU build loads it; install it (Debian: apt-get install libnuma1)"

if [ -x .venv/bin/python ]; then
    .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' ||
        fail ".venv was made by another Python; run 'make clean' first"
else
    run "a virtual environment in .venv" "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)

index=()
if ! .venv/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch") != "2.13.0+cpu")' 2>/dev/null; then
    say "  looking for $TORCH"
    probe=$(mktemp -d)
    trap 'rm -rf "$probe"' EXIT
    if ! "${pip[@]}" download --quiet --no-deps --dest "$probe" "$TORCH" >>"$LOG" 2>&1; then
        [ -n "$TORCH_INDEX" ] ||
            fail "your package index has no $TORCH; give make TORCH_INDEX=URL, the index that pytorch.org names for Linux, pip and CPU"
        say "  your package index has no CPU build of torch; taking it from $TORCH_INDEX"
        index=(--extra-index-url "$TORCH_INDEX")
    else
        index=(--find-links "$probe") # already here: do not fetch it twice
    fi
fi

# the stubs and Cairn itself are built with this setuptools, the version vLLM pins: no build environments
run "build tools" "${pip[@]}" install --quiet "setuptools==78.1.1"
run "vLLM for CPU, torch and the rest: 3 GB, one to three minutes" \
    "${pip[@]}" install --quiet --no-build-isolation ${index[@]+"${index[@]}"} -r requirements/cpu.txt
run "native kernels" .venv/bin/python -m cacheengine.build
[ -z "$browser" ] || wait "$browser" || true
touch .install-stamp
say "installed in $((SECONDS - started)) s; next: make up"
