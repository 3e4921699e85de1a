//! Where computed jumps lead.
//!
//! Owns [`Tables`], which collects what a unit of code knows of jump tables, and reads them. A table is a row of addresses, or of distances from its own
//! beginning (or, in position-independent code of 32 bits, from the global offset table), and it is near at hand in the code that uses it. How long it is
//! stands nowhere, so it is read as long as its entries make sense. Neighbours: the [scan](crate::scan) feeds it. Invariant: an entry too many is harmless, see there.

use std::ops::Range;

use iced_x86::{Instruction, OpKind, Register};
use trapline_engine::Mode;

use crate::scan::{Context, Scanned};

/// More entries has no switch; interpreters have some hundreds.
const MAX_ENTRIES: u64 = 1 << 12;

/// What is known so far of the tables of one unit.
#[derive(Debug)]
pub(crate) struct Tables {
    unit: Range<u64>,
    /// Addresses of data that the code computes.
    bases: Vec<u64>,
    /// Displacements of operands with an index.
    displacements: Vec<u64>,
    /// Where it jumps to outside of itself: the other parts of the same function are there.
    parts: Vec<u64>,
    has_computed_jump: bool,
}

impl Tables {
    pub(crate) fn new(unit: Range<u64>) -> Self {
        Self { unit, bases: Vec::new(), displacements: Vec::new(), parts: Vec::new(), has_computed_jump: false }
    }

    /// An indirect jump. Those through a pointer that the linker fills are no tables.
    pub(crate) fn add_jump(&mut self, insn: &Instruction) {
        self.has_computed_jump |= insn.op0_kind() != OpKind::Memory || insn.memory_base() != Register::RIP;
    }

    pub(crate) fn add_part(&mut self, target: u64) {
        if self.parts.last() != Some(&target) {
            self.parts.push(target);
        }
    }

    pub(crate) fn add_base(&mut self, address: u64) {
        if self.bases.last() != Some(&address) {
            self.bases.push(address);
        }
    }

    /// An operand with a displacement that may be a table's address.
    pub(crate) fn add_memory(&mut self, insn: &Instruction) {
        if insn.memory_index() != Register::None {
            self.displacements.push(insn.memory_displacement64());
        }
    }

    /// Itself, if there are tables to follow.
    pub(crate) fn if_used(self) -> Option<Self> {
        self.has_computed_jump.then_some(self)
    }

    /// Addresses where tables of any of `all` may begin, ascending: where one begins, another ends.
    pub(crate) fn beginnings(context: &Context<'_, '_>, all: &[Self]) -> Vec<u64> {
        let got = got_of_32_bits(context).unwrap_or(0);
        let mut found: Vec<u64> = all
            .iter()
            .flat_map(|tables| {
                let displacements =
                    tables.displacements.iter().map(|displacement| in_width(context, got.wrapping_add(*displacement)));
                tables.bases.iter().copied().chain(displacements)
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Reads the tables and marks where they lead.
    pub(crate) fn follow(mut self, context: &Context<'_, '_>, scanned: &Scanned, beginnings: &[u64]) {
        let mut parts: Vec<Range<u64>> = vec![self.unit.clone()];
        for part in &self.parts {
            let index = scanned.units.partition_point(|unit| unit.range.start <= *part);
            let range = index.checked_sub(1).map(|index| scanned.units[index].range.clone());
            parts.extend(range.filter(|range| range.contains(part)));
        }
        parts.sort_by_key(|range| range.start);
        parts.dedup();
        self.bases.sort_unstable();
        self.bases.dedup();
        self.displacements.sort_unstable();
        self.displacements.dedup();
        let mark = |target: u64| {
            // A part of the function that nothing but the table leads to.
            let is_whole_part = scanned.unit_at(target).is_some_and(|unit| scanned.units[unit].candidate.is_some());
            if is_whole_part || parts.iter().any(|part| part.contains(&target)) {
                scanned.listed.add(context.text, target);
            }
        };
        for base in &self.bases {
            relative(context, *base, *base, beginnings, mark);
            if context.elf.is_fixed {
                absolute(context, *base, beginnings, mark);
            }
        }
        let got = got_of_32_bits(context);
        for displacement in &self.displacements {
            absolute(context, *displacement, beginnings, mark);
            if let Some(got) = got {
                relative(context, in_width(context, got.wrapping_add(*displacement)), got, beginnings, mark);
            }
        }
    }
}

/// What position-independent code of 32 bits counts from.
fn got_of_32_bits(context: &Context<'_, '_>) -> Option<u64> {
    let got = context.elf.section(".got.plt").or_else(|| context.elf.section(".got"));
    got.filter(|_| context.elf.mode == Mode::Bits32).map(|got| got.address)
}

fn in_width(context: &Context<'_, '_>, address: u64) -> u64 {
    if context.elf.mode == Mode::Bits32 { address & u64::from(u32::MAX) } else { address }
}

/// How many entries of `entry_bytes` there may be in the table at `table`.
fn max_entries(table: u64, entry_bytes: u64, beginnings: &[u64]) -> u64 {
    let next = beginnings.get(beginnings.partition_point(|other| *other <= table));
    next.map_or(MAX_ENTRIES, |next| (next - table).div_ceil(entry_bytes).min(MAX_ENTRIES))
}

/// A table of distances from `origin`.
fn relative(context: &Context<'_, '_>, table: u64, origin: u64, beginnings: &[u64], mark: impl Fn(u64)) {
    let Some(bytes) = context.elf.at(table) else { return };
    let count = usize::try_from(max_entries(table, 4, beginnings)).unwrap_or(0);
    for entry in bytes.as_chunks::<4>().0.iter().take(count) {
        let target = in_width(context, origin.wrapping_add_signed(i32::from_le_bytes(*entry).into()));
        if !context.text.contains(target) {
            break;
        }
        mark(target);
    }
}

/// A table of addresses.
fn absolute(context: &Context<'_, '_>, table: u64, beginnings: &[u64], mark: impl Fn(u64)) {
    let word_bytes = u64::from(context.elf.mode.word_bytes());
    for index in 0..max_entries(table, word_bytes, beginnings) {
        let Some(target) = context.elf.word(table.wrapping_add(index * word_bytes)) else { break };
        if !context.text.contains(target) {
            break;
        }
        mark(target);
    }
}
