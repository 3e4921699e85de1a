//! Where functions begin, by all that the file says, before its code was looked at.
//!
//! Owns [`Candidate`]: an address that some table calls a function. Neighbours: symbols, the unwind information and the dynamic linker's tables come in; the
//! [scan](crate::scan) looks at their code, after which the [ladder](crate::plan) tells functions from what only looks like them. Invariant: sorted by address,
//! each address once; what is left out already is listed.

use std::collections::BTreeMap;

use trapline_engine::{Addr, AddrRange};

use crate::{
    LeftOut, NoFunction,
    elf::{Binding, Elf, Section, Segment, Symbol},
    frames::{Cfa, Frame, Frames},
    names::{Names, is_part},
};

/// An address that may be a function's.
#[derive(Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) address: u64,
    /// 0 until it is known.
    pub(crate) size: u64,
    pub(crate) names: Names<'a>,
    /// Its unwind information, if that begins here: how the frame looks at the first instruction.
    pub(crate) frame: Option<FrameAtEntry>,
    /// Whether some table names this very address as a function's, so that nobody has to be found who calls it.
    pub(crate) is_certain: bool,
}

/// How a candidate's frame looks at its first instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FrameAtEntry {
    pub(crate) cfa: Cfa,
    pub(crate) has_no_return: bool,
    pub(crate) is_signal: bool,
}

impl Candidate<'_> {
    /// Whether all its names say that it is a part of a function.
    pub(crate) fn is_named_part(&self) -> bool {
        !self.names.is_empty() && self.names.iter().all(is_part)
    }

    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.size)
    }
}

/// What the tables say.
#[derive(Debug, Default)]
pub(crate) struct Discovered<'a> {
    pub(crate) candidates: Vec<Candidate<'a>>,
    pub(crate) left_out: Vec<LeftOut>,
}

/// Collects what `symbols`, `frames` and the dynamic linker's tables call functions.
pub(crate) fn discover<'a>(elf: &Elf<'a>, symbols: &[Symbol<'a>], frames: &Frames<'_>) -> Discovered<'a> {
    let mut found: BTreeMap<u64, Candidate<'a>> = BTreeMap::new();
    let mut discovered = Discovered::default();
    let plts: Vec<_> =
        elf.sections.iter().filter(|section| section.is_code && section.name.starts_with(b".plt")).collect();
    let is_plt = |address: u64| plts.iter().any(|plt| (plt.address..plt.end()).contains(&address));
    for frame in frames.iter().filter(|frame| elf.is_code(frame.start)) {
        let range = AddrRange { start: Addr::new(frame.start), end: Addr::new(frame.end) };
        if is_plt(frame.start) {
            discovered.left_out.push(LeftOut { name: None, range, why: NoFunction::Plt });
            continue;
        }
        let candidate = candidate(&mut found, frame.start);
        candidate.size = frame.end - frame.start;
        candidate.frame = Some(FrameAtEntry {
            cfa: cfa_at_entry(elf, frames, frame),
            has_no_return: frame.has_no_return,
            is_signal: frame.is_signal,
        });
    }
    let functions = || symbols.iter().filter(|symbol| symbol.is_function && elf.is_code(symbol.address));
    for symbol in functions().filter(|symbol| symbol.size != 0 && !is_plt(symbol.address)) {
        let candidate = candidate(&mut found, symbol.address);
        candidate.size = candidate.size.max(symbol.size);
        candidate.names.add(symbol);
        candidate.is_certain = true;
    }
    add_labels(functions().filter(|symbol| symbol.size == 0 && !is_plt(symbol.address)), &mut found, &mut discovered);
    add_entries(elf, &mut found);
    // What is not marked as a function is a name where something else says that there is one.
    for symbol in symbols.iter().filter(|symbol| !symbol.is_function && !symbol.name.starts_with(b".")) {
        if let Some(candidate) = found.get_mut(&symbol.address)
            && candidate.names.is_empty()
            && symbol.binding != Binding::Local
        {
            candidate.names.add(symbol);
        }
    }
    discovered.candidates = found.into_values().collect();
    find_ends(elf, &mut discovered.candidates);
    discovered
}

/// How the frame looks at the first instruction of `frame` that does something.
///
/// GCC puts a nop before a part of a function that begins with an exception's landing place, which may not be at offset 0. Its unwind information is
/// that of a function there, and only behind the nop the true one.
fn cfa_at_entry<'f>(elf: &Elf<'_>, frames: &Frames<'f>, frame: &Frame<'f>) -> Cfa {
    const NOP: u8 = 0x90;
    if elf.at(frame.start).and_then(<[u8]>::first) != Some(&NOP) {
        return frame.entry;
    }
    let mut rows = Vec::new();
    frames.rows(frame, &mut rows);
    let behind = rows.iter().take_while(|(from, _)| *from <= frame.start + 1).last();
    behind.map_or(frame.entry, |(_, cfa)| *cfa)
}

fn candidate<'a, 'm>(found: &'m mut BTreeMap<u64, Candidate<'a>>, address: u64) -> &'m mut Candidate<'a> {
    found.entry(address).or_insert_with(|| Candidate {
        address,
        size: 0,
        names: Names::default(),
        frame: None,
        is_certain: false,
    })
}

/// Symbols without a size: labels if they are inside of something, functions otherwise.
fn add_labels<'a: 's, 's>(
    symbols: impl Iterator<Item = &'s Symbol<'a>>,
    found: &mut BTreeMap<u64, Candidate<'a>>,
    discovered: &mut Discovered<'a>,
) {
    let mut outside = Vec::new();
    for symbol in symbols {
        let before = found.range(..=symbol.address).next_back();
        match before {
            Some((address, _)) if *address == symbol.address => outside.push(symbol),
            Some((_, outer)) if symbol.address < outer.end() => {
                let name = Some(String::from_utf8_lossy(symbol.name).into_owned());
                let range = AddrRange::new(Addr::new(symbol.address), 0);
                discovered.left_out.push(LeftOut { name, range, why: NoFunction::Label });
            }
            _ => outside.push(symbol),
        }
    }
    for symbol in outside {
        let candidate = candidate(found, symbol.address);
        candidate.names.add(symbol);
        candidate.is_certain = true;
    }
}

/// What is called by the kernel or by the dynamic linker. In stripped files some of that has neither symbol nor unwind information.
fn add_entries<'a>(elf: &Elf<'a>, found: &mut BTreeMap<u64, Candidate<'a>>) {
    let named: [(Option<u64>, &'static [u8]); 3] = [
        (Some(elf.entry).filter(|entry| elf.is_code(*entry)), b"_start"),
        (elf.dynamic.init, b"_init"),
        (elf.dynamic.fini, b"_fini"),
    ];
    for (address, name) in named {
        let Some(address) = address else { continue };
        let candidate = candidate(found, address);
        candidate.is_certain = true;
        if candidate.names.is_empty() {
            candidate.names.add(&Symbol { name, address, size: 0, binding: Binding::Global, is_function: true });
        }
    }
    for address in elf.constructors() {
        candidate(found, address).is_certain = true;
    }
}

/// Sizes where no table says one: up to the next candidate, the end of the section, or of the segment.
fn find_ends(elf: &Elf<'_>, candidates: &mut [Candidate<'_>]) {
    let mut next = u64::MAX;
    for candidate in candidates.iter_mut().rev() {
        let address = candidate.address;
        let sections = elf.sections.iter().filter(|section| section.is_code);
        let section = sections.filter(|section| (section.address..section.end()).contains(&address)).map(Section::end);
        let segments = elf.segments.iter().filter(|segment| (segment.address..segment.end()).contains(&address));
        let end = section.chain(segments.map(Segment::end)).min().unwrap_or(address);
        if candidate.size == 0 {
            candidate.size = end.min(next) - address;
        }
        candidate.size = candidate.size.min(end - address);
        next = address;
    }
}
