#!/bin/busybox sh
# The guest's first process: mounts the host's files read-only under a throw-away overlay, runs /job/run.sh there as root, powers off.
# Lines that begin with @@ are for the host, which reads the console.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1
echo "@@INIT"
# For the questions about huge pages, while memory is in one piece still.
[ -w /proc/sys/vm/nr_hugepages ] && echo 4 > /proc/sys/vm/nr_hugepages
for m in $($B cat /mods/order 2>/dev/null); do $B insmod /mods/$m || echo "insmod $m failed"; done
for a in $($B cat /proc/cmdline); do case $a in job.uml=*) uml=${a#job.uml=};; esac; done
O=trans=virtio,version=9p2000.L,msize=512000
if [ -n "$uml" ]; then   # user-mode Linux: hostfs
  $B mount -t hostfs -o ro,/ none /host || { echo "@@FAIL mount of the host's files"; $B poweroff -f; }
  $B mount -t hostfs -o "$uml" none /job || { echo "@@FAIL mount of the job"; $B poweroff -f; }
else
  $B mount -t 9p -o $O,ro,cache=loose host /host || { echo "@@FAIL mount of the host's files"; $B poweroff -f; }
  $B mount -t 9p -o $O,cache=none job /job || { echo "@@FAIL mount of the job"; $B poweroff -f; }
fi
$B mount -t tmpfs -o size=75% tmpfs /ov; $B mkdir /ov/up /ov/wk
$B mount -t overlay -o lowerdir=/host,upperdir=/ov/up,workdir=/ov/wk overlay /root || { echo "@@FAIL overlay"; $B poweroff -f; }
R=/root
$B mount -t proc proc $R/proc
$B mount -t sysfs sys $R/sys
$B mount -t devtmpfs dev $R/dev
$B mkdir -p $R/dev/pts $R/dev/shm
$B mount -t devpts devpts $R/dev/pts
$B mount -t tmpfs shm $R/dev/shm
$B mount -t tmpfs run $R/run
$B mount -t debugfs debugfs $R/sys/kernel/debug
$B mount -t configfs configfs $R/sys/kernel/config 2>/dev/null
$B ip link set lo up 2>/dev/null
[ -e $R/dev/fd ] || $B ln -s /proc/self/fd $R/dev/fd
[ -e $R/dev/stdin ] || {
  $B ln -s /proc/self/fd/0 $R/dev/stdin; $B ln -s /proc/self/fd/1 $R/dev/stdout; $B ln -s /proc/self/fd/2 $R/dev/stderr
}
$B mkdir -p $R/run/job; $B mount --bind /job $R/run/job
for m in $($B cat /job/modules); do
  $B chroot $R /sbin/modprobe -q -d "$($B cat /job/moddir)" $m 2>/dev/null
done
echo "@@CMD"
$B chroot $R /bin/sh /run/job/run.sh </dev/null >/job/stdout 2>/job/stderr
echo $? > /job/rc
$B dmesg > /job/dmesg 2>/dev/null
echo "@@DONE"
$B poweroff -f
