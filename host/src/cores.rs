//! The cores of the host's processors.

/// Whether each of them runs one thread at a time, by what the kernel says (`/sys/devices/system/cpu/smt/active`).
pub fn have_one_thread() -> bool {
    std::fs::read_to_string("/sys/devices/system/cpu/smt/active").is_ok_and(|active| active.trim() == "0")
}
