//! The frames of a stopped thread, exactly: as the unwind tables of what is loaded have them.
//!
//! Owns [`Walker`]. A search of the stack for words that may be return addresses never misses one, but takes words for return addresses that are left over from calls long
//! gone; in a thread that sleeps, such a word stays. A walk that comes to the thread's first function has seen all frames. One that does not, because code has no
//! tables (Go, generated code) or memory is not as they say, has seen nothing. Rules are kept by program counter, as the same threads sleep at the same places from one
//! stop to the next. Sources: DWARF 5, section 6.4; LSB core specification, section 10.6; System V psABI, table "DWARF Register Number Mapping".

use std::collections::HashMap;

use gimli::{
    BaseAddresses, CfaRule, EhFrame, EhFrameHdr, EndianSlice, Evaluation, EvaluationResult, Expression, LittleEndian,
    Location, Register, RegisterRule, UnwindContext, UnwindExpression, UnwindSection, Value, X86_64,
};
use object::{
    Endianness, elf,
    read::elf::{FileHeader, ProgramHeader},
};
use trapline_engine::{Addr, AddrRange};
use trapline_process::quiesce::ThreadRegisters;

use super::{PAGE_BYTES, objects::Objects, state::Active, tracing::Hooks};
use crate::sys::{maps::Mapping, memory::Memory};

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

/// General registers and the return address, by their numbers in DWARF.
type Registers = [Option<u64>; 17];

const STACK_POINTER: usize = 7;
const RETURN_ADDRESS: usize = 16;

const WORD_BYTES: u64 = 8;

/// Recursions deeper than this are not followed.
const DEEPEST: usize = 1 << 16;

/// Unwind tables, as they lie in a process.
#[derive(Debug)]
struct Tables {
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
    tables: Vec<Tables>,
    known: HashMap<u64, Option<Step>>,
}

impl Walker {
    /// For a process with these objects and patches.
    pub(super) fn new(objects: &Objects, memory: &Memory, mappings: &[Mapping], patches: &[Active]) -> Self {
        let mut tables: Vec<Tables> = objects
            .all()
            .iter()
            .filter_map(|object| Tables::of_file(object.bytes(), object.bias, object.range))
            .collect();
        let vdso = mappings.iter().find(|mapping| mapping.path.to_str() == Some("[vdso]"));
        tables.extend(vdso.and_then(|mapping| {
            let bytes = memory.read_vec(mapping.range.start, usize::try_from(mapping.range.len_bytes()).ok()?).ok()?;
            Tables::of_file(&bytes, mapping.range.start.value(), mapping.range)
        }));
        tables.extend(patches.iter().filter_map(|patch| {
            let (start, end) = patch.unwind?;
            let bytes = memory.read_vec(Addr::new(start), usize::try_from(end - start).ok()?).ok()?;
            let code = AddrRange { start: Addr::new(patch.code.0), end: Addr::new(patch.code.1) };
            Some(Tables { code, index: None, records: (start, bytes) })
        }));
        Self { tables, known: HashMap::new() }
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
        let mut pages = Pages { memory, known: HashMap::new() };
        let now = registers;
        let mut registers: Registers = [
            now.rax, now.rdx, now.rcx, now.rbx, now.rsi, now.rdi, now.rbp, now.rsp, now.r8, now.r9, now.r10, now.r11,
            now.r12, now.r13, now.r14, now.r15, now.rip,
        ]
        .map(Some);
        let mut found = Vec::new();
        let mut frame = Frame { pc: program_at(now.rip)?, has_called: false };
        while found.len() < DEEPEST {
            found.push(frame);
            let step = self.step(frame.insn().value())?;
            let frame_address = step.frame_address.value(&registers, None, &mut pages)?;
            if !step.is_signal_frame && frame_address <= registers[STACK_POINTER]? {
                return None;
            }
            let mut caller = registers;
            caller[STACK_POINTER] = Some(frame_address);
            for (register, rule) in &step.registers {
                caller[*register] = match rule {
                    Rule::Undefined => None,
                    rule => Some(rule.value(&registers, Some(frame_address), &mut pages)?),
                };
            }
            frame = match caller[RETURN_ADDRESS] {
                // The thread's first function.
                None | Some(0) => return Some(found),
                Some(pc) if step.is_signal_frame => Frame { pc: program_at(pc)?, has_called: false },
                Some(pc) => {
                    let hooks = hooks.filter(|hooks| hooks.return_code() == pc);
                    // The frame's address is behind its return address (System V psABI).
                    let slot = Addr::new(frame_address.wrapping_sub(WORD_BYTES));
                    let pc = hooks.map_or(Some(pc), |hooks| hooks.return_at(memory, slot))?;
                    Frame { pc: Addr::new(pc), has_called: true }
                }
            };
            registers = caller;
        }
        None
    }

    fn step(&mut self, pc: u64) -> Option<Step> {
        let Self { tables, known } = self;
        let find = || tables.iter().find(|tables| tables.code.contains(Addr::new(pc)))?.step(pc);
        known.entry(pc).or_insert_with(find).clone()
    }
}

impl Tables {
    /// Those of a file that is loaded there.
    fn of_file(bytes: &[u8], bias: u64, code: AddrRange) -> Option<Self> {
        let header = elf::FileHeader64::<Endianness>::parse(bytes).ok()?;
        let endian = header.endian().ok()?;
        let segments = header.program_headers(endian, bytes).ok()?;
        // From an address to the end of what the file has behind it.
        let from = |address: u64| {
            let loads = segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD);
            let mut pieces = loads.filter_map(|segment| {
                let within = address.checked_sub(segment.p_vaddr(endian))?;
                segment.data(endian, bytes).ok()?.get(usize::try_from(within).ok()?..).filter(|data| !data.is_empty())
            });
            pieces.next().map(<[u8]>::to_vec)
        };
        let index = segments.iter().find(|segment| segment.p_type(endian) == elf::PT_GNU_EH_FRAME)?;
        let address = index.p_vaddr(endian);
        let (at, index) = (address.wrapping_add(bias), from(address)?);
        let bases = BaseAddresses::default().set_eh_frame_hdr(at);
        let parsed = EhFrameHdr::new(&index, LittleEndian).parse(&bases, 8).ok()?;
        let records_at = parsed.eh_frame_ptr().direct().ok()?;
        let records = from(records_at.wrapping_sub(bias))?;
        Some(Self { code, index: Some((at, index)), records: (records_at, records) })
    }

    fn step(&self, pc: u64) -> Option<Step> {
        let records = EhFrame::new(&self.records.1, LittleEndian);
        let bases = BaseAddresses::default().set_eh_frame(self.records.0);
        let record = match &self.index {
            Some((at, index)) => {
                let bases = bases.clone().set_eh_frame_hdr(*at);
                let index = EhFrameHdr::new(index, LittleEndian).parse(&bases, 8).ok()?;
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
            if register > RETURN_ADDRESS {
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
        registers.iter().any(|(register, _)| *register == RETURN_ADDRESS).then_some(())?;
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
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
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
            EvaluationResult::RequiresMemory { address, size: 8, space: None, .. } => {
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
    known: HashMap<u64, Option<Vec<u8>>>,
}

impl Pages<'_> {
    fn word(&mut self, at: u64) -> Option<u64> {
        let (page, offset) = (at & !(PAGE_BYTES - 1), usize::try_from(at % PAGE_BYTES).ok()?);
        let read = || self.memory.read_vec(Addr::new(page), usize::try_from(PAGE_BYTES).ok()?).ok();
        let bytes = self.known.entry(page).or_insert_with(read).as_ref()?;
        // A stack has whole words.
        bytes.get(offset..)?.first_chunk().map(|word| u64::from_le_bytes(*word))
    }
}

const _: () = assert!(X86_64::RSP.0 as usize == STACK_POINTER && X86_64::RA.0 as usize == RETURN_ADDRESS);
