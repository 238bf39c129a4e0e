//! What Caisson's host programs share.
//!
//! * [`control`]: messages with file descriptors between two of our processes;
//! * [`jail`]: namespaces, an empty or given root, a user id, no capabilities;
//! * [`process`]: processes by handle;
//! * [`rights`]: what of root's rights each process keeps;
//! * [`seccomp`]: system call filters, one for each thread role;
//! * [`stand_in`]: what stands on the host for a container;
//! * [`settings`]: reads the configuration's files;
//! * [`records`]: reads and writes what pods keep on disk;
//! * [`cores`]: how many threads the host's cores run;
//! * [`users`]: which users there are where a program runs.

pub mod control;
pub mod cores;
pub mod jail;
pub mod process;
pub mod records;
pub mod rights;
pub mod seccomp;
pub mod settings;
pub mod stand_in;
pub mod users;
