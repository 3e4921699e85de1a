//! Who leaves a process as it was when the recorder cannot any more.
//!
//! Owns [`Guard`]: a child of the recorder that sleeps at the end of a pipe, and is told of every process that the agent is injected into before anything is
//! changed there. The kernel lets a recorder's processes go when it dies, whatever it dies of, and closes the pipe. Then the guard stops each of them and leaves
//! it as the recorder would have: by the same [`Footprint`]. It holds no memory of a target, traces nobody meanwhile, and adds nothing to a target. If it is
//! killed with the recorder, targets run on untraced, as those that were launched. Invariant: the guard ends when the recorder does, and when all is left.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write as _},
    mem::offset_of,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use trapline_abi::{agent::INJECTED_THREAD_OFFSET, pool::PoolHeader};
use trapline_engine::{Addr, AddrRange, Mode, insn::InsnBytes};
use trapline_image::Write;
use trapline_process::quiesce::stop_process;

use crate::{
    agent::Agent,
    arm,
    divert::Amended,
    drain::SpaceId,
    inject::Gadgets,
    leave::{self, Footprint},
    space::ThreadPointer,
    sys::{Tid, maps, memory::Memory, ptrace, spawn},
};

/// The guard, as the recorder sees it. What cannot be told it is not told: then the recorder is all there is.
#[derive(Debug)]
pub(crate) struct Guard {
    pid: Tid,
    pipe: Mutex<File>,
}

const HOLD: u64 = 1;
const LET_GO: u64 = 2;
const DONE: u64 = 3;
const AMEND: u64 = 4;

/// How long threads may take to stand still.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long it is tried to leave a process, and the time between two attempts at first.
const PERSISTENCE: Duration = Duration::from_mins(2);
const PAUSE: Duration = Duration::from_millis(1);

impl Guard {
    /// Starts it.
    pub(crate) fn start() -> io::Result<Self> {
        let (pid, pipe) = spawn::fork_reader(watch)?;
        Ok(Self { pid, pipe: Mutex::new(pipe) })
    }

    /// Tells it what is about to be done to a process.
    pub(crate) fn hold(&self, id: SpaceId, pid: Tid, footprint: &Footprint) {
        // The agent's code comes first.
        let base = footprint.code.first().map_or(0, |code| code.start.value());
        let mode = footprint.agent.mode;
        let mut words = vec![u64::from(id.0), u64::from(pid.cast_unsigned()), u64::from(mode.bitness()), base];
        words.extend([footprint.gadgets.syscall_ret.value(), footprint.gadgets.sigreturn.value()]);
        for ranges in [&footprint.code, &footprint.mapped, &footprint.unwinders] {
            put_ranges(&mut words, ranges);
        }
        for writes in [&footprint.writes, &footprint.of_unwinders] {
            put_writes(&mut words, writes);
        }
        self.send(HOLD, &words);
    }

    /// Tells it that edits are others now.
    pub(crate) fn amend(&self, id: SpaceId, amended: &Amended) {
        let mut words = vec![u64::from(id.0)];
        put_writes(&mut words, &amended.gone);
        put_writes(&mut words, &amended.come);
        self.send(AMEND, &words);
    }

    /// The process is left, or has ended.
    pub(crate) fn let_go(&self, id: SpaceId) {
        self.send(LET_GO, &[u64::from(id.0)]);
    }

    fn send(&self, kind: u64, words: &[u64]) {
        let all = [kind, words.len() as u64].into_iter().chain(words.iter().copied());
        let bytes: Vec<u8> = all.flat_map(u64::to_le_bytes).collect();
        if let Ok(mut pipe) = self.pipe.lock() {
            let _ = pipe.write_all(&bytes);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.send(DONE, &[]);
        spawn::wait_for_end(self.pid);
    }
}

fn put_ranges(words: &mut Vec<u64>, ranges: &[AddrRange]) {
    words.push(ranges.len() as u64);
    words.extend(ranges.iter().flat_map(|range| [range.start.value(), range.end.value()]));
}

fn put_writes(words: &mut Vec<u64>, writes: &[Write]) {
    words.push(writes.len() as u64);
    for write in writes {
        words.push(write.at.value());
        words.extend(packed(&write.expected));
        words.extend(packed(&write.new));
    }
}

/// The bytes of an instruction and their count, in two words.
fn packed(bytes: &InsnBytes) -> [u64; 2] {
    let mut all = [0_u8; 16];
    all[..bytes.len()].copy_from_slice(bytes);
    all[15] = u8::try_from(bytes.len()).unwrap_or(0);
    let word = |at: usize| all[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    [word(0), word(8)]
}

fn unpacked(words: [u64; 2]) -> InsnBytes {
    let [first, second] = words.map(u64::to_le_bytes);
    let all = [first, second].concat();
    InsnBytes::new(&all[..usize::from(all[15]).min(15)])
}

/// Words of a message, from the front.
struct Words<'a>(&'a [u64]);

impl Words<'_> {
    fn next(&mut self) -> u64 {
        let (first, rest) = self.0.split_first().map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first
    }

    fn ranges(&mut self) -> Vec<AddrRange> {
        let count = self.next();
        let range = |_| AddrRange { start: Addr::new(self.next()), end: Addr::new(self.next()) };
        (0..count).map(range).collect()
    }

    fn writes(&mut self) -> Vec<Write> {
        let count = self.next();
        let write = |_| Write {
            at: Addr::new(self.next()),
            expected: unpacked([self.next(), self.next()]),
            new: unpacked([self.next(), self.next()]),
        };
        (0..count).map(write).collect()
    }
}

/// A process that is held.
#[derive(Debug)]
struct Held {
    pid: Tid,
    footprint: Footprint,
}

fn read_held(words: &mut Words<'_>) -> Option<Held> {
    let pid = Tid::try_from(words.next()).ok()?;
    let mode = if words.next() == u64::from(Mode::Bits32.bitness()) { Mode::Bits32 } else { Mode::Bits64 };
    let agent = Agent::injected(mode)?;
    let mut agent = arm::agent_at(mode, &agent, Addr::new(words.next()), ThreadPointer::Given).ok()?;
    agent.thread_offset = INJECTED_THREAD_OFFSET.cast_signed();
    let gadgets = Gadgets { syscall_ret: Addr::new(words.next()), sigreturn: Addr::new(words.next()), mode };
    let (code, mapped, unwinders) = (words.ranges(), words.ranges(), words.ranges());
    let (writes, of_unwinders) = (words.writes(), words.writes());
    let instead = Vec::new();
    Some(Held { pid, footprint: Footprint { agent, code, mapped, unwinders, writes, of_unwinders, gadgets, instead } })
}

fn read_message(pipe: &mut File) -> Option<(u64, Vec<u64>)> {
    let mut head = [0; 16];
    pipe.read_exact(&mut head).ok()?;
    let word = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let mut bytes = vec![0; usize::try_from(word(8)).ok()?.checked_mul(8)?];
    pipe.read_exact(&mut bytes).ok()?;
    let words = bytes.chunks_exact(8).map(|bytes| bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)));
    Some((word(0), words.collect()))
}

/// The guard's life.
fn watch(mut pipe: File) {
    let mut held = BTreeMap::new();
    while let Some((kind, words)) = read_message(&mut pipe) {
        let mut words = Words(&words);
        let id = words.next();
        match kind {
            HOLD => {
                held.extend(read_held(&mut words).map(|one| (id, one)));
            }
            AMEND => {
                if let Some(Held { footprint, .. }) = held.get_mut(&id) {
                    let amended = Amended { gone: words.writes(), come: words.writes() };
                    amended.apply(&mut footprint.writes);
                    amended.apply(&mut footprint.of_unwinders);
                }
            }
            LET_GO => drop(held.remove(&id)),
            _ => return,
        }
    }
    // The recorder is gone.
    let mut pids: Vec<Tid> = held.values().map(|held| held.pid).collect();
    for held in held.values() {
        leave(held.pid, held.footprint.clone());
    }
    // Children that were started meanwhile have a copy of everything.
    loop {
        let copies = copies_of(&held, &pids);
        if copies.is_empty() {
            return;
        }
        for (pid, id) in copies {
            if let Some(held) = held.get(&id) {
                leave(pid, held.footprint.clone());
            }
            pids.push(pid);
        }
    }
}

/// Processes that have mapped what one of ours has, and which.
fn copies_of(held: &BTreeMap<u64, Held>, known: &[Tid]) -> Vec<(Tid, u64)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<Tid>().ok());
    let new = pids.filter(|pid| !known.contains(pid) && *pid != std::process::id().cast_signed());
    let copy = |pid: Tid| {
        let mappings = maps::read(pid).ok()?;
        let has_all = |held: &Held| held.footprint.is_mapped_in(&mappings);
        held.iter().find(|(_, held)| has_all(held)).map(|(id, _)| (pid, *id))
    };
    new.filter_map(copy).collect()
}

/// Leaves a process, as soon as nobody is in the agent.
fn leave(pid: Tid, mut footprint: Footprint) {
    let started = Instant::now();
    let mut pause = PAUSE;
    while started.elapsed() < PERSISTENCE {
        let Ok(memory) = Memory::open(pid) else { return };
        let (left, _) = stop_process(pid, PATIENCE, |threads, _| try_to_leave(threads, &mut footprint, &memory));
        match left {
            Ok(Ok(true)) => return,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return,
            _ => {}
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// One attempt, while its threads stand still.
fn try_to_leave(threads: &[Tid], footprint: &mut Footprint, memory: &Memory) -> io::Result<bool> {
    let Some(&any) = threads.first() else { return Ok(true) };
    let mappings = maps::read(any)?;
    footprint.keep_what_is_mapped(&mappings);
    if footprint.mapped.is_empty() {
        return Ok(true);
    }
    // The recorder was mapping it, or unmapping it already: nothing leads there.
    if !footprint.has_data_in(&mappings) {
        return withdraw(threads, footprint, memory);
    }
    let pool = memory.read_word(footprint.agent.config)?;
    if pool != 0 {
        // Whoever waits for room goes on.
        memory.write(Addr::new(pool).after(offset_of!(PoolHeader, closed)), &1_u32.to_le_bytes())?;
    }
    footprint.disarm(memory)?;
    if !footprint.lead_out(threads, memory)?.is_empty() {
        footprint.hold_unwinders(memory, true)?;
        return Ok(false);
    }
    withdraw(threads, footprint, memory)
}

fn withdraw(threads: &[Tid], footprint: &Footprint, memory: &Memory) -> io::Result<bool> {
    for tid in threads {
        ptrace::tell_system_calls(*tid)?;
    }
    leave::withdraw(threads, footprint, memory).map_err(|reason| io::Error::other(reason.0))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_come_through_the_pipe_as_they_were() {
        for bytes in [&[0xe9, 1, 2, 3, 4][..], &[0x90], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]] {
            assert_eq!(*unpacked(packed(&InsnBytes::new(bytes))), *bytes);
        }
    }
}
