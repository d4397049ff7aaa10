# Functions for scripts in the test host.
# The folder in the shared one is umbra's own, as it has to be.
: "${UMBRA_SNAPSHOT_DIR:=/snapshots/umbra}"; export UMBRA_SNAPSHOT_DIR
# bdf_at rp:10 | pci:08: the PCI function behind that root port, or in that slot of the root bus
bdf_at() {
  case $1 in
    rp:*) ls /sys/bus/pci/devices/0000:00:${1#rp:}.0/ | grep -E '^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$' | head -n 1;;
    pci:*) echo 0000:00:${1#pci:}.0;;
  esac
}
# vfio BDF: binds the function to vfio-pci
vfio() {
  local d=/sys/bus/pci/devices/$1
  [ -e "$d" ] || { echo "vfio: no device $1" >&2; return 1; }
  echo vfio-pci > $d/driver_override
  [ -e $d/driver ] && echo $1 > $d/driver/unbind
  echo $1 > /sys/bus/pci/drivers_probe
  [ "$(basename "$(readlink $d/driver)")" = vfio-pci ] || { echo "vfio: $1 is not bound" >&2; return 1; }
}
# unvfio BDF: gives the function back to its own driver
unvfio() {
  local d=/sys/bus/pci/devices/$1
  [ -e $d/driver ] && echo $1 > $d/driver/unbind
  echo > $d/driver_override
  modprobe "$(cat $d/modalias)"
  [ -e $d/driver ] || echo $1 > /sys/bus/pci/drivers_probe
}
# disk_node BDF: the block device of the controller's disk
disk_node() {
  for b in /sys/block/*; do case $(readlink -f $b) in */$1/*) echo /dev/${b##*/};; esac; done
}
# netof BDF: the function's network interface
netof() { ls /sys/bus/pci/devices/$1/net 2>/dev/null | head -n 1; }
# fetch FROM TO: copies a file, or a folder with what is in it, out of the shared folder; its time stays, by which a snapshot knows it
fetch() {
  local file
  if [ -d "$1" ]; then
    mkdir -p "$2" || return 1
    for file in "$1"/*; do fetch "$file" "$2/${file##*/}" || return 1; done
  else
    dd if="$1" of="$2" bs=256k 2>/dev/null && chmod 755 "$2" && touch -r "$1" "$2"
  fi
}
# mount_folder NAME: mounts the shared folder of that name below the root. What is read is kept while a file is open, for reading ahead:
# without (cache=none) Linux 6.12 reads at some 15 MB/s here, in pieces of whatever size, which was most of what a restore took
mount_folder() { mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=readahead "$1" "/$1"; }
# without_folders COMMAND...: runs it, from the root, while the shared folders are away: a virtio 9p file system does not outlive a sleep
# of the host
without_folders() {
  local drivers=/sys/bus/virtio/drivers/9pnet_virtio folders folder status
  cd / && umount /snapshots && umount /share || { ls -l /proc/*/cwd /proc/*/fd /proc/*/exe | grep /share; return 1; }
  folders=$(cd $drivers && echo virtio*)
  for folder in $folders; do echo $folder > $drivers/unbind; done
  "$@"; status=$?
  for folder in $folders; do echo $folder > $drivers/bind; done
  mount_folder share && mount_folder snapshots || return 1
  return $status
}
# await SECONDS COMMAND...: runs the command until it succeeds; the seconds are those of the reference machine
await() {
  local n=$(($1 * 20 * ${UMBRA_PATIENCE:-1})); shift
  while ! "$@" >/dev/null 2>&1; do n=$((n - 1)); [ $n -gt 0 ] || return 1; usleep 50000; done
}
[ -f /etc/umbra/places.sh ] && . /etc/umbra/places.sh
