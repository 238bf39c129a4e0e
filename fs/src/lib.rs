//! What `caisson-fs` serves, as a fuzz target tries it, too.

pub mod dax;
pub mod descriptors;
pub mod device;
pub mod filter;
pub mod linked;
pub mod request;
mod seal;
pub mod share;
pub mod unnamed;
pub mod volumes;
