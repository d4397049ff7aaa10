# Unpacks the packages in $2 to the folder $1, as debootstrap(8) does it.
set -e
mkdir -p "$1/usr/bin" "$1/usr/sbin" "$1/usr/lib" "$1/usr/lib64"
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$1/$folder"; done
for package in "$2"/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$1"; done
