//! A recorder and a program in one process: a pool made by hand, and stubs that call the agent's entries.
//!
//! Owns [`Pool`], which drains as the recorder does, and the functions of [`stub`]. The agent is linked in, so there is one pool at a time: [`Pool::new`]
//! holds a lock until the pool is dropped.
#![allow(dead_code, reason = "each test uses a part")]

use std::{
    arch::global_asm,
    collections::HashMap,
    ptr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use trapline_abi::{
    counters::{
        COUNTERS_AT, COUNTERS_BYTES, CountedFrame, Counter, CountersHeader, REGIONS, RegionHeader, region_offset,
    },
    pool::{self, CHUNK_BYTES, CHUNK_STRIDE_BYTES, ChunkHeader, OnFull, POOL_HEADER_BYTES, PoolHeader, state},
    record::{Event, decode},
    thread::Thread,
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Records in a chunk.
pub(crate) const CHUNK_RECORDS: usize = CHUNK_BYTES / 8;

/// A pool that this process has mapped, and that the agent in it uses.
#[derive(Debug)]
pub(crate) struct Pool {
    address: usize,
    chunk_count: usize,
    reserved: (usize, usize),
    /// Chunks that became full before their threads had filled them.
    ended_early: Mutex<Vec<usize>>,
    _lock: MutexGuard<'static, ()>,
}

// SAFETY: all that is behind the address is atomic; the lock stays with whoever drops the value.
unsafe impl Sync for Pool {}

impl Pool {
    /// An empty pool, which the agent is told of. This process is the recorder.
    pub(crate) fn new(chunk_count: usize, on_full: OnFull) -> Self {
        let lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let len_bytes = pool::pool_bytes(chunk_count) + CHUNK_STRIDE_BYTES;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), len_bytes, protection, flags, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        let address = (mapped as usize).next_multiple_of(CHUNK_STRIDE_BYTES);
        let pool = Self {
            address,
            chunk_count,
            reserved: (mapped as usize, len_bytes),
            ended_early: Mutex::default(),
            _lock: lock,
        };
        let header = pool.header();
        let count = u32::try_from(chunk_count).unwrap();
        header.chunk_count.store(count, Ordering::Relaxed);
        header.free_chunks.store(count, Ordering::Relaxed);
        header.on_full.store(on_full as u32, Ordering::Relaxed);
        header.recorder.store(std::process::id(), Ordering::Relaxed);
        trapline_agent::arch::config_pool().store(address, Ordering::SeqCst);
        pool
    }

    pub(crate) fn header(&self) -> &PoolHeader {
        // SAFETY: (1) mapped, aligned and large enough; (2) made of atomics.
        unsafe { &*(self.address as *const PoolHeader) }
    }

    pub(crate) fn chunk(&self, index: usize) -> &ChunkHeader {
        assert!(index < self.chunk_count);
        let at = self.address + POOL_HEADER_BYTES + index * size_of::<ChunkHeader>();
        // SAFETY: as in `header`.
        unsafe { &*(at as *const ChunkHeader) }
    }

    pub(crate) fn records(&self, index: usize) -> &[AtomicU64] {
        assert!(index < self.chunk_count);
        let at = self.address + pool::records_offset(self.chunk_count, index);
        // SAFETY: as in `header`.
        unsafe { std::slice::from_raw_parts(at as *const AtomicU64, CHUNK_RECORDS) }
    }

    pub(crate) fn state(&self, index: usize) -> u32 {
        state::of(self.chunk(index).state.load(Ordering::Acquire))
    }

    /// The chunk that a thread's position lies in.
    pub(crate) fn chunk_at(&self, position: u64) -> Option<usize> {
        pool::chunk_at(self.address as u64, self.chunk_count, position)
    }

    /// Everything that is in chunks which are not free, in each thread's order. Complains of what must not be: chunks out of order, chunks of one
    /// thread that are in use at once, words behind the end of what is in use.
    pub(crate) fn contents(&self) -> Result<Contents, String> {
        let mut chunks: Vec<(u32, u32, usize)> = Vec::new();
        let mut contents = Contents::default();
        for index in 0..self.chunk_count {
            let used = self.records(index).iter().filter(|word| word.load(Ordering::Acquire) != 0).count();
            match self.state(index) {
                state::FREE if used != 0 => return Err(format!("free chunk {index} has {used} records")),
                state::FREE => {}
                state::TAKEN if used == 0 => contents.unused += 1,
                _ => {
                    let chunk = self.chunk(index);
                    let [tid, sequence] = [&chunk.tid, &chunk.sequence].map(|word| word.load(Ordering::Relaxed));
                    chunks.push((tid, sequence, index));
                }
            }
        }
        chunks.sort_unstable();
        for pair in chunks.windows(2) {
            let [(tid, sequence, _), (next_tid, next_sequence, _)] = pair else { unreachable!() };
            let is_gap = tid == next_tid && sequence + 1 != *next_sequence;
            if is_gap && self.header().on_full.load(Ordering::Relaxed) != OnFull::Overwrite as u32 {
                return Err(format!("thread {tid}: chunk {next_sequence} follows {sequence}"));
            }
        }
        for (_, _, index) in chunks {
            contents.not_full += usize::from(self.state(index) != state::FULL);
            contents.add(self.records(index), self.state(index) == state::FULL);
        }
        let free = (0..self.chunk_count).filter(|index| self.state(*index) == state::FREE).count();
        contents.said_to_be_free = self.header().free_chunks.load(Ordering::Relaxed) as usize - free;
        Ok(contents)
    }

    /// What the recorder does: counts what is in full chunks, and frees them.
    pub(crate) fn drain(&self, into: &mut Contents) {
        let mut full: Vec<usize> = (0..self.chunk_count).filter(|index| self.state(*index) == state::FULL).collect();
        full.sort_unstable_by_key(|index| self.chunk(*index).sequence.load(Ordering::Relaxed));
        for index in full {
            if self.records(index).iter().any(|word| word.load(Ordering::Acquire) == 0)
                && !self.ended_early.lock().unwrap().contains(&index)
            {
                // An interrupted context has not written its record yet.
                continue;
            }
            into.add(self.records(index), false);
            self.ended_early.lock().unwrap().retain(|ended| *ended != index);
            self.free(index);
        }
        self.header().heartbeat.fetch_add(1, Ordering::Relaxed);
        self.header().now_tsc.store(trapline_agent::arch::tsc(), Ordering::Relaxed);
    }

    fn free(&self, index: usize) {
        for word in self.records(index) {
            word.store(0, Ordering::Relaxed);
        }
        let (header, chunk) = (self.header(), self.chunk(index));
        header.free_chunks.fetch_add(1, Ordering::Relaxed);
        let word = chunk.state.load(Ordering::Relaxed);
        chunk.state.store(state::with(word, state::FREE), Ordering::Release);
        header.freed.fetch_add(1, Ordering::SeqCst);
        if header.waiters.load(Ordering::SeqCst) != 0 {
            let word = (&raw const header.freed).cast::<u32>();
            // SAFETY: the word is an address for this call.
            unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
        }
    }

    /// Ends the chunks of a thread that has ended.
    pub(crate) fn end(&self, tid: u32) {
        for index in 0..self.chunk_count {
            let chunk = self.chunk(index);
            let word = chunk.state.load(Ordering::Acquire);
            if state::thread(word) == tid && matches!(state::of(word), state::ACTIVE | state::TAKEN) {
                self.ended_early.lock().unwrap().push(index);
                chunk.state.store(state::with(word, state::FULL), Ordering::Release);
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        trapline_agent::arch::config_pool().store(0, Ordering::SeqCst);
        trapline_agent::arch::config_forbidden().store(0, Ordering::SeqCst);
        // SAFETY: the mapping that `new` made; the agent has no address of it any more but in the states of threads, which start anew in each test.
        unsafe { libc::munmap(self.reserved.0 as *mut libc::c_void, self.reserved.1) };
    }
}

/// Counters that this process has mapped, and that the agent in it uses in place of its pool.
#[derive(Debug)]
pub(crate) struct Counters {
    address: usize,
    /// What is recorded beside.
    pub(crate) pool: Pool,
}

impl Counters {
    /// All zero; the agent is told of them.
    pub(crate) fn new() -> Self {
        // A handler may come where somebody has taken a chunk and not begun it.
        let pool = Pool::new(4, OnFull::Block);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), COUNTERS_BYTES, protection, flags, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        trapline_agent::arch::config_counters().store(mapped as usize, Ordering::SeqCst);
        Self { address: mapped as usize, pool }
    }

    /// Has the calls of these sites be recorded as well from now on.
    pub(crate) fn record(&self, sites: &[u32]) {
        for site in sites {
            self.header().selected[*site as usize / 64].fetch_or(1 << (site % 64), Ordering::SeqCst);
        }
        trapline_agent::arch::config_recorded().store(1, Ordering::SeqCst);
    }

    pub(crate) fn header(&self) -> &CountersHeader {
        // SAFETY: (1) mapped, aligned and large enough; (2) made of atomics.
        unsafe { &*(self.address as *const CountersHeader) }
    }

    /// Where the one region is that was taken, by this thread.
    pub(crate) fn region(&self, tid: u32) -> usize {
        let is_taken = |index: &usize| self.header().owners[*index].load(Ordering::Relaxed) != 0;
        let taken: Vec<usize> = (0..REGIONS).filter(is_taken).collect();
        assert_eq!(taken.len(), 1, "regions {taken:?}");
        assert_eq!(self.header().owners[taken[0]].load(Ordering::Relaxed), tid);
        region_offset(taken[0])
    }

    pub(crate) fn counter(&self, region: usize, site: usize) -> &Counter {
        // SAFETY: as in `header`.
        unsafe { &*((self.address + region + COUNTERS_AT + site * size_of::<Counter>()) as *const Counter) }
    }

    /// How many frames are open, at the first depths, and how deep the innermost one is said to be.
    pub(crate) fn open(&self, region: usize) -> (usize, u64) {
        // SAFETY: as in `header`.
        let header = unsafe { &*((self.address + region) as *const RegionHeader) };
        let frames = self.address + region + size_of::<RegionHeader>();
        // SAFETY: as in `header`.
        let frame = |depth: usize| unsafe { &*((frames + depth * size_of::<CountedFrame>()) as *const CountedFrame) };
        let open = (0..100).filter(|depth| frame(*depth).slot.load(Ordering::Relaxed) != 0).count();
        (open, header.depth.load(Ordering::Relaxed))
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        trapline_agent::arch::config_recorded().store(0, Ordering::SeqCst);
        trapline_agent::arch::config_counters().store(0, Ordering::SeqCst);
        // SAFETY: the mapping that `new` made; the agent has no address of it any more, as in the pool's `drop`.
        unsafe { libc::munmap(self.address as *mut libc::c_void, COUNTERS_BYTES) };
    }
}

/// What was found in chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// Calls by site.
    pub(crate) calls: HashMap<u32, u64>,
    pub(crate) exits: u64,
    pub(crate) unwinds: u64,
    /// Zero words in front of others, or in full chunks.
    pub(crate) holes: u64,
    /// Words that are no records.
    pub(crate) broken: u64,
    /// Chunks that were taken and not used.
    pub(crate) unused: usize,
    /// Chunks in use.
    pub(crate) not_full: usize,
    /// Chunks that are counted as free, and are not.
    pub(crate) said_to_be_free: usize,
}

impl Contents {
    pub(crate) fn records(&self) -> u64 {
        self.calls.values().sum::<u64>() + self.exits
    }

    fn add(&mut self, records: &[AtomicU64], is_full: bool) {
        let words: Vec<u64> = records.iter().map(|word| word.load(Ordering::Acquire)).collect();
        let used =
            if is_full { words.len() } else { words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1) };
        for word in &words[..used] {
            match decode(*word) {
                Some((Event::Enter { site } | Event::Point { site } | Event::Tail { site }, _)) => {
                    *self.calls.entry(site).or_default() += 1;
                }
                Some((Event::Exit { .. }, _)) => self.exits += 1,
                Some((Event::Unwind { .. }, _)) => self.unwinds += 1,
                None if *word == 0 => self.holes += 1,
                None => self.broken += 1,
            }
        }
    }
}

/// The calling thread's state.
pub(crate) fn thread() -> *mut Thread {
    trapline_agent::arch::thread()
}

/// The calling thread, as the agent sees it.
pub(crate) fn tid() -> u32 {
    // SAFETY: has no effect.
    u32::try_from(unsafe { libc::syscall(libc::SYS_gettid) }).unwrap()
}

/// A stub as the recorder writes it, whose entry hooks the return: the site's id, a jump to where the entry is jumped to, and the function.
#[macro_export]
macro_rules! hooked_stub {
    ($name:literal, $id:literal, $entry:literal, $function:literal) => {
        concat!(
            ".long ",
            $id,
            "\n.globl ",
            $name,
            "\n",
            $name,
            ":\n",
            ".byte 0xe9\n.long .L",
            $name,
            "_enter - .L",
            $name,
            "_off\n",
            ".L",
            $name,
            "_off:\njmp ",
            $function,
            "\n",
            ".L",
            $name,
            "_enter:\npush qword ptr [rip + .L",
            $name,
            "_word]\njmp ",
            $entry,
            "\n",
            ".pushsection .data.rel.ro.stubs,\"aw\",@progbits\n.p2align 3\n",
            ".L",
            $name,
            "_word: .quad .L",
            $name,
            "_off\n.popsection\n",
        )
    };
}

// The others call their entries.
global_asm!(
    ".pushsection .text.stubs,\"ax\",@progbits",
    "stub_ends: ret",
    // Jumps to site 2.
    "stub_jumps: jmp stub_two",
    hooked_stub!("stub_tail", "4", "trapline_enter", "stub_jumps"),
    // Calls itself, edi times.
    "calls_itself:\ntest edi, edi\njz 1f\npush rdi\ndec edi\ncall stub_recursive\npop rdi\n1: ret",
    hooked_stub!("stub_recursive", "5", "trapline_enter_keep_flags", "calls_itself"),
    hooked_stub!("stub_one", "1", "trapline_enter", "stub_ends"),
    hooked_stub!("stub_two", "2", "trapline_enter", "stub_ends"),
    r#"
    .long 3
    .globl stub_point
stub_point:
    call trapline_point
    ret
    # rdi calls of the function in rsi
    .globl call_often
call_often:
    push rbx
    push r12
    sub rsp, 8
    mov rbx, rdi
    mov r12, rsi
2:
    test rbx, rbx
    jz 3f
    call r12
    dec rbx
    jmp 2b
3:
    add rsp, 8
    pop r12
    pop rbx
    ret
    .popsection
    "#
);

unsafe extern "C" {
    /// A function of site 1, whose return is seen.
    pub(crate) fn stub_one();
    /// The same of site 2.
    pub(crate) fn stub_two();
    /// A function of site 3, whose return is not seen.
    pub(crate) fn stub_point();
    /// A function of site 4 that jumps to that of site 2.
    pub(crate) fn stub_tail();
    /// A function of site 5 that calls itself so many times.
    pub(crate) fn stub_recursive(times: u64);
    fn call_often(times: u64, function: unsafe extern "C" fn());
}

/// Calls a function of the above so many times.
pub(crate) fn calls(times: u64, function: unsafe extern "C" fn()) {
    // SAFETY: (1) the functions above keep to the calling convention; (2) the agent changes nothing, which is what is tested.
    unsafe { call_often(times, function) }
}

/// In a thread of its own, whose state is all zero at first.
pub(crate) fn in_thread<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    std::thread::scope(|scope| scope.spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}
