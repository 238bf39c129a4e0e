//! The virtual machine monitor: what `caisson-vmm` is made of, and what the fuzz targets try.
//!
//! [`machine`] puts KVM, [`memory`], [`devices`] and vCPUs together; [`filters`] says what each
//! thread may ask of the kernel.

mod cpuid;
pub mod devices;
pub mod filters;
mod kernel;
pub mod machine;
pub mod memory;
mod mptable;
mod panic_log;
pub mod restrict;
mod vcpu;
mod vcpus;
