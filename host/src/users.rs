//! The users of the user namespace that a program runs in: all of the host's, or those that somebody without root was
//! given (user_namespaces(7)).

use std::io;
use std::ops::Range;

/// How many users there are: the last number is none.
const ALL: u64 = u32::MAX as u64;

/// Users by their ids in the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users(Vec<Range<u64>>);

impl Users {
    /// Those of the calling process's namespace.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn here() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read_to_string("/proc/self/uid_map")?))
    }

    /// A line a range: the first id here, the one that it is outside, how many.
    fn parse(map: &str) -> Self {
        let range = |line: &str| {
            let mut numbers = line.split_whitespace().map(|word| word.parse::<u64>().ok());
            let (first, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
            Some(first..first.saturating_add(count))
        };
        Self(map.lines().filter_map(range).collect())
    }

    /// Whether they are all that there are, as in the host's own namespace.
    pub fn are_all(&self) -> bool {
        self.0.iter().map(|range| range.end - range.start).sum::<u64>() >= ALL
    }

    /// Whether so many from `first` on are there.
    pub fn have(&self, first: u32, count: u32) -> bool {
        let wanted = u64::from(first)..u64::from(first) + u64::from(count);
        self.0.iter().any(|range| range.start <= wanted.start && wanted.end <= range.end)
    }

    /// Their ids, for a message.
    pub fn describe(&self) -> String {
        let ranges: Vec<String> = self.0.iter().map(|range| format!("{} to {}", range.start, range.end.saturating_sub(1))).collect();
        if ranges.is_empty() { "none".into() } else { ranges.join(", ") }
    }
}

/// Whether the calling process is in a namespace with fewer users than the host, as everything is that somebody starts
/// without root.
pub fn are_few() -> bool {
    Users::here().is_ok_and(|users| !users.are_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_says_which_users_there_are() {
        let host = Users::parse("         0          0 4294967295\n");
        assert!(host.are_all() && host.have(1_500_000_000, 65_536));
        let few = Users::parse("         0       1000          1\n         1     100000      65536\n");
        assert!(!few.are_all() && few.have(1, 65_536) && few.have(0, 1) && !few.have(0, 2) && !few.have(65_530, 8));
        assert_eq!((few.describe(), Users::parse("").describe()), ("0 to 0, 1 to 65536".into(), "none".into()));
    }
}
