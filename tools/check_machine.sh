#!/bin/sh
# Says in one line, by its Debian package, what this machine lacks to build dmabuf.
# Plain sh, because Python itself may be what is missing.
# usage: check_machine.sh PYTHON

python=${1:-python3}

missing() {
    echo "dmabuf: $1: apt-get install $2" >&2
    exit 1
}

# A python3.N has packages of its own; any other name stands for the distribution's default.
case ${python##*/} in
    python3.[0-9]*) package=${python##*/} ;;
    *) package=python3 ;;
esac

[ "$(uname -s)" = Linux ] || { echo "dmabuf: needs Linux, this is $(uname -s)" >&2; exit 1; }
command -v "$python" >/dev/null 2>&1 || missing "no $python found" "$package"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || missing "$python does not run" "$package"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    missing "$python is Python $version and 3.11 is the oldest that will do (name another with PYTHON=)" "python3.11"
"$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || missing "$python has no venv module" "$package-venv"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || missing "no Python.h for $python" "$package-dev"
# The compiler that setuptools will call: $CC, else the one that built this Python.
cc=${CC:-$("$python" -c 'import sysconfig; print((sysconfig.get_config_var("CC") or "cc").split()[0])')}
command -v "${cc%% *}" >/dev/null 2>&1 || missing "no C compiler (${cc%% *})" "gcc libc6-dev"
echo '#include <stdio.h>' | ${cc} -E - >/dev/null 2>&1 || missing "no C library headers" "libc6-dev"
