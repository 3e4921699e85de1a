//! Where instructions end.
//!
//! Owns [`Operands`]: for each place in code how far it is from the end of its instruction, from which the CPU counts, and whether registers are added.
//! Neighbours: comparing and binding need it to know what a place refers to. Invariant: code that cannot be decoded gives no answer.

use std::collections::HashMap;

use iced_x86::{Decoder, DecoderOptions, Instruction, Register};

use crate::object::{Object, Role};

/// What instructions make of the places in a section of code.
#[derive(Clone, Debug, Default)]
pub(crate) struct Operands {
    by_offset: HashMap<u64, Operand>,
}

/// A place in an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Operand {
    /// From the place to the end of the instruction.
    pub(crate) to_end_bytes: i64,
    /// How many registers are added to the address.
    pub(crate) registers: usize,
}

impl Operands {
    /// Decodes a section; what is no code has none.
    pub(crate) fn of(object: &Object, section: usize) -> Self {
        let section = &object.sections[section];
        let mut by_offset = HashMap::new();
        if section.role != Role::Code || section.relocations.is_empty() {
            return Self { by_offset };
        }
        let mut decoder = Decoder::with_ip(object.mode.bitness(), &section.data, 0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let mut places = section.relocations.iter().map(|relocation| relocation.offset).peekable();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            let end = decoder.position() as u64;
            while let Some(place) = places.next_if(|place| *place < end) {
                if !instruction.is_invalid() {
                    let registers = [instruction.memory_base(), instruction.memory_index()];
                    let is_added =
                        |register: &&Register| !matches!(register, Register::None | Register::RIP | Register::EIP);
                    let registers = registers.iter().filter(is_added).count();
                    let to_end_bytes = i64::try_from(end - place).unwrap_or(i64::MAX);
                    by_offset.insert(place, Operand { to_end_bytes, registers });
                }
            }
        }
        Self { by_offset }
    }

    /// The place at `offset`.
    pub(crate) fn at(&self, offset: u64) -> Option<Operand> {
        self.by_offset.get(&offset).copied()
    }
}
