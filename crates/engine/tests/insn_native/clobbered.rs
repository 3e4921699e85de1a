//! What the clobbers analysis leaves out is not written: instructions of all kinds are run, and what changed is
//! compared.

use iced_x86::{Code, Instruction, Register};
use proptest::prelude::*;
use trapline_engine::{
    Addr, Mode,
    insn::{Clobbers, Gpr, RegSet, clobbers},
};

use crate::{
    asm::{WORD_BYTES, assemble, direct, gpr, word},
    machine::{GPR_COUNT, Machine, Place, Registers, STATUS_FLAGS},
    quiet, registers,
};

/// Instructions that write registers which do not show among their operands, parts of registers, or only sometimes.
fn instructions(machine: &Machine) -> Vec<Instruction> {
    let memory = || direct(machine.data().offset(0x40));
    let (ax, cx, dx, bx, si, di) = (gpr(0), gpr(1), gpr(2), gpr(3), gpr(6), gpr(7));
    let plain = Instruction::with;
    let unary = |code, register: Register| Instruction::with1(code, register).unwrap();
    let in_memory = |code| Instruction::with1(code, memory()).unwrap();
    let binary = |code, to: Register, from: Register| Instruction::with2(code, to, from).unwrap();
    let immediate = |code, register: Register, value: i32| Instruction::with2(code, register, value).unwrap();
    let mut all = vec![
        plain(Code::Rdtsc),
        plain(Code::Cpuid),
        plain(Code::Cld),
        plain(Code::Cmc),
        plain(Code::Lahf),
        plain(Code::Sahf),
        plain(Code::Cwde),
        plain(Code::Cdq),
        plain(Code::Lfence),
        plain(Code::Mfence),
        plain(Code::Pause),
        unary(word(Code::Mul_rm32, Code::Mul_rm64), cx),
        unary(word(Code::Imul_rm32, Code::Imul_rm64), si),
        unary(Code::Mul_rm8, Register::BH),
        unary(word(Code::Neg_rm32, Code::Neg_rm64), di),
        unary(word(Code::Inc_rm32, Code::Inc_rm64), bx),
        unary(word(Code::Bswap_r32, Code::Bswap_r64), bx),
        unary(Code::Seto_rm8, Register::DH),
        unary(Code::Setle_rm8, Register::BL),
        in_memory(word(Code::Not_rm32, Code::Not_rm64)),
        in_memory(word(Code::Dec_rm32, Code::Dec_rm64)),
        in_memory(Code::Setb_rm8),
        binary(word(Code::Xchg_rm32_r32, Code::Xchg_rm64_r64), cx, dx),
        binary(word(Code::Xadd_rm32_r32, Code::Xadd_rm64_r64), si, bx),
        binary(word(Code::Cmpxchg_rm32_r32, Code::Cmpxchg_rm64_r64), di, cx),
        binary(word(Code::Bsf_r32_rm32, Code::Bsf_r64_rm64), dx, si),
        binary(word(Code::Bsr_r32_rm32, Code::Bsr_r64_rm64), ax, bx),
        binary(word(Code::Cmove_r32_rm32, Code::Cmove_r64_rm64), cx, di),
        binary(word(Code::Adc_r32_rm32, Code::Adc_r64_rm64), bx, cx),
        binary(word(Code::Bts_rm32_r32, Code::Bts_rm64_r64), di, ax),
        binary(Code::Mov_r8_rm8, Register::AH, Register::CL),
        binary(Code::Mov_r16_rm16, Register::SI, Register::DX),
        binary(Code::Movsx_r32_rm8, Register::EDI, Register::AH),
        binary(word(Code::Rol_rm32_CL, Code::Rol_rm64_CL), si, Register::CL),
        immediate(word(Code::Sar_rm32_imm8, Code::Sar_rm64_imm8), dx, 3),
        immediate(word(Code::Shl_rm32_imm8, Code::Shl_rm64_imm8), ax, 0),
        Instruction::with3(word(Code::Imul_r32_rm32_imm32, Code::Imul_r64_rm64_imm32), bx, cx, 1000).unwrap(),
        Instruction::with3(word(Code::Shld_rm32_r32_imm8, Code::Shld_rm64_r64_imm8), dx, si, 5).unwrap(),
        Instruction::with2(word(Code::Xadd_rm32_r32, Code::Xadd_rm64_r64), memory(), cx).unwrap(),
        Instruction::with2(word(Code::Cmpxchg_rm32_r32, Code::Cmpxchg_rm64_r64), memory(), dx).unwrap(),
        Instruction::with1(Code::Cmpxchg8b_m64, memory()).unwrap(),
    ];
    // lock inc
    let mut locked = in_memory(word(Code::Inc_rm32, Code::Inc_rm64));
    locked.set_has_lock_prefix(true);
    all.push(locked);
    // A string instruction, with its registers pointing into the data.
    let address = |register| {
        Instruction::with2(word(Code::Lea_r32_m, Code::Lea_r64_m), register, direct(machine.data().offset(0x100)))
            .unwrap()
    };
    all.extend([address(di), address(si), immediate(Code::Mov_rm32_imm32, Register::ECX, 5)]);
    all.push(Instruction::with_rep_stosb(Mode::NATIVE.bitness()).unwrap());
    all.extend([address(di), address(si)]);
    all.push(Instruction::with_movsb(Mode::NATIVE.bitness(), Register::None, iced_x86::RepPrefixKind::None).unwrap());
    all.extend([address(di), address(si)]);
    all.push(Instruction::with_cmpsb(Mode::NATIVE.bitness(), Register::None, iced_x86::RepPrefixKind::None).unwrap());
    all
}

/// Indices into `instructions` up to here can run anywhere; the string instructions behind need the ones before them.
fn independent(instructions: &[Instruction]) -> usize {
    instructions.iter().position(|insn| insn.code() == word(Code::Lea_r32_m, Code::Lea_r64_m)).unwrap()
}

/// Reads the analysed function from the bytes it was made of.
fn analyse(at: Addr, code: &[u8]) -> Clobbers {
    clobbers(Mode::NATIVE, at, &mut |from, buffer| {
        let rest =
            usize::try_from(from.distance_from(at)).ok().and_then(|offset| code.get(offset..)).unwrap_or_default();
        let len_bytes = rest.len().min(buffer.len());
        buffer[..len_bytes].copy_from_slice(&rest[..len_bytes]);
        len_bytes
    })
}

/// What differs after a run.
#[derive(PartialEq, Eq, Debug)]
struct Changed {
    general: RegSet,
    flags: bool,
}

impl Changed {
    fn is_covered_by(&self, found: Clobbers) -> bool {
        (self.general - found.general).is_empty() && (found.flags || !self.flags)
    }
}

/// The code of `body` and a return, what is found in it, and what changes when it runs.
fn run(machine: &mut Machine, body: &[Instruction], before: &Registers) -> (Vec<u8>, Clobbers, Changed) {
    let ret = Instruction::with(word(Code::Retnd, Code::Retnq));
    let code = assemble(machine.function(), &[body, &[ret]].concat());
    machine.reset_memory();
    machine.write_function(&code);
    let before = before.with_stack_pointer(machine);
    let after = machine.run(machine.function(), &before);
    assert_eq!(after.general[4], before.general[4] + WORD_BYTES);
    let differing = (0..GPR_COUNT).filter(|number| before.general[*number] != after.general[*number]);
    let general = RegSet::from_bits(differing.map(|number| 1 << number).sum());
    let flags = before.flags & STATUS_FLAGS != after.flags;
    let found = analyse(machine.function(), &code);
    (code, found, Changed { general, flags })
}

/// The same, with what changed compared to what was found.
fn run_and_compare(machine: &mut Machine, body: &[Instruction], before: &Registers) -> Clobbers {
    let (code, found, changed) = run(machine, body, before);
    assert!(changed.is_covered_by(found), "{changed:?}, but found {found:?} for {code:02x?}");
    found
}

#[test]
fn a_register_that_is_left_out_is_noticed() {
    let mut machine = Machine::new(Place::High);
    let exchange = Instruction::with2(word(Code::Xchg_rm32_r32, Code::Xchg_rm64_r64), gpr(1), gpr(2)).unwrap();
    let increment = Instruction::with1(word(Code::Inc_rm32, Code::Inc_rm64), gpr(3)).unwrap();
    let mut before = Registers { general: [1; _], flags: STATUS_FLAGS };
    before.general[2] = 2;
    let (_, found, changed) = run(&mut machine, &[exchange, increment], &before);
    assert_eq!(changed, Changed { general: RegSet::of(&[Gpr::CX, Gpr::DX, Gpr::BX, Gpr::SP]), flags: true });
    assert!(changed.is_covered_by(found));
    for register in changed.general.iter() {
        let general = found.general - RegSet::of(&[register]);
        assert!(!changed.is_covered_by(Clobbers { general, ..found }), "{register}");
    }
    assert!(!changed.is_covered_by(Clobbers { flags: false, ..found }));
}

#[test]
fn each_instruction_alone_writes_only_what_was_found() {
    let mut machine = Machine::new(Place::High);
    let all = instructions(&machine);
    for insn in &all[..independent(&all)] {
        for value in [0, 1, usize::MAX, 0x5a5a_1234] {
            for flags in [0, usize::MAX] {
                let before = Registers { general: [value; _], flags };
                let found = run_and_compare(&mut machine, &[*insn], &before);
                assert!(!found.vector, "{insn:?}");
                assert_ne!(found.general, RegSet::ALL, "{insn:?}");
            }
        }
    }
}

#[test]
fn string_instructions_write_their_pointers() {
    let mut machine = Machine::new(Place::High);
    let all = instructions(&machine);
    let strings = &all[independent(&all)..];
    let found = run_and_compare(&mut machine, strings, &Registers { general: [0; _], flags: 0 });
    assert_eq!(found.general, RegSet::of(&[Gpr::CX, Gpr::SP, Gpr::SI, Gpr::DI]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..quiet() })]

    #[test]
    fn sequences_write_only_what_was_found(
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
        before in registers(),
    ) {
        let mut machine = Machine::new(Place::High);
        let all = instructions(&machine);
        let independent = &all[..independent(&all)];
        let body: Vec<_> = picks.iter().map(|pick| *pick.get(independent)).collect();
        let found = run_and_compare(&mut machine, &body, &before);
        prop_assert!(found != Clobbers::EVERYTHING);
    }
}
