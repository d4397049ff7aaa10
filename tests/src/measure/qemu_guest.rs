//! What a user would pick instead: the same guest under QEMU/KVM in the test host, virtio-net on a TAP that is bridged to the host's own
//! driver for the NIC, or virtio-blk on the host's own driver for the disk.
//!
//! QEMU, its libraries and its firmware are those of the machine that runs the bench, carried in the shared folder.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::assets::Assets;
use crate::bench::guest::{self, Guest};
use crate::demo::DemoError;
use crate::demo::place::Place;
use crate::peer::guest_address;
use crate::probe::client::Run;
use crate::probe::wire::PORT_NAME;

/// Firmware that a machine with `-kernel` and no display needs.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];
/// Where Debian has it.
const FIRMWARE_DIRS: [&str; 3] = ["/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu"];
/// Longest time to get a device or the program ready.
const SET_UP: Duration = Duration::from_secs(120);

/// Copies QEMU and what it needs to `to`.
///
/// # Errors
/// A file cannot be copied.
pub(super) fn carry(to: &Path, assets: &Assets) -> Result<(), DemoError> {
    std::fs::create_dir_all(to).map_err(|e| DemoError::file("make", to, e))?;
    let copy = |from: &Path, name: &str| {
        std::fs::copy(from, to.join(name)).map(drop).map_err(|e| DemoError::file("copy", from, e))
    };
    copy(assets.qemu(), "qemu")?;
    let ldd = Command::new("ldd")
        .arg(assets.qemu())
        .output()
        .map_err(|e| DemoError::file("ask for libraries", assets.qemu(), e))?;
    for word in String::from_utf8_lossy(&ldd.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
        let path = Path::new(word);
        copy(path, &path.file_name().unwrap_or_default().to_string_lossy())?;
    }
    for name in FIRMWARE {
        if let Some(path) = FIRMWARE_DIRS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file()) {
            copy(&path, name)?;
        }
    }
    Ok(())
}

/// QEMU's guest; ends with [`Self::stop`].
pub(super) struct QemuGuest {
    name: String,
    run: Run,
}

/// Gives NIC `nic` to the host's driver, bridges it, starts QEMU with guest `name`, which has a virtio NIC.
///
/// # Errors
/// The guest does not come up.
pub(super) fn start_with_nic(
    place: &mut Place,
    (name, nic): (&str, usize),
    vhost: &str,
) -> Result<QemuGuest, DemoError> {
    let bridge = format!(
        "modprobe vhost_net 2>/dev/null; device=$NIC{nic}; unvfio $device
         brctl addbr br-{name}
         has_net() {{ [ -n \"$(netof $device)\" ]; }}; await 20 has_net; nic=$(netof $device); brctl addif br-{name} $nic; \
         ip link set $nic up; ip link set br-{name} up; await 10 grep -q 1 /sys/class/net/$nic/carrier"
    );
    place.run(&bridge, SET_UP)?;
    let devices = format!(
        "-netdev tap,id=n,ifname={name},script=no,downscript=no,vhost={vhost} \
         -device virtio-net-pci,netdev=n,romfile=,mac=52:54:00:78:00:{nic:02x}"
    );
    let guest = launch(place, name, &devices, &format!("ip4={}/24", guest_address(nic, 0)))?;
    let join = format!("await 10 test -e /sys/class/net/{name}; brctl addif br-{name} {name}; ip link set {name} up");
    place.run(&join, Duration::from_secs(20))?;
    guest.await_up(place)
}

/// Starts QEMU with guest `name`, whose virtio disk is the block device `node` of the host: past its cache, by `io_uring`, in a thread of
/// its own.
///
/// # Errors
/// The guest does not come up.
pub(super) fn start_with_disk(place: &mut Place, name: &str, node: &str) -> Result<QemuGuest, DemoError> {
    let disk = format!(
        "-object iothread,id=io -blockdev driver=host_device,filename={node},node-name=d,cache.direct=on,aio=io_uring \
         -device virtio-blk-pci,drive=d,iothread=io"
    );
    launch(place, name, &disk, "")?.await_up(place)
}

/// Starts QEMU with guest `name`, these `devices` and these `words` for its kernel.
fn launch(place: &mut Place, name: &str, devices: &str, words: &str) -> Result<QemuGuest, DemoError> {
    place.expect("[ -e /tmp/qemu ] || fetch /share/qemu /tmp/qemu", SET_UP)?;
    let work = place.work();
    let run = place.start(&format!(
        "cd /tmp/qemu && exec ./ld-linux-x86-64.so.2 --library-path . ./qemu -L . -accel kvm -machine q35 -cpu host -smp 1 -m 256M \
         -nodefaults -display none -no-reboot -serial file:/share/{name}.log {devices} \
         -chardev socket,id=x,path={},server=on,wait=off -device virtio-serial-pci \
         -device virtserialport,chardev=x,name={PORT_NAME} \
         -kernel /share/bzImage -initrd {work}/guest.cpio -append 'console=ttyS0 quiet panic=-1 {words}' 2>&1",
        guest::socket(name),
    ))?;
    Ok(QemuGuest { name: name.into(), run })
}

impl QemuGuest {
    /// It, once it answers.
    fn await_up(mut self, place: &mut Place) -> Result<Self, DemoError> {
        match place.in_guest(&self.name, "true", Duration::from_secs(60)) {
            Ok(_) => Ok(self),
            Err(e) => {
                let _ = self.run.poll(Duration::from_millis(100));
                Err(DemoError::Umbra {
                    what: format!("QEMU's guest did not come up ({e})"),
                    said: self.run.output().stdout.clone(),
                })
            }
        }
    }

    /// Ends it.
    pub(super) fn stop(mut self, place: &mut Place) -> Result<(), DemoError> {
        place.run(&Guest::command(&self.name, "poweroff -f", Duration::from_secs(2)), Duration::from_secs(10)).ok();
        if self.run.poll(Duration::from_secs(10)).map_err(DemoError::Exec)? {
            return Ok(());
        }
        // Dropping the run kills QEMU.
        Ok(())
    }
}
