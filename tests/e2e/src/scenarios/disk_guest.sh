# Run by the guest of the disk scenarios: uses each device, and reports what it found, one
# "NAME VALUE" a line. @PORT@ is the host's echo server, @MIB@ the size of the file, @NET_MIB@ how
# much of it goes over the network.
set -eu
data=/var/tmp/data
copy=/var/tmp/copy
drop() { sync; echo 3 >/proc/sys/vm/drop_caches; }
sum() { sha256sum | cut -d' ' -f1; }

echo "release $(uname -r)"
echo "root $(findmnt -no SOURCE /)"
# A variable that the stub sets: four bytes of attributes, then UTF-16.
stub=/sys/firmware/efi/efivars/StubInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f
echo "stub $(cat $stub | tail -c +5 | tr -d '\000')"

head -c @MIB@M /dev/urandom | tee $data | sum >/run/sum
echo "written $(cat /run/sum)"
drop
echo "read-back $(sum <$data)"
# Past the page cache: the device sees the program's own buffers, of up to 1 MiB.
dd if=$data of=$copy bs=1M iflag=direct oflag=direct status=none
drop
echo "copied $(sum <$copy)"
disk=$(lsblk -no PKNAME "$(findmnt -no SOURCE /)")
read -r _ _ in_sectors _ _ _ out_sectors _ </sys/block/$disk/stat
echo "disk-read-mib $((in_sectors / 2048))"
echo "disk-written-mib $((out_sectors / 2048))"

echo "address $(ip -4 -o addr show scope global | tr -s ' ' | cut -d' ' -f4)"
exec 4<>/dev/tcp/10.0.2.2/@PORT@
head -c @NET_MIB@M $data | tee >(sum >/run/sent) >&4 &
echo "echoed $(head -c @NET_MIB@M <&4 | sum)"
wait
# The sum of what was sent is written by a process that nobody waits for.
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -s /run/sent ] && break; sleep 1; done
echo "sent $(cat /run/sent)"
exec 4>&-

echo "rng $(cat /sys/class/misc/hw_random/rng_current)"
head -c 64K /dev/hwrng >/run/first
head -c 64K /dev/hwrng >/run/second
# Randomness does not compress.
echo "rng-entropy-bytes $(gzip -c /run/first | wc -c)"
cmp -s /run/first /run/second && echo "rng-repeats yes" || echo "rng-repeats no"

# The most ever in use, and those in use now: 7.3.4 leaves the former at 0 whatever is in use.
cd /sys/kernel/debug/swiotlb
echo "bounced-slots $(($(cat io_tlb_used_hiwater) + $(cat io_tlb_used)))"
dmesg | grep -e 'Memory Encryption Features' -e 'SNP running' || true
dmesg --level=err,crit,alert,emerg || true
