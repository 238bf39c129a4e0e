//! What a process of a container says of itself, for people who look: `/proc` (proc(5)).

use std::io::Read;

use caisson_protocol::agent::ProcessInfo;

/// The longest beginning of a command line.
const MAX_COMMAND: u64 = 256;

/// Adds it; of a process that has ended meanwhile nothing is known.
pub fn describe(info: &mut ProcessInfo) {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", info.pid)).unwrap_or_default();
    let status = read("status");
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let user = field("Uid:").split_whitespace().next().and_then(|user| user.parse().ok()).unwrap_or_default();
    let inside = inside(&read("uid_map"), user);
    let mut command = Vec::new();
    if let Ok(file) = std::fs::File::open(format!("/proc/{}/cmdline", info.pid)) {
        let _ = file.take(MAX_COMMAND).read_to_end(&mut command);
    }
    let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
    // A thread of the kernel, or a process that has ended, has none.
    info.command = if command.is_empty() { format!("[{}]", field("Name:")) } else { command };
    (info.user, info.guest_user) = (inside, user);
}

/// A user as its user namespace knows it, by that namespace's map (user_namespaces(7)).
fn inside(map: &str, user: u32) -> u32 {
    let ranges = map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>().ok());
        Some((numbers.next()??, numbers.next()??, numbers.next()??))
    });
    let mut found = ranges.filter_map(|(inner, outer, count)| user.checked_sub(outer).filter(|offset| *offset < count)?.checked_add(inner));
    found.next().unwrap_or(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_as_its_namespace_knows_it() {
        assert_eq!(inside("         0          0 4294967295\n", 33), 33);
        let map = "0 100000 1000\n1000 5000 10\n";
        assert_eq!((inside(map, 100_033), inside(map, 5003), inside(map, 7)), (33, 1003, 7));
    }

    #[test]
    fn a_process_is_described_by_what_it_says() {
        let mut info = ProcessInfo { pid: std::process::id(), ..ProcessInfo::default() };
        describe(&mut info);
        assert_eq!(info.guest_user, nix::unistd::getuid().as_raw());
        assert!(!info.command.is_empty() && info.command.len() <= MAX_COMMAND as usize);
    }
}
