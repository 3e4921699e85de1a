//! Machine code for the mode that the tests themselves run in.

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};
use trapline_engine::{Addr, Mode};

/// Bytes of a native machine word.
pub(crate) const WORD_BYTES: usize = size_of::<usize>();

/// The one of two instruction codes that handles native words.
pub(crate) fn word(bits32: Code, bits64: Code) -> Code {
    match Mode::NATIVE {
        Mode::Bits32 => bits32,
        Mode::Bits64 => bits64,
    }
}

/// The native general-purpose register with that number.
pub(crate) fn gpr(number: usize) -> Register {
    const BITS32: [Register; 8] = [
        Register::EAX,
        Register::ECX,
        Register::EDX,
        Register::EBX,
        Register::ESP,
        Register::EBP,
        Register::ESI,
        Register::EDI,
    ];
    const BITS64: [Register; 16] = [
        Register::RAX,
        Register::RCX,
        Register::RDX,
        Register::RBX,
        Register::RSP,
        Register::RBP,
        Register::RSI,
        Register::RDI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    match Mode::NATIVE {
        Mode::Bits32 => BITS32[number],
        Mode::Bits64 => BITS64[number],
    }
}

/// Memory at a fixed address: relative to RIP in 64-bit code, absolute in 32-bit code.
pub(crate) fn direct(address: Addr) -> MemoryOperand {
    let displacement = address.value().cast_signed();
    match Mode::NATIVE {
        Mode::Bits32 => MemoryOperand::with_displ(address.value(), 4),
        Mode::Bits64 => MemoryOperand::with_base_displ(Register::RIP, displacement),
    }
}

/// The bytes of `instructions`, one behind the other, the first at `at`.
pub(crate) fn assemble(at: Addr, instructions: &[Instruction]) -> Vec<u8> {
    let mut encoder = Encoder::new(Mode::NATIVE.bitness());
    let mut next = at.value();
    for instruction in instructions {
        next += encoder.encode(instruction, next).expect("can be encoded") as u64;
    }
    encoder.take_buffer()
}
