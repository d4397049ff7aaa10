#!/bin/busybox sh
# PID 1 of a guest in the bench: modules by modalias, an address, the exec server.
# Command line: ip4=ADDRESS/LEN; umbra.patience=N, by which time limits are multiplied.
# A file /script is run instead of the server, then the guest powers off.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=linux
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /root; mount -t devpts pts /dev/pts; mount -t tmpfs tmp /tmp
ln -sf /proc/self/fd /dev/fd
for word in $(cat /proc/cmdline); do
  case $word in ip4=*) ip4=${word#ip4=};; umbra.patience=*) export UMBRA_PATIENCE=${word#*=};; esac
done
modprobe -a $(cat /sys/bus/pci/devices/*/modalias /sys/bus/virtio/devices/*/modalias | sort -u) 2>/dev/null
ip link set lo up; hostname guest
if [ -n "$ip4" ]; then
  await 5 sh -c 'ls /sys/class/net/e*'
  for dev in /sys/class/net/e*; do [ -e $dev ] && nic=$(basename $dev); done
  if [ -n "$nic" ]; then
    ip link set "$nic" up
    if [ "$ip4" = dhcp ]; then udhcpc -q -n -t 20 -i "$nic" -s /bin/dhcp-bound; else ip addr add "$ip4" dev "$nic"; fi
  fi
fi
echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s"
if [ -f /script ]; then
  sh /script; echo "guest: status $?"
  poweroff -f
fi
if ls /dev/vport* >/dev/null 2>&1; then
  # The second port, where there is one: for a script that goes on while others run.
  (while :; do umbra-probe serve umbra.bench.long; sleep 1; done </dev/null >/dev/null 2>&1 &)
  while :; do umbra-probe serve; sleep 1; done
fi
setsid sh -c 'exec sh -l </dev/ttyS0 >/dev/ttyS0 2>&1'
poweroff -f
