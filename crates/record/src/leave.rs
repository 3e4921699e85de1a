//! How a process is left as it was.
//!
//! Owns [`Footprint`], everything that was done to a process that the agent was injected into, and the steps of leaving it. All of them are for a time when every
//! thread stands still; between [`disarm`](Footprint::disarm) and [`lead_out`](Footprint::lead_out) threads may run for a while:
//!
//! 1. The code is as it was; whoever is in a stub is moved to the instruction that the stub's stands for. Nobody comes to the agent any more, but unwinders:
//!    what they have read from a slot that is hooked they cannot do without us.
//! 2. Whoever is in the agent leaves it soon, and whoever is in an unwinder's own code, or in what it calls to find unwind information, leaves that, or comes
//!    to where the agent has moved it on and is held there: then it has read nothing of ours that it has not been told the meaning of. What it has read
//!    could not be told from a slot, as it may lie where one was. When nobody is inside, each slot that is hooked gets its return address back, whoever's it
//!    is and however long that sleeps; shadows say where they are. What unwinders keep for later gets it, too.
//! 3. Unwinders are led as they were, threads lose the pointers to their states, and everything is unmapped.
//!
//! Invariant: nothing is unmapped as long as anything may lead there (I6).

use std::{collections::HashMap, fs::File, io, mem::offset_of, os::unix::fs::FileExt};

use trapline_abi::agent::{Config, Detour};
use trapline_engine::{Addr, AddrRange, Mode};
use trapline_image::Write;
use trapline_process::quiesce::{OtherProcess, RangeSet, ThreadRegisters};

use crate::{
    divert::{ENDBR_BYTES, begins_with_endbr},
    exec::Untraceable,
    inject::Gadgets,
    places::Places,
    remote::Remote,
    shadows::{self, Block},
    space::AgentAt,
    sys::{
        Tid,
        maps::{self, Mapping},
        memory::Memory,
        ptrace, spawn, width,
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
    /// Where the program's unwinders are.
    pub(crate) unwinders: Vec<AddrRange>,
    /// Edits of the program's code, but those that follow.
    pub(crate) writes: Vec<Write>,
    /// Those that lead unwinders through the agent.
    pub(crate) of_unwinders: Vec<Write>,
    /// Code of its own that makes system calls.
    pub(crate) gadgets: Gadgets,
    /// Where nobody may go on any more once the code is as it was, as a live patch's jump is there, and where to go on instead.
    pub(crate) instead: Vec<(Addr, Addr)>,
}

/// Why a process cannot be left yet: a thread, and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Inside {
    /// The thread.
    pub(crate) tid: Tid,
    /// An address of ours that it is at, or comes back to.
    pub(crate) at: Addr,
}

/// Where a thread is while a process is left.
enum Place {
    /// In our code, and cannot be moved out of it yet.
    Inside,
    /// In an unwinder that knows only the program's addresses, at the beginning of its search for unwind information.
    Asked,
    /// In the program's code.
    Outside,
}

/// Some words of libgcc's `_Unwind_Context`, from its `cfa` on (unwind-dw2.c).
struct Context;

impl Context {
    /// `cfa`.
    const FRAME_ADDRESS: usize = 0;
    /// `ra`.
    const ADDRESS: usize = 1;
    /// `bases.func`: the beginning of the function that was asked about.
    const FUNCTION: usize = 5;
    /// `flags`.
    const FLAGS: usize = 6;
    const WORDS: usize = 7;

    /// `EXTENDED_CONTEXT_BIT`, which is always set: the last but one of a word.
    fn is_extended(mode: Mode) -> u64 {
        1 << (mode.bitness() - 2)
    }

    /// `SIGNAL_FRAME_BIT`.
    fn is_signal(mode: Mode) -> u64 {
        1 << (mode.bitness() - 1)
    }
}

const PAGE_BYTES: u64 = 4096;

impl Footprint {
    /// Takes edits of code back.
    pub(crate) fn disarm(&mut self, memory: &Memory) -> io::Result<()> {
        text::undo(memory, &mut self.writes)?;
        // A jump that begins before such an instruction covers what is behind it.
        let covered = self.writes.iter().filter(|edit| begins_with_endbr(&edit.new));
        self.instead.extend(covered.map(|edit| (edit.at.after(ENDBR_BYTES), edit.at)));
        self.writes.clear();
        Ok(())
    }

    /// Whether a process has all of it mapped.
    pub(crate) fn is_mapped_in(&self, mappings: &[Mapping]) -> bool {
        !self.mapped.is_empty() && self.mapped.iter().all(|range| is_mapped(*range, mappings))
    }

    /// Whether it has the agent's data mapped, which tell what else is there.
    pub(crate) fn has_data_in(&self, mappings: &[Mapping]) -> bool {
        is_mapped(AddrRange::new(self.agent.config, size_of::<Config>() as u64), mappings)
    }

    /// Forgets what was planned and is not mapped.
    pub(crate) fn keep_what_is_mapped(&mut self, mappings: &[Mapping]) {
        self.code.retain(|range| is_mapped(*range, mappings));
        self.mapped.retain(|range| is_mapped(*range, mappings));
    }

    /// If nobody is inside, moves threads out of our code, takes the hooks from their returns and leads unwinders as they were, and nothing leads to us any
    /// more. Otherwise changes nothing, and returns who is.
    pub(crate) fn lead_out(&mut self, threads: &[Tid], memory: &Memory) -> io::Result<Vec<Inside>> {
        let Some(&any) = threads.first() else { return Ok(Vec::new()) };
        let mappings = maps::read(any)?;
        let mut places = None;
        let mut inside = Vec::new();
        let (mut stacks, mut outside, mut moved) = (Vec::with_capacity(threads.len()), Vec::new(), Vec::new());
        for &tid in threads {
            let mut registers = ptrace::registers(tid)?;
            self.let_begin(tid, &mut registers, memory)?;
            let at = Addr::new(registers.rip);
            stacks.push(Addr::new(registers.rsp));
            let place = self.led_out(&mut registers, memory, &mut places)?;
            if registers.rip != at.value() {
                moved.push((tid, registers));
            }
            match place {
                Place::Inside => inside.push(Inside { tid, at }),
                Place::Asked => {}
                Place::Outside => outside.push((tid, registers)),
            }
        }
        inside.extend(self.inside(&outside, memory, &mappings)?);
        if !inside.is_empty() {
            return Ok(inside);
        }
        // A thread that goes on where its function begins may have been through the entry: nothing may lead there any more.
        for (tid, registers) in moved {
            ptrace::set_registers(tid, &registers)?;
        }
        let slots = self.hooked_slots(any, memory)?;
        let contexts = self.contexts(&stacks, memory, &mappings, &slots);
        for (word, return_address) in slots.iter().chain(&contexts) {
            memory.write_pointer(self.agent.mode, *word, *return_address)?;
        }
        text::undo(memory, &mut self.of_unwinders)?;
        Ok(inside)
    }

    /// Has threads wait that come to unwinders, or lets them go on.
    pub(crate) fn hold_unwinders(&self, memory: &Memory, is_leaving: bool) -> io::Result<()> {
        memory.write_word(self.agent.config.after(offset_of!(Config, is_leaving)), is_leaving.into())
    }

    /// Where a thread with these registers is, which become what it has outside of our code if it can be moved out of it.
    fn led_out(
        &self,
        registers: &mut ThreadRegisters,
        memory: &Memory,
        places: &mut Option<Places>,
    ) -> io::Result<Place> {
        let mut pc = Addr::new(registers.rip);
        if !self.code.iter().any(|code| code.contains(pc)) {
            return Ok(Place::Outside);
        }
        let has_asked = self.agent.asked.contains(pc);
        if has_asked {
            pc = find_fde(registers, memory)?;
        }
        let to = if pc == self.agent.return_code {
            shadows::return_of(&self.agent, memory, Addr::new(registers.rsp))?
        } else {
            if places.is_none() {
                *places = Some(Places::read(memory, &self.agent)?);
            }
            let instead = |to: Addr| self.instead.iter().find(|(at, _)| *at == to).map_or(to, |(_, instead)| *instead);
            places.as_ref().and_then(|places| places.code_at(pc)).map(instead)
        };
        let Some(to) = to else { return Ok(Place::Inside) };
        registers.rip = to.value();
        Ok(if has_asked { Place::Asked } else { Place::Outside })
    }

    /// Has a thread go on that is held for an unwinder that has just begun: that asks about itself first, and has the return address of its caller somewhere.
    fn let_begin(&self, tid: Tid, registers: &mut ThreadRegisters, memory: &Memory) -> io::Result<()> {
        let has_asked = self.agent.asked.contains(Addr::new(registers.rip));
        if has_asked && self.is_in_unwinder(Addr::new(first_argument(registers, memory)?)) {
            registers.rip = find_fde(registers, memory)?.value();
            ptrace::set_registers(tid, registers)?;
        }
        Ok(())
    }

    fn is_in_unwinder(&self, at: Addr) -> bool {
        self.unwinders.iter().any(|unwinder| unwinder.contains(at))
    }

    /// Who of these threads, none of which is in our code, comes back to us, or may be in an unwinder that has read a slot that is hooked.
    fn inside(
        &self,
        threads: &[(Tid, ThreadRegisters)],
        memory: &Memory,
        mappings: &[Mapping],
    ) -> io::Result<Vec<Inside>> {
        let mut inside = Vec::new();
        // A word counts by the call before it.
        let walking = RangeSet::new([AddrRange::new(self.agent.walking.offset(-1), 1)]);
        let Some(&(any, _)) = threads.first() else { return Ok(inside) };
        let process = OtherProcess::new(any)?;
        let contexts = RangeSet::new(self.code.iter().chain(&self.unwinders).copied());
        for (tid, registers) in threads {
            let blocker = process.blocker_of(*tid, registers, &walking, &contexts).map(|blocker| blocker.at);
            let at = || self.may_work_for_unwinder(registers, memory, mappings).then_some(Addr::new(registers.rip));
            inside.extend(blocker.or_else(at).map(|at| Inside { tid: *tid, at }));
        }
        Ok(inside)
    }

    /// Whether a stopped thread may be in what an unwinder calls while it holds an address that it has read from a slot: the search for unwind information,
    /// which the C library and the dynamic linker do the first part of. It is for a moment only, unless it waits for a lock.
    fn may_work_for_unwinder(&self, registers: &ThreadRegisters, memory: &Memory, mappings: &[Mapping]) -> bool {
        /// What the frames below an unwinder's need at most: the dynamic linker saves all vector registers while it looks for a function.
        const NEAR_BYTES: u64 = 8192;
        if self.unwinders.is_empty() || (width::call_of(registers) >= 0 && !waits_for_lock(registers)) {
            return false;
        }
        let Some(object) = mappings.iter().find(|mapping| mapping.range.contains(Addr::new(registers.rip))) else {
            return false;
        };
        if !is_of_c_library(object) && !self.unwinders.iter().any(|unwinder| object.range.contains(unwinder.start)) {
            return false;
        }
        let sp = registers.rsp;
        let end = end_of_mapping(Addr::new(sp), mappings);
        let len_bytes = end.map_or(0, |end| NEAR_BYTES.min(end.value() - sp));
        let Ok(stack) = memory.read_vec(Addr::new(sp), usize::try_from(len_bytes).unwrap_or(0)) else { return false };
        words_of(self.agent.mode, &stack).any(|word| self.is_in_unwinder(Addr::new(word).offset(-1)))
    }

    /// Every slot that is hooked, and its return address.
    fn hooked_slots(&self, tid: Tid, memory: &Memory) -> io::Result<Vec<(Addr, u64)>> {
        let pages = File::open(format!("/proc/{tid}/pagemap"))?;
        let mut slots = Vec::new();
        let ratio = shadows::BYTES as u64 / u64::from(self.agent.mode.word_bytes());
        for Block { stack, shadow } in shadows::blocks(&self.agent, memory)? {
            let len_bytes = shadow.len_bytes();
            let mut present = vec![0; usize::try_from(len_bytes / PAGE_BYTES).unwrap_or(0) * 8];
            pages.read_exact_at(&mut present, shadow.start.value() / PAGE_BYTES * 8)?;
            for (page, entry) in present.chunks_exact(8).enumerate() {
                // Present, or in the swap (Documentation/admin-guide/mm/pagemap.rst).
                if entry[7] & 0xc0 == 0 {
                    continue;
                }
                let offset = page as u64 * PAGE_BYTES;
                let shadows = memory.read_vec(shadow.start.offset(offset.cast_signed()), 4096)?;
                self.slots_of_page(memory, stack.offset((offset / ratio).cast_signed()), &shadows, &mut slots);
            }
        }
        Ok(slots)
    }

    /// What unwinders have, on stacks in use from here up, of slots that are hooked: each word, and the return address that belongs there. The first phase of an exception
    /// is a walk over a copy of what the unwinder begins the second one with, where it itself returns to. It has asked about itself then.
    fn contexts(
        &self,
        stacks: &[Addr],
        memory: &Memory,
        mappings: &[Mapping],
        slots: &[(Addr, u64)],
    ) -> Vec<(Addr, u64)> {
        let mut contexts = Vec::new();
        if self.unwinders.is_empty() {
            return contexts;
        }
        let mode = self.agent.mode;
        let word_bytes = i64::from(mode.word_bytes());
        let returns: HashMap<Addr, u64> = slots.iter().copied().collect();
        for &stack in stacks {
            let Some(end) = end_of_mapping(stack, mappings) else { continue };
            let Ok(bytes) = memory.read_vec(stack, usize::try_from(end.distance_from(stack)).unwrap_or(0)) else {
                continue;
            };
            let words: Vec<u64> = words_of(mode, &bytes).collect();
            for (index, context) in words.windows(Context::WORDS).enumerate() {
                if context[Context::ADDRESS] != self.agent.return_code.value()
                    || context[Context::FLAGS] & !Context::is_signal(mode) != Context::is_extended(mode)
                    || !self.is_in_unwinder(Addr::new(context[Context::FUNCTION]))
                {
                    continue;
                }
                let slot = Addr::new(context[Context::FRAME_ADDRESS]).offset(-word_bytes);
                if let Some(return_address) = returns.get(&slot) {
                    let at = stack.after((index + Context::ADDRESS) * mode.word_bytes() as usize);
                    contexts.push((at, *return_address));
                }
            }
        }
        contexts
    }

    /// The same, of the part of a stack that a page of shadows is for.
    fn slots_of_page(&self, memory: &Memory, stack: Addr, shadows: &[u8], slots: &mut Vec<(Addr, u64)>) {
        let mode = self.agent.mode;
        let word_bytes = mode.word_bytes() as usize;
        let (all, _) = shadows.as_chunks::<{ shadows::BYTES }>();
        // A stack that is gone has no slots.
        let Ok(bytes) = memory.read_vec(stack, all.len() * word_bytes) else { return };
        for ((index, shadow), word) in all.iter().enumerate().zip(words_of(mode, &bytes)) {
            let slot = stack.after(index * word_bytes);
            if let Some(return_address) = shadows::return_in(mode, slot, shadow)
                && word == self.agent.return_code.value()
            {
                slots.push((slot, return_address));
            }
        }
    }

    /// Has a stopped thread unmap everything. Nothing may lead there any more.
    pub(crate) fn unmap(&self, tid: Tid, remote: &mut Remote, memory: &Memory) -> io::Result<()> {
        let mappings = maps::read(tid)?;
        let blocks = if self.has_data_in(&mappings) { shadows::blocks(&self.agent, memory)? } else { Vec::new() };
        let mut shadows: Vec<AddrRange> = blocks.into_iter().map(|block| block.shadow).collect();
        shadows.sort_unstable_by_key(|shadow| shadow.start);
        for run in runs(&shadows, &mappings) {
            remote.unmap(run.start, run.len_bytes())?;
        }
        self.mapped.iter().try_for_each(|range| remote.unmap(range.start, range.len_bytes()))
    }
}

/// Takes everything out of a process that nobody comes back to.
pub(crate) fn withdraw(threads: &[Tid], footprint: &Footprint, memory: &Memory) -> Result<(), Untraceable> {
    for &tid in threads {
        let mut registers = ptrace::registers(tid)?;
        if !is_kernels(&registers) {
            width::give_pointer(tid, &mut registers, None)?;
        }
    }
    let tid = worker(threads);
    let known = Some(footprint.gadgets).filter(|gadgets| gadgets.are_there(memory));
    let found = || Gadgets::find(footprint.agent.mode, memory, &maps::read(tid).ok()?, &footprint.code);
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
pub(crate) fn is_kernels(registers: &ThreadRegisters) -> bool {
    registers.rip == 0 && registers.rsp == 0
}

/// The thread that makes system calls for us: rather one whose own is simply made again.
pub(crate) fn worker(threads: &[Tid]) -> Tid {
    const ERESTART_RESTARTBLOCK: i64 = -516;
    let is_simple = |tid: &&Tid| {
        ptrace::registers(**tid).is_ok_and(|registers| {
            !is_kernels(&registers)
                && (width::call_of(&registers) < 0 || width::result_of(&registers) != ERESTART_RESTARTBLOCK)
        })
    };
    threads.iter().find(is_simple).or(threads.first()).copied().unwrap_or(0)
}

/// Where a thread goes on that is held with these registers: the stub of `_Unwind_Find_FDE`.
fn find_fde(registers: &ThreadRegisters, memory: &Memory) -> io::Result<Addr> {
    let detour = match width::mode_of(registers) {
        Mode::Bits32 => Addr::new(registers.rdx),
        Mode::Bits64 => Addr::new(registers.r10),
    };
    memory.read_word(detour.after(offset_of!(Detour, function))).map(Addr::new)
}

/// The first argument of a function that a thread is at the beginning of.
fn first_argument(registers: &ThreadRegisters, memory: &Memory) -> io::Result<u64> {
    let mode = width::mode_of(registers);
    match mode {
        Mode::Bits32 => memory.read_pointer(mode, Addr::new(registers.rsp).after(4)),
        Mode::Bits64 => Ok(registers.rdi),
    }
}

/// The words that lie in some bytes.
fn words_of(mode: Mode, bytes: &[u8]) -> impl Iterator<Item = u64> {
    let word_bytes = mode.word_bytes() as usize;
    bytes.chunks_exact(word_bytes).map(|word| word.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
}

/// Whether the system call that a thread is in is one by which the C library waits for a lock of its own.
fn waits_for_lock(registers: &ThreadRegisters) -> bool {
    let command = libc::c_int::try_from(width::second_argument(registers) & 0x7f).unwrap_or(-1);
    let futex = width::call_number(width::mode_of(registers), libc::SYS_futex);
    u64::try_from(width::call_of(registers)).ok() == futex && command == libc::FUTEX_WAIT
}

/// Whether an object that is mapped there is the C library or the dynamic linker.
fn is_of_c_library(mapping: &Mapping) -> bool {
    let name = mapping.path.file_name().unwrap_or_default().to_string_lossy();
    ["libc.", "libc-", "ld-", "ld."].iter().any(|prefix| name.starts_with(prefix))
}

fn end_of_mapping(at: Addr, mappings: &[Mapping]) -> Option<Addr> {
    mappings.iter().find(|mapping| mapping.range.contains(at)).map(|mapping| mapping.range.end)
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

/// Joins the shadows of blocks where nothing of others lies in between, so that few calls unmap them.
fn runs(shadows: &[AddrRange], mappings: &[Mapping]) -> Vec<AddrRange> {
    let is_shadow = |at: Addr| {
        let behind = shadows.partition_point(|shadow| shadow.start <= at);
        shadows[..behind].last().is_some_and(|shadow| shadow.contains(at))
    };
    let is_free = |range: AddrRange| {
        let first = mappings.partition_point(|mapping| mapping.range.end <= range.start);
        let between = mappings[first..].iter().take_while(|mapping| mapping.range.start < range.end);
        between.into_iter().all(|mapping| is_shadow(mapping.range.start) && is_shadow(mapping.range.end.offset(-1)))
    };
    let mut runs: Vec<AddrRange> = Vec::new();
    for shadow in shadows {
        match runs.last_mut() {
            Some(run) if is_free(AddrRange { start: run.end, end: shadow.start }) => run.end = shadow.end,
            _ => runs.push(*shadow),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shadows_are_joined_up_to_what_is_others() {
        const BLOCK_SHADOW_BYTES: u64 = 2 << 20;
        let mapping =
            |start: u64, end: u64| Mapping::planned(AddrRange { start: Addr::new(start), end: Addr::new(end) });
        let shadows = [0x1000_0000, 0x1080_0000, 0x1100_0000, 0x1120_0000];
        let ours = |start: u64| mapping(start, start + BLOCK_SHADOW_BYTES);
        let free = [ours(shadows[0]), ours(shadows[1]), mapping(shadows[2], shadows[3] + BLOCK_SHADOW_BYTES)];
        let blocks = shadows.map(|start| AddrRange::new(Addr::new(start), BLOCK_SHADOW_BYTES));
        let range = |start: u64, end: u64| AddrRange { start: Addr::new(start), end: Addr::new(end) };
        assert_eq!(runs(&blocks, &free), [range(shadows[0], shadows[3] + BLOCK_SHADOW_BYTES)]);
        let between = [&free[..1], &[mapping(0x1070_0000, 0x1070_1000)], &free[1..]].concat();
        let two =
            [range(shadows[0], shadows[0] + BLOCK_SHADOW_BYTES), range(shadows[1], shadows[3] + BLOCK_SHADOW_BYTES)];
        assert_eq!(runs(&blocks, &between), two);
    }
}
