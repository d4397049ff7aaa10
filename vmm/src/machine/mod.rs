//! One VM: memory, vCPUs, boot, ACPI, legacy devices.
