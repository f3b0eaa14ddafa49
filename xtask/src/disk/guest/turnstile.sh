#!/bin/bash
# Run once by turnstile.service when the system is up. Announces userspace; if the host left a command
# in fw_cfg, runs it (its output goes to the second serial port, between two marks, the latter with
# its exit status) and powers the machine off. Without a command the console's login is all there is.
echo "@MARKER@" >/dev/console

modprobe --quiet qemu_fw_cfg
left=/sys/firmware/qemu_fw_cfg/by_name/opt/turnstile/exec/raw
[ -e "$left" ] || exit 0
cat "$left" >/run/turnstile-exec

exec 3>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
printf '\000@BEGINS@\n' >&3
cd /root && HOME=/root TERM=dumb NO_COLOR=1 bash /run/turnstile-exec >&3 2>&1 </dev/null
printf '\000@TRAILER@%d\n' $? >&3
# The last close waits until the port has sent everything.
exec 3>&-
systemctl poweroff
