//! Makes the images that Caisson needs, byte for byte the same from the same inputs.
//!
//! * [`initramfs`]: the guest's root, a cpio archive that holds the agent and nothing else;
//! * [`busybox_image`]: the OCI image archive that tests, the demo and the node's pods run;
//! * [`pack_tree`]: any folder as a cpio archive (the node's own initramfs).
//!
//! Reproducible means: entries in sorted order, times zero, owner root, inode numbers counted.

mod initramfs;
mod oci_image;

pub use initramfs::{initramfs, pack_tree};
pub use oci_image::busybox_image;
