#!/usr/bin/env bash
# Creates .venv and installs EquiAV into it, with one progress line; called by make when pyproject.toml or constraints.txt changed.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
log=.venv/install.log

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "equiav needs Python >= 3.11, found: $("$python" --version 2>&1 || echo none). Set PYTHON=/path/to/python3.11" >&2
    exit 1
}
"$python" -c 'import ensurepip' 2>/dev/null || {
    echo "This Python cannot create virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "Installing EquiAV into .venv: about 5 GB, a few minutes. Log: $log"
started=$SECONDS
show_progress() { # one line that overwrites itself on a terminal, one line per large package otherwise
    while IFS= read -r line; do
        case "$line" in
            "Collecting "*|"Installing "*|*"Downloading "*) ;;
            *) continue ;;
        esac
        if [ -t 1 ]; then printf '\r\033[K%4ds  %.90s' "$((SECONDS - started))" "$line"
        else case "$line" in "Collecting torch"*|"Installing "*) printf '%4ds  %.90s\n' "$((SECONDS - started))" "$line" ;; esac
        fi
    done
}
if ! .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[prep,k8s,smoke,search,export,dev]' 2>&1 \
        | tee "$log" | show_progress; then
    echo; tail -n 20 "$log" >&2
    echo "The installation failed; the whole log is in $log" >&2
    exit 1
fi
[ -t 1 ] && printf '\r\033[K'
echo "Installed in $((SECONDS - started)) s."
touch .venv/installed
