#!/bin/sh
# Installs MedSegFed from the folder it lies in, without internet: sudo sh install.sh [PLACE]
#
# PLACE (default /opt/medsegfed) becomes a link to PLACE-VERSION-HASH, an environment of its own; it moves only when that
# one is complete, so a running service keeps what it has until it is restarted, and the version before stays to go back to.
# PYTHON chooses the interpreter.
set -eu
umask 022 # a service runs as another user than the one who installs

place=$(realpath -m -s -- "${1:-/opt/medsegfed}") # -s: an existing PLACE is a link, and it is the link that is meant
cd -- "$(dirname -- "$0")"

fail() {
    echo "error: $1" >&2
    exit 2
}

sha256sum --check --strict --quiet SHA256SUMS ||
    fail "a file of this folder is missing or was changed (named above); nothing was installed. Copy the folder again."
wanted=$(sed -n 's/^  "python": "\(.*\)",*$/\1/p' wheelhouse.json)
version=$(sed -n 's/^  "version": "\(.*\)",*$/\1/p' wheelhouse.json)
python=${PYTHON:-python$wanted}
command -v "$python" >/dev/null || fail "$python is not here; nothing was installed. Install Python $wanted, or name it: PYTHON=/path/to/python$wanted sh install.sh"
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$found" = "$wanted" ] || fail "$python is Python $found, this folder is for $wanted; nothing was installed. Name another: PYTHON=/path/to/python$wanted sh install.sh"
if [ -e "$place" ] && [ ! -L "$place" ]; then
    fail "$place is there and is not a link that this script made; nothing was installed. Name another place: sh install.sh PLACE"
fi

target=$place-$version-$(sha256sum SHA256SUMS | cut -c 1-8)
if [ ! -e "$target/.complete" ]; then
    rm -rf -- "$target" # what an interrupted installation left
    mkdir -p -- "$(dirname -- "$target")"
    "$python" -m venv "$target" || fail "no environment could be made in $target (on Debian and Ubuntu: apt-get install python$wanted-venv)."
    # No setting of this machine (an index, a constraint) may add to what the lock names.
    PIP_CONFIG_FILE=/dev/null "$target/bin/python" -m pip --isolated --quiet --disable-pip-version-check install \
        --no-index --find-links . --no-cache-dir --require-hashes --requirement requirements.lock ||
        fail "pip refused (see above); $place is as it was."
    "$target/bin/python" -m pip --disable-pip-version-check check >/dev/null || fail "the packages do not fit each other; $place is as it was."
    cp -R files "$target/"
    touch "$target/.complete"
fi
ln -sfn -- "$target" "$place.new"
mv -T -- "$place.new" "$place" # a rename: there is no moment without it
echo "$place -> $target"
echo "Next: $place/bin/medsegfed --help"
