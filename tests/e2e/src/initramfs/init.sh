#!/bin/busybox sh
# The first process of the guest. Announces userspace, runs the command that the host left in
# /turnstile/exec (its output goes to the second serial port, between two marks, the latter with its
# exit status), or gives a shell on the console; then powers the machine off.
/bin/busybox mkdir -p /proc /sys /dev /tmp /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=linux
cd /root

echo "@MARKER@"

if [ -e /turnstile/exec ]; then
    exec 3>/dev/ttyS1
    stty -F /dev/ttyS1 raw -echo
    printf '\000@BEGINS@\n' >&3
    sh /turnstile/exec >&3 2>&1 </dev/null
    printf '\000@TRAILER@%d\n' $? >&3
    # The last close waits until the port has sent everything.
    exec 3>&-
else
    stty -F /dev/console sane 2>/dev/null
    echo "A shell in the confidential guest. 'exit' or 'poweroff -f' ends it, Ctrl-A X kills it."
    setsid cttyhack sh
fi
poweroff -f
