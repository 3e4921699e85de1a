//! Trampolines: the machine code between a site and the callbacks of its ops.
//!
//! Owns the emission of two kinds of code for a target of either width: the *int3 trampoline* ([`int3_trampoline`], one for each address
//! space), which turns a slot into a return address on the stack, and *ops trampolines* ([`ops_trampoline`], one for each set of ops),
//! which save what their callbacks can clobber, call them, restore, and return behind the site. Emitted bytes are position dependent;
//! the [`Host`](crate::Host) finds the place. Upstream is the [`engine`](crate::Engine), downstream the callbacks.
//!
//! An ops trampoline is a `caller`, or a `regs_caller` as soon as one of its ops wants all registers (`SAVE_REGS`); with several ops it is
//! a `list`. The list is unrolled into the code: a set of ops never changes, a changed set has another trampoline. So there is no list
//! in memory that a thread could read while it is edited.
//!
//! Invariant: whatever register a callback can write is restored, and no other instruction is spent. [`Clobbers`] of the callbacks' machine
//! code tell which: an empty or counting callback costs no more than its arguments; one whose code is not fully understood has the
//! whole register file saved, vectors included.
//!
//! ```text
//! stack inside an ops trampoline (word = 4 or 8 bytes)
//!   parent   return address of the traced function    <- sp at the site
//!   ip       site + 5: pushed by the call at the site, or from a slot
//!   bp       pushed by the trampoline                 <- bp
//!   ax, flags, cx, dx, si, di, (r8-r11), bx, (r12-r15), sp: a CallFrame, filled as far as needed
//!   extended state (XSAVE area, 64-byte aligned), if a callback may write vector registers
//!   callback
//! ```

mod asm;

use alloc::{
    string::{String, ToString},
    vec::Vec,
};
use core::fmt;

pub use asm::Segment;
use asm::{Asm, Mem};
use iced_x86::IcedError;

use crate::{
    Addr, Mode,
    frame::FrameLayout,
    insn::{Clobbers, Gpr, INT3},
    slots::ThreadLayout,
};

/// Bytes of the r11 entry that lies before the main entry of a 64-bit ops trampoline: `push r11`, falling through.
pub const R11_ENTRY_BYTES: i64 = 2;

/// An ops trampoline's main entry lies this far behind the start of its block; the r11 entry fits between.
pub const ENTRY_OFFSET_BYTES: i64 = 16;

/// Where a thread finds its [`ThreadState`](crate::ThreadState): at a fixed distance from a segment base, or from what a pointer at a fixed
/// distance from a segment base points to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ThreadBase {
    /// The segment register.
    pub segment: Segment,
    /// Where the segment leads to data of a CPU, not of a thread, as in most kernels: distance in bytes from its base to the word that points
    /// to the current thread. The trampolines read that word by one instruction, so that a thread gets its own pointer on whichever CPU
    /// it runs, and then use no segment any more: a thread that migrates between two instructions keeps its own state.
    pub pointer: Option<i64>,
    /// Distance in bytes from the segment's base, or from where `pointer` points; negative for thread-local storage of the psABI's
    /// variant II.
    pub offset: i64,
}

/// How vector and x87 state is kept across callbacks that may write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VectorSave {
    /// Not at all: the host's callbacks are compiled without vector instructions, as kernels are.
    Never,
    /// FXSAVE: x87, MMX and SSE (SDM volume 1, section 10.5).
    Fxsave,
    /// XSAVE with this component mask; `area_bytes` is CPUID.0DH's size for it.
    Xsave {
        /// State components, as in XCR0.
        mask: u64,
        /// Size of the save area.
        area_bytes: u32,
    },
    /// XSAVEC, which writes only components in use (SDM volume 1, section 13.10).
    Xsavec {
        /// State components, as in XCR0.
        mask: u64,
        /// Size of the save area in compacted form.
        area_bytes: u32,
    },
}

/// What the emitted code has to know of the machine that it runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Width of the target.
    pub mode: Mode,
    /// Where threads keep their state.
    pub thread: ThreadBase,
    /// How vector state is kept.
    pub vectors: VectorSave,
}

/// One callback of an ops trampoline.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpsCall {
    /// Entry of an `extern "C" fn(frame: *mut CallFrame, data: usize)`.
    pub callback: Addr,
    /// Its second argument.
    pub data: Addr,
    /// A word that counts calls left out because the callback was running already, in the same context.
    pub recursions: Addr,
    /// What the callback's machine code can write.
    pub clobbers: Clobbers,
    /// Whether the callback wants every register, and may change the instruction pointer.
    pub save_regs: bool,
    /// Whether the callback may be entered again from itself.
    pub recursion_safe: bool,
}

/// A trampoline could not be encoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EmitError(String);

impl fmt::Display for EmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a trampoline could not be encoded: {}", self.0)
    }
}

impl core::error::Error for EmitError {}

impl From<IcedError> for EmitError {
    fn from(error: IcedError) -> Self {
        Self(error.to_string())
    }
}

/// The int3 trampoline, to run at `at`: entered from the trap handler with a slot pending, on the stack of the interrupted context,
/// with all registers and flags as they were at the site.
///
/// It may be interrupted at any instruction by a context that uses the slots above. Therefore: the room on the stack is taken before the
/// slot is read, and the slot is released last. Only moves and `lea` are used, which leave the flags alone; the final `ret` needs no
/// register for the target.
///
/// # Errors
/// If an instruction cannot be encoded, which a thread offset beyond 2 GiB would cause.
pub fn int3_trampoline(machine: &Machine, at: Addr) -> Result<Vec<u8>, EmitError> {
    let mut asm = Asm::new(machine.mode);
    let layout = ThreadLayout::new(machine.mode);
    let word = i64::from(machine.mode.word_bytes());
    let ThreadBase { segment, pointer, offset } = machine.thread;
    // Of the slot on top, indexed by the bytes in use.
    let top_slot = offset + layout.slots() - layout.slot_bytes();
    let depth = offset + layout.depth();

    // Room for the call's target and, above it, the return address.
    asm.lea(Gpr::SP, Mem::at(Gpr::SP, -2 * word));
    asm.push(Gpr::AX);
    asm.push(Gpr::CX);
    if let Some(pointer) = pointer {
        let thread = Mem::thread(segment, pointer);
        asm.load(Gpr::AX, thread);
        asm.load(Gpr::CX, Mem::at(Gpr::AX, depth));
        asm.lea(Gpr::CX, Mem::indexed(Gpr::AX, Gpr::CX, top_slot));
        asm.load(Gpr::AX, Mem::at(Gpr::CX, layout.slot_return_to()));
        asm.store(Mem::at(Gpr::SP, 3 * word), Gpr::AX);
        asm.load(Gpr::AX, Mem::at(Gpr::CX, layout.slot_target()));
        asm.store(Mem::at(Gpr::SP, 2 * word), Gpr::AX);
        // The slot is on the stack: release it.
        asm.load(Gpr::AX, thread);
        asm.load(Gpr::CX, Mem::at(Gpr::AX, depth));
        asm.lea(Gpr::CX, Mem::at(Gpr::CX, -layout.slot_bytes()));
        asm.store(Mem::at(Gpr::AX, depth), Gpr::CX);
    } else {
        asm.load(Gpr::AX, Mem::thread(segment, depth));
        asm.load(Gpr::CX, Mem::thread_indexed(segment, Gpr::AX, top_slot + layout.slot_return_to()));
        asm.store(Mem::at(Gpr::SP, 3 * word), Gpr::CX);
        asm.load(Gpr::CX, Mem::thread_indexed(segment, Gpr::AX, top_slot + layout.slot_target()));
        asm.store(Mem::at(Gpr::SP, 2 * word), Gpr::CX);
        // The slot is on the stack: release it.
        asm.lea(Gpr::AX, Mem::at(Gpr::AX, -layout.slot_bytes()));
        asm.store(Mem::thread(segment, depth), Gpr::AX);
    }
    asm.pop(Gpr::CX);
    asm.pop(Gpr::AX);
    // To the target, with the return address on top of the stack, as after a call.
    asm.ret();
    Ok(asm.assemble(at)?)
}

/// The trampoline of a set of ops, whose block starts at `at`; its main entry is [`ENTRY_OFFSET_BYTES`] further on.
///
/// # Errors
/// If an instruction cannot be encoded.
pub fn ops_trampoline(machine: &Machine, calls: &[OpsCall], at: Addr) -> Result<Vec<u8>, EmitError> {
    let mut block = alloc::vec![INT3; usize::try_from(ENTRY_OFFSET_BYTES).unwrap_or_default()];
    if machine.mode == Mode::Bits64 {
        let mut r11_entry = Asm::new(machine.mode);
        r11_entry.push(Gpr::R11);
        let code = r11_entry.assemble(at)?;
        let start = block.len() - code.len();
        block[start..].copy_from_slice(&code);
    }
    block.extend(OpsTrampoline::new(machine, calls).emit(calls, at.offset(ENTRY_OFFSET_BYTES))?);
    Ok(block)
}

/// What one ops trampoline has to save, and where.
struct OpsTrampoline<'a> {
    machine: &'a Machine,
    frame: FrameLayout,
    saved: Vec<Gpr>,
    flags: bool,
    vectors: bool,
    all_registers: bool,
}

const ARGUMENTS_64: [Gpr; 6] = [Gpr::DI, Gpr::SI, Gpr::DX, Gpr::CX, Gpr::R8, Gpr::R9];
const SCRATCH_64: [Gpr; 3] = [Gpr::AX, Gpr::R10, Gpr::R11];
/// Of regparm and fastcall functions; the cdecl ones are on the stack.
const ARGUMENTS_32: [Gpr; 3] = [Gpr::AX, Gpr::DX, Gpr::CX];
const CALLEE_SAVED_64: [Gpr; 5] = [Gpr::BX, Gpr::R12, Gpr::R13, Gpr::R14, Gpr::R15];
const CALLEE_SAVED_32: [Gpr; 3] = [Gpr::BX, Gpr::SI, Gpr::DI];

impl<'a> OpsTrampoline<'a> {
    fn new(machine: &'a Machine, calls: &[OpsCall]) -> Self {
        let clobbers = calls.iter().fold(Clobbers::NOTHING, |all, call| all.union(call.clobbers));
        let all_registers = calls.iter().any(|call| call.save_regs);
        let vectors = clobbers.vector && machine.vectors != VectorSave::Never;
        // The guard compares; alignment for the vector area is an AND; both write flags.
        let flags = all_registers || clobbers.flags || vectors || calls.iter().any(|call| !call.recursion_safe);
        let (arguments, scratch, callee_saved): (&[Gpr], &[Gpr], &[Gpr]) = match machine.mode {
            Mode::Bits64 => (&ARGUMENTS_64, &SCRATCH_64, &CALLEE_SAVED_64),
            Mode::Bits32 => (&ARGUMENTS_32, &[], &CALLEE_SAVED_32),
        };
        let mut saved = arguments.to_vec();
        saved.extend(scratch.iter().filter(|register| {
            all_registers || clobbers.general.contains(**register) || (flags && **register == Gpr::AX)
        }));
        if all_registers {
            saved.extend(callee_saved);
        }
        Self { machine, frame: FrameLayout::new(machine.mode), saved, flags, vectors, all_registers }
    }

    fn emit(&self, calls: &[OpsCall], at: Addr) -> Result<Vec<u8>, EmitError> {
        let mut asm = Asm::new(self.machine.mode);
        self.enter(&mut asm);
        for call in calls {
            self.call(&mut asm, call);
        }
        self.leave(&mut asm);
        Ok(asm.assemble(at)?)
    }

    fn place(&self, register: Gpr) -> Mem {
        Mem::at(Gpr::BP, self.frame.register(register))
    }

    fn enter(&self, asm: &mut Asm) {
        asm.push(Gpr::BP);
        asm.copy(Gpr::BP, Gpr::SP);
        asm.lea(Gpr::SP, Mem::at(Gpr::BP, self.frame.start()));
        for register in &self.saved {
            asm.store(self.place(*register), *register);
        }
        let flags = Mem::at(Gpr::BP, self.frame.flags());
        if self.all_registers {
            asm.push_flags();
            asm.pop(Gpr::AX);
            asm.store(flags, Gpr::AX);
            asm.lea(Gpr::AX, Mem::at(Gpr::BP, self.frame.parent()));
            asm.store(Mem::at(Gpr::BP, self.frame.start()), Gpr::AX);
        } else if self.flags {
            asm.flags_to_ax();
            asm.store(flags, Gpr::AX);
        }
        if self.vectors {
            self.save_vectors(asm);
        }
        if asm.mode() == Mode::Bits32 {
            // Room for two stack arguments that keeps a 16-byte alignment.
            asm.lea(Gpr::SP, Mem::at(Gpr::SP, -16));
        }
    }

    fn call(&self, asm: &mut Asm, call: &OpsCall) {
        let (recursion, done) = (asm.label(), asm.label());
        if !call.recursion_safe {
            let busy = self.load_context(asm);
            asm.compare_byte(busy, 0);
            asm.jump_if_not_equal(recursion);
            asm.store_byte(busy, 1);
        }
        let frame = Mem::at(Gpr::BP, self.frame.start());
        match asm.mode() {
            Mode::Bits64 => {
                asm.lea(Gpr::DI, frame);
                asm.load_address(Gpr::SI, call.data);
            }
            Mode::Bits32 => {
                asm.load_address(Gpr::CX, call.data);
                asm.store(Mem::at(Gpr::SP, 4), Gpr::CX);
                asm.lea(Gpr::CX, frame);
                asm.store(Mem::at(Gpr::SP, 0), Gpr::CX);
            }
        }
        asm.call(call.callback);
        if !call.recursion_safe {
            let busy = self.load_context(asm);
            asm.store_byte(busy, 0);
            asm.jump(done);
            asm.bind(recursion);
            asm.load_address(Gpr::CX, call.recursions);
            asm.lock_increment(Mem::at(Gpr::CX, 0));
            asm.bind(done);
            asm.nop();
        }
    }

    /// Loads what leads to the current context's guard byte, and returns where that is. Uses cx, and ax where there is a pointer; a
    /// guarded trampoline has saved both.
    fn load_context(&self, asm: &mut Asm) -> Mem {
        let ThreadBase { segment, pointer, offset } = self.machine.thread;
        let layout = ThreadLayout::new(self.machine.mode);
        if let Some(pointer) = pointer {
            asm.load(Gpr::CX, Mem::thread(segment, pointer));
            asm.load(Gpr::AX, Mem::at(Gpr::CX, offset + layout.context()));
            Mem::indexed(Gpr::CX, Gpr::AX, offset + layout.busy())
        } else {
            asm.load(Gpr::CX, Mem::thread(segment, offset + layout.context()));
            Mem::thread_indexed(segment, Gpr::CX, offset + layout.busy())
        }
    }

    fn leave(&self, asm: &mut Asm) {
        if self.vectors {
            self.restore_vectors(asm);
        }
        let flags = Mem::at(Gpr::BP, self.frame.flags());
        if self.all_registers {
            asm.load(Gpr::AX, flags);
            asm.push(Gpr::AX);
            asm.pop_flags();
        } else if self.flags {
            asm.load(Gpr::AX, flags);
            asm.ax_to_flags();
        }
        for register in &self.saved {
            asm.load(*register, self.place(*register));
        }
        asm.leave();
        asm.ret();
    }

    /// Below the frame, at a 64-byte boundary; `sp` points to the area afterwards. Uses ax, cx and dx, which are saved.
    fn save_vectors(&self, asm: &mut Asm) {
        asm.align_down(Gpr::SP, 64);
        let area = Mem::at(Gpr::SP, 0);
        match self.machine.vectors {
            VectorSave::Never => {}
            VectorSave::Fxsave => {
                asm.lea(Gpr::SP, Mem::at(Gpr::SP, -512));
                asm.fxsave(area);
            }
            VectorSave::Xsave { mask, area_bytes } | VectorSave::Xsavec { mask, area_bytes } => {
                asm.lea(Gpr::SP, Mem::at(Gpr::SP, -i64::from(area_bytes.next_multiple_of(64))));
                // XRSTOR faults unless the reserved bytes of the header are zero (SDM volume 1, section 13.8.1), and neither
                // form of XSAVE writes them.
                asm.load_u32(Gpr::CX, 0);
                for place in (XSAVE_HEADER_BYTES).step_by(asm.mode().word_bytes() as usize) {
                    asm.store(Mem::at(Gpr::SP, place), Gpr::CX);
                }
                load_mask(asm, mask);
                if matches!(self.machine.vectors, VectorSave::Xsavec { .. }) {
                    asm.xsavec(area);
                } else {
                    asm.xsave(area);
                }
            }
        }
    }

    fn restore_vectors(&self, asm: &mut Asm) {
        let area = Mem::at(Gpr::SP, if asm.mode() == Mode::Bits32 { 16 } else { 0 });
        match self.machine.vectors {
            VectorSave::Never => {}
            VectorSave::Fxsave => asm.fxrstor(area),
            VectorSave::Xsave { mask, .. } | VectorSave::Xsavec { mask, .. } => {
                load_mask(asm, mask);
                asm.xrstor(area);
            }
        }
    }
}

/// The XSAVE header: behind the 512 bytes of the legacy region (SDM volume 1, section 13.4.2).
const XSAVE_HEADER_BYTES: core::ops::Range<i64> = 512..576;

/// The requested-feature bitmap in edx:eax.
#[expect(clippy::cast_possible_truncation, reason = "the halves of the mask")]
fn load_mask(asm: &mut Asm, mask: u64) {
    asm.load_u32(Gpr::AX, mask as u32);
    asm.load_u32(Gpr::DX, (mask >> 32) as u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of `mov ax, gs:[8]` at either width.
    const LOAD_POINTER: [(Mode, &[u8]); 2] =
        [(Mode::Bits32, &[0x65, 0x8b, 0x05, 8, 0, 0, 0]), (Mode::Bits64, &[0x65, 0x48, 0x8b, 0x04, 0x25, 8, 0, 0, 0])];

    #[test]
    fn a_thread_behind_a_pointer_is_reached_by_loads_of_the_pointer_alone() {
        for (mode, load) in LOAD_POINTER {
            let thread = ThreadBase { segment: Segment::Gs, pointer: Some(8), offset: 0x40 };
            let code =
                int3_trampoline(&Machine { mode, thread, vectors: VectorSave::Never }, Addr::new(0x1000)).unwrap();
            let loads = code.windows(load.len()).filter(|window| *window == load).count();
            let segment_prefixes = code.windows(1).filter(|window| *window == [0x65]).count();
            assert_eq!((loads, segment_prefixes), (2, 2), "{mode:?}: {code:02x?}");
        }
    }
}
