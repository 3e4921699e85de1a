//! May a thread still be inside this code? The question that every commit under a stop depends on.
//!
//! [`Inspector::blocker_of`] answers it for one stopped thread. It has no unwind tables to trust, so it looks at everything that could
//! bring the thread back, and counts as inside whatever it cannot rule out:
//!
//! 1. the program counter, and the system call instruction that a restart goes back to;
//! 2. every word of the live stack, from the stack pointer to the end of its memory, or to the thread pointer: a thread library puts its
//!    record at the stack's very end, and what is behind it may be anything. Any of the words may be the return address of a call, which
//!    ends where the word points to: a word that points to the first byte of a range returns to what lies before it;
//! 3. every stack that a signal made the thread leave: the frame's interrupted program counter, and then that stack like the first.
//!
//! The 128 bytes below a 64-bit stack pointer (the red zone) hold data at most: a return address is only ever above it.
//!
//! Not seen, and so the caller's to check: contexts that no register and no stack refers to, such as a suspended coroutine's, and
//! return addresses that trapline itself moved elsewhere (shadow stacks, slots).

use trapline_engine::{Addr, AddrRange, Mode};

use super::{
    memory_map::MemoryMap,
    ranges::RangeSet,
    sigframe::{FrameKind, Interrupted},
};
use crate::sys::{
    memory::{self, Memory},
    procfs::Tid,
};

/// How much stack one check reads at most, over all threads: what takes some 20 ms. A thousand threads in ordinary depth have 10 MB.
///
/// What exceeds it is a stack in memory of another purpose, such as a coroutine's in a large heap, which has no end that we know.
const BUDGET_BYTES: u64 = 32 << 20;

/// How much stack is read at once. Most live stacks are shorter.
const CHUNK_BYTES: usize = 16 << 10;

/// Stacks of one thread: more than a handful means that garbage was taken for signal frames.
const MAX_STACKS: usize = 16;

/// Answers remembered about words that point to code. Threads share most of their return addresses.
const MEMO_SLOTS: usize = 512;

/// Why code cannot be changed now: a thread that may be inside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blocker {
    /// The thread.
    pub tid: Tid,
    /// The address at which the thread is, or to which a call inside the forbidden ranges may return. For [`How::Unscannable`] the stack
    /// pointer at which the search had to end.
    pub at: Addr,
    /// What says so.
    pub how: How,
}

/// What ties a thread to an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// The program counter, or the system call that the thread is going to restart.
    Pc,
    /// A word on one of the thread's stacks that may be a return address.
    StackWord {
        /// Where the word is.
        slot: Addr,
    },
    /// The program counter that a signal frame will restore.
    SignalFrame {
        /// Where the frame begins.
        frame: Addr,
    },
    /// Nothing: a stack could not be searched to its end, because it is not mapped, or is too large, or not one.
    Unscannable,
}

/// The registers that the check starts from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    pub(super) pc: Addr,
    pub(super) sp: Addr,
    /// See [`Registers::restarted_syscall`](crate::sys::ptrace::Registers::restarted_syscall).
    pub(super) restart: Option<Addr>,
    /// Where thread-local storage ends. If that is in the memory of a stack, the stack ends before it.
    pub(super) thread_pointer: Option<Addr>,
    /// Below it, the words of the stack that the thread is on are not looked at.
    pub(super) floor: Option<Addr>,
}

/// Whether a code address is a signal's return stub, and of which frame.
#[derive(Clone, Copy, Default)]
struct Memo {
    addr: Addr,
    kind: Option<FrameKind>,
}

/// Checks threads against one set of ranges during one stop.
pub(super) struct Inspector<'a, M> {
    mode: Mode,
    memory: &'a M,
    map: &'a MemoryMap,
    forbidden: &'a RangeSet,
    /// Where neither the thread nor what a signal interrupted may be; usually the same ranges.
    contexts: &'a RangeSet,
    budget_bytes: u64,
    memos: [Memo; MEMO_SLOTS],
    chunk: [u8; CHUNK_BYTES],
}

/// The stacks of one thread: those that were searched, then those that are still to be.
struct Stacks {
    pointers: [Addr; MAX_STACKS],
    known: usize,
    /// What was searched, each from its pointer to its end.
    searched: [AddrRange; MAX_STACKS],
    begun: usize,
}

impl Stacks {
    fn starting_at(sp: Addr) -> Self {
        let mut pointers = [Addr::default(); MAX_STACKS];
        pointers[0] = sp;
        Self { pointers, known: 1, searched: [AddrRange::default(); MAX_STACKS], begun: 0 }
    }

    /// Adds a stack pointer, unless its stack is searched already. Returns whether there was room.
    fn add(&mut self, sp: Addr) -> bool {
        let searched = self.searched[..self.begun].iter().any(|range| range.contains(sp) || range.end == sp);
        if searched || self.pointers[..self.known].contains(&sp) {
            return true;
        }
        let Some(free) = self.pointers.get_mut(self.known) else { return false };
        *free = sp;
        self.known += 1;
        true
    }

    /// The next pointer to search from. [`begin`](Self::begin) says what that covers.
    fn next(&mut self) -> Option<Addr> {
        self.pointers[..self.known].get(self.begun).copied()
    }

    fn begin(&mut self, range: AddrRange) {
        self.searched[self.begun] = range;
        self.begun += 1;
    }
}

impl<'a, M: Memory> Inspector<'a, M> {
    /// An inspector with a whole budget.
    pub(super) fn new(mode: Mode, memory: &'a M, map: &'a MemoryMap, forbidden: &'a RangeSet) -> Self {
        Self {
            mode,
            memory,
            map,
            forbidden,
            contexts: forbidden,
            budget_bytes: BUDGET_BYTES,
            memos: [Memo::default(); MEMO_SLOTS],
            chunk: [0; CHUNK_BYTES],
        }
    }

    /// Other ranges for the threads themselves, and for what signals interrupted, than for the words of stacks.
    pub(super) fn with_contexts(self, contexts: &'a RangeSet) -> Self {
        Self { contexts, ..self }
    }

    /// Why thread `tid` may be inside, or `None` if it is certainly not.
    pub(super) fn blocker_of(&mut self, tid: Tid, context: Context) -> Option<Blocker> {
        let found = |(at, how)| Blocker { tid, at, how };
        if let Some(at) =
            [Some(context.pc), context.restart].into_iter().flatten().find(|pc| self.contexts.contains(*pc))
        {
            return Some(found((at, How::Pc)));
        }
        let mut stacks = Stacks::starting_at(context.sp);
        if let Some((kind, frame)) = FrameKind::being_left(self.mode, context.pc, context.sp, self.memory)
            && let Some(blocker) = self.follow_frame(kind, frame, &mut stacks)
        {
            return Some(found(blocker));
        }
        while let Some(sp) = stacks.next() {
            if let Some(blocker) = self.search_stack(sp, context, &mut stacks) {
                return Some(found(blocker));
            }
        }
        None
    }

    /// Looks at each word of the stack from `sp` up.
    fn search_stack(&mut self, sp: Addr, context: Context, stacks: &mut Stacks) -> Option<(Addr, How)> {
        let Some(mut live) = self.map.live_stack(sp) else { return Some((sp, How::Unscannable)) };
        // The kernel joins adjacent mappings of the same kind, so the memory behind a thread's stack may well be the heap, full of
        // addresses of code. The stack of the process's first thread has its record elsewhere, and is never joined.
        if let Some(thread_pointer) = context.thread_pointer.filter(|pointer| live.contains(*pointer)) {
            live.end = thread_pointer;
        }
        let word_bytes = self.mode.word_bytes() as usize;
        let misalignment = |addr: Addr| addr.value() % word_bytes as u64;
        // Code that misaligns its stack pointer may push return addresses anywhere.
        let step_bytes = if misalignment(live.start) == 0 { word_bytes } else { 1 };
        // The floor says something about the stack that the thread is on, and about no other.
        let floor = context.floor.filter(|floor| sp == context.sp && live.contains(*floor));
        let start = floor.map_or(live.start, |floor| floor.offset(-misalignment(floor).cast_signed()).max(live.start));
        stacks.begin(AddrRange { start, end: live.end });
        let mut at = start;
        loop {
            let left = usize::try_from(live.end.distance_from(at)).unwrap_or(0);
            if left < word_bytes {
                return None;
            }
            let want = left.min(CHUNK_BYTES);
            let count = self.memory.read(at, &mut self.chunk[..want]);
            if count < word_bytes {
                // A stack has no holes: memory that cannot be read is its end, unless it is all there is.
                return (at == start).then_some((sp, How::Unscannable));
            }
            let Some(budget_bytes) = self.budget_bytes.checked_sub(count as u64) else {
                return Some((sp, How::Unscannable));
            };
            self.budget_bytes = budget_bytes;
            let mut offset = 0;
            while offset + word_bytes <= count {
                let slot = memory::further(at, offset);
                let word = self.word_in_chunk(offset);
                // It is the call before a return address that is inside or not: a function may end in a call that does not return.
                if self.forbidden.contains(word.offset(-1)) {
                    return Some((word, How::StackWord { slot }));
                }
                if let Some(kind) = self.frame_left_through(word)
                    && let Some(blocker) = self.follow_frame(kind, slot, stacks)
                {
                    return Some(blocker);
                }
                offset += step_bytes;
            }
            at = memory::further(at, offset);
        }
    }

    /// The word at an offset of the chunk that holds all of it.
    fn word_in_chunk(&self, offset: usize) -> Addr {
        let bytes = &self.chunk[offset..];
        // Loads of a fixed length: this runs for every word of every stack.
        Addr::new(match self.mode {
            Mode::Bits64 => bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)),
            Mode::Bits32 => bytes.first_chunk().map_or(0, |word| u32::from_le_bytes(*word).into()),
        })
    }

    /// The kind of signal frame that returning to `word` leaves, if it is a return stub's address.
    fn frame_left_through(&mut self, word: Addr) -> Option<FrameKind> {
        if !self.map.is_executable(word) {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
        let memo = &mut self.memos[word.value() as usize % MEMO_SLOTS];
        if memo.addr != word {
            *memo = Memo { addr: word, kind: FrameKind::returned_to(self.mode, word, self.memory) };
        }
        memo.kind
    }

    /// Checks the context that a signal frame will restore, and notes its stack.
    fn follow_frame(&self, kind: FrameKind, frame: Addr, stacks: &mut Stacks) -> Option<(Addr, How)> {
        let Interrupted { pc, sp } = kind.interrupted(frame, self.memory)?;
        if self.contexts.contains(pc) {
            return Some((pc, How::SignalFrame { frame }));
        }
        if stacks.add(sp) { None } else { Some((sp, How::Unscannable)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{maps::MapsLine, memory::fake::FakeMemory};

    const MODES: [Mode; 2] = [Mode::Bits32, Mode::Bits64];
    /// Somewhere in code, outside of everything forbidden.
    const ELSEWHERE: Addr = Addr::new(0x1000);
    const FORBIDDEN: AddrRange = AddrRange { start: Addr::new(0x1800), end: Addr::new(0x1805) };
    const INSIDE: Addr = Addr::new(0x1804);
    /// Where the signal return stub lies.
    const STUB: Addr = Addr::new(0x1400);
    const STACK: Addr = Addr::new(0x10_0000);
    const OTHER_STACK: Addr = Addr::new(0x20_0000);
    const STACK_BYTES: u16 = 0x8000;
    const CHUNK: i64 = CHUNK_BYTES.cast_signed() as i64;

    struct World {
        mode: Mode,
        kind: FrameKind,
        map: MemoryMap,
        memory: FakeMemory,
        forbidden: RangeSet,
    }

    impl World {
        /// Code with one signal return stub in it, and two stacks of zeros.
        fn new(mode: Mode, kind: FrameKind) -> Self {
            let mut map = MemoryMap::empty().unwrap();
            for line in [
                "1000-2000 r-xp 0 fe:00 9 /program",
                "ff000-100000 ---p 0 00:00 0",
                "100000-108000 rw-p 0 00:00 0",
                "200000-208000 rw-p 0 00:00 0",
            ] {
                map.push(MapsLine::parse(line.as_bytes()).unwrap()).unwrap();
            }
            let mut memory = FakeMemory::default();
            for (base, len) in [(ELSEWHERE, 0x1000_u16), (STACK, STACK_BYTES), (OTHER_STACK, STACK_BYTES)] {
                memory.add(base, vec![0; len.into()]);
            }
            memory.write(STUB, kind.stub_code());
            Self { mode, kind, map, memory, forbidden: RangeSet::new([FORBIDDEN]) }
        }

        fn put(&mut self, at: Addr, word: Addr) {
            self.memory.write(at, &word.value().to_le_bytes()[..self.mode.word_bytes() as usize]);
        }

        /// Builds a signal frame at the given offset of a stack, as the kernel would.
        fn put_frame(&mut self, stack: Addr, offset: i64, interrupted: Interrupted) -> Addr {
            let frame = stack.offset(offset + self.kind.alignment());
            self.put(frame, STUB);
            for (offset, word) in self.kind.context(interrupted) {
                self.put(frame.offset(offset), word);
            }
            frame
        }

        fn check(&self, context: Context) -> Option<How> {
            let mut inspector = Inspector::new(self.mode, &self.memory, &self.map, &self.forbidden);
            let blocker = inspector.blocker_of(7, context)?;
            assert_eq!(blocker.tid, 7);
            match blocker.how {
                How::Unscannable => {}
                How::StackWord { .. } => assert!(FORBIDDEN.contains(blocker.at.offset(-1)), "{blocker:?}"),
                How::Pc | How::SignalFrame { .. } => assert!(FORBIDDEN.contains(blocker.at), "{blocker:?}"),
            }
            Some(blocker.how)
        }
    }

    fn at(pc: Addr, sp: Addr) -> Context {
        Context { pc, sp, restart: None, thread_pointer: None, floor: None }
    }

    fn worlds() -> impl Iterator<Item = World> {
        FrameKind::ALL.into_iter().map(|(mode, kind)| World::new(mode, kind))
    }

    #[test]
    fn a_thread_elsewhere_with_a_clean_stack_is_outside() {
        for world in worlds() {
            assert_eq!(world.check(at(ELSEWHERE, STACK)), None);
            assert_eq!(world.check(at(FORBIDDEN.end, STACK)), None, "right behind the range");
        }
    }

    #[test]
    fn the_program_counter_and_the_restarted_instruction_count() {
        for world in worlds() {
            assert_eq!(world.check(at(INSIDE, STACK)), Some(How::Pc));
            let restarting = Context { restart: Some(INSIDE), ..at(INSIDE.offset(2), STACK) };
            assert_eq!(world.check(restarting), Some(How::Pc));
            assert_eq!(world.check(Context { restart: None, ..restarting }), None);
        }
    }

    #[test]
    fn every_live_word_counts_and_no_dead_one() {
        for mut world in worlds() {
            let word_bytes = i64::from(world.mode.word_bytes());
            let last = i64::from(STACK_BYTES) - word_bytes;
            for offset in [0, word_bytes, CHUNK - word_bytes, CHUNK, last] {
                let slot = STACK.offset(offset);
                world.put(slot, INSIDE);
                assert_eq!(world.check(at(ELSEWHERE, STACK)), Some(How::StackWord { slot }));
                assert_eq!(world.check(at(ELSEWHERE, slot)), Some(How::StackWord { slot }));
                assert_eq!(world.check(at(ELSEWHERE, slot.offset(word_bytes))), None, "below the stack pointer");
                world.put(slot, Addr::default());
            }
        }
    }

    #[test]
    fn a_return_address_belongs_to_the_call_before_it() {
        for mut world in worlds() {
            world.put(STACK, FORBIDDEN.start);
            assert_eq!(world.check(at(ELSEWHERE, STACK)), None, "a call that ends where the range begins");
            for inside in [FORBIDDEN.start.offset(1), FORBIDDEN.end] {
                world.put(STACK, inside);
                assert_eq!(world.check(at(ELSEWHERE, STACK)), Some(How::StackWord { slot: STACK }));
            }
            assert_eq!(world.check(at(FORBIDDEN.start, STACK)), Some(How::Pc));
        }
    }

    #[test]
    fn a_misaligned_stack_pointer_finds_words_at_any_address() {
        for mut world in worlds() {
            for offset in [1, 2, 3, 1001, CHUNK - 1] {
                let slot = STACK.offset(offset);
                world.put(slot, INSIDE);
                assert_eq!(world.check(at(ELSEWHERE, STACK.offset(1))), Some(How::StackWord { slot }));
                world.put(slot, Addr::default());
            }
        }
    }

    #[test]
    fn an_empty_or_overflowed_stack_is_searched_and_an_unmapped_one_blocks() {
        for mut world in worlds() {
            let top = STACK.offset(STACK_BYTES.into());
            assert_eq!(world.check(at(ELSEWHERE, top)), None);
            assert_eq!(world.check(at(ELSEWHERE, Addr::new(0x30_0000))), Some(How::Unscannable));
            let in_guard = STACK.offset(-8);
            assert_eq!(world.check(at(ELSEWHERE, in_guard)), None);
            world.put(STACK, INSIDE);
            assert_eq!(world.check(at(ELSEWHERE, in_guard)), Some(How::StackWord { slot: STACK }));
        }
    }

    #[test]
    fn a_signal_frame_leads_to_the_interrupted_code() {
        for mut world in worlds() {
            let frame = world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: INSIDE, sp: STACK });
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), Some(How::SignalFrame { frame }));
            assert_eq!(world.check(at(ELSEWHERE, STACK)), None, "a thread on the other stack");
            world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: ELSEWHERE, sp: STACK });
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), None, "interrupted elsewhere");
        }
    }

    #[test]
    fn a_signal_frame_leads_to_the_interrupted_stack() {
        for mut world in worlds() {
            let slot = STACK.offset(0x40);
            world.put(slot, INSIDE);
            world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: ELSEWHERE, sp: STACK });
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), Some(How::StackWord { slot }));
            world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: ELSEWHERE, sp: slot.offset(8) });
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), None, "the word is dead");
        }
    }

    #[test]
    fn a_thread_in_the_return_stub_is_still_in_its_frame() {
        for mut world in worlds() {
            let frame = world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: INSIDE, sp: STACK });
            for &(offset, above_frame) in world.kind.boundaries() {
                let context = at(STUB.offset(offset.into()), frame.offset(above_frame.into()));
                assert_eq!(world.check(context), Some(How::SignalFrame { frame }), "{:?} + {offset}", world.kind);
            }
            let past_the_return_address = frame.offset(world.mode.word_bytes().into());
            assert_eq!(world.check(at(ELSEWHERE, past_the_return_address.offset(0x200))), None, "not in the stub");
        }
    }

    #[test]
    fn a_stub_at_the_very_beginning_of_its_mapping_is_recognised() {
        for mut world in worlds() {
            world.memory.write(ELSEWHERE, world.kind.stub_code());
            let frame = world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: INSIDE, sp: STACK });
            let past_the_return_address = frame.offset(world.mode.word_bytes().into());
            assert_eq!(world.check(at(ELSEWHERE, past_the_return_address)), Some(How::SignalFrame { frame }));
        }
    }

    #[test]
    fn words_that_only_look_like_frames_lead_nowhere() {
        for mut world in worlds() {
            let word_bytes = i64::from(world.mode.word_bytes());
            let interrupted = Interrupted { pc: ELSEWHERE, sp: Addr::new(0x30_0000) };
            let frame = world.put_frame(OTHER_STACK, 0x100, interrupted);
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), Some(How::Unscannable), "its stack is not mapped");
            // The kernel never builds a frame at another alignment.
            world.put(frame, Addr::default());
            world.put(frame.offset(word_bytes), STUB);
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), None);
        }
    }

    #[test]
    fn frames_that_refer_to_each_other_end() {
        for mut world in worlds() {
            world.put_frame(OTHER_STACK, 0x100, Interrupted { pc: ELSEWHERE, sp: STACK });
            world.put_frame(STACK, 0x100, Interrupted { pc: ELSEWHERE, sp: OTHER_STACK });
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), None);
            // More stacks than a thread can have: garbage, which must not count as searched.
            for index in (0..).take(MAX_STACKS + 1) {
                let sp = STACK.offset(i64::from(STACK_BYTES) - 8 * index);
                world.put_frame(OTHER_STACK, 0x400 * (index + 1), Interrupted { pc: ELSEWHERE, sp });
            }
            assert_eq!(world.check(at(ELSEWHERE, OTHER_STACK)), Some(How::Unscannable));
        }
    }

    #[test]
    fn the_floor_hides_the_callers_own_frames_only() {
        for mut world in worlds() {
            let slot = STACK.offset(0x100);
            world.put(slot, INSIDE);
            let check = |sp, floor| world.check(Context { floor: Some(floor), ..at(ELSEWHERE, sp) });
            let (below, above) = (slot, slot.offset(8));
            assert_eq!(check(STACK, below), Some(How::StackWord { slot }));
            assert_eq!(check(STACK, above), None);
            // Any local's address will do, and does not make the search look at other words than without it.
            assert_eq!(check(STACK, below.offset(3)), Some(How::StackWord { slot }));
            assert_eq!(check(STACK, above.offset(1)), None);
            // On another stack the floor means nothing.
            assert_eq!(check(STACK, OTHER_STACK.offset(8)), Some(How::StackWord { slot }));
            assert_eq!(check(slot.offset(8), STACK), None, "a dead word");
        }
    }

    #[test]
    fn a_stack_ends_before_the_threads_record() {
        for mut world in worlds() {
            let slot = STACK.offset(0x100);
            world.put(slot, INSIDE);
            let check = |sp, pointer| world.check(Context { thread_pointer: Some(pointer), ..at(ELSEWHERE, sp) });
            assert_eq!(check(STACK, slot), None);
            assert_eq!(check(STACK, slot.offset(8)), Some(How::StackWord { slot }));
            assert_eq!(check(slot, STACK), Some(How::StackWord { slot }), "a record below the stack says nothing");
            assert_eq!(check(STACK, OTHER_STACK), Some(How::StackWord { slot }), "nor does one elsewhere");
        }
    }

    #[test]
    fn a_hole_ends_a_stack_and_an_unreadable_one_blocks() {
        for mode in MODES {
            let kind = FrameKind::ALL.into_iter().find(|(other, _)| *other == mode).unwrap().1;
            let mut world = World::new(mode, kind);
            world.memory = FakeMemory::default();
            assert_eq!(world.check(at(ELSEWHERE, STACK)), Some(How::Unscannable));
            world.memory.add(STACK, vec![0; 0x1000]);
            assert_eq!(world.check(at(ELSEWHERE, STACK)), None, "a guard inside of the mapping");
        }
    }

    #[test]
    fn a_stack_without_end_exceeds_the_budget() {
        for mode in MODES {
            let kind = FrameKind::ALL.into_iter().find(|(other, _)| *other == mode).unwrap().1;
            let world = World::new(mode, kind);
            let mut inspector = Inspector::new(mode, &world.memory, &world.map, &world.forbidden);
            inspector.budget_bytes = STACK_BYTES.into();
            assert_eq!(inspector.blocker_of(1, at(ELSEWHERE, STACK)), None);
            let second = inspector.blocker_of(2, at(ELSEWHERE, OTHER_STACK));
            assert_eq!(second, Some(Blocker { tid: 2, at: OTHER_STACK, how: How::Unscannable }));
        }
    }
}
