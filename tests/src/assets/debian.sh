# Makes a Debian root in $1 of the packages in $2, as debootstrap(8) does it: unpacked first, so that dpkg can be run in it, then installed
# by dpkg with all that packages do at that. Nothing of it starts a service here. What unpacks them (unpack.sh) comes before.
mkdir -p "$1/var/lib/dpkg/info" "$1/var/lib/dpkg/updates"
: > "$1/var/lib/dpkg/status"
for file in passwd group; do cp "$1/usr/share/base-passwd/$file.master" "$1/etc/$file"; done
ln -sf mawk "$1/usr/bin/awk"
printf '#!/bin/sh\nexit 101\n' > "$1/usr/sbin/policy-rc.d"
chmod 755 "$1/usr/sbin/policy-rc.d"
mkdir "$1/packages"
cp "$2"/*.deb "$1/packages"
env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive unshare -mpf --mount-proc="$1/proc" \
  chroot "$1" sh -e -c 'dpkg --force-all --unpack /packages/*.deb; dpkg --force-unsafe-io --force-confdef --configure -a' >&2
rm -r "$1/packages" "$1/usr/sbin/policy-rc.d"
# What nobody reads there.
rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/info "$1"/usr/share/locale "$1"/var/cache/apt "$1"/usr/lib/udev/hwdb.d
: > "$1/etc/fstab"
echo testhost > "$1/etc/hostname"
# No limit of a unit that has none of its own may depend on how slow the machine is.
mkdir "$1/etc/systemd/system.conf.d"
printf '[Manager]\nDefaultTimeoutStartSec=infinity\nDefaultTimeoutStopSec=infinity\nDefaultDeviceTimeoutSec=infinity\n' \
  > "$1/etc/systemd/system.conf.d/bench.conf"
# The exec server, in the place of a login.
cat > "$1/etc/systemd/system/umbra-bench.service" <<UNIT
[Unit]
Description=Exec server of the bench
After=multi-user.target
[Service]
ExecStart=/usr/local/bin/umbra-probe serve
Restart=always
KillMode=process
[Install]
WantedBy=multi-user.target
UNIT
ln -s ../umbra-bench.service "$1/etc/systemd/system/multi-user.target.wants/umbra-bench.service"
