//! The ladder: how each function can be armed, or why it cannot.
//!
//! Owns [`judge`]. A function's first whole instructions of 5 bytes and more, behind an `endbr`, are its *window*. If they begin with a call of
//! [`__fentry__`](crate::hook), the window is behind that, unless it cannot be there. The ladder tries, in this order,
//! 1. a jump over the window, if nothing leads between the window's instructions and all of them can be moved;
//! 2. the same with the padding behind a function that is shorter than a jump;
//! 3. a short jump over the first 2 bytes and more, to padding near by that holds the jump;
//! 4. a jump over the window, with the branches that lead into it sent to where its instructions are now: loops to a function's first bytes.
//!
//! Padding is what stands between functions, is never executed, and does nothing. Neighbours: the [scan](crate::scan) says what leads where,
//! [`arm`](crate::arm) carries plans out. Invariants: no byte is used for two functions; every candidate becomes a function with a verdict, or is
//! left out with the reason why it is none.

use std::ops::Range;

use iced_x86::{FlowControl, Instruction};
use rayon::prelude::*;
use trapline_engine::{
    Addr, AddrRange, Mode,
    insn::{CALL_BYTES, Gpr, RelocateError, RelocateOptions, RelocateReason, Relocated, pc_thunk, relocate},
};

use crate::{
    Function, LeftOut, Plan, Reason, Rung, Verdict,
    discover::Candidate,
    elf::Elf,
    flags,
    frames::Cfa,
    hook::Hook,
    marks::{Marks, Text},
    padding::{Padding, leading_bytes},
    scan::{Scanned, branch_target, decoder},
};

/// Bytes of a jump with a displacement of one byte.
const SHORT_JUMP_BYTES: usize = 2;

/// How far away stubs are taken to be until it is known. Their size does not depend on it, as long as everything is within reach.
const NOMINAL_DISTANCE: i64 = 1 << 28;

/// What judgements are based on.
pub(crate) struct Evidence<'s, 'a> {
    pub(crate) elf: &'s Elf<'a>,
    pub(crate) text: &'s Text<'a>,
    pub(crate) scanned: &'s Scanned,
    /// What functions without a name are called after.
    pub(crate) module: &'s str,
    /// Whether it is a Go program.
    pub(crate) is_go: bool,
}

/// What is known of a function before padding is given out.
enum Draft {
    Settled(Verdict),
    /// All is well if there is padding within reach of a short jump.
    NeedsPadding(Plan, Box<Draft>),
}

impl Draft {
    /// Something else where this one comes to nothing.
    fn or(self, other: Self) -> Self {
        match self {
            Self::Settled(Verdict::Untraced(_)) => other,
            Self::NeedsPadding(plan, otherwise) => Self::NeedsPadding(plan, Box::new(otherwise.or(other))),
            settled @ Self::Settled(_) => settled,
        }
    }
}

/// Tells functions from what is none, and judges them.
pub(crate) fn judge(evidence: &Evidence<'_, '_>, candidates: Vec<Candidate<'_>>) -> (Vec<Function>, Vec<LeftOut>) {
    let readers = evidence.readers(&candidates);
    let hook = Hook::find(evidence.elf, evidence.text, &candidates);
    let mut padding = Padding::find(evidence.text, evidence.elf.mode, evidence.scanned);
    let judged: Vec<Result<(Function, Draft), LeftOut>> = candidates
        .into_par_iter()
        .with_min_len(64)
        .map(|candidate| match evidence.is_no_function(&candidate) {
            Some(why) => {
                let name = candidate.names.iter().next().map(|name| String::from_utf8_lossy(name).into_owned());
                let range = AddrRange::new(Addr::new(candidate.address), candidate.size);
                Err(LeftOut { name, range, why })
            }
            None => Ok(evidence.function(candidate, &readers, &hook, &padding)),
        })
        .collect();
    let (mut drafts, mut left_out) = (Vec::with_capacity(judged.len()), Vec::new());
    for one in judged {
        match one {
            Ok(draft) => drafts.push(draft),
            Err(other) => left_out.push(other),
        }
    }
    // Padding behind a function is its own first of all.
    for (function, draft) in &drafts {
        if let Draft::Settled(Verdict::Traced(plan)) = draft
            && matches!(plan.rung, Rung::Window | Rung::OneInstruction | Rung::Nop)
        {
            padding.claim(function.end().max(plan.window_at)..plan.window_at + CALL_BYTES as u64);
        }
    }
    let functions = drafts.into_iter().map(|(function, draft)| settle(function, draft, &mut padding)).collect();
    (functions, left_out)
}

fn settle(mut function: Function, mut draft: Draft, padding: &mut Padding) -> Function {
    function.verdict = loop {
        match draft {
            Draft::Settled(verdict) => break verdict,
            Draft::NeedsPadding(mut plan, otherwise) => {
                let next = plan.window_at + SHORT_JUMP_BYTES as u64;
                let reach = next.saturating_sub(128)..next + 127 + CALL_BYTES as u64;
                if let Some(pad) = padding.take(next, &reach) {
                    plan.rung = Rung::ShortJump { pad };
                    break Verdict::Traced(plan);
                }
                draft = *otherwise;
            }
        }
    };
    function
}

impl Evidence<'_, '_> {
    /// Makes a function of a candidate, and a draft of its verdict.
    fn function(
        &self,
        candidate: Candidate<'_>,
        readers: &[u64],
        hook: &Hook<'_, '_>,
        padding: &Padding,
    ) -> (Function, Draft) {
        let address = candidate.address;
        let draft = match self.special(&candidate) {
            Some(Special::Untraced(reason)) => Draft::Settled(Verdict::Untraced(reason)),
            special => {
                let entry_only = match special {
                    Some(Special::EntryOnly(reason)) => Some(reason),
                    _ if self.is_go => Some(Reason::GoStack),
                    _ if self.looks_at_return_address(&candidate) || readers.contains(&address) => {
                        Some(Reason::ReadsReturnAddress)
                    }
                    _ => None,
                };
                self.climb(address, entry_only, hook, padding)
            }
        };
        let size = candidate.size;
        let named = candidate.names.choose();
        let (name, aliases) = named.unwrap_or_else(|| (format!("{}+{address:#x}", self.module), Vec::new()));
        (Function { name, aliases, address, size, verdict: Verdict::Untraced(Reason::NoCode) }, draft)
    }

    /// What is known of a function by its name or its frame.
    fn special(&self, candidate: &Candidate<'_>) -> Option<Special> {
        const UNUSUAL: [&[u8]; 4] = [b"_dl_runtime_resolve", b"_dl_runtime_profile", b"_dl_tlsdesc", b"__restore_rt"];
        const NO_RETURN: [&[u8]; 2] = [b"_start", b"_dl_start_user"];
        const TWICE: [&[u8]; 9] = [
            b"setjmp",
            b"_setjmp",
            b"sigsetjmp",
            b"__sigsetjmp",
            b"getcontext",
            b"__getcontext",
            b"vfork",
            b"__vfork",
            b"swapcontext",
        ];
        let has = |all: &[&[u8]]| candidate.names.iter().any(|name| all.contains(&name));
        if candidate.names.iter().any(|name| UNUSUAL.iter().any(|unusual| name.starts_with(unusual))) {
            return Some(Special::Untraced(Reason::UnusualFrame));
        }
        if has(&NO_RETURN) || candidate.frame.is_some_and(|frame| frame.has_no_return) {
            return Some(Special::EntryOnly(Reason::NoReturnAddress));
        }
        if candidate.frame.is_some_and(|frame| frame.cfa != Cfa::at_entry(self.elf.mode)) {
            return Some(Special::Untraced(Reason::UnusualFrame));
        }
        has(&TWICE).then_some(Special::EntryOnly(Reason::ReturnsTwice))
    }

    /// Tries the rungs for the function at `address`.
    fn climb(&self, address: u64, entry_only: Option<Reason>, hook: &Hook<'_, '_>, padding: &Padding) -> Draft {
        let Some(unit) = self.scanned.unit_at(address) else {
            return Draft::Settled(Verdict::Untraced(Reason::NoCode));
        };
        let unit = &self.scanned.units[unit].range;
        let code = self.text.range(unit.clone());
        let window = |skipped: usize| Window {
            at: address + skipped as u64,
            code: &code[skipped..],
            unit: unit.clone(),
            room: padding.len_at(unit.end),
        };
        let first = endbr_bytes(self.elf.mode, code);
        let at_first = || self.climb_at(address, &window(first), entry_only);
        let behind = first + hook.call_bytes(address + first as u64, &code[first..]);
        let begin = address + behind as u64;
        // Whoever gets there otherwise than from the call has not called the function: a loop's next turn.
        if behind == first || self.scanned.first_target(self.text, begin..begin + 1).is_some() {
            return at_first();
        }
        self.climb_at(address, &window(behind), entry_only).or(at_first())
    }

    /// Tries the rungs for this window of the function at `address`.
    fn climb_at(&self, address: u64, window: &Window<'_>, entry_only: Option<Reason>) -> Draft {
        if window.code.is_empty() {
            return Draft::Settled(Verdict::Untraced(if window.unit.is_empty() {
                Reason::NoCode
            } else {
                Reason::TooShort
            }));
        }
        let plan = |rung, relocated: &Relocated, redirected| Plan {
            rung,
            window_at: window.at,
            window_bytes: u8::try_from(relocated.consumed_bytes).unwrap_or(u8::MAX),
            entry_only,
            keep_flags: flags::live_at(self.text, self.elf.mode, window.at),
            popped_bytes: self.scanned.unit_at(address).and_then(|unit| self.scanned.facts[unit].popped_bytes),
            is_branch_target: self.is_branch_target(address, window.at),
            stub_bytes: stub_bytes(relocated),
            redirected,
        };
        let whole = self.whole(window);
        let reason = match whole {
            Ok((rung, relocated)) => return Draft::Settled(Verdict::Traced(plan(rung, &relocated, Vec::new()))),
            Err(reason) => reason,
        };
        let last = match self.redirect(window) {
            Some((relocated, branches)) => Verdict::Traced(plan(Rung::Window, &relocated, branches)),
            None => Verdict::Untraced(reason),
        };
        match self.short(window) {
            Some(relocated) => {
                // The padding is filled in when it is given out.
                let plan = plan(Rung::ShortJump { pad: 0 }, &relocated, Vec::new());
                Draft::NeedsPadding(plan, Box::new(Draft::Settled(last)))
            }
            None => Draft::Settled(last),
        }
    }

    /// The jump over the whole window, and perhaps over padding behind it.
    fn whole(&self, window: &Window<'_>) -> Result<(Rung, Relocated), Reason> {
        if window.code.len() + window.room < CALL_BYTES {
            return Err(Reason::TooShort);
        }
        if let Some(target) = self.first_obstacle(window, CALL_BYTES) {
            return Err(self.led_to(target));
        }
        let attempt = if window.code.len() < CALL_BYTES {
            self.relocate(window, window.path_bytes(self.elf.mode))?
        } else {
            match self.relocate(window, CALL_BYTES) {
                Err(Reason::NotRelocatable(RelocateError { reason: RelocateReason::EndsTooSoon, .. })) => {
                    let path = window.path_bytes(self.elf.mode);
                    if path + leading_bytes(self.elf.mode, &window.code[path..]) < CALL_BYTES {
                        return Err(Reason::TooShort);
                    }
                    self.relocate(window, path)?
                }
                attempt => attempt?,
            }
        };
        let first_bytes = decoder(self.elf.mode, window.at, window.code).decode();
        let rung = match first_bytes.len() {
            len if len >= CALL_BYTES && first_bytes.is_invalid() => Rung::Window,
            len if len >= CALL_BYTES && first_bytes.mnemonic() == iced_x86::Mnemonic::Nop => Rung::Nop,
            len if len >= CALL_BYTES => Rung::OneInstruction,
            _ => Rung::Window,
        };
        Ok((rung, attempt))
    }

    /// What is moved for a short jump.
    fn short(&self, window: &Window<'_>) -> Option<Relocated> {
        if window.code.len() < SHORT_JUMP_BYTES || self.first_obstacle(window, SHORT_JUMP_BYTES).is_some() {
            return None;
        }
        let relocated = self.relocate(window, SHORT_JUMP_BYTES).ok()?;
        // What leads behind the short jump finds the bytes that always were there. Those of an instruction that was moved in part are none.
        self.first_obstacle(window, relocated.consumed_bytes).is_none().then_some(relocated)
    }

    /// The first address that something leads to between the first and the last of the window's first `len_bytes` bytes.
    ///
    /// Data that was taken for code, and tables that were read beyond their end, seem to lead anywhere. What a function's own branches do not
    /// lead to, and is in the middle of one of its instructions, is of that kind.
    fn first_obstacle(&self, window: &Window<'_>, len_bytes: usize) -> Option<u64> {
        let mut range = window.at + 1..window.at + len_bytes as u64;
        range.find(|address| {
            let is_target = |marks: &&Marks| marks.contains(self.text, *address);
            let scanned = self.scanned;
            let others = [&scanned.outside, &scanned.called, &scanned.taken, &scanned.listed];
            is_target(&&scanned.inside)
                || others.iter().any(is_target) && window.begins_instruction(self.elf.mode, *address)
        })
    }

    /// The jump over the whole window, although branches of the function lead into it, which can be sent elsewhere. Also says where those are.
    fn redirect(&self, window: &Window<'_>) -> Option<(Relocated, Vec<u64>)> {
        let bytes = window.at + 1..window.at + CALL_BYTES as u64;
        if window.code.len() < CALL_BYTES {
            return None;
        }
        let scanned = self.scanned;
        let others = [&scanned.outside, &scanned.called, &scanned.taken, &scanned.listed];
        let is_target = |address: u64| others.iter().any(|marks| marks.contains(self.text, address));
        if bytes.clone().any(|at| is_target(at) && window.begins_instruction(self.elf.mode, at)) {
            return None;
        }
        let relocated = self.relocate(window, CALL_BYTES).ok()?;
        let moved = window.at..window.at + relocated.consumed_bytes as u64;
        let mut branches = Vec::new();
        let mut decoder = decoder(self.elf.mode, window.unit.start, self.text.range(window.unit.clone()));
        let mut insn = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut insn);
            let Some(target) = branch_target(&insn).filter(|target| bytes.contains(target)) else { continue };
            let offset = u32::try_from(target - window.at).ok()?;
            let is_boundary = relocated.boundaries.iter().any(|(old, _)| *old == offset);
            let is_long = decoder.get_constant_offsets(&insn).immediate_size() == size_of::<i32>();
            if !is_boundary || !is_long || moved.contains(&insn.ip()) {
                return None;
            }
            branches.push(insn.ip());
        }
        Some((relocated, branches))
    }

    fn relocate(&self, window: &Window<'_>, min_bytes: usize) -> Result<Relocated, Reason> {
        let thunk = |target: Addr| pc_thunk_at(self.elf.mode, self.text.from(target.value()));
        let (from, to) = (Addr::new(window.at), Addr::new(window.at).offset(NOMINAL_DISTANCE));
        let options = RelocateOptions { pc_thunk: Some(&thunk) };
        let relocated =
            relocate(self.elf.mode, from, window.code, min_bytes, to, &options).map_err(Reason::NotRelocatable)?;
        let touched = window.at..window.at + relocated.consumed_bytes.max(CALL_BYTES) as u64;
        match self.scanned.relocated.first_in(self.text, touched) {
            None => Ok(relocated),
            Some(_) => Err(Reason::TextRelocation),
        }
    }

    /// How something that leads to `target` is called.
    fn led_to(&self, target: u64) -> Reason {
        let is_branch = [&self.scanned.inside, &self.scanned.outside, &self.scanned.called]
            .iter()
            .any(|marks| marks.contains(self.text, target));
        if is_branch { Reason::JumpIntoWindow { target } } else { Reason::JumpTable { target } }
    }

    fn is_branch_target(&self, address: u64, window_at: u64) -> bool {
        let (text, scanned) = (self.text, self.scanned);
        let jumps = [&scanned.inside, &scanned.outside];
        jumps.iter().any(|marks| marks.contains(text, address) || marks.contains(text, window_at))
    }
}

/// What a name or a frame says about a function.
enum Special {
    EntryOnly(Reason),
    Untraced(Reason),
}

/// The first bytes of a function.
struct Window<'a> {
    at: u64,
    /// From there to the end of the unit.
    code: &'a [u8],
    unit: Range<u64>,
    /// How much padding is behind the unit.
    room: usize,
}

impl Window<'_> {
    /// Whether one of its instructions is at `address`, or behind them.
    fn begins_instruction(&self, mode: Mode, address: u64) -> bool {
        let mut at = self.at;
        for insn in &mut decoder(mode, self.at, self.code) {
            if at >= address || insn.is_invalid() {
                return at == address || insn.is_invalid();
            }
            at = insn.next_ip();
        }
        true
    }

    /// Bytes of whole instructions until control goes elsewhere, or the code ends.
    fn path_bytes(&self, mode: Mode) -> usize {
        let mut len = 0;
        for insn in &mut decoder(mode, self.at, self.code) {
            if insn.is_invalid() {
                break;
            }
            len += insn.len();
            let ends = matches!(
                insn.flow_control(),
                FlowControl::UnconditionalBranch
                    | FlowControl::IndirectBranch
                    | FlowControl::Return
                    | FlowControl::Exception
            );
            if ends {
                break;
            }
        }
        len
    }
}

/// The most bytes that this window's moved instructions have in any process, as long as everything is within reach.
fn stub_bytes(relocated: &Relocated) -> u16 {
    /// A return address that does not fit the push gets its upper half stored over.
    const UPPER_HALF_BYTES: usize = 8;
    let more = if relocated.emulates_call { UPPER_HALF_BYTES } else { 0 };
    u16::try_from(relocated.bytes.len() + more).unwrap_or(u16::MAX)
}

/// The register that a PC thunk with this code loads, if it is one.
pub(crate) fn pc_thunk_at(mode: Mode, code: &[u8]) -> Option<Gpr> {
    if mode == Mode::Bits64 { None } else { pc_thunk(mode, code) }
}

/// Bytes of the `endbr` that `code` begins with.
pub(crate) fn endbr_bytes(mode: Mode, code: &[u8]) -> usize {
    let last = match mode {
        Mode::Bits32 => 0xfb,
        Mode::Bits64 => 0xfa,
    };
    let endbr = [0xf3, 0x0f, 0x1e, last];
    if code.starts_with(&endbr) { endbr.len() } else { 0 }
}
