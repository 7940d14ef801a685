#!/usr/bin/env bash
# ROOT TMP COMMAND...: runs a command in the root as Kubernetes does with runAsUser: 10001, readOnlyRootFilesystem, no
# capabilities and no way to any, with TMP at /tmp. It was started in namespaces of its own; the command is process 1.
set -euo pipefail
root=$1 tmp=$2
shift 2
ip link set lo up # and nothing else: no download can be part of a start

# What a runtime adds to an image: /proc, /sys, some devices, 64 MiB of shared memory, the name localhost.
touch "$root/etc/hosts"
printf '127.0.0.1 localhost\n' > "$tmp.hosts"
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount --bind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount --bind "$tmp.hosts" "$root/etc/hosts"
mount -o remount,bind,ro "$root/etc/hosts"
mount --bind "$tmp" "$root/tmp"
mount -t tmpfs -o nosuid,mode=755,size=64k dev "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size=64m shm "$root/dev/shm"
mount -o remount,ro "$root/dev"

exec setpriv --no-new-privs chroot --userspec=10001:10001 --groups= "$root" "$@"
