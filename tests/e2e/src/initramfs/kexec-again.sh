#!/bin/busybox sh
# Starts the kernel that runs anew, with the root file system as it is now and the same command
# line, to which this script's arguments are added.
cd / && find bin init root turnstile | cpio -o -H newc >/tmp/initrd 2>/dev/null &&
    exec kexec /turnstile/vmlinuz /tmp/initrd "$(cat /proc/cmdline) $*"
