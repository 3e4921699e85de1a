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

    /// Reads the tables and marks where they lead.
    pub(crate) fn follow(mut self, context: &Context<'_, '_>, scanned: &Scanned) {
        if !self.has_computed_jump {
            return;
        }
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
            if parts.iter().any(|part| part.contains(&target)) {
                scanned.listed.add(context.text, target);
            }
        };
        for base in &self.bases {
            relative(context, *base, *base, mark);
            if context.elf.is_fixed {
                absolute(context, *base, mark);
            }
        }
        let got = context.elf.section(".got.plt").or_else(|| context.elf.section(".got")).map(|got| got.address);
        for displacement in &self.displacements {
            absolute(context, *displacement, mark);
            if let (Some(got), Mode::Bits32) = (got, context.elf.mode) {
                relative(context, got.wrapping_add(*displacement) & u64::from(u32::MAX), got, mark);
            }
        }
    }
}

/// A table of distances from `origin`.
fn relative(context: &Context<'_, '_>, table: u64, origin: u64, mark: impl Fn(u64)) {
    let Some(bytes) = data(context, table) else { return };
    for entry in bytes.as_chunks::<4>().0.iter().take(MAX_ENTRIES as usize) {
        let target = origin.wrapping_add_signed(i32::from_le_bytes(*entry).into());
        let target = if context.elf.mode == Mode::Bits32 { target & u64::from(u32::MAX) } else { target };
        if !context.text.contains(target) {
            break;
        }
        mark(target);
    }
}

/// A table of addresses.
fn absolute(context: &Context<'_, '_>, table: u64, mark: impl Fn(u64)) {
    for index in 0..MAX_ENTRIES {
        let at = table.wrapping_add(index * u64::from(context.elf.mode.word_bytes()));
        let Some(target) = data(context, at).and_then(|_| context.elf.word(at)) else { break };
        if !context.text.contains(target) {
            break;
        }
        mark(target);
    }
}

/// What stands at an address, if that is in the file.
fn data<'a>(context: &Context<'_, 'a>, address: u64) -> Option<&'a [u8]> {
    context.elf.at(address)
}
