//! What can be seen of a process from outside, before and after it was recorded.
//!
//! Owns [`Snapshot`], and its [comparison](Snapshot::complaints): what a recorder may not leave behind. Of the program's own, only that may differ which
//! it changes itself; whoever takes the snapshots knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

/// A line of `maps`, as far as it tells what is there.
type Mapping = (u64, u64, String, String);

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    mappings: Vec<Mapping>,
    threads: BTreeSet<String>,
    descriptors: BTreeMap<String, String>,
    /// Of the process and of each thread: signals that are blocked, ignored, and handled, and who traces.
    signals: BTreeMap<String, Vec<String>>,
    /// Files whose code is not as it is in the file, and where first.
    changed_code: Vec<String>,
    virtual_kib: u64,
    resident_kib: u64,
}

/// What a program changes itself all the time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Own {
    /// Nothing that can be seen.
    Nothing,
    /// Its heap.
    Memory,
    /// Its libraries, threads, or children, too.
    Everything,
}

/// How much more memory a process may have resident: its own stacks and heaps come and go.
const TOLERANCE_KIB: u64 = 8 << 10;

impl Snapshot {
    /// Takes one.
    ///
    /// # Panics
    /// The process is gone, or may not be looked at.
    pub fn of(pid: u32) -> Self {
        let folder = format!("/proc/{pid}");
        let read = |path: String| fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let mappings: Vec<Mapping> = read(format!("{folder}/maps")).lines().filter_map(mapping).collect();
        let names = |path: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(path).unwrap_or_else(|error| panic!("{path}: {error}"));
            entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect()
        };
        let threads = names(&format!("{folder}/task"));
        let target = |fd: &String| fs::read_link(format!("{folder}/fd/{fd}")).unwrap_or_default();
        let descriptors = names(&format!("{folder}/fd"));
        let descriptors =
            descriptors.iter().map(|fd| (fd.clone(), target(fd).to_string_lossy().into_owned())).collect();
        let signals = threads.iter().map(|tid| {
            let status = fs::read_to_string(format!("{folder}/task/{tid}/status")).unwrap_or_default();
            let wanted = ["SigBlk:", "SigIgn:", "SigCgt:", "TracerPid:"];
            let lines = status.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
            (tid.clone(), lines.map(str::to_owned).collect())
        });
        let status = read(format!("{folder}/status"));
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        Self {
            changed_code: changed_code(pid, &mappings),
            signals: signals.collect(),
            mappings,
            threads,
            descriptors,
            virtual_kib: kib("VmSize:"),
            resident_kib: kib("RssAnon:"),
        }
    }

    /// What is there now that was not there before, or the other way round. `own` is what the program changes itself.
    pub fn complaints(&self, before: &Self, own: Own) -> Vec<String> {
        let mut complaints = self.changed_code.clone();
        for (start, end, access, path) in &self.mappings {
            if path.contains("memfd:trapline") {
                complaints.push(format!("{start:x}-{end:x} {access} {path} is mapped"));
            }
        }
        if own == Own::Nothing {
            for mapping in self.mappings.iter().filter(|mapping| !before.mappings.contains(mapping)) {
                complaints.push(format!("{mapping:x?} was not mapped"));
            }
            for mapping in before.mappings.iter().filter(|mapping| !self.mappings.contains(mapping)) {
                complaints.push(format!("{mapping:x?} is not mapped any more"));
            }
            if self.virtual_kib != before.virtual_kib {
                complaints.push(format!("{} KiB of addresses and before: {}", self.virtual_kib, before.virtual_kib));
            }
        }
        if own != Own::Everything {
            let pairs = [("threads", format!("{:?}", self.threads), format!("{:?}", before.threads))];
            let descriptors = [("descriptors", format!("{:?}", self.descriptors), format!("{:?}", before.descriptors))];
            let signals = [("signals", format!("{:?}", self.signals), format!("{:?}", before.signals))];
            for (what, now, then) in pairs.into_iter().chain(descriptors).chain(signals) {
                if now != then {
                    complaints.push(format!("{what}: {now} and before: {then}"));
                }
            }
        }
        if self.resident_kib > before.resident_kib + TOLERANCE_KIB {
            complaints.push(format!("{} KiB resident and before: {}", self.resident_kib, before.resident_kib));
        }
        complaints
    }
}

fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let access = words.next()?.to_owned();
    let offset = words.next()?.to_owned();
    let path = words.nth(2).unwrap_or_default().to_owned();
    Some((hex(start)?, hex(end)?, format!("{access} {offset}"), path))
}

/// Compares all code with the files that it is of.
fn changed_code(pid: u32, mappings: &[Mapping]) -> Vec<String> {
    let Ok(memory) = File::open(format!("/proc/{pid}/mem")) else {
        return vec!["its memory cannot be read".to_owned()];
    };
    let is_code = |mapping: &&Mapping| mapping.2.contains('x') && Path::new(&mapping.3).is_absolute();
    let compare = |(start, end, access, path): &Mapping| {
        let offset = u64::from_str_radix(access.split_once(' ')?.1, 16).ok()?;
        let mut there = vec![0; usize::try_from(end - start).ok()?];
        let mut here = there.clone();
        // What was unloaded meanwhile is not changed.
        memory.read_exact_at(&mut there, *start).ok()?;
        let read = File::open(path).ok()?.read_at(&mut here, offset).ok()?;
        let at = there[..read].iter().zip(&here[..read]).position(|(there, here)| there != here)?;
        Some(format!("{path}: its code is changed at {:#x}", offset + at as u64))
    };
    mappings.iter().filter(is_code).filter_map(compare).collect()
}
