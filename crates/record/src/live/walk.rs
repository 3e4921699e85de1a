//! The frames of a stopped thread, exactly: as the unwind tables of what is loaded have them.
//!
//! Owns [`Walker`]. A search of the stack for words that may be return addresses never misses one, but takes words for return addresses that are left over from calls long
//! gone; in a thread that sleeps, such a word stays. A walk that comes to the thread's first function has seen all frames. One that does not, because code has no
//! tables (Go, generated code) or memory is not as they say, has seen nothing. Rules are kept by program counter, as the same threads sleep at the same places from one
//! stop to the next. Sources: DWARF 5, section 6.4; LSB core specification, section 10.6; System V psABI, table "DWARF Register Number Mapping".

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CfaRule, EhFrame, EhFrameHdr, EndianSlice, Evaluation, EvaluationResult, Expression, LittleEndian,
    Location, Register, RegisterRule, UnwindContext, UnwindExpression, UnwindSection, Value, X86, X86_64,
};
use object::elf;
use trapline_engine::{Addr, AddrRange, Mode};
use trapline_process::quiesce::ThreadRegisters;

use super::{
    PAGE_BYTES,
    file::{self, Segment},
    objects::Objects,
    state::Active,
    tracing::Hooks,
};
use crate::sys::{maps::Mapping, memory::Memory, width};

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// General registers and the return address, by their numbers in DWARF. Of 32-bit code they are the first nine.
type Registers = [Option<u64>; 17];

/// The number of the stack pointer.
fn stack_pointer(mode: Mode) -> usize {
    usize::from(if mode == Mode::Bits32 { X86::ESP } else { X86_64::RSP }.0)
}

/// The number of the return address, which is the last one.
fn return_address(mode: Mode) -> usize {
    usize::from(if mode == Mode::Bits32 { X86::RA } else { X86_64::RA }.0)
}

/// Recursions deeper than this are not followed.
const DEEPEST: usize = 1 << 16;

/// Unwind tables, as they lie in a process.
#[derive(Debug)]
struct Tables {
    mode: Mode,
    code: AddrRange,
    /// The index (`.eh_frame_hdr`): where it is, and its bytes from there on.
    index: Option<(u64, Vec<u8>)>,
    /// The records (`.eh_frame`), likewise.
    records: (u64, Vec<u8>),
}

/// How to get from one frame to its caller's.
#[derive(Clone, Debug)]
struct Step {
    frame_address: Rule,
    registers: Vec<(usize, Rule)>,
    /// Whether it is where signal handlers return to: its caller was interrupted, and did not call.
    is_signal_frame: bool,
}

/// Where a value is.
#[derive(Clone, Debug)]
enum Rule {
    /// There is none.
    Undefined,
    /// A register's, and a distance.
    Register(usize, i64),
    /// In memory, from the frame's address.
    InMemory(i64),
    /// The frame's address, and a distance.
    FrameAddress(i64),
    /// In memory, where an expression says.
    InMemoryAt(Vec<u8>),
    /// An expression's value.
    Computed(Vec<u8>),
}

/// Where a function goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Frame {
    pub(super) pc: Addr,
    /// Whether it has called; otherwise it was interrupted there.
    pub(super) has_called: bool,
}

impl Frame {
    /// Of the instruction that it is at: behind a call there may be another function's.
    pub(super) fn insn(self) -> Addr {
        self.pc.offset(-i64::from(self.has_called))
    }
}

/// Walks stacks.
#[derive(Debug)]
pub(super) struct Walker {
    mode: Mode,
    /// Where objects are.
    code: Vec<AddrRange>,
    tables: Vec<Tables>,
    known: HashMap<u64, Option<Step>>,
}

impl Walker {
    /// For a process with these objects and patches.
    pub(super) fn new(
        mode: Mode,
        objects: &Objects,
        memory: &Memory,
        mappings: &[Mapping],
        patches: &[Active],
    ) -> Self {
        let mut tables: Vec<Tables> = objects
            .all()
            .iter()
            .filter_map(|object| Tables::of_file(mode, object.file().bytes(), object.bias, object.range))
            .collect();
        let vdso = mappings.iter().find(|mapping| mapping.path.to_str() == Some("[vdso]"));
        tables.extend(vdso.and_then(|mapping| {
            let bytes = memory.read_vec(mapping.range.start, usize::try_from(mapping.range.len_bytes()).ok()?).ok()?;
            Tables::of_file(mode, &bytes, mapping.range.start.value(), mapping.range)
        }));
        tables.extend(patches.iter().filter_map(|patch| {
            let (start, end) = patch.unwind?;
            let bytes = memory.read_vec(Addr::new(start), usize::try_from(end - start).ok()?).ok()?;
            let code = AddrRange { start: Addr::new(patch.code.0), end: Addr::new(patch.code.1) };
            Some(Tables { mode, code, index: None, records: (start, bytes) })
        }));
        let code = objects.all().iter().map(|object| object.range).collect();
        Self { mode, code, tables, known: HashMap::new() }
    }

    /// Whether an address may be one of code, as it is an object's.
    pub(super) fn is_code(&self, at: Addr) -> bool {
        self.code.iter().any(|range| range.contains(at))
    }

    /// Where a stopped thread is, and where all functions that it is in will go on, from the innermost. `None` if that cannot be told. What a tracer has put in between is left
    /// out.
    pub(super) fn frames(
        &mut self,
        registers: &ThreadRegisters,
        memory: &Memory,
        hooks: Option<&Hooks>,
    ) -> Option<Vec<Frame>> {
        let program_at = |pc: u64| hooks.map_or(Some(Addr::new(pc)), |hooks| hooks.program_at(Addr::new(pc)));
        let mode = self.mode;
        if width::mode_of(registers) != mode {
            return None;
        }
        let mut pages = Pages { memory, mode, known: HashMap::new() };
        let now = registers;
        let mut registers = by_number(mode, now);
        let mut found = Vec::new();
        let mut frame = Frame { pc: program_at(now.rip)?, has_called: false };
        while found.len() < DEEPEST {
            found.push(frame);
            let step = self.step(frame.insn().value())?;
            let frame_address = step.frame_address.value(&registers, None, &mut pages)?;
            if !step.is_signal_frame && frame_address <= registers[stack_pointer(mode)]? {
                return None;
            }
            let mut caller = registers;
            caller[stack_pointer(mode)] = Some(frame_address);
            for (register, rule) in &step.registers {
                caller[*register] = match rule {
                    Rule::Undefined => None,
                    rule => Some(rule.value(&registers, Some(frame_address), &mut pages)?),
                };
            }
            frame = match caller[return_address(mode)] {
                // The thread's first function.
                None | Some(0) => return Some(found),
                Some(pc) if step.is_signal_frame => Frame { pc: program_at(pc)?, has_called: false },
                Some(pc) => {
                    let hooks = hooks.filter(|hooks| hooks.return_code() == pc);
                    // The frame's address is behind its return address (System V psABI).
                    let slot = Addr::new(frame_address.wrapping_sub(word_bytes(mode).into()));
                    let pc = hooks.map_or(Some(pc), |hooks| hooks.return_at(memory, slot))?;
                    Frame { pc: Addr::new(pc), has_called: true }
                }
            };
            registers = caller;
        }
        None
    }

    fn step(&mut self, pc: u64) -> Option<Step> {
        let Self { tables, known, .. } = self;
        let find = || tables.iter().find(|tables| tables.code.contains(Addr::new(pc)))?.step(pc);
        known.entry(pc).or_insert_with(find).clone()
    }
}

/// Registers as they are in a thread.
fn by_number(mode: Mode, now: &ThreadRegisters) -> Registers {
    match mode {
        Mode::Bits32 => {
            let general = [now.rax, now.rcx, now.rdx, now.rbx, now.rsp, now.rbp, now.rsi, now.rdi, now.rip];
            let mut registers = [None; 17];
            for (place, register) in registers.iter_mut().zip(general) {
                // What the kernel keeps in the upper halves says nothing.
                *place = Some(register & u64::from(u32::MAX));
            }
            registers
        }
        Mode::Bits64 => [
            now.rax, now.rdx, now.rcx, now.rbx, now.rsi, now.rdi, now.rbp, now.rsp, now.r8, now.r9, now.r10, now.r11,
            now.r12, now.r13, now.r14, now.r15, now.rip,
        ]
        .map(Some),
    }
}

impl Tables {
    /// Those of a file that is loaded there.
    fn of_file(mode: Mode, file: &[u8], bias: u64, code: AddrRange) -> Option<Self> {
        let segments = file::segments(file)?;
        // From an address to the end of what the file has behind it.
        let from = |address: u64| segments.iter().find_map(|segment| segment.from(file, address)).map(<[u8]>::to_vec);
        let Segment { address, .. } = *segments.iter().find(|segment| segment.kind == elf::PT_GNU_EH_FRAME)?;
        let at = width::wrapped(mode, Addr::new(address.wrapping_add(bias))).value();
        let index = from(address)?;
        let bases = BaseAddresses::default().set_eh_frame_hdr(at);
        let word_bytes = word_bytes(mode);
        let parsed = EhFrameHdr::new(&index, LittleEndian).parse(&bases, word_bytes).ok()?;
        let records_at = parsed.eh_frame_ptr().direct().ok()?;
        let records = from(width::wrapped(mode, Addr::new(records_at.wrapping_sub(bias))).value())?;
        Some(Self { mode, code, index: Some((at, index)), records: (records_at, records) })
    }

    fn step(&self, pc: u64) -> Option<Step> {
        let mut records = EhFrame::new(&self.records.1, LittleEndian);
        records.set_address_size(word_bytes(self.mode));
        let bases = BaseAddresses::default().set_eh_frame(self.records.0);
        let record = match &self.index {
            Some((at, index)) => {
                let bases = bases.clone().set_eh_frame_hdr(*at);
                let index = EhFrameHdr::new(index, LittleEndian).parse(&bases, word_bytes(self.mode)).ok()?;
                index.table()?.fde_for_address(&records, &bases, pc, EhFrame::cie_from_offset).ok()?
            }
            None => records.fde_for_address(&bases, pc, EhFrame::cie_from_offset).ok()?,
        };
        let mut context = UnwindContext::new();
        let row = record.unwind_info_for_address(&records, &bases, &mut context, pc).ok()?;
        let expression =
            |place: &UnwindExpression<usize>| place.get(&records).ok().map(|expression| expression.0.slice().to_vec());
        let frame_address = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => Rule::Register(usize::from(register.0), *offset),
            CfaRule::Expression(place) => Rule::Computed(expression(place)?),
        };
        let mut registers = Vec::new();
        for (register, rule) in row.registers() {
            let register = usize::from(register.0);
            // Registers of vectors are nobody's business here.
            if register > return_address(self.mode) {
                continue;
            }
            let rule = match rule {
                RegisterRule::Undefined => Rule::Undefined,
                RegisterRule::SameValue => continue,
                RegisterRule::Offset(offset) => Rule::InMemory(*offset),
                RegisterRule::ValOffset(offset) => Rule::FrameAddress(*offset),
                RegisterRule::Register(Register(other)) => Rule::Register(usize::from(*other), 0),
                RegisterRule::Expression(place) => Rule::InMemoryAt(expression(place)?),
                RegisterRule::ValExpression(place) => Rule::Computed(expression(place)?),
                _ => return None,
            };
            registers.push((register, rule));
        }
        // Without a rule for it there would be no end.
        registers.iter().any(|(register, _)| *register == return_address(self.mode)).then_some(())?;
        Some(Step { frame_address, registers, is_signal_frame: record.is_signal_trampoline() })
    }
}

impl Rule {
    fn value(&self, registers: &Registers, frame_address: Option<u64>, pages: &mut Pages<'_>) -> Option<u64> {
        match self {
            Self::Undefined => None,
            Self::Register(register, offset) => {
                registers.get(*register).copied().flatten()?.checked_add_signed(*offset)
            }
            Self::InMemory(offset) => pages.word(frame_address?.checked_add_signed(*offset)?),
            Self::FrameAddress(offset) => frame_address?.checked_add_signed(*offset),
            Self::InMemoryAt(expression) => {
                let at = evaluate(expression, registers, frame_address, pages)?;
                pages.word(at)
            }
            Self::Computed(expression) => evaluate(expression, registers, frame_address, pages),
        }
    }
}

/// The value of an expression, which finds the frame's address on its stack if there is one.
fn evaluate(
    expression: &[u8],
    registers: &Registers,
    frame_address: Option<u64>,
    pages: &mut Pages<'_>,
) -> Option<u64> {
    const LIMIT: u32 = 1000;
    let encoding = gimli::Encoding { address_size: word_bytes(pages.mode), format: gimli::Format::Dwarf32, version: 4 };
    let mut evaluation: Evaluation<Bytes<'_>> =
        Expression(EndianSlice::new(expression, LittleEndian)).evaluation(encoding);
    evaluation.set_max_iterations(LIMIT);
    if let Some(frame_address) = frame_address {
        evaluation.set_initial_value(frame_address);
    }
    let mut state = evaluation.evaluate().ok()?;
    loop {
        state = match state {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresRegister { register, .. } => {
                let value = registers.get(usize::from(register.0)).copied().flatten()?;
                evaluation.resume_with_register(Value::Generic(value)).ok()?
            }
            EvaluationResult::RequiresMemory { address, size, space: None, .. } if size == word_bytes(pages.mode) => {
                let value = pages.word(address)?;
                evaluation.resume_with_memory(Value::Generic(value)).ok()?
            }
            _ => return None,
        };
    }
    match evaluation.result().first()?.location {
        Location::Address { address } => Some(address),
        _ => None,
    }
}

/// Memory of a process that stands still.
struct Pages<'a> {
    memory: &'a Memory,
    mode: Mode,
    known: HashMap<u64, Option<Vec<u8>>>,
}

impl Pages<'_> {
    fn word(&mut self, at: u64) -> Option<u64> {
        let (page, offset) = (at & !(PAGE_BYTES - 1), usize::try_from(at % PAGE_BYTES).ok()?);
        let read = || self.memory.read_vec(Addr::new(page), usize::try_from(PAGE_BYTES).ok()?).ok();
        let bytes = self.known.entry(page).or_insert_with(read).as_ref()?;
        // A stack has whole words.
        let word = bytes.get(offset..offset + usize::from(word_bytes(self.mode)))?;
        Some(width::word_in(self.mode, word))
    }
}

/// As tables count.
fn word_bytes(mode: Mode) -> u8 {
    match mode {
        Mode::Bits32 => 4,
        Mode::Bits64 => 8,
    }
}
