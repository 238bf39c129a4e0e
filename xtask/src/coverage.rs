//! How much of our own code the inputs of the fuzz targets reach, by what libFuzzer prints when it runs them once.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// A function as it is in the source: its file and line.
type Place = (String, u32);

/// Branches of a function.
struct Function {
    name: String,
    reached: u32,
    all: u32,
}

/// Functions by their place.
#[derive(Default)]
pub struct Coverage(BTreeMap<Place, Function>);

impl Coverage {
    /// Adds what a target printed, of the functions below a folder. One that is there for several types, or in several targets,
    /// counts where most of it was reached.
    pub fn add(&mut self, text: &str, top: &Path) {
        for (place, function) in text.lines().filter_map(|line| parse(line, top)) {
            if self.0.get(&place).is_none_or(|known| known.reached < function.reached) {
                self.0.insert(place, function);
            }
        }
    }
}

/// `COVERED_FUNC: hits: 458 edges: 5/33 NAME FILE:LINE`, or `UNCOVERED_FUNC`.
fn parse(line: &str, top: &Path) -> Option<(Place, Function)> {
    let rest = line.strip_prefix("UN").unwrap_or(line).strip_prefix("COVERED_FUNC: hits: ")?;
    let (edges, rest) = rest.split_once(" edges: ")?.1.split_once(' ')?;
    let (reached, all) = edges.split_once('/')?;
    let (name, place) = rest.rsplit_once(' ')?;
    let (file, line) = place.rsplit_once(':')?;
    let file = Path::new(file).strip_prefix(top).ok()?.to_str()?;
    let of_target = file.starts_with("fuzz/") || file.starts_with("target/");
    let function = Function { name: name.to_owned(), reached: reached.parse().ok()?, all: all.parse().ok()? };
    (!of_target).then_some(((file.to_owned(), line.parse().ok()?), function))
}

impl fmt::Display for Coverage {
    /// A line for each file that anything of was reached, and for each of its functions that was not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut files: BTreeMap<&str, Vec<(u32, &Function)>> = BTreeMap::new();
        for ((file, line), function) in &self.0 {
            files.entry(file).or_default().push((*line, function));
        }
        files.retain(|_, functions| functions.iter().any(|(_, function)| function.reached > 0));
        for (file, functions) in &files {
            let sum = |count: fn(&Function) -> u32| functions.iter().map(|(_, function)| count(function)).sum::<u32>();
            let called = sum(|function| u32::from(function.reached > 0));
            let (reached, all) = (sum(|function| function.reached), sum(|function| function.all));
            writeln!(f, "{file:<36} {called:>3} of {:>3} functions, {reached:>5} of {all:>5} branches", functions.len())?;
            for (line, function) in functions.iter().filter(|(_, function)| function.reached == 0) {
                writeln!(f, "    not reached: line {line}, {}", function.name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_counts_where_most_of_it_was_reached() {
        let mut coverage = Coverage::default();
        let text = "COVERED_FUNC: hits: 1 edges: 1/4 a::serve::<A> /top/vmm/src/a.rs:10\n\
                    COVERED_FUNC: hits: 9 edges: 3/5 <a as b>::serve::<u8> /top/vmm/src/a.rs:10\n\
                    UNCOVERED_FUNC: hits: 0 edges: 0/7 a::other /top/vmm/src/a.rs:20\n\
                    UNCOVERED_FUNC: hits: 0 edges: 0/7 b::nothing /top/vmm/src/b.rs:20\n\
                    COVERED_FUNC: hits: 9 edges: 3/5 std::thing /rustc/std.rs:10\nINFO: seed corpus";
        coverage.add(text, Path::new("/top"));
        let expected =
            format!("{:<36}   1 of   2 functions,     3 of    12 branches\n    not reached: line 20, a::other\n", "vmm/src/a.rs");
        assert_eq!(coverage.to_string(), expected);
    }
}
