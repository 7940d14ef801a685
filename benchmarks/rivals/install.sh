#!/usr/bin/env bash
# Creates .venv-rivals, where MosaicML's `streaming` and Lightning's litdata live: the former has the name of our own package.
# What .venv has (torch, simplejpeg, soundfile, webdataset) is seen from there through a .pth file, behind the rivals' own
# packages, so nothing large is installed twice.
set -euo pipefail
cd "$(dirname "$0")/../.."
log=.venv-rivals/install.log

[ -x .venv/bin/python ] || {
    echo "There is no .venv yet: make install" >&2
    exit 1
}
rm -rf .venv-rivals
.venv/bin/python -m venv .venv-rivals
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# A line of a .pth file is appended to sys.path; the .pth files found there (our editable install) are not read in turn.
site .venv > "$(site .venv-rivals)/behind.pth"
if ! .venv-rivals/bin/python -m pip install --disable-pip-version-check -c constraints.txt \
        mosaicml-streaming==0.13.0 litdata==0.2.76 > "$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "The installation failed; the whole log is in $log" >&2
    exit 1
fi
touch .venv-rivals/installed
