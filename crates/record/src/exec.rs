//! A new program image, from the moment of its exec to the moment when all its objects are loaded.
//!
//! Owns [`NewImage`]. At the exec nothing of the program has run: its initial stack (System V psABI, "Initial Stack and Register State") and the
//! dynamic linker's code are all there is. [`prepare`] makes the dynamic linker load the agent, and puts a system call where it reports that
//! all objects are mapped and relocated. [`NewImage::reached`] is for when that is made; constructors have not run yet. A system call and no breakpoint,
//! because it stops the thread only as long as the recorder lives; it would be killed by a breakpoint that nobody waits for. The program's
//! environment has no trace of this when it starts:
//!
//! ```text
//!                at the exec          while ld.so runs          from its end on
//!                argc argv..          argc argv..               (all that was moved stays where it is)
//!                envp[0..n]           envp[0..n]                envp[0..n]
//!                                     LD_PRELOAD=agent          NULL
//!                                     LD_PRELOAD=agent          AT_IGNORE
//!                NULL                 NULL                      0
//!                auxv..               auxv..  (never moves)     auxv..
//! ```
//!
//! The vectors move down by two words, so that the stack pointer keeps its alignment, and the two words are filled at the end with an entry of the
//! auxiliary vector that means nothing. What points to the vectors (the dynamic linker's and the C library's own variables) stays right.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use object::{Object, ObjectSymbol};
use trapline_engine::{Addr, Mode};

use crate::{
    remote::Remote,
    sys::{
        Tid, auxiliary_vector, maps,
        memory::Memory,
        ptrace::{self, SyscallStop},
        spawn, width,
    },
};

const WORD: u64 = 8;
const AT_IGNORE: u64 = 1;
/// Of the auxiliary vector (getauxval(3)).
const AT_NULL: u64 = 0;
const AT_BASE: u64 = 7;
const AT_SECURE: u64 = 23;
/// Bytes of what [`report`] is.
const REPORT_BYTES: usize = 6;
/// The program counter in that system call, from the first instruction on.
const IN_REPORT: i64 = 5;
/// Functions begin at multiples of this, so that there is room for [`report`] up to the next.
const FUNCTION_ALIGN: u64 = 16;
const ENDBR: [[u8; 4]; 2] = [[0xf3, 0x0f, 0x1e, 0xfa], [0xf3, 0x0f, 0x1e, 0xfb]];
const RET: u8 = 0xc3;
const SYSCALL_RET: [u8; 3] = [0x0f, 0x05, RET];

const RT_CONSISTENT: u64 = 0;

/// `r_state` in the `r_debug` of `<link.h>`: behind a version, padded, and two pointers.
fn r_state(mode: Mode, r_debug: Addr) -> Addr {
    r_debug.after(3 * mode.word_bytes() as usize)
}

/// `push 39; pop rax; syscall; ret`: `getpid`, which changes nothing. A call spoils these registers anyway. At 32 bit it has the number 20, and `int 0x80`.
fn report(mode: Mode) -> [u8; REPORT_BYTES] {
    match mode {
        Mode::Bits32 => [0x6a, 20, 0x58, 0xcd, 0x80, RET],
        Mode::Bits64 => [0x6a, 39, 0x58, 0x0f, 0x05, RET],
    }
}

/// Bytes of a string in the environment that are looked at.
const PRELOAD_LIMIT_BYTES: usize = 1 << 17;

/// Why a program image runs untraced. The text is for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Untraceable(pub(crate) String);

impl From<io::Error> for Untraceable {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// What is known of a dynamic linker's file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linker {
    /// Of `_dl_debug_state`, which it calls when objects come and go. An address in the file.
    debug_state: u64,
    /// Of `_r_debug`, which says what has happened.
    r_debug: u64,
    /// Of a `syscall` and a `ret`, which 32-bit code has none of.
    syscall_ret: Option<u64>,
}

/// Dynamic linkers by path: a machine has one or two.
#[derive(Debug, Default)]
pub(crate) struct Linkers(HashMap<PathBuf, Option<Linker>>);

impl Linkers {
    fn find(&mut self, path: &Path) -> Option<Linker> {
        *self.0.entry(path.to_path_buf()).or_insert_with(|| Linker::read(path))
    }

    /// The one that a process has mapped there.
    fn mapped_at(&mut self, tid: Tid, base: u64) -> Result<Linker, Untraceable> {
        let mappings = maps::read(tid)?;
        let mapping = mappings.iter().find(|mapping| mapping.range.contains(Addr::new(base)));
        let Some(path) = mapping.and_then(|mapping| mapping.file(tid)) else {
            return Err(Untraceable("the file of its dynamic linker is gone".to_owned()));
        };
        let silent =
            || Untraceable(format!("its dynamic linker {} does not say when objects are loaded", path.display()));
        self.find(&path).ok_or_else(silent)
    }

    /// Where a process has `_dl_debug_state` and `_r_debug`.
    fn of_process(&mut self, tid: Tid, base: u64) -> Result<(Addr, Addr), Untraceable> {
        let linker = self.mapped_at(tid, base)?;
        let at = |address: u64| Addr::new(base.wrapping_add(address));
        Ok((at(linker.debug_state), at(linker.r_debug)))
    }
}

impl Linker {
    fn read(path: &Path) -> Option<Self> {
        use object::ObjectSection;
        let bytes = fs::read(path).ok()?;
        let file = object::File::parse(&*bytes).ok()?;
        let symbol = |name: &str| {
            let mut all = file.dynamic_symbols().chain(file.symbols());
            all.find(|symbol| symbol.is_definition() && symbol.name() == Ok(name)).map(|symbol| symbol.address())
        };
        let text = file.section_by_name(".text")?;
        // Bytes that mean this wherever execution begins at them, be they a part of another instruction.
        let at = text.data().ok()?.windows(SYSCALL_RET.len()).position(|bytes| bytes == SYSCALL_RET);
        let syscall_ret = at.map(|at| text.address() + at as u64);
        Some(Self { debug_state: symbol("_dl_debug_state")?, r_debug: symbol("_r_debug")?, syscall_ret })
    }
}

/// A program image that is being loaded.
#[derive(Debug)]
pub(crate) struct NewImage {
    /// Its width.
    pub(crate) mode: Mode,
    /// Where the dynamic linker reports to: a function that does nothing.
    pub(crate) debug_state: Addr,
    original: [u8; REPORT_BYTES],
    r_debug: Addr,
    /// What was changed for the agent to be preloaded, if it is.
    preload: Option<Preload>,
}

/// What the dynamic linker reads, and the program is not to find.
#[derive(Debug)]
struct Preload {
    /// Where the two words are to become an entry of the auxiliary vector: the first of the three.
    spare_words: Addr,
    /// What stood in the environment where our `LD_PRELOAD` replaces another.
    replaced: Option<(Addr, u64)>,
    scratch: Addr,
}

/// Bytes of the memory that our strings are in while the dynamic linker runs.
const SCRATCH_BYTES: u64 = PRELOAD_LIMIT_BYTES as u64 + 4096;

/// What the kernel put on the stack.
#[derive(Debug)]
struct InitialStack {
    at: Addr,
    /// argc, argv, envp with their terminators.
    vectors: Vec<u64>,
    /// Index in `vectors` of the first of the environment.
    environment: usize,
    auxiliary: HashMap<u64, u64>,
}

impl InitialStack {
    fn read(mode: Mode, memory: &Memory, at: Addr) -> io::Result<Self> {
        let word_bytes = u64::from(mode.word_bytes());
        let word = |index: u64| memory.read_pointer(mode, at.offset((index * word_bytes).cast_signed()));
        let mut vectors = vec![word(0)?];
        let mut next = 1;
        let mut terminators = 0;
        let mut environment = 0;
        while terminators < 2 {
            let value = word(next)?;
            vectors.push(value);
            next += 1;
            // The count and not the terminator ends argv, though both should agree.
            if terminators == 0 && next == vectors[0] + 2 {
                terminators = 1;
                environment = vectors.len();
            } else if terminators == 1 && value == 0 {
                terminators = 2;
            }
        }
        let mut auxiliary = HashMap::new();
        loop {
            let (key, value) = (word(next)?, word(next + 1)?);
            if key == AT_NULL {
                return Ok(Self { at, vectors, environment, auxiliary });
            }
            auxiliary.insert(key, value);
            next += 2;
        }
    }

    fn auxiliary(&self, key: u64) -> u64 {
        self.auxiliary.get(&key).copied().unwrap_or(0)
    }
}

/// What a dynamic linker that has long done its work offers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadedLinker {
    /// The function that it reports to.
    pub(crate) debug_state: Addr,
    /// Where it says what it is doing.
    pub(crate) linker_state: Addr,
}

/// The dynamic linker of a process that runs.
pub(crate) fn loaded_linker(
    mode: Mode,
    tid: Tid,
    memory: &Memory,
    linkers: &mut Linkers,
) -> Result<LoadedLinker, Untraceable> {
    let base = auxiliary_vector(tid, mode)?.get(&AT_BASE).copied().unwrap_or(0);
    if base == 0 {
        return Err(Untraceable("it is linked statically".to_owned()));
    }
    let (debug_state, r_debug) = linkers.of_process(tid, base)?;
    check_debug_state(memory, debug_state)?;
    Ok(LoadedLinker { debug_state, linker_state: r_state(mode, r_debug) })
}

fn check_debug_state(memory: &Memory, debug_state: Addr) -> Result<[u8; REPORT_BYTES], Untraceable> {
    let mut code = [0; REPORT_BYTES];
    memory.read(debug_state, &mut code)?;
    let unmarked = ENDBR.iter().find_map(|mark| code.strip_prefix(mark)).unwrap_or(&code);
    let does_nothing = unmarked.first() == Some(&RET);
    if !does_nothing || !debug_state.value().is_multiple_of(FUNCTION_ALIGN) {
        return Err(Untraceable(format!("the function at {debug_state} in its dynamic linker does something")));
    }
    Ok(code)
}

/// Prepares a thread that is stopped at its exec, with the agent to preload, if there is one; 32-bit images never preload it. `Err` says why this image runs
/// untraced; nothing was changed then.
pub(crate) fn prepare(tid: Tid, agent: Option<&str>, linkers: &mut Linkers) -> Result<NewImage, Untraceable> {
    let registers = ptrace::registers(tid)?;
    let mode = width::mode_of(&registers);
    if width::is_too_wide(width::mode_of_program(tid)) {
        return Err(Untraceable(width::TOO_WIDE.to_owned()));
    }
    let memory = Memory::open(tid)?;
    let stack = InitialStack::read(mode, &memory, Addr::new(registers.rsp))?;
    if stack.auxiliary(AT_SECURE) != 0 {
        return Err(Untraceable("it runs with more rights than its user (setuid, setgid or capabilities)".to_owned()));
    }
    let linker_base = stack.auxiliary(AT_BASE);
    if linker_base == 0 {
        return Err(Untraceable("it is linked statically, so that no agent can be loaded into it".to_owned()));
    }
    if user_of(tid)? != crate::sys::spawn::user() {
        return Err(Untraceable("it runs as another user".to_owned()));
    }
    let linker = linkers.mapped_at(tid, linker_base)?;
    let at = |address: u64| Addr::new(linker_base.wrapping_add(address));
    let debug_state = at(linker.debug_state);
    let code = check_debug_state(&memory, debug_state)?;
    let environment = environment(&memory, &stack)?;
    if environment.iter().any(|(_, text)| text.starts_with(b"LD_TRACE_LOADED_OBJECTS=")) {
        return Err(Untraceable("it is asked for its libraries only (ldd)".to_owned()));
    }
    let preload = match (agent.filter(|_| mode == Mode::Bits64), linker.syscall_ret) {
        (Some(agent), Some(syscall_ret)) => Some(preload(tid, &memory, &stack, &environment, agent, at(syscall_ret))?),
        (Some(_), None) => {
            return Err(Untraceable("there is no code in its dynamic linker that makes system calls".to_owned()));
        }
        (None, _) => None,
    };
    memory.write(debug_state, &report(mode))?;
    Ok(NewImage { mode, debug_state, original: code, r_debug: at(linker.r_debug), preload })
}

/// Has the dynamic linker preload the agent.
fn preload(
    tid: Tid,
    memory: &Memory,
    stack: &InitialStack,
    environment: &[(usize, Vec<u8>)],
    agent: &str,
    syscall_ret: Addr,
) -> Result<Preload, Untraceable> {
    let mut remote = Remote::at_start(tid, memory, syscall_ret)?;
    let scratch = remote.map(
        Addr::default(),
        SCRATCH_BYTES,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    )?;
    let (spare_words, replaced) = add_preload(memory, stack, environment, agent, scratch)?;
    remote.registers.rsp = stack.at.value() - 2 * WORD;
    for signal in remote.finish()? {
        spawn::kill(tid, signal);
    }
    Ok(Preload { spare_words, replaced, scratch })
}

fn user_of(tid: Tid) -> io::Result<u32> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(format!("/proc/{tid}")).map(|metadata| metadata.uid())
}

/// A set of signals in a `/proc/PID/status`: signal n is bit n - 1.
pub(crate) fn signal_set(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The environment: where each pointer stands in the vectors, and the string's beginning.
fn environment(memory: &Memory, stack: &InitialStack) -> io::Result<Vec<(usize, Vec<u8>)>> {
    const NAME_BYTES: usize = 64;
    let pointers = stack.vectors.iter().enumerate().skip(stack.environment).take_while(|(_, pointer)| **pointer != 0);
    pointers.map(|(index, pointer)| Ok((index, memory.read_string(Addr::new(*pointer), NAME_BYTES)?))).collect()
}

/// Moves the vectors and adds the agent to what is preloaded. Returns where the three spare words begin, and what was replaced.
fn add_preload(
    memory: &Memory,
    stack: &InitialStack,
    environment: &[(usize, Vec<u8>)],
    agent: &str,
    scratch: Addr,
) -> io::Result<(Addr, Option<(Addr, u64)>)> {
    const NAME: &[u8] = b"LD_PRELOAD=";
    let moved = stack.at.offset(-2 * WORD.cast_signed());
    let word_at = |index: usize| moved.after(index * size_of::<u64>());
    let preload = environment.iter().find(|(_, text)| text.starts_with(NAME)).map(|(index, _)| *index);
    let mut text = [NAME, agent.as_bytes()].concat();
    let mut vectors = stack.vectors.clone();
    let terminator = vectors.len() - 1;
    let mut replaced = None;
    if let Some(index) = preload {
        let others = memory.read_string(Addr::new(vectors[index]), PRELOAD_LIMIT_BYTES)?;
        text.push(b':');
        text.extend_from_slice(&others[NAME.len()..]);
        replaced = Some((word_at(index), vectors[index]));
        vectors[index] = scratch.value();
    }
    text.push(0);
    memory.write(scratch, &text)?;
    // Where there is one already, ours may come twice: the dynamic linker loads it once.
    vectors.splice(terminator..terminator, [scratch.value(); 2]);
    let bytes: Vec<u8> = vectors.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write(moved, &bytes)?;
    Ok((word_at(terminator), replaced))
}

/// What the dynamic linker reports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Report {
    /// It is about to change the set of objects.
    Changing,
    /// Everything is loaded.
    Loaded,
}

impl NewImage {
    /// Whether a thread that a system call stopped has just made ours.
    pub(crate) fn has_made_report(&self, tid: Tid) -> bool {
        ptrace::registers(tid).is_ok_and(|registers| Addr::new(registers.rip) == self.debug_state.offset(IN_REPORT))
            && ptrace::syscall_stop(tid).is_ok_and(|stop| stop == SyscallStop::Exit)
    }

    /// Where the dynamic linker says what it is doing.
    pub(crate) fn linker_state(&self) -> Addr {
        r_state(self.mode, self.r_debug)
    }

    /// Takes the thread out of the report, by doing what the function there does: it returns.
    pub(crate) fn reached(&self, tid: Tid, memory: &Memory) -> io::Result<Report> {
        const STATE_BITS: u64 = 0xffff_ffff;
        let mut registers = ptrace::registers(tid)?;
        registers.rip = memory.read_pointer(self.mode, Addr::new(registers.rsp))?;
        registers.rsp += u64::from(self.mode.word_bytes());
        ptrace::set_registers(tid, &registers)?;
        let state = memory.read_word(self.linker_state())? & STATE_BITS;
        Ok(if state == RT_CONSISTENT { Report::Loaded } else { Report::Changing })
    }

    /// Removes every trace of the preload. The thread is stopped and the dynamic linker has read its environment.
    pub(crate) fn clean(&self, remote: &mut Remote, memory: &Memory) -> io::Result<()> {
        self.clean_code(memory)?;
        let Some(preload) = &self.preload else { return Ok(()) };
        for (at, word) in [0, AT_IGNORE, 0].into_iter().enumerate() {
            memory.write_word(preload.spare_words.after(at * size_of::<u64>()), word)?;
        }
        if let Some((at, pointer)) = preload.replaced {
            memory.write_word(at, pointer)?;
        }
        remote.unmap(preload.scratch, SCRATCH_BYTES)
    }

    /// Removes the system call.
    pub(crate) fn clean_code(&self, memory: &Memory) -> io::Result<()> {
        memory.write(self.debug_state, &self.original)
    }

    /// Removes the system call of a stopped thread, wherever it is, and takes it out if it is there.
    pub(crate) fn abandon(&self, tid: Tid, memory: &Memory) -> io::Result<()> {
        /// Behind the `push`.
        const PUSHED: i64 = 2;
        let mut registers = ptrace::registers(tid)?;
        let offset = Addr::new(registers.rip).distance_from(self.debug_state);
        if (1..=IN_REPORT).contains(&offset) {
            let word_bytes = u64::from(self.mode.word_bytes());
            let return_at =
                Addr::new(registers.rsp).offset(if offset == PUSHED { word_bytes.cast_signed() } else { 0 });
            registers.rip = memory.read_pointer(self.mode, return_at)?;
            registers.rsp = return_at.value() + word_bytes;
            registers.orig_rax = u64::MAX;
            ptrace::set_registers(tid, &registers)?;
        }
        self.clean_code(memory)
    }
}
