//! Programs that forbid themselves system calls: seccomp's strict mode and filters.
//!
//! Owns [`forbidden_by`], which asks a filter about the agent's calls as the kernel would, [`blocks_to_map`], what of a process may become a stack, and
//! [`Hook`], which leads the C library's functions that switch a sandbox on to the agent. Upstream: the agent asks when it sees such a call coming, the
//! [tracer](crate::tracer) stops the thread and comes here. Invariant: when the agent has its answer, it makes no call that the filter does not allow; what
//! is not understood counts as forbidden.

use std::{io, mem::offset_of, sync::Arc};

use object::{Object, ObjectSymbol};
use trapline_abi::{
    agent::{ALL_FORBIDDEN, CALLS, Call, Config, NARROW_CALLS, SANDBOX_FUNCTIONS, SITE_ID_BYTES, TO_MAP},
    pool::{BLOCKS_TO_MAP, request},
    thread::{ADDRESS_BITS, BLOCK_SHIFT, narrow},
};
use trapline_engine::{
    Addr, AddrRange, Mode,
    insn::{InsnBytes, RelocateOptions, encode, relocate},
};

use trapline_image::{Write, entry_window};

use crate::{
    pending::Pending,
    space::{AgentAt, Space},
    sys::{
        Tid,
        maps::{self, Mapping},
        memory::Memory,
        shared::SharedMemory,
    },
};

/// `struct sock_filter` (include/uapi/linux/filter.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Insn {
    code: u16,
    on_true: u8,
    on_false: u8,
    k: u32,
}

const INSN_BYTES: usize = 8;

/// The kernel takes no longer filter.
const MAX_INSNS: u16 = 4096;

/// Which of the agent's [`CALLS`] the filter forbids that a `struct sock_fprog` at `at` describes; all if that cannot be read, 0 being strict mode.
fn forbidden_by(mode: Mode, memory: &Memory, at: Addr) -> u64 {
    let read = || -> io::Result<Vec<Insn>> {
        let head = memory.read_vec(at, 2)?;
        let count = u16::from_le_bytes([head[0], head[1]]).min(MAX_INSNS);
        let insns = memory.read_pointer(mode, at.after(mode.word_bytes() as usize))?;
        let bytes = memory.read_vec(Addr::new(insns), usize::from(count) * INSN_BYTES)?;
        Ok(bytes.chunks_exact(INSN_BYTES).map(Insn::parse).collect())
    };
    if at == Addr::default() {
        return ALL_FORBIDDEN;
    }
    // What the kernel cannot read either is not installed.
    read().map_or(0, |filter| forbidden(mode, &filter))
}

fn forbidden(mode: Mode, filter: &[Insn]) -> u64 {
    let calls = match mode {
        Mode::Bits32 => &NARROW_CALLS,
        Mode::Bits64 => &CALLS,
    };
    let is_forbidden = |(number, asked): (&u32, &[[u64; 6]; 2])| {
        !asked.iter().all(|with| allows(filter, &Asked::new(mode, *number, with)))
    };
    let each = calls.iter().zip(&ARGUMENTS).map(is_forbidden).enumerate();
    each.map(|(bit, is_forbidden)| u64::from(is_forbidden) << bit).sum()
}

/// Some address.
const SOME: u64 = 0x7fff_ffff_f000;

const HERE: u64 = (libc::AT_FDCWD as i64).cast_unsigned();
const OPEN_FLAGS: u64 = (libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned() as u64;

/// With which arguments the agent makes its [`CALLS`], for filters that look at them.
const ARGUMENTS: [[[u64; 6]; 2]; CALLS.len()] = [
    [[SOME, 0x20_0000, 3, 0x10_4022, u64::MAX, 0]; 2],
    [[SOME, 0x20_0000, 0, 0, 0, 0]; 2],
    [[0, SOME, SOME, 8, 0, 0], [2, SOME, 0, 8, 0, 0]],
    [[SOME, 0x20_0000, 15, 0, 0, 0]; 2],
    [[SOME, 0, 0, 0, 0, 0]; 2],
    [[0; 6]; 2],
    [[1, 0, 0, 0, 0, 0], [4_000_000, 0, 0, 0, 0, 0]],
    [[0, SOME, 0, 0, 0, 0]; 2],
    [[0; 6]; 2],
    [[SOME, 0, 7, SOME, 0, 0], [SOME, 1, 0x7fff_ffff, 0, 0, 0]],
    [[HERE, SOME, OPEN_FLAGS, 0, 0, 0]; 2],
    [[3, 0, 0, 0, 0, 0], [900, 0, 0, 0, 0, 0]],
];

impl Insn {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            code: u16::from_le_bytes([bytes[0], bytes[1]]),
            on_true: bytes[2],
            on_false: bytes[3],
            k: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// A system call that a filter is asked about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Asked {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

impl Asked {
    fn new(mode: Mode, number: u32, arguments: &[u64; 6]) -> Self {
        let low = |argument: u64| argument & u64::from(u32::MAX);
        match mode {
            Mode::Bits32 => Self { number, architecture: AUDIT_ARCH_I386, arguments: arguments.map(low) },
            Mode::Bits64 => Self { number, architecture: AUDIT_ARCH_X86_64, arguments: *arguments },
        }
    }
}
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ACTION: u32 = 0xffff_0000;

/// Whether a filter lets a system call pass. The machine is classic BPF, as far as the kernel accepts it for seccomp (`seccomp_check_filter`).
fn allows(filter: &[Insn], asked: &Asked) -> bool {
    run(filter, asked).is_some_and(|result| matches!(result & RET_ACTION, RET_ALLOW | RET_LOG))
}

/// What a filter returns; `None` if it is none.
fn run(filter: &[Insn], asked: &Asked) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; 16]);
    let mut pc = 0_usize;
    loop {
        let Insn { code, on_true, on_false, k } = *filter.get(pc)?;
        pc += 1;
        let operand = if code & 8 != 0 { x } else { k };
        let slot = || usize::try_from(k).ok().filter(|slot| *slot < 16);
        match (code & 7, code & 0xf0) {
            // BPF_LD: a word of `struct seccomp_data`, a constant, memory, or its length.
            (0, _) => {
                a = match code & 0xe0 {
                    0x00 => k,
                    0x20 => data_word(k, asked)?,
                    0x60 => memory[slot()?],
                    0x80 => 64,
                    _ => return None,
                }
            }
            // BPF_LDX.
            (1, _) => {
                x = match code & 0xe0 {
                    0x00 => k,
                    0x60 => memory[slot()?],
                    0x80 => 64,
                    _ => return None,
                }
            }
            // BPF_ST, BPF_STX.
            (2, _) => memory[slot()?] = a,
            (3, _) => memory[slot()?] = x,
            // BPF_ALU.
            (4, operation) => {
                a = match operation {
                    0x00 => a.wrapping_add(operand),
                    0x10 => a.wrapping_sub(operand),
                    0x20 => a.wrapping_mul(operand),
                    0x30 => a.checked_div(operand).unwrap_or(0),
                    0x40 => a | operand,
                    0x50 => a & operand,
                    0x60 => a.wrapping_shl(operand),
                    0x70 => a.wrapping_shr(operand),
                    0x80 => a.wrapping_neg(),
                    0xa0 => a ^ operand,
                    _ => return None,
                }
            }
            // BPF_JMP: always forwards, so that every filter ends.
            (5, 0x00) => pc = pc.checked_add(usize::try_from(k).ok()?)?,
            (5, operation) => {
                let is_true = match operation {
                    0x10 => a == operand,
                    0x20 => a > operand,
                    0x30 => a >= operand,
                    0x40 => a & operand != 0,
                    _ => return None,
                };
                pc += usize::from(if is_true { on_true } else { on_false });
            }
            // BPF_RET.
            (6, _) => return Some(if code & 0x18 == 0x10 { a } else { k }),
            // BPF_MISC: TAX, TXA.
            (7, _) => {
                if code & 0x80 == 0 {
                    x = a;
                } else {
                    a = x;
                }
            }
            _ => return None,
        }
    }
}

/// A word of `struct seccomp_data`: number, architecture, instruction pointer, arguments.
fn data_word(offset: u32, asked: &Asked) -> Option<u32> {
    let half = |word: u64| if offset.is_multiple_of(8) { word } else { word >> 32 };
    let word = match offset {
        0 => asked.number,
        4 => asked.architecture,
        8 | 12 => 0,
        16..64 if offset.is_multiple_of(4) => low(half(asked.arguments[(offset as usize - 16) / 8])),
        _ => return None,
    };
    Some(word)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
const fn low(word: u64) -> u32 {
    word as u32
}

/// Whether a thread can be made to map our memory. In a sandbox that forbids it, to try might be its death.
pub(crate) const fn may_map(forbidden: u64) -> bool {
    forbidden & TO_MAP == 0
}

/// Larger pieces of memory are no stacks.
fn largest_stack_bytes(mode: Mode) -> u64 {
    match mode {
        Mode::Bits32 => 32 << 20,
        Mode::Bits64 => 256 << 20,
    }
}

/// How much stack is mapped for at most, in blocks, and how far left a block's number is in an address.
fn most_blocks(mode: Mode) -> (u64, u32) {
    match mode {
        Mode::Bits32 => (2048, narrow::BLOCK_SHIFT),
        Mode::Bits64 => (8192, BLOCK_SHIFT),
    }
}

/// The blocks of a process that stacks may lie in, as runs: what can be written and is no file's, and what the first stack may grow to.
fn blocks_to_map(mode: Mode, mappings: &[Mapping], stack_limit_bytes: u64) -> Vec<u64> {
    let largest_stack_bytes = largest_stack_bytes(mode);
    let (most_blocks, block_shift) = most_blocks(mode);
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut total = 0;
    let mut end_before = 0;
    for mapping in mappings {
        let (mut start, end) = (mapping.range.start.value(), mapping.range.end.value());
        let is_stack = mapping.path.as_os_str() == "[stack]";
        if is_stack {
            start = start.min(end.saturating_sub(stack_limit_bytes.min(largest_stack_bytes))).max(end_before);
        }
        end_before = end;
        let is_wanted = mapping.is_private_memory && end <= 1 << ADDRESS_BITS && end - start <= largest_stack_bytes;
        if !is_wanted {
            continue;
        }
        let (mut first, behind) = (start >> block_shift, ((end - 1) >> block_shift) + 1);
        if let Some((_, last_behind)) = runs.last_mut()
            && *last_behind >= first
        {
            first = *last_behind;
            *last_behind = behind.max(first);
        } else {
            runs.push((first, behind));
        }
        total += behind.saturating_sub(first);
        if total > most_blocks {
            break;
        }
    }
    // The first stack comes last, and is wanted most.
    runs.reverse();
    runs.truncate(BLOCKS_TO_MAP - 1);
    runs.into_iter().map(|(first, behind)| (behind - first) << 32 | first).collect()
}

/// The limit for the first stack of a process.
fn stack_limit_bytes(tid: Tid) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{tid}/limits")).unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max stack size"));
    let soft = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    soft.unwrap_or(u64::MAX)
}

impl Space {
    /// The filter that a thread is about to install, if that is what it asks about: the address of a `struct sock_fprog`, or 0.
    pub(crate) fn sandbox_request(&self) -> Option<Addr> {
        use std::sync::atomic::Ordering::Relaxed;
        let header = self.pool.as_ref()?.header();
        (header.request.load(Relaxed) == request::SANDBOX).then(|| Addr::new(header.request_about.load(Relaxed)))
    }

    /// Writes what the agent needs to know before this filter is installed into the pool, for the thread that is stopped and waits for it.
    pub(crate) fn prepare_for_sandbox(&mut self, tid: Tid, filter: Addr) -> io::Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        let (Some(memory), Some(pool)) = (&self.memory, &self.pool) else { return Ok(()) };
        let forbidden = forbidden_by(self.agent.mode, memory, filter);
        let runs = if forbidden & Call::Mmap.bit() == 0 {
            Vec::new()
        } else {
            blocks_to_map(self.agent.mode, &maps::read(tid)?, stack_limit_bytes(tid))
        };
        let header = pool.header();
        for (place, run) in header.blocks_to_map.iter().zip(runs.into_iter().chain([0])) {
            place.store(run, Relaxed);
        }
        header.request_about.store(forbidden, Relaxed);
        self.forbidden |= forbidden;
        Ok(())
    }

    /// Tells the agent of a sandbox that was there before it.
    pub(crate) fn forbid(&mut self, forbidden: u64) -> io::Result<()> {
        self.forbidden |= forbidden;
        let Some(memory) = self.memory.as_ref().filter(|_| forbidden != 0) else { return Ok(()) };
        let at = offset_of!(Config, forbidden);
        memory.write_word(self.agent.config.after(at), self.forbidden)
    }
}

/// A function of the C library that is to begin with a call of the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Function {
    number: u32,
    /// In the file.
    address: u64,
    /// Its whole instructions that make room for a jump.
    window: Vec<u8>,
}

/// What is hooked in one file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Hook(Vec<Function>);

/// Bytes of the jump at a function's entry.
const JUMP_BYTES: usize = 5;

/// Bytes between one stub and the next.
const STUB_BYTES: usize = 64;

/// Bytes of the memory that the stubs are in.
const AREA_BYTES: usize = 4096;

impl Hook {
    /// Finds the functions in a file, if it is a C library.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let Ok(file) = object::File::parse(bytes) else { return Self::default() };
        let mode = if file.is_64() { Mode::Bits64 } else { Mode::Bits32 };
        let function = |(number, name): (usize, &&str)| {
            let symbol = file.dynamic_symbols().find(|symbol| symbol.is_definition() && symbol.name() == Ok(name))?;
            let code = code_at(&file, symbol.address())?;
            let size = usize::try_from(symbol.size()).ok()?.min(code.len());
            let window = code[..entry_window(mode, &code[..size], symbol.address(), JUMP_BYTES)?].to_vec();
            Some(Function { number: u32::try_from(number).ok()?, address: symbol.address(), window })
        };
        Self(SANDBOX_FUNCTIONS.iter().enumerate().filter_map(function).collect())
    }

    /// Whether there is nothing to hook.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What it takes to have the functions begin in stubs that call the agent.
    pub(crate) fn arm(&self, pending: &mut Pending, agent: &AgentAt, bias: u64) -> io::Result<()> {
        let in_process = |function: &Function| Addr::new(function.address.wrapping_add(bias));
        let starts = self.0.iter().map(in_process);
        let near = AddrRange {
            start: starts.clone().min().unwrap_or_default(),
            end: starts.max().unwrap_or_default().after(STUB_BYTES),
        };
        let out_of_reach = || io::Error::other("no room for stubs within reach of the C library");
        let at = pending.find_hole(near, AREA_BYTES as u64).ok_or_else(out_of_reach)?;
        let shared = SharedMemory::new(c"trapline-stubs", AREA_BYTES)?;
        shared.fill(0, &[INT3; AREA_BYTES]);
        let mut jumps = Vec::new();
        for (index, function) in self.0.iter().enumerate() {
            let start = in_process(function);
            let stub_at = at.after(index * STUB_BYTES);
            let stub = stub(agent.mode, function, start, stub_at, agent.sandbox).ok_or_else(out_of_reach)?;
            shared.fill(index * STUB_BYTES, &stub);
            let jump = encode::jmp(start, stub_at.after(CODE_AT), agent.mode).map_err(|_| out_of_reach())?;
            let expected = InsnBytes::new(&function.window[..JUMP_BYTES]);
            jumps.push(Write { at: start, expected, new: InsnBytes::new(&jump) });
        }
        jumps.sort_by_key(|jump| jump.at);
        pending.edit_others(&jumps).map_err(|_| io::Error::other("the C library is not as in its file"))?;
        pending.map_code(at, &Arc::new(shared), AREA_BYTES);
        Ok(())
    }
}

const INT3: u8 = 0xcc;

/// Where a stub's code begins: its number is in front of it, and the code is aligned.
const CODE_AT: usize = 16;

/// Number, call through an address, and the function's first instructions. In 32-bit code everything is within a call's reach.
fn stub(mode: Mode, function: &Function, start: Addr, stub_at: Addr, sandbox: Addr) -> Option<Vec<u8>> {
    const ADDRESS_AT: usize = STUB_BYTES - 8;
    // The agent finds the number in front of a call of 5 bytes: `call` to a jump through the address at the end.
    const CALL_BYTES: usize = 5;
    const THROUGH_AT: usize = ADDRESS_AT - 6;
    let mut bytes = vec![INT3; STUB_BYTES];
    bytes[CODE_AT - SITE_ID_BYTES..CODE_AT].copy_from_slice(&function.number.to_le_bytes());
    let called = match mode {
        Mode::Bits32 => sandbox,
        Mode::Bits64 => stub_at.after(THROUGH_AT),
    };
    let call = encode::call(stub_at.after(CODE_AT), called, mode).ok()?;
    bytes[CODE_AT..CODE_AT + CALL_BYTES].copy_from_slice(&call);
    let moved_at = CODE_AT + CALL_BYTES;
    let options = RelocateOptions { pc_thunk: None };
    let window = &function.window;
    let moved = relocate(mode, start, window, window.len(), stub_at.after(moved_at), &options).ok()?;
    bytes.get_mut(moved_at..THROUGH_AT)?.get_mut(..moved.bytes.len())?.copy_from_slice(&moved.bytes);
    // jmp [rip + 0]
    bytes[THROUGH_AT..ADDRESS_AT].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
    bytes[ADDRESS_AT..].copy_from_slice(&sandbox.value().to_le_bytes());
    Some(bytes)
}

fn code_at<'a>(file: &object::File<'a>, address: u64) -> Option<&'a [u8]> {
    use object::ObjectSegment;
    file.segments().find_map(|segment| {
        let offset = usize::try_from(address.checked_sub(segment.address())?).ok()?;
        segment.data().ok()?.get(offset..).filter(|code| !code.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn statement(code: u16, k: u32) -> Insn {
        Insn { code, on_true: 0, on_false: 0, k }
    }

    const fn jump(code: u16, k: u32, on_true: u8, on_false: u8) -> Insn {
        Insn { code, on_true, on_false, k }
    }

    const LOAD: u16 = 0x20;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const KILL: u32 = 0x8000_0000;
    const ERRNO: u32 = 0x0005_0001;

    fn bits(calls: &[Call]) -> u64 {
        calls.iter().map(|call| call.bit()).sum()
    }

    #[test]
    fn a_list_of_what_is_allowed_forbids_the_rest() {
        let filter = [
            statement(LOAD, 4),
            jump(IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
            statement(RETURN, KILL),
            statement(LOAD, 0),
            jump(IF_EQUAL, CALLS[Call::Futex as usize], 2, 0),
            jump(IF_EQUAL, CALLS[Call::Mmap as usize], 1, 0),
            statement(RETURN, ERRNO),
            statement(RETURN, RET_ALLOW),
        ];
        assert_eq!(forbidden(Mode::Bits64, &filter), ALL_FORBIDDEN & !bits(&[Call::Futex, Call::Mmap]));
    }

    #[test]
    fn a_list_of_what_is_forbidden_allows_the_rest() {
        let filter = [
            statement(LOAD, 0),
            jump(IF_EQUAL, CALLS[Call::Kill as usize], 0, 1),
            statement(RETURN, ERRNO),
            statement(RETURN, RET_LOG),
        ];
        assert_eq!(forbidden(Mode::Bits64, &filter), bits(&[Call::Kill]));
    }

    #[test]
    fn arguments_are_looked_at() {
        // The third argument, with a mask: no memory that can be written.
        let filter = |mask: u32| {
            [
                statement(LOAD, 0),
                jump(IF_EQUAL, CALLS[Call::Mmap as usize], 0, 3),
                statement(LOAD, 32),
                jump(0x45, mask, 0, 1),
                statement(RETURN, KILL),
                statement(RETURN, RET_ALLOW),
            ]
        };
        assert_eq!(forbidden(Mode::Bits64, &filter(2)), bits(&[Call::Mmap]));
        assert_eq!(forbidden(Mode::Bits64, &filter(4)), 0);
        // The upper half of the fifth: the descriptor, -1.
        let upper = [statement(LOAD, 16 + 4 * 8 + 4), jump(IF_EQUAL, u32::MAX, 0, 1), statement(RETURN, KILL)];
        let upper = [&upper[..], &[statement(RETURN, RET_ALLOW)]].concat();
        assert_eq!(forbidden(Mode::Bits64, &upper), bits(&[Call::Mmap]));
    }

    #[test]
    fn a_32_bit_filter_sees_its_own_numbers_and_32_bits() {
        let filter = [
            statement(LOAD, 4),
            jump(IF_EQUAL, AUDIT_ARCH_I386, 1, 0),
            statement(RETURN, KILL),
            statement(LOAD, 0),
            jump(IF_EQUAL, NARROW_CALLS[Call::Mmap as usize], 0, 3),
            statement(LOAD, 16 + 4 * 8 + 4),
            jump(IF_EQUAL, 0, 1, 0),
            statement(RETURN, ERRNO),
            statement(RETURN, RET_ALLOW),
        ];
        assert_eq!(forbidden(Mode::Bits32, &filter), 0);
        assert_eq!(forbidden(Mode::Bits64, &filter), ALL_FORBIDDEN);
    }

    #[test]
    fn the_whole_machine_computes() {
        let program = [
            statement(0x00, 40),
            statement(0x07, 0),
            statement(0x04, 2),
            statement(0x02, 3),
            statement(0x61, 3),
            statement(0x0c, 0),
            statement(0x64, 1),
            statement(0x54, 0xff),
            statement(0xa4, 1),
            statement(0x16, 0),
        ];
        let nothing = Asked::new(Mode::Bits64, 0, &[0; 6]);
        // a = 40, x = 40, a = 42, m[3] = 42, x = 42, a = 84, a = 168, a &= 255, a ^= 1.
        assert_eq!(run(&program, &nothing), Some(169));
        assert_eq!(run(&[statement(0x05, 7)], &nothing), None, "out of the program");
        assert_eq!(run(&[statement(LOAD, 3)], &nothing), None, "no word");
        assert_eq!(run(&[], &nothing), None);
        assert_eq!(forbidden(Mode::Bits64, &[]), ALL_FORBIDDEN, "what is not understood");
    }

    fn mapping(start: u64, end: u64, path: &str) -> Mapping {
        let range = AddrRange { start: Addr::new(start), end: Addr::new(end) };
        let path = std::path::PathBuf::from(path);
        Mapping { range, is_executable: false, is_private_memory: true, offset: 0, inode: 0, path }
    }

    #[test]
    fn stacks_get_their_blocks_and_room_to_grow() {
        let heap = mapping(0x5555_5010_0000, 0x5555_5030_0000, "[heap]");
        let near = mapping(0x5555_5030_0000, 0x5555_5030_1000, "");
        let large = mapping(0x6000_0000_0000, 0x6001_0000_0000, "");
        let stack = mapping(0x7fff_ffe0_0000, 0x7fff_fff0_0000, "[stack]");
        let runs = blocks_to_map(Mode::Bits64, &[heap, near, large, stack], 8 << 20);
        assert_eq!(runs, [8 << 32 | 0x7ff_fff7, 3 << 32 | 0x555_5501]);
    }

    #[test]
    fn the_functions_of_this_machines_c_library_are_found_and_their_stubs_fit() {
        let mappings = maps::read(std::process::id().cast_signed()).unwrap();
        let library = mappings.iter().find(|mapping| {
            let name = mapping.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with("libc.so") || name.starts_with("libc-2") || name.starts_with("ld-musl")
        });
        let hook = Hook::read(&std::fs::read(&library.expect("a C library").path).unwrap());
        assert_eq!(hook.0.iter().map(|function| function.number).collect::<Vec<_>>(), [0, 1]);
        for function in &hook.0 {
            let start = Addr::new(0x7f00_0000_0000).offset(function.address.cast_signed());
            let stub =
                stub(Mode::Bits64, function, start, Addr::new(0x7eff_ff00_0000), Addr::new(0x1234_5678)).unwrap();
            assert_eq!(stub.len(), STUB_BYTES);
            assert_eq!(stub[CODE_AT - SITE_ID_BYTES..CODE_AT], function.number.to_le_bytes());
        }
        assert!(Hook::read(b"no file").is_empty());
    }
}
