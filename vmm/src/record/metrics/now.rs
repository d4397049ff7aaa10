//! The present state as metrics, put together when somebody asks.

use std::fmt::Error;
use std::fs;
use std::sync::{Arc, Mutex};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelValue, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use serde::Serialize;
use serde_json::Value;

use umbra_shadow::block::SECTOR_BYTES;

use crate::base::lock::lock;
use crate::record::status::{BlockStatus, DriverStatus, GuestStatus, StandbyStatus, Status};

/// The last status that the supervisor has shown.
#[derive(Debug)]
pub(super) struct Now(pub(super) Arc<Mutex<Option<Status>>>);

impl Collector for Now {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), Error> {
        // A copy, so that the supervisor never waits for an encoder.
        let Some(mut status) = lock(&self.0).clone() else { return Ok(()) };
        status.add_threads();
        let encoder = &mut encoder;
        let drivers = status.drivers.iter();
        let state = drivers.clone().map(|d| ([("driver", d.name.clone()), ("state", d.state.to_string())], 1_u64));
        gauge(encoder, "driver_state", "State of a driver VM's life cycle (1: the present one)", None, state)?;
        let life = drivers.clone().filter_map(|d| Some(([("driver", d.name.as_str())], d.generation?)));
        gauge(encoder, "driver_generation", "Present or last life of a driver VM", None, life)?;
        let carrier = drivers.clone().map(|d| ([("driver", d.name.as_str())], u64::from(d.carrier)));
        gauge(encoder, "driver_carrier", "Whether the NIC has its link", None, carrier)?;
        let memory = drivers.clone().filter_map(|d| Some(([("driver", d.name.as_str())], d.available_memory?)));
        gauge(encoder, "driver_available_memory", "Memory available in a driver VM", Some(&Unit::Bytes), memory)?;
        let waiting = drivers.clone().filter_map(|d| Some((d, d.standby.as_ref()?)));
        let of = |driver: &DriverStatus, standby: &StandbyStatus| {
            let kind = if standby.device.is_some() { "spare" } else { "standby" };
            [("driver", driver.name.clone()), ("kind", kind.to_owned())]
        };
        let state = waiting.clone().map(|(driver, standby)| {
            let [driver, kind] = of(driver, standby);
            ([driver, kind, ("state", standby.state.to_string())], 1_u64)
        });
        gauge(
            encoder,
            "driver_standby_state",
            "State of what waits for a driver VM's failure (1: the present one)",
            None,
            state,
        )?;
        let age = waiting.filter_map(|(driver, standby)| Some((of(driver, standby), standby.age_s?)));
        let help = "Since the process that waits for a driver VM's failure was started";
        gauge(encoder, "driver_standby_age", help, Some(&Unit::Seconds), age)?;
        let guests = status.guests.iter();
        let state = guests.clone().map(|g| ([("guest", g.name.clone()), ("state", g.state.to_string())], 1_u64));
        gauge(encoder, "guest_state", "State of a guest (1: the present one)", None, state)?;
        let uptime = guests.clone().map(|g| ([("guest", g.name.as_str())], g.uptime_s));
        gauge(encoder, "guest_uptime", "Since the guest's VM was started", Some(&Unit::Seconds), uptime)?;
        let dropped = guests.clone().flat_map(|guest| {
            let split = guest.nets.iter().filter(|net| net.driver.is_some());
            split.map(|net| {
                ([("guest", guest.name.clone()), ("device", format!("net{}", net.index))], net.foreign_source)
            })
        });
        counter(
            encoder,
            "guest_foreign_source_frames",
            "Frames dropped, because they had another's source address",
            None,
            dropped,
        )?;
        let disks = || guests.clone().flat_map(|guest| guest.disks.iter().map(move |disk| (labels(guest, disk), disk)));
        let owed = disks().map(|(labels, disk)| (labels, disk.owed_bytes));
        let help = "Bytes that a disk's guest was told are written, and that are to be written again";
        gauge(encoder, "guest_disk_owed", help, Some(&Unit::Bytes), owed)?;
        let kept = disks().map(|(labels, disk)| (labels, disk.kept_bytes));
        let help = "Bytes of a disk that are kept because they are not known to be stable, or are in flight";
        gauge(encoder, "guest_disk_kept", help, Some(&Unit::Bytes), kept)?;
        let requests = disks().flat_map(|([guest, device], disk)| {
            let sums = &disk.sums;
            let fates =
                [("kept", sums.kept_in_flight), ("masked-error", sums.masked_errors), ("failed", sums.failed_requests)];
            fates.map(|(fate, count)| ([guest.clone(), device.clone(), ("fate", fate.into())], count))
        });
        counter(encoder, "guest_disk_requests", "What became of a disk's requests", None, requests)?;
        let bytes = disks().flat_map(|([guest, device], disk)| {
            let fates = [("rewritten", disk.sums.rewritten_sectors), ("lost", disk.sums.lost_sectors)];
            let of = move |(fate, sectors): (&str, u64)| {
                ([guest.clone(), device.clone(), ("fate", fate.into())], sectors.saturating_mul(SECTOR_BYTES))
            };
            fates.map(of)
        });
        let help = "What became of acknowledged data of a disk that were not stable at an outage";
        counter(encoder, "guest_disk", help, Some(&Unit::Bytes), bytes)?;
        used(encoder, &status)?;
        let vms = guests.map(|g| ("guest", &g.name, g.pid)).chain(drivers.map(|d| ("driver", &d.name, d.pid)));
        let all = vms.chain([("supervisor", &status.name, Some(status.pid))]);
        let resident =
            all.filter_map(|(kind, name, pid)| Some(([("kind", kind), ("name", name.as_str())], resident(pid?)?)));
        gauge(
            encoder,
            "process_resident_memory",
            "Resident memory of the process of a VM, and of the supervisor",
            Some(&Unit::Bytes),
            resident,
        )
    }
}

/// What VMs have used of the host's processors, and what moving frames took. The names behind `counter` are those of the status.
fn used(encoder: &mut DescriptorEncoder, status: &Status) -> Result<(), Error> {
    let guests = status.guests.iter().map(|guest| ("guest", &guest.name, &guest.usage));
    let vms = || guests.clone().chain(status.drivers.iter().map(|driver| ("driver", &driver.name, &driver.usage)));
    let of_vm = |kind: &str, name: &str| [("kind", kind.to_owned()), ("name", name.to_owned())];
    let vcpus = vms().flat_map(|(kind, name, usage)| {
        let counts = usage.vcpus.iter().flat_map(named);
        counts.map(move |(counter, count)| {
            let [kind, name] = of_vm(kind, name);
            ([kind, name, ("counter", counter)], count)
        })
    });
    counter(encoder, "vcpu_events", "What KVM has counted of the vCPUs of a VM (exits and so on)", None, vcpus)?;
    let threads = vms().flat_map(|(kind, name, usage)| {
        usage.threads.iter().flat_map(move |thread| {
            named(thread).into_iter().map(move |(counter, count)| {
                let [kind, name] = of_vm(kind, name);
                ([kind, name, ("role", thread.role.clone()), ("counter", counter)], count)
            })
        })
    });
    let help = "Time on a processor and without one (ns), sleeps and preemptions of the threads of a VM's process";
    counter(encoder, "thread_events", help, None, threads)?;
    let nets = status.guests.iter().flat_map(|guest| guest.nets.iter().map(move |net| (guest, net)));
    let paths = nets.filter(|(_, net)| net.driver.is_some()).flat_map(|(guest, net)| {
        [("out", net.work.out), ("into", net.work.into)].into_iter().flat_map(move |(direction, work)| {
            let counts = named(&work).into_iter();
            counts.map(move |(counter, count)| {
                let device = ("device", format!("net{}", net.index));
                ([("guest", guest.name.clone()), device, ("direction", direction.into()), ("counter", counter)], count)
            })
        })
    });
    counter(encoder, "guest_net_events", "What moving frames took: kicks, signals and so on", None, paths)
}

/// The numbers of a record, each with the name of its field.
fn named(record: &impl Serialize) -> Vec<(String, u64)> {
    let fields = match serde_json::to_value(record) {
        Ok(Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    fields.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect()
}

fn labels(guest: &GuestStatus, disk: &BlockStatus) -> [(&'static str, String); 2] {
    [("guest", guest.name.clone()), ("device", format!("block{}", disk.index))]
}

fn gauge<const N: usize, L: EncodeLabelValue, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    values: impl Iterator<Item = ([(&'static str, L); N], V)>,
) -> Result<(), Error> {
    let mut values = values.peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    for (labels, value) in values {
        metric.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

fn counter<const N: usize>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    values: impl Iterator<Item = ([(&'static str, String); N], u64)>,
) -> Result<(), Error> {
    let mut values = values.peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for (labels, value) in values {
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

/// Resident memory of a process in bytes.
fn resident(pid: u32) -> Option<u64> {
    let pages: u64 = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?.split_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    pages.checked_mul(u64::try_from(page).ok()?)
}
