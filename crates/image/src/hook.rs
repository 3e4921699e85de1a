//! The call that `-pg -mfentry` has at the beginning of every function.
//!
//! Owns [`Hook`], which knows a call of `__fentry__`: a function that profilers have called first of all, that keeps what a function is entered with, and that
//! looks at the return address of who calls it. Such a function is armed behind the call, so that the profiler is called as it always was, from where it always was,
//! and the processor predicts its return. Neighbours: the tables say where the dynamic linker stores the address, [discovery](crate::discover) knows it if the file has
//! a `__fentry__` of its own; the [ladder](crate::plan) asks. Invariant: what is not known to be that function is none.

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::{
    discover::Candidate,
    elf::{ENTRY_HOOK, Elf},
    marks::Text,
    plan::endbr_bytes,
    scan::{branch_target, decoder},
};

/// See the module's text.
pub(crate) struct Hook<'s, 'a> {
    elf: &'s Elf<'a>,
    text: &'s Text<'a>,
    /// Where it is in the file itself.
    functions: Vec<u64>,
}

impl<'s, 'a> Hook<'s, 'a> {
    /// Looks for it in the file.
    pub(crate) fn find(elf: &'s Elf<'a>, text: &'s Text<'a>, candidates: &[Candidate<'_>]) -> Self {
        let is_it = |candidate: &&Candidate<'_>| candidate.names.iter().any(|name| name == ENTRY_HOOK);
        let functions = candidates.iter().filter(is_it).map(|candidate| candidate.address).collect();
        Self { elf, text, functions }
    }

    /// How many bytes the call of it takes, if that is the first instruction of `code`, which stands at `address`; 0 otherwise.
    pub(crate) fn call_bytes(&self, address: u64, code: &[u8]) -> usize {
        if self.functions.is_empty() && self.elf.dynamic.hook_places.is_empty() {
            return 0;
        }
        let insn = decoder(self.elf.mode, address, code).decode();
        let is_call_of_it = match insn.code() {
            Code::Call_rel32_32 | Code::Call_rel32_64 => branch_target(&insn).is_some_and(|target| self.is_at(target)),
            Code::Call_rm32 | Code::Call_rm64 => self.goes_through_place(&insn),
            _ => false,
        };
        if is_call_of_it { insn.len() } else { 0 }
    }

    /// Whether the code at `address` is it, or leads there.
    fn is_at(&self, address: u64) -> bool {
        let stub = self.text.from(address);
        let skipped = endbr_bytes(self.elf.mode, stub);
        let jump = decoder(self.elf.mode, address + skipped as u64, &stub[skipped..]).decode();
        let is_jump = matches!(jump.code(), Code::Jmp_rm32 | Code::Jmp_rm64);
        self.functions.contains(&address) || is_jump && self.goes_through_place(&jump)
    }

    /// Whether a branch goes where a word says that the dynamic linker fills in with the address.
    fn goes_through_place(&self, branch: &Instruction) -> bool {
        let is_plain = branch.op0_kind() == OpKind::Memory
            && branch.segment_prefix() == Register::None
            && branch.memory_index() == Register::None;
        let place = match branch.memory_base() {
            Register::RIP => branch.ip_rel_memory_address(),
            Register::None => branch.memory_displacement64(),
            _ => return false,
        };
        is_plain && self.elf.dynamic.hook_places.contains(&place)
    }
}
