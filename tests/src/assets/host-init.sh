#!/bin/busybox sh
# PID 1 of the test host: file systems, modules, the shared folder, then the exec server for as long as it lives.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin:/share HOME=/root TERM=linux
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /root /share /run/umbra-bench
mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm; mount -t tmpfs tmp /tmp; mount -t tmpfs run /run
mkdir -p /run/umbra-bench
ln -sf /proc/self/fd /dev/fd
# The kernel's boot messages are a sign of life for who waits; from here on errors alone are of interest.
dmesg -n 4
echo "test host: loading modules"
modprobe -a 9pnet_virtio 9p vfio_iommu_type1 vfio_pci tun bridge
if grep -q svm /proc/cpuinfo; then modprobe kvm_amd; else modprobe kvm_intel; fi
. /etc/umbra/bench.sh
mount_folder share || echo "test host: no shared folder"
# What driver VMs are restored from is kept for other test hosts.
mkdir -p /snapshots && mount_folder snapshots
# Programs run from memory: the shared folder is slow to page from.
for program in umbra umbra-agent umbra-probe; do [ -f /share/$program ] && fetch /share/$program /bin/$program; done
ip link set lo up; hostname testhost
# Whom the processes of VMs are handed to: a user of its own each.
echo 'umbra-vm:x:987:987::/nonexistent:/bin/false' >>/etc/passwd
echo 'umbra-vm:100000:65536' >/etc/subuid; cp /etc/subuid /etc/subgid
: > /etc/umbra/places.sh
i=0; j=0; k=0
for word in $(cat /proc/cmdline); do
  case $word in
    umbra.nic=*)  echo "export NIC$i=$(bdf_at ${word#*=})" >> /etc/umbra/places.sh; i=$((i+1));;
    umbra.snd=*)  echo "export SND$j=$(bdf_at ${word#*=})" >> /etc/umbra/places.sh; j=$((j+1));;
    umbra.disk=*) echo "export DISK$k=$(bdf_at ${word#*=})" >> /etc/umbra/places.sh; k=$((k+1));;
    umbra.root)   root=1;;
    umbra.shell)  shell=1;;
  esac
done
cat /etc/umbra/places.sh
if [ -e /dev/kvm ]; then umbra-probe hold-vcpu & else echo "test host: no /dev/kvm"; fi
if [ -n "$root" ]; then
  # The system on that disk takes over, with its own init; what the bench needs goes along.
  modprobe -a virtio_blk ext4
  disk=/dev/$(basename "$(dirname "$(grep -lx umbra-root /sys/block/*/serial)")")
  mkdir /debian && mount -t ext4 "$disk" /debian || { echo "test host: no root file system"; poweroff -f; }
  mkdir -p /debian/etc/umbra /debian/share /debian/snapshots
  cp /etc/umbra/bench.sh /etc/umbra/places.sh /debian/etc/umbra/
  # At a reboot it has all that already.
  if [ ! -e /debian/usr/local/bin/usleep ]; then
    cp -r /lib/modules /debian/lib/ && chroot /debian depmod 2>/dev/null
    cp /bin/umbra-probe /bin/busybox /debian/usr/local/bin/ && ln -s busybox /debian/usr/local/bin/usleep
  fi
  for folder in proc sys dev run share snapshots; do mount --move /$folder /debian/$folder; done
  exec switch_root /debian /sbin/init
fi
if [ -n "$shell" ]; then
  umbra-probe serve & 
  export ENV=/etc/umbra/bench.sh; cd /share
  setsid sh -c 'exec sh -l </dev/hvc0 >/dev/hvc0 2>&1'
  poweroff -f
fi
while :; do umbra-probe serve; echo "test host: the exec server ended, starting it again"; sleep 1; done
