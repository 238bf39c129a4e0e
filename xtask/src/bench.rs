//! `cargo xtask bench`: figures of one node run, as a table and as JSON.
//!
//! Everything is measured beside its peer in the same node, because emulated time means little by
//! itself; with `--counted` the node's clock counts instructions and runs can be compared.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::node::{self, NodeArgs};
use crate::{build, test};

/// Scripts that write `NAME VALUE` lines (see [`UNITS`]): of starts, memory and sizes, and of files, disks and the network.
const STARTS: &str = include_str!("node/bench.sh");
const DATA: &str = include_str!("node/data.sh");

/// Unit of each figure, by what its name begins with.
const UNITS: &[(&str, &str)] = &[
    ("start", "ms"),
    ("run", "ms"),
    ("phase", "ms"),
    ("cri-", "ms"),
    ("memory", "KiB"),
    ("jail-enter", "µs"),
    ("jail-call", "ns"),
    ("neighbour", "ms"),
    ("size", "KiB"),
    ("rate-", "KiB/s"),
    ("requests-", "1/s"),
    ("tree-", "ms"),
    ("stream-", "Mbit/s"),
    ("answer-", "µs"),
];
/// Ratios that have a name of their own: it, ours, the peer's. Any other figure of ours that a peer has has a ratio, too.
const RATIOS: &[(&str, &str, &str)] = &[
    ("machine ready / QEMU microvm to its first program", "start.caisson", "start.qemu-microvm"),
    ("ctr run true / runc", "run.caisson", "run.runc"),
    ("a system call behind the monitor's longest filter / behind none", "jail-call.filtered", "jail-call.free"),
    ("a neighbour's exec beside a pod that does its worst / beside none", "neighbour.attacked", "neighbour.quiet"),
    ("memory of two readers of a file that is mapped / copied", "memory-readers.mapped", "memory-readers.copied"),
    ("CRI: pod with one container to Running / runc", "cri-pod.caisson", "cri-pod.runc"),
    ("CRI: second container of a pod to Running / runc", "cri-second.caisson", "cri-second.runc"),
    ("CRI: exec of true / runc", "cri-exec.caisson", "cri-exec.runc"),
    ("CRI: a hundred execs, one after another / runc", "cri-execs.caisson", "cri-execs.runc"),
    ("CRI: statistics of fifty containers / runc", "cri-stats.caisson", "cri-stats.runc"),
];

/// Whom files, disks and the network are measured beside.
const PEERS: &[&str] = &["runc", "qemu"];

/// What `cargo xtask bench` was asked for.
#[derive(clap::Args, Clone, Debug)]
pub struct BenchArgs {
    /// Runs of each figure; the median and the spread are printed
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub runs: u32,
    /// Measure files, disks and the network beside those of runc and of QEMU with virtiofsd, instead of starts, memory and sizes
    #[arg(long)]
    pub data: bool,
    /// Measure on the instruction clock
    #[arg(long)]
    pub counted: bool,
    /// Where the figures are written as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Measures and prints; returns the exit code.
pub fn run(args: &BenchArgs) -> Result<i32> {
    let share = tempfile::tempdir()?;
    let script = share.path().join("bench.sh");
    std::fs::write(&script, if args.data { DATA } else { STARTS })?;
    test::build_node_tests(share.path())?;
    let command = ["bash", "/share/bench.sh", &args.runs.to_string()].map(str::to_owned).to_vec();
    let mut node_args = NodeArgs::usual(share.path(), command);
    node_args.counted = args.counted;
    let code = node::run(&node_args)?;
    let text = std::fs::read_to_string(share.path().join("figures")).context("read the figures")?;
    let figures = parse(&text);
    print_table(&figures);
    let sh = xshell::Shell::new()?;
    sh.change_dir(build::source_dir()?);
    let revision = xshell::cmd!(sh, "git describe --always --dirty").quiet().read().unwrap_or_else(|_| "unknown".into());
    let json = serde_json::json!({
        "revision": revision, "data": args.data, "counted": args.counted, "runs": args.runs,
        "figures": figures.iter().map(|(name, values)| (name.clone(), serde_json::json!({"median": median(values), "min": values.first(), "max": values.last(), "unit": unit(name)}))).collect::<BTreeMap<_, _>>(),
        "ratios": ratios(&figures).into_iter().collect::<BTreeMap<_, _>>(),
    });
    let text = serde_json::to_string_pretty(&json)?;
    println!("\n{text}");
    // Those of each revision stay, to be compared.
    let kind = format!("{}{}", if args.data { "-data" } else { "" }, if args.counted { "-counted" } else { "" });
    let name = format!("target/bench{kind}-{revision}.json");
    let path = args.json.clone().unwrap_or(build::source_dir()?.join(name));
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    eprintln!("{}", path.display());
    Ok(code)
}

/// Values by name, each sorted.
fn parse(text: &str) -> BTreeMap<String, Vec<f64>> {
    let mut figures: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, value)) = line.split_once(' ')
            && let Ok(value) = value.trim().parse()
        {
            figures.entry(name.to_owned()).or_default().push(value);
        }
    }
    figures.values_mut().for_each(|values| values.sort_by(f64::total_cmp));
    figures
}

/// Of sorted values.
fn median(values: &[f64]) -> f64 {
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn unit(name: &str) -> &'static str {
    UNITS.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or("", |(_, unit)| unit)
}

fn ratios(figures: &BTreeMap<String, Vec<f64>>) -> Vec<(String, f64)> {
    let ratio = |ours: &str, peer: &str| Some(median(figures.get(ours)?) / median(figures.get(peer)?));
    let named = RATIOS.iter().filter_map(|(name, ours, peer)| Some(((*name).to_owned(), ratio(ours, peer)?)));
    let unnamed = figures.keys().filter(|name| RATIOS.iter().all(|(_, ours, _)| ours != name));
    let others = unnamed.filter_map(|name| name.strip_suffix(".caisson")).flat_map(|figure| {
        let ratio =
            move |peer: &str| Some((format!("{figure} / {peer}"), ratio(&format!("{figure}.caisson"), &format!("{figure}.{peer}"))?));
        PEERS.iter().filter_map(move |peer| ratio(peer))
    });
    named.chain(others).collect()
}

fn print_table(figures: &BTreeMap<String, Vec<f64>>) {
    println!("{:<36} {:>10} {:>10} {:>10} unit", "figure", "median", "least", "most");
    for (name, values) in figures {
        println!(
            "{name:<36} {:>10.0} {:>10.0} {:>10.0} {}",
            median(values),
            values.first().unwrap_or(&f64::NAN),
            values.last().unwrap_or(&f64::NAN),
            unit(name)
        );
    }
    for (name, ratio) in ratios(figures) {
        println!("{name:<58} {ratio:>10.2}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_of_all_runs_and_ratios_of_medians() {
        let figures = parse("run.caisson 30\nrun.caisson 10\nrun.caisson 20\nrun.runc 10\nnoise\n");
        assert_eq!(median(&figures["run.caisson"]), 20.0);
        assert_eq!(ratios(&figures), [("ctr run true / runc".to_owned(), 2.0)]);
        let figures = parse("stream-in.caisson 30\nstream-in.runc 60\nanswer-x.caisson 1\n");
        assert_eq!(ratios(&figures), [("stream-in / runc".to_owned(), 0.5)]);
    }
}
