#!/usr/bin/env bash
# `make image`: builds the Dockerfile and trains in it as a cluster would: user 10001, read-only root, no network, /tmp.
#
# Debian's buildah does it, as root, without a daemon. The base is made here from Debian's packages, so that no registry
# of images is needed; BASE=IMAGE takes another (the Dockerfile's own: docker.io/library/python:3.11-slim-bookworm).
# What it keeps lies in EQUIAV_IMAGE_CACHE (~/.cache/equiav/image), 11 GB for each set of dependencies; remove the
# folder to begin anew.
# Status 0: all of it holds; 1: something does not; 2: this machine cannot tell.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
cache=${EQUIAV_IMAGE_CACHE:-$HOME/.cache/equiav/image}
image=localhost/equiav:check
base=${BASE:-localhost/equiav-base:bookworm}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
fail() { printf 'image: %s\n' "$*" >&2; exit 1; }
cannot() { printf 'image: %s\n' "$*" >&2; exit 2; }

missing=()
need() { [ -n "$(PATH=$PATH:/usr/sbin:/sbin type -P "$1")" ] || missing+=("$2"); }
need buildah buildah
need unshare util-linux
need setpriv util-linux
need flock util-linux
need ip iproute2
if [ -z "${BASE:-}" ]; then
    need debootstrap debootstrap
    [ -e "$keyring" ] || missing+=(debian-archive-keyring)
fi
[ ${#missing[@]} = 0 ] || cannot "missing here: apt-get install --no-install-recommends" \
    "$(printf '%s\n' "${missing[@]}" | sort -u | xargs)"
[ "$(id -u)" = 0 ] || cannot "this makes file systems and mounts: run it as root"

mkdir -p "$cache/tmp"
exec 9> "$cache/lock"
flock -n 9 || cannot "another check is using $cache"
export TMPDIR=$cache/tmp BUILDAH_ISOLATION=chroot # of layers on their way, gigabytes each

# overlay keeps what a layer adds; vfs, where kernel or file system know no overlay, everything for each layer.
driver=overlay
run_buildah() { buildah --storage-driver "$driver" --root "$cache/$driver" --runroot "$cache/$driver-run" "$@"; }
run_buildah info > "$cache/info.log" 2>&1 || driver=vfs
run_buildah info > "$cache/info.log" 2>&1 || cannot "buildah does not run here: $(tail -n 1 "$cache/info.log")"

scratch=$(mktemp -d "$cache/tmp/check.XXXXXX")
leave() {
    run_buildah rm --all > "$scratch/rm.log" 2>&1 || cat "$scratch/rm.log" >&2
    rm -rf "$scratch"
}
trap leave EXIT
trap 'exit 1' INT TERM
run_buildah rm --all > /dev/null # of a check that was killed

# The base -----------------------------------------------------------------------------------------------------------
if [ -z "${BASE:-}" ] && ! run_buildah inspect --type image "$base" > "$scratch/inspect.log" 2>&1; then
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' \
        | sed -n 's/^Debian Debian //p' | head -n 1)
    [ -n "$mirror" ] || cannot "apt knows no mirror of Debian to make a base from: set BASE=IMAGE"
    say "making a base of Debian bookworm (log: $cache/base.log)"
    made=$(run_buildah from scratch)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates --keyring="$keyring" \
        bookworm "$(run_buildah mount "$made")" "$mirror" > "$cache/base.log" 2>&1 \
        || { tail -n 5 "$cache/base.log" >&2; fail "debootstrap failed"; }
    run_buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$made"
    run_buildah run "$made" sh -c 'apt-get clean && rm -rf /var/lib/apt/lists/*'
    run_buildah commit --quiet "$made" "$base" > /dev/null
    run_buildah rm "$made" > /dev/null
fi

# The build, with pip's sources and certificates as they are on this machine -----------------------------------------
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
secrets=(--secret "id=pip.conf,src=$scratch/pip.conf")
settings=$("$python" -m pip config list 2> /dev/null || true)
setting() { sed -nE "s/^.*\.$1='(.*)'\$/\1/p" <<< "$settings" | head -n 1; } # the environment's are listed first
{
    echo "[global]"
    for name in index-url extra-index-url trusted-host proxy default-timeout; do
        value=$(setting "$name")
        [ -z "$value" ] || echo "$name = $value"
    done
    authorities=$(setting cert)
    authorities=${authorities:-/etc/ssl/certs/ca-certificates.crt}
    [ ! -e "$authorities" ] || echo "cert = /run/secrets/ca.crt"
} > "$scratch/pip.conf"
[ ! -e "$authorities" ] || secrets+=(--secret "id=ca.crt,src=$authorities")

say "building over $base with the $driver driver (log: $cache/build.log)"
run_buildah bud --layers --build-arg BASE="$base" --build-arg VERSION=check "${secrets[@]}" --tag "$image" . 2>&1 \
    | tee "$cache/build.log" | sed -unE 's/ +/ /g; s/^(\[[^]]*\] STEP [^ ]* (FROM|COPY|RUN) .{0,80}).*/      \1/p' \
    || { tail -n 15 "$cache/build.log" >&2; fail "the build failed; the whole log is in $cache/build.log"; }

# What is in it ------------------------------------------------------------------------------------------------------
config() { run_buildah inspect --type image --format "$1" "$image"; }
[ "$(config '{{.OCIv1.Config.User}}')" = 10001:10001 ] || fail "its user is not 10001:10001"
[ "$(config '{{index .OCIv1.Config.Labels "org.opencontainers.image.version"}}')" = check ] || fail "no version label"
run_buildah inspect --type image "$image" > "$scratch/inspect.log"
! grep -E 'PIP_|pip\.conf' "$scratch/inspect.log" || fail "pip's settings are in it"

container=$(run_buildah from --pull-never "$image")
root=$(run_buildah mount "$container")
size() { du --summarize --block-size=1M "$1" | cut -f 1; }
say "built: $(size "$root") MiB, $(size "$root/opt/equiav") of them in /opt/equiav"
# The build backend passes over a package that .dockerignore keeps from it.
for package in $("$python" -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])'); do
    compgen -G "$root/opt/equiav/lib/python3*/site-packages/$package/__init__.py" > "$scratch/found" \
        || fail "the package $package is not in it: does .dockerignore let it in?"
done
# Compilers and linkers by name, with or without a target before and a version behind it; then what installing leaves.
find "$root" -xdev ! -type d -regextype posix-extended -regex \
    '.*/([a-z0-9_]+-linux-gnu-)?(gcc|g\+\+|cc|c\+\+|c[89]9|cpp|clang(\+\+)?|tcc|ld|as|make|rustc|go)(-[0-9.]+)?' \
    -printf '/%P\n' > "$scratch/found"
find "$root" -xdev -printf '/%P\n' | grep -E '/\.cache/|/pip\.conf$|^/(source|project)(/|$)|^/run/secrets/' \
    >> "$scratch/found" || true
find "$root/opt" -name '*.whl' -o -path '*/site-packages/pip' >> "$scratch/found"
[ ! -s "$scratch/found" ] || { head "$scratch/found" >&2; fail "this does not belong in it"; }

# Training in it -----------------------------------------------------------------------------------------------------
mapfile -t environment < <(config '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | grep .)
mapfile -t default < <(config '{{range .OCIv1.Config.Cmd}}{{println .}}{{end}}' | grep .)
directory=$(config '{{.OCIv1.Config.WorkingDir}}')
install -d -m 1777 "$scratch/tmp"
inside() { # one thread, as in the tests: on a busy machine two wait for each other ten times as long as they compute
    unshare --mount --pid --net --ipc --uts --fork --kill-child bash "$here/enter.sh" "$root" "$scratch/tmp" \
        /usr/bin/env -i -C "$directory" "${environment[@]}" OMP_NUM_THREADS=1 "$@"
}
attempt() {
    local begun=$SECONDS
    inside "$@" > "$scratch/out.log" 2>&1 || { tail -n 15 "$scratch/out.log" >&2; fail "in the image: $* failed"; }
    say "$(printf '%.90s' "$*") ($((SECONDS - begun)) s)"
}
attempt "${default[@]}"
grep -q 'usage: equiav' "$scratch/out.log" || fail "its command shows no help"
attempt python - < "$here/inside.py"
sed 's/^/       /' "$scratch/out.log"
attempt equiav pack synthetic:64 --to clips --frames 4 --short_side 64
attempt equiav pretrain --config smoke --stream.url /tmp/clips --stream.cache cache --out run \
    --train.steps 10 --train.warmup_steps 2
[ "$(wc -l < "$scratch/tmp/run/metrics.jsonl")" = 10 ] || fail "not ten steps in metrics.jsonl"
[ -s "$scratch/tmp/run/model/model.safetensors" ] || fail "no model"
[ "$(stat -c %u:%g "$scratch/tmp/run/metrics.jsonl")" = 10001:10001 ] || fail "it did not run as 10001:10001"
# Once more with a real S3 server (rclone) between packing and training, evaluation and report.
attempt equiav smoke --clips 64 --held_out 16 --train.steps 10 --train.warmup_steps 2 --out smoke
[ -s "$scratch/tmp/smoke/report.html" ] || fail "no report"
say "image: all holds"
