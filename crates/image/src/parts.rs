//! Functions, and what only looks like one.
//!
//! Owns the decision: compilers place parts of functions that are rarely executed elsewhere, with unwind information of their own and, in a stripped file,
//! nothing that says what they are. They are entered by jumps, with live registers, flags and, in a function without a frame, a stack that is in use
//! below the stack pointer: nothing may be hooked there. Neighbours: [discovery](crate::discover) and the [scan](crate::scan) have the evidence, the
//! [ladder](crate::plan) asks. Invariant: in doubt it is a part.

use iced_x86::{FlowControl, Instruction};

use crate::{
    NoFunction,
    discover::Candidate,
    frames::Cfa,
    plan::{Evidence, pc_thunk_at},
    scan::{branch_target, decoder},
};

impl Evidence<'_, '_> {
    /// Why a candidate is no function.
    pub(crate) fn is_no_function(&self, candidate: &Candidate<'_>) -> Option<NoFunction> {
        let (text, scanned, address) = (self.text, self.scanned, candidate.address);
        let is_called = scanned.called.contains(text, address);
        let frame = candidate.frame;
        if frame.is_some_and(|frame| frame.is_signal) {
            return Some(NoFunction::SignalReturn);
        }
        if pc_thunk_at(self.elf.mode, text.from(address)).is_some() {
            return Some(NoFunction::PcThunk);
        }
        if candidate.is_named_part() {
            return (!is_called).then_some(NoFunction::PartName);
        }
        if candidate.is_certain {
            return None;
        }
        if frame.is_some_and(|frame| frame.cfa != Cfa::at_entry(self.elf.mode)) {
            return Some(NoFunction::FrameAtEntry);
        }
        let is_known = is_called || scanned.taken.contains(text, address) || !candidate.names.is_empty();
        let is_jumped_to = scanned.outside.contains(text, address) || scanned.listed.contains(text, address);
        if is_known || !is_jumped_to {
            return None;
        }
        // A function that is never called, but jumped to at the ends of others, is no part. GCC makes no conditional jumps of calls, and parts are
        // where conditional jumps lead.
        let by_condition = scanned.conditional.contains(text, address) || scanned.listed.contains(text, address);
        (by_condition || !self.leaves_as_functions_do(candidate)).then_some(NoFunction::OnlyJumpedTo)
    }

    /// Whether a candidate returns, or jumps to functions; parts jump back to the middle of theirs, or never come back.
    fn leaves_as_functions_do(&self, candidate: &Candidate<'_>) -> bool {
        let range = candidate.address..candidate.end();
        let mut leaves = false;
        for insn in &mut decoder(self.elf.mode, range.start, self.text.range(range.clone())) {
            leaves |= matches!(insn.flow_control(), FlowControl::Return | FlowControl::IndirectBranch);
            if let Some(target) = jump_out(&insn, &range) {
                let is_entry =
                    self.scanned.unit_at(target).is_some_and(|unit| self.scanned.units[unit].candidate.is_some());
                let is_plt = self.text.contains(target) && self.is_plt(target);
                if !is_entry && !is_plt {
                    return false;
                }
                leaves = true;
            }
        }
        leaves
    }

    fn is_plt(&self, address: u64) -> bool {
        let sections = self.elf.sections.iter().filter(|section| section.is_code && section.name.starts_with(b".plt"));
        sections.map(|section| section.address..section.end()).any(|range| range.contains(&address))
    }

    /// Addresses of functions whose parts elsewhere look at the return address.
    pub(crate) fn readers(&self, candidates: &[Candidate<'_>]) -> Vec<u64> {
        let mut readers = Vec::new();
        for candidate in candidates {
            if !self.looks_at_return_address(candidate) || self.is_no_function(candidate).is_none() {
                continue;
            }
            // They jump back to the function, if they ever leave.
            let range = candidate.address..candidate.end();
            for insn in &mut decoder(self.elf.mode, range.start, self.text.range(range.clone())) {
                if let Some(target) = jump_out(&insn, &range) {
                    let index = self.scanned.units.partition_point(|unit| unit.range.start <= target);
                    readers.extend(index.checked_sub(1).map(|index| self.scanned.units[index].range.start));
                }
            }
        }
        readers
    }

    /// Whether any of the code of a candidate looks at the return address.
    pub(crate) fn looks_at_return_address(&self, candidate: &Candidate<'_>) -> bool {
        let first = self.scanned.units.partition_point(|unit| unit.range.start < candidate.address);
        let units = self.scanned.units[first..].iter().zip(&self.scanned.facts[first..]);
        units.take_while(|(unit, _)| unit.range.start < candidate.end()).any(|(_, facts)| facts.reads_return_address)
    }
}

/// Where a direct jump leads, if that is outside of `range`.
fn jump_out(insn: &Instruction, range: &std::ops::Range<u64>) -> Option<u64> {
    let target = branch_target(insn).filter(|target| !range.contains(target));
    target.filter(|_| insn.flow_control() != FlowControl::Call)
}
