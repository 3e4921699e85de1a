//! How a process is left as it was.
//!
//! Owns [`Footprint`], everything that was done to a process that the agent was injected into, and the steps of leaving it. All of them are for a time when every
//! thread stands still; between [`disarm`](Footprint::disarm) and [`lead_out`](Footprint::lead_out) threads may run for a while:
//!
//! 1. The code is as it was; whoever is in a stub is moved to the instruction that the stub's stands for. Nobody comes to the agent any more, but unwinders:
//!    what they have read from a slot that is hooked they cannot do without us.
//! 2. Whoever is in the agent leaves it soon. When nobody is: each slot that is hooked gets its return address back, whoever's it is and however long
//!    that sleeps; shadows say where they are. If anything else holds the address of the return code, it is an unwinder that has just read it: then slots are
//!    hooked again, and it goes on for a moment.
//! 3. Unwinders are led as they were, threads lose the pointers to their states, and everything is unmapped.
//!
//! Invariant: nothing is unmapped as long as anything may lead there (I6).

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt};

use trapline_abi::{
    agent::{SHADOW_ENTRIES, SHADOW_MAPPED, SHADOW_STATE_BITS},
    thread::{BLOCK_SHIFT, SHADOW_BYTES, SHADOW_RETURN, shadow_address},
};
use trapline_engine::{Addr, AddrRange};
use trapline_image::Write;
use trapline_process::quiesce::{OtherProcess, RangeSet};

use crate::{
    exec::Untraceable,
    inject::Gadgets,
    places::Places,
    remote::Remote,
    space::AgentAt,
    sys::{
        Tid,
        maps::{self, Mapping},
        memory::Memory,
        ptrace, spawn,
    },
    text,
};

/// What was done to a process.
#[derive(Clone, Debug)]
pub(crate) struct Footprint {
    /// Where the agent's entries are.
    pub(crate) agent: AgentAt,
    /// Where its code is, and everybody's stubs.
    pub(crate) code: Vec<AddrRange>,
    /// What is mapped beside shadows.
    pub(crate) mapped: Vec<AddrRange>,
    /// Edits of the program's code, but those that follow.
    pub(crate) writes: Vec<Write>,
    /// Those that lead unwinders through the agent.
    pub(crate) of_unwinders: Vec<Write>,
    /// Code of its own that makes system calls.
    pub(crate) gadgets: Gadgets,
}

/// Why a process cannot be left yet: a thread, and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Inside {
    /// The thread.
    pub(crate) tid: Tid,
    /// An address of ours that it is at, or comes back to.
    pub(crate) at: Addr,
}

const PAGE_BYTES: u64 = 4096;

/// Bytes of shadow for a block.
const BLOCK_SHADOW_BYTES: u64 = (SHADOW_BYTES / 8) << BLOCK_SHIFT;

impl Footprint {
    /// Takes edits of code back.
    pub(crate) fn disarm(&mut self, memory: &Memory) -> io::Result<()> {
        text::undo(memory, &mut self.writes)?;
        self.writes.clear();
        Ok(())
    }

    /// Whether a process has all of it mapped.
    pub(crate) fn is_mapped_in(&self, mappings: &[Mapping]) -> bool {
        !self.mapped.is_empty() && self.mapped.iter().all(|range| is_mapped(*range, mappings))
    }

    /// Forgets what was planned and is not mapped.
    pub(crate) fn keep_what_is_mapped(&mut self, mappings: &[Mapping]) {
        self.code.retain(|range| is_mapped(*range, mappings));
        self.mapped.retain(|range| is_mapped(*range, mappings));
    }

    /// Moves threads out of our code and takes the hooks from their returns. Returns who is still inside; if that is nobody, nothing leads to us any more.
    pub(crate) fn lead_out(&mut self, threads: &[Tid], memory: &Memory) -> io::Result<Vec<Inside>> {
        let ours = RangeSet::new(self.code.iter().copied());
        let mut places = None;
        let mut inside = Vec::new();
        for &tid in threads {
            let mut registers = ptrace::registers(tid)?;
            let pc = Addr::new(registers.rip);
            if !ours.contains(pc) {
                continue;
            }
            if self.holds_return_code(&registers) {
                inside.push(Inside { tid, at: pc });
                continue;
            }
            let slot = Addr::new(registers.rsp).offset(-8);
            let to = if pc == self.agent.return_code {
                Some(Addr::new(memory.read_word(shadow_of(slot))?))
            } else {
                if places.is_none() {
                    places = Some(Places::read(memory, &self.agent)?);
                }
                places.as_ref().and_then(|places| places.code_at(pc))
            };
            let Some(to) = to else {
                inside.push(Inside { tid, at: pc });
                continue;
            };
            registers.rip = to.value();
            ptrace::set_registers(tid, &registers)?;
        }
        let Some(&any) = threads.first().filter(|_| inside.is_empty()) else { return Ok(inside) };
        let slots = self.hooked_slots(any, memory)?;
        for (slot, return_address) in &slots {
            memory.write_word(*slot, *return_address)?;
        }
        inside.extend(self.inside(threads, &ours)?);
        if inside.is_empty() {
            text::undo(memory, &mut self.of_unwinders)?;
        } else {
            for (slot, _) in &slots {
                memory.write_word(*slot, self.agent.return_code.value())?;
            }
        }
        Ok(inside)
    }

    /// Whether a register has the address of the return code, or what an unwinder looks for then: the byte before it.
    fn holds_return_code(&self, registers: &libc::user_regs_struct) -> bool {
        let now = registers;
        let general = [
            now.r15, now.r14, now.r13, now.r12, now.rbp, now.rbx, now.r11, now.r10, now.r9, now.r8, now.rax, now.rcx,
            now.rdx, now.rsi, now.rdi,
        ];
        let return_code = self.agent.return_code;
        general.iter().any(|word| [return_code, return_code.offset(-1)].contains(&Addr::new(*word)))
    }

    /// Whether anything may still come back to us.
    fn inside(&self, threads: &[Tid], ours: &RangeSet) -> io::Result<Option<Inside>> {
        let AgentAt { return_code, walking, .. } = self.agent;
        // A word counts by the call before it.
        let words = RangeSet::new([return_code, walking].map(|at| AddrRange::new(at.offset(-1), 1)));
        let Some(&any) = threads.first() else { return Ok(None) };
        let process = OtherProcess::new(any)?;
        for &tid in threads {
            let registers = ptrace::registers(tid)?;
            if self.holds_return_code(&registers) {
                return Ok(Some(Inside { tid, at: return_code }));
            }
            if let Some(blocker) = process.blocker_of(tid, &registers, &words, ours) {
                return Ok(Some(Inside { tid, at: blocker.at }));
            }
        }
        Ok(None)
    }

    /// The blocks of stack that have a shadow.
    fn shadowed_blocks(&self, memory: &Memory) -> io::Result<Vec<u64>> {
        let table = memory.read_vec(self.agent.shadows, SHADOW_ENTRIES as usize * size_of::<u32>())?;
        let entries =
            table.chunks_exact(4).map(|bytes| bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)));
        let is_mapped = |entry: &u32| entry & ((1 << SHADOW_STATE_BITS) - 1) == SHADOW_MAPPED;
        let mut blocks: Vec<u64> =
            entries.filter(is_mapped).map(|entry| u64::from(entry >> SHADOW_STATE_BITS)).collect();
        blocks.sort_unstable();
        Ok(blocks)
    }

    /// Every slot that is hooked, and its return address.
    fn hooked_slots(&self, tid: Tid, memory: &Memory) -> io::Result<Vec<(Addr, u64)>> {
        let pages = File::open(format!("/proc/{tid}/pagemap"))?;
        let mut slots = Vec::new();
        for block in self.shadowed_blocks(memory)? {
            let shadow = Addr::new(shadow_address(block << BLOCK_SHIFT));
            let stack = Addr::new(block << BLOCK_SHIFT);
            let mut present = vec![0; usize::try_from(BLOCK_SHADOW_BYTES / PAGE_BYTES).unwrap_or(0) * 8];
            pages.read_exact_at(&mut present, shadow.value() / PAGE_BYTES * 8)?;
            for (page, entry) in present.chunks_exact(8).enumerate() {
                // Present, or in the swap (Documentation/admin-guide/mm/pagemap.rst).
                if entry[7] & 0xc0 == 0 {
                    continue;
                }
                let offset = page as u64 * PAGE_BYTES;
                let shadows = memory.read_vec(shadow.offset(offset.cast_signed()), 4096)?;
                self.slots_of_page(memory, stack.offset((offset / 2).cast_signed()), &shadows, &mut slots);
            }
        }
        Self::correct_contexts(&mut slots, memory);
        Ok(slots)
    }

    /// An unwinder may have read a slot, and have put what it read where a slot was that has long returned: there is a shadow, of that. Such a word is in
    /// libgcc's `_Unwind_Context`, `ra`, and the word before it is `cfa`, which says which slot was read.
    fn correct_contexts(slots: &mut [(Addr, u64)], memory: &Memory) {
        let known: HashMap<Addr, u64> = slots.iter().copied().collect();
        for (word, return_address) in slots {
            let Ok(cfa) = memory.read_word(word.offset(-8)) else { continue };
            if let Some(right) = known.get(&Addr::new(cfa).offset(-8)) {
                *return_address = *right;
            }
        }
    }

    /// The same, of the part of a stack that a page of shadows is for.
    fn slots_of_page(&self, memory: &Memory, stack: Addr, shadows: &[u8], slots: &mut Vec<(Addr, u64)>) {
        // A stack that is gone has no slots.
        let Ok(words) = memory.read_vec(stack, shadows.len() / 2) else { return };
        let word = |bytes: &[u8], at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        for (index, shadow) in shadows.chunks_exact(16).enumerate() {
            let return_address = word(shadow, usize::try_from(SHADOW_RETURN).unwrap_or(0));
            if return_address != 0 && word(&words, index * 8) == self.agent.return_code.value() {
                slots.push((stack.after(index * 8), return_address));
            }
        }
    }

    /// Has a stopped thread unmap everything. Nothing may lead there any more.
    pub(crate) fn unmap(&self, tid: Tid, remote: &mut Remote, memory: &Memory) -> io::Result<()> {
        let mut shadows: Vec<u64> =
            self.shadowed_blocks(memory)?.into_iter().map(|block| shadow_address(block << BLOCK_SHIFT)).collect();
        shadows.sort_unstable();
        for run in runs(&shadows, &maps::read(tid)?) {
            remote.unmap(run.start, run.len_bytes())?;
        }
        self.mapped.iter().try_for_each(|range| remote.unmap(range.start, range.len_bytes()))
    }
}

/// Takes everything out of a process that nobody comes back to.
pub(crate) fn withdraw(threads: &[Tid], footprint: &Footprint, memory: &Memory) -> Result<(), Untraceable> {
    for &tid in threads {
        let mut registers = ptrace::registers(tid)?;
        registers.gs_base = 0;
        ptrace::set_registers(tid, &registers)?;
    }
    let tid = worker(threads);
    let known = Some(footprint.gadgets).filter(|gadgets| gadgets.are_there(memory));
    let found = || Gadgets::find(memory, &maps::read(tid).ok()?, &footprint.code);
    let gadgets = known
        .or_else(found)
        .ok_or_else(|| Untraceable("there is no code in it that makes system calls; our memory stays".to_owned()))?;
    let mut remote = Remote::by_gadgets(tid, memory, gadgets)?;
    let unmapped = footprint.unmap(tid, &mut remote, memory);
    requeue(tid, &remote.finish()?);
    unmapped?;
    Ok(())
}

/// Signals that came to a thread that worked for us.
pub(crate) fn requeue(tid: Tid, signals: &[i32]) {
    for signal in signals {
        spawn::kill(tid, *signal);
    }
}

/// Whether a thread is one of the kernel's own in the process (`io_uring`), which never runs its code.
pub(crate) fn is_kernels(registers: &libc::user_regs_struct) -> bool {
    registers.rip == 0 && registers.rsp == 0
}

/// The thread that makes system calls for us: rather one whose own is simply made again.
pub(crate) fn worker(threads: &[Tid]) -> Tid {
    const ERESTART_RESTARTBLOCK: i64 = -516;
    let is_simple = |tid: &&Tid| {
        ptrace::registers(**tid).is_ok_and(|registers| {
            !is_kernels(&registers)
                && (registers.orig_rax.cast_signed() < 0 || registers.rax.cast_signed() != ERESTART_RESTARTBLOCK)
        })
    };
    threads.iter().find(is_simple).or(threads.first()).copied().unwrap_or(0)
}

/// Whether something is mapped everywhere in a range.
fn is_mapped(range: AddrRange, mappings: &[Mapping]) -> bool {
    let mut at = range.start;
    for mapping in mappings {
        if mapping.range.contains(at) {
            at = mapping.range.end;
        }
    }
    at >= range.end
}

/// The shadow of a slot.
fn shadow_of(slot: Addr) -> Addr {
    Addr::new(shadow_address(slot.value()) + SHADOW_RETURN)
}

/// Joins the shadows of blocks where nothing of others lies in between, so that few calls unmap them.
fn runs(shadows: &[u64], mappings: &[Mapping]) -> Vec<AddrRange> {
    let is_shadow = |at: u64| {
        let behind = shadows.partition_point(|start| *start <= at);
        shadows[..behind].last().is_some_and(|start| at - start < BLOCK_SHADOW_BYTES)
    };
    let is_free = |range: AddrRange| {
        let first = mappings.partition_point(|mapping| mapping.range.end <= range.start);
        let between = mappings[first..].iter().take_while(|mapping| mapping.range.start < range.end);
        between.into_iter().all(|mapping| {
            is_shadow(mapping.range.start.value()) && is_shadow(mapping.range.end.value().wrapping_sub(1))
        })
    };
    let mut runs: Vec<AddrRange> = Vec::new();
    for start in shadows {
        let (start, end) = (Addr::new(*start), Addr::new(start + BLOCK_SHADOW_BYTES));
        match runs.last_mut() {
            Some(run) if is_free(AddrRange { start: run.end, end: start }) => run.end = end,
            _ => runs.push(AddrRange { start, end }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadows_are_joined_up_to_what_is_others() {
        let mapping =
            |start: u64, end: u64| Mapping::planned(AddrRange { start: Addr::new(start), end: Addr::new(end) });
        let shadows = [0x1000_0000, 0x1080_0000, 0x1100_0000, 0x1120_0000];
        let ours = |start: u64| mapping(start, start + BLOCK_SHADOW_BYTES);
        let free = [ours(shadows[0]), ours(shadows[1]), mapping(shadows[2], shadows[3] + BLOCK_SHADOW_BYTES)];
        let range = |start: u64, end: u64| AddrRange { start: Addr::new(start), end: Addr::new(end) };
        assert_eq!(runs(&shadows, &free), [range(shadows[0], shadows[3] + BLOCK_SHADOW_BYTES)]);
        let between = [&free[..1], &[mapping(0x1070_0000, 0x1070_1000)], &free[1..]].concat();
        let two =
            [range(shadows[0], shadows[0] + BLOCK_SHADOW_BYTES), range(shadows[1], shadows[3] + BLOCK_SHADOW_BYTES)];
        assert_eq!(runs(&shadows, &between), two);
    }
}
