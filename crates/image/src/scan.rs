//! All code of a file, decoded once.
//!
//! Owns [`scan`] and what it finds: [`Scanned`], where something leads to, and which functions look at their own return addresses. Code is cut into [`Unit`]s at
//! the beginnings and ends of candidates; each is decoded from its start to its end, so that what lies between functions is seen as well. Neighbours:
//! [discovery](crate::discover) says where the cuts are; `tables` follows computed jumps; `stack` follows the stack pointer. Invariants: a mark too many costs
//! a better place for a jump, a mark too few would cost correctness, so whatever might be a target is one; the result does not depend on the order of threads.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use rayon::prelude::*;
use trapline_engine::Mode;

use crate::{
    discover::{Candidate, Discovered},
    elf::{Elf, read_word},
    frames::Frames,
    marks::{Marks, Text},
    stack::Stack,
    tables::Tables,
};

/// The vendors differ about branches with an operand-size prefix; read AMD's way they show as 16-bit ones, as in the engine.
const DECODER_OPTIONS: u32 = DecoderOptions::AMD;

/// A piece of code without the beginning or end of a candidate inside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Unit {
    pub(crate) range: Range<u64>,
    /// The candidate that begins here, by index.
    pub(crate) candidate: Option<usize>,
}

/// What the code was seen to do.
#[derive(Debug)]
pub(crate) struct Scanned {
    /// By ascending address.
    pub(crate) units: Vec<Unit>,
    /// Branches to the unit that they are in, but calls.
    pub(crate) inside: Marks,
    /// Branches from other units, but calls.
    pub(crate) outside: Marks,
    /// Those of them that depend on a condition.
    pub(crate) conditional: Marks,
    /// Calls.
    pub(crate) called: Marks,
    /// Addresses that are stored in data, or computed by code: of functions, and of labels.
    pub(crate) taken: Marks,
    /// Entries of jump tables, and where exceptions land.
    pub(crate) listed: Marks,
    /// Bytes that the dynamic linker changes.
    pub(crate) relocated: Marks,
    /// What else was seen of each unit.
    pub(crate) facts: Vec<Facts>,
}

/// What was seen of one unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Facts {
    /// Whether it looks at the return address of its function.
    pub(crate) reads_return_address: bool,
    /// Whether control goes on behind its end, as far as its last instruction says.
    pub(crate) falls_through: bool,
    /// How many bytes its `ret` takes off the stack beside the return address; `None` if it has none, or several that do not agree.
    pub(crate) popped_bytes: Option<u16>,
}

impl Scanned {
    /// The first address in `range` that something leads to.
    pub(crate) fn first_target(&self, text: &Text<'_>, range: Range<u64>) -> Option<u64> {
        let all = [&self.inside, &self.outside, &self.called, &self.taken, &self.listed];
        range.clone().find(|address| all.iter().any(|marks| marks.contains(text, *address)))
    }

    /// The unit that begins at `address`.
    pub(crate) fn unit_at(&self, address: u64) -> Option<usize> {
        self.units.binary_search_by_key(&address, |unit| unit.range.start).ok()
    }
}

/// What all threads see of the file.
pub(crate) struct Context<'s, 'a> {
    pub(crate) elf: &'s Elf<'a>,
    pub(crate) text: &'s Text<'a>,
    frames: &'s Frames<'a>,
}

/// Decodes everything.
pub(crate) fn scan<'a>(elf: &Elf<'a>, text: &Text<'a>, frames: &Frames<'a>, discovered: &Discovered<'_>) -> Scanned {
    let candidates = &discovered.candidates;
    let marks = || Marks::new(text);
    let mut scanned = Scanned {
        units: units(text, candidates),
        inside: marks(),
        outside: marks(),
        conditional: marks(),
        called: marks(),
        taken: marks(),
        listed: marks(),
        relocated: marks(),
        facts: Vec::new(),
    };
    let context = Context { elf, text, frames };
    // Units are small and many; a few hundred of them make a piece of work.
    let seen: Vec<(Facts, Option<Tables>)> =
        scanned.units.par_iter().with_min_len(256).map(|unit| scan_unit(&context, &scanned, unit)).collect();
    let (facts, tables): (Vec<_>, Vec<_>) = seen.into_iter().unzip();
    scanned.facts = facts;
    let tables: Vec<Tables> = tables.into_iter().flatten().collect();
    let beginnings = Tables::beginnings(&context, &tables);
    tables.into_par_iter().with_min_len(16).for_each(|tables| tables.follow(&context, &scanned, &beginnings));
    mark_data(elf, text, &scanned);
    // Somebody gave them a name, so perhaps somebody goes there.
    discovered.left_out.iter().for_each(|label| scanned.listed.add(text, label.range.start.value()));
    for frame in frames.iter() {
        frames.landing_places(elf, frame, |address| scanned.listed.add(text, address));
    }
    scanned
}

/// A decoder for code that stands at `address`.
pub(crate) fn decoder(mode: Mode, address: u64, code: &[u8]) -> Decoder<'_> {
    Decoder::with_ip(mode.bitness(), code, address, DECODER_OPTIONS)
}

/// The address that a direct branch leads to.
pub(crate) fn branch_target(insn: &Instruction) -> Option<u64> {
    match insn.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Some(insn.near_branch_target()),
        _ => None,
    }
}

/// Cuts the text at the beginnings and the ends of candidates.
fn units(text: &Text<'_>, candidates: &[Candidate<'_>]) -> Vec<Unit> {
    let mut units = Vec::with_capacity(candidates.len() * 2);
    for range in text.ranges() {
        let first = candidates.partition_point(|candidate| candidate.address < range.start);
        let last = candidates.partition_point(|candidate| candidate.address < range.end);
        let mut cuts: Vec<u64> = vec![range.start, range.end];
        for candidate in &candidates[first..last] {
            cuts.extend([candidate.address, candidate.end().min(range.end)]);
        }
        cuts.sort_unstable();
        cuts.dedup();
        for cut in cuts.windows(2) {
            let candidate = candidates.binary_search_by_key(&cut[0], |candidate| candidate.address).ok();
            units.push(Unit { range: cut[0]..cut[1], candidate });
        }
    }
    units
}

/// Decodes one unit.
fn scan_unit(context: &Context<'_, '_>, scanned: &Scanned, unit: &Unit) -> (Facts, Option<Tables>) {
    let (text, mode) = (context.text, context.elf.mode);
    let code = text.range(unit.range.clone());
    let mut stack = Stack::new(mode, context.frames, unit.range.start, unit.candidate.is_some());
    let mut tables = Tables::new(unit.range.clone());
    let mut decoder = decoder(mode, unit.range.start, code);
    let mut insn = Instruction::default();
    let mut facts = Facts { falls_through: true, ..Facts::default() };
    let mut popped = Popped::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        if insn.is_invalid() {
            // Data in code, or code that was cut in the middle: look for the next instruction at every byte.
            let next = insn.ip() + 1;
            let position = usize::try_from(next - unit.range.start).unwrap_or(usize::MAX);
            if decoder.set_position(position).is_err() {
                break;
            }
            decoder.set_ip(next);
            stack.lost();
            facts.falls_through = true;
            continue;
        }
        let flow = insn.flow_control();
        if flow != FlowControl::Next {
            if let Some(target) = branch_target(&insn) {
                if matches!(flow, FlowControl::Call) {
                    scanned.called.add(text, target);
                } else if unit.range.contains(&target) {
                    scanned.inside.add(text, target);
                } else {
                    scanned.outside.add(text, target);
                    if flow == FlowControl::ConditionalBranch {
                        scanned.conditional.add(text, target);
                    }
                    tables.add_part(target);
                }
            } else if flow == FlowControl::IndirectBranch {
                tables.add_jump(&insn);
            } else if flow == FlowControl::XbeginXabortXend && insn.op0_kind() != OpKind::Immediate8 {
                scanned.inside.add(text, insn.near_branch64());
            }
        }
        if flow == FlowControl::Return {
            popped.add(&insn);
        }
        mark_operands(context, scanned, &mut tables, &insn);
        facts.reads_return_address |= stack.follow(&insn, flow);
        // What is called last does not return, or else there would be something behind.
        facts.falls_through = matches!(flow, FlowControl::Next | FlowControl::ConditionalBranch);
    }
    facts.popped_bytes = popped.bytes();
    if facts.reads_return_address && unit.candidate.is_some() {
        facts.reads_return_address = reads_for_sure(context, unit);
    }
    (facts, tables.if_used())
}

/// What the `ret`s of a unit take off the stack.
#[derive(Clone, Copy, Default)]
struct Popped {
    least_and_most: Option<(u16, u16)>,
}

impl Popped {
    fn add(&mut self, insn: &Instruction) {
        let bytes = if insn.op_count() == 0 { 0 } else { insn.immediate16() };
        let (least, most) = self.least_and_most.unwrap_or((bytes, bytes));
        self.least_and_most = Some((least.min(bytes), most.max(bytes)));
    }

    fn bytes(self) -> Option<u16> {
        self.least_and_most.filter(|(least, most)| least == most).map(|(bytes, _)| bytes)
    }
}

/// Looks again, more closely: unwind information that an assembler's author did not write says that nothing was ever pushed.
fn reads_for_sure(context: &Context<'_, '_>, unit: &Unit) -> bool {
    let mut told = Stack::new(context.elf.mode, context.frames, unit.range.start, true);
    let mut followed = Stack::followed(context.elf.mode);
    let mut decoder = decoder(context.elf.mode, unit.range.start, context.text.range(unit.range.clone()));
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        let flow = insn.flow_control();
        let disagrees = !followed.follow(&insn, flow) && followed.knows();
        if told.follow(&insn, flow) && !disagrees {
            return true;
        }
    }
    false
}

/// Marks the addresses of code that an instruction computes, and remembers those of data that may be tables.
fn mark_operands(context: &Context<'_, '_>, scanned: &Scanned, tables: &mut Tables, insn: &Instruction) {
    let text = context.text;
    for operand in 0..insn.op_count() {
        match insn.op_kind(operand) {
            OpKind::Memory => {
                if insn.memory_base() == Register::RIP {
                    let address = insn.ip_rel_memory_address();
                    if text.contains(address) {
                        scanned.taken.add(text, address);
                    }
                    tables.add_base(address);
                } else if insn.memory_displ_size() >= 4 {
                    tables.add_memory(insn);
                    if insn.memory_base() == Register::None || context.elf.is_fixed {
                        scanned.taken.add(text, insn.memory_displacement64());
                    }
                }
            }
            // `mov edi, function`, in code that is not position-independent.
            OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64 if context.elf.is_fixed => {
                scanned.taken.add(text, insn.immediate(operand));
            }
            _ => {}
        }
    }
}

/// Marks the addresses of code that stand in data, and what the dynamic linker changes.
fn mark_data(elf: &Elf<'_>, text: &Text<'_>, scanned: &Scanned) {
    for (_, target) in &elf.dynamic.stored {
        scanned.taken.add(text, *target);
    }
    for address in &elf.dynamic.relocated {
        let bytes = u64::from(elf.mode.word_bytes());
        if text.contains(*address) {
            (*address..address.saturating_add(bytes)).for_each(|byte| scanned.relocated.add(text, byte));
        }
    }
    if elf.is_fixed {
        let word_bytes = usize::try_from(elf.mode.word_bytes()).unwrap_or(8);
        for section in elf.sections.iter().filter(|section| section.is_loaded && !section.is_code) {
            let misaligned = usize::try_from(section.address % word_bytes as u64).unwrap_or(0);
            let skipped = (word_bytes - misaligned) % word_bytes;
            let words = section.data.get(skipped..).unwrap_or_default().chunks_exact(word_bytes);
            words.filter_map(|word| read_word(elf.mode, word)).for_each(|word| scanned.taken.add(text, word));
        }
    }
}
