//! A relocated window computes what the original did: both are run.
//!
//! The relocated one runs as it would in a target: the window holds a jump to the stub, with int3 behind it. The
//! outcome is everything that code can see of itself: registers, flags, data, and the stack above the stack pointer.

use iced_x86::{Decoder, DecoderOptions, Register};
use proptest::prelude::*;
use trapline_engine::{
    Addr, Mode,
    insn::{CALL_BYTES, Gpr, RelocateOptions, RelocateReason, Relocated, jmp, relocate},
};

use crate::{
    machine::{Machine, Place, Registers, STATUS_FLAGS},
    program::{Alu, Assembled, Op, PC_THUNK_REGISTER, Program, Reg, Slot, To, programs},
    quiet, registers,
};

/// AF is left undefined by logic operations.
const AF: usize = 1 << 4;

/// Longest and shortest run of bytes asked for: a jump, and a jump through memory.
const WINDOW_BYTES: [usize; 2] = [CALL_BYTES, 14];

#[derive(PartialEq, Eq, Debug)]
struct Outcome {
    registers: Registers,
    data: Vec<u8>,
    stack: Vec<u8>,
}

fn run(machine: &mut Machine, assembled: &Assembled, registers: &Registers) -> Outcome {
    assembled.reset_data(machine);
    let mut after = machine.run(machine.function(), registers);
    after.flags &= !AF;
    Outcome { registers: after, data: machine.read_data(), stack: machine.read_stack(after.general[4]) }
}

/// What the code does with a jump to the stub over its window.
fn run_armed(
    machine: &mut Machine,
    assembled: &Assembled,
    consumed_bytes: usize,
    stub: Addr,
    registers: &Registers,
) -> Outcome {
    let mut armed = assembled.code.clone();
    armed[..consumed_bytes].fill(0xcc);
    if let Ok(jmp) = jmp(machine.function(), stub, Mode::NATIVE) {
        armed[..jmp.len()].copy_from_slice(&jmp);
    } else {
        armed[..6].copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
        armed[6..14].copy_from_slice(&stub.value().to_le_bytes());
    }
    machine.write_function(&armed);
    run(machine, assembled, registers)
}

fn relocate_program(
    machine: &Machine,
    assembled: &Assembled,
    window_bytes: usize,
    stub: Addr,
    know_pc_thunk: bool,
) -> Result<Relocated, RelocateReason> {
    let pc_thunk = |target| (target == assembled.pc_thunk).then(|| Gpr::new(PC_THUNK_REGISTER).expect("is a register"));
    let options = RelocateOptions { pc_thunk: know_pc_thunk.then_some(&pc_thunk) };
    relocate(Mode::NATIVE, machine.function(), &assembled.code, window_bytes, stub, &options)
        .map_err(|error| error.reason)
}

/// Runs `program` in place and from a stub; whether it could be relocated, and if so that it did the same.
fn compare(
    machine: &mut Machine,
    program: &Program,
    window_bytes: usize,
    far: bool,
    know_pc_thunk: bool,
    registers: &Registers,
) -> Result<(), RelocateReason> {
    let assembled = program.load(machine);
    let stub = if far { machine.far_stub() } else { machine.stub() };
    let relocated = relocate_program(machine, &assembled, window_bytes, stub, know_pc_thunk)?;
    let original = run(machine, &assembled, registers);
    if far {
        machine.write_far_stub(&relocated.bytes);
    } else {
        machine.write_stub(&relocated.bytes, 0xcc);
    }
    let moved = run_armed(machine, &assembled, relocated.consumed_bytes, stub, registers);
    assert_eq!(moved, original, "{program:?} with a window of {window_bytes} bytes, far: {far}");
    Ok(())
}

/// Whether the window of that many bytes has a RIP-relative operand.
fn reads_relative_to_rip(assembled: &Assembled, window_bytes: usize) -> bool {
    let mut decoder = Decoder::new(Mode::NATIVE.bitness(), &assembled.code, DecoderOptions::NONE);
    while decoder.position() < window_bytes {
        if decoder.decode().memory_base() == Register::RIP {
            return true;
        }
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_global_rejects: 20_000, ..quiet() })]

    #[test]
    fn a_relocated_window_computes_the_same_as_the_original(
        program in programs(),
        registers in registers(),
        place in prop::sample::select(&Place::ALL),
        far: bool,
        know_pc_thunk: bool,
        window_bytes in 1..=20_usize,
    ) {
        let mut machine = Machine::new(place);
        let registers = registers.with_stack_pointer(&machine);
        // A far stub is entered through 14 bytes.
        let window_bytes = window_bytes.max(WINDOW_BYTES[usize::from(far && Mode::NATIVE == Mode::Bits64)]);
        match compare(&mut machine, &program, window_bytes, far, know_pc_thunk, &registers) {
            Ok(()) => {}
            Err(RelocateReason::EndsTooSoon | RelocateReason::ReturnsIntoWindow) => {
                return Err(TestCaseError::reject("refused"));
            }
            Err(RelocateReason::OperandOutOfReach) => {
                prop_assert!(far && reads_relative_to_rip(&program.assemble(&machine), window_bytes));
                return Err(TestCaseError::reject("refused"));
            }
            Err(reason) => prop_assert!(false, "{:?} is refused: {:?}", program, reason),
        }
    }
}

/// Every kind of op as the first of a function, in a window that ends right behind it where that is possible.
#[test]
fn every_kind_of_instruction_can_be_the_first() {
    let (first, second, slot) = (Reg::at(0), Reg::at(1), Slot::at(3));
    let to_pad = To::Pad(1);
    let mut ops = vec![
        Op::MovImmediate(first, -5),
        Op::MovRegister(first, second),
        Op::Load(first, slot),
        Op::StoreImmediate(slot, 0x1234_5678),
        Op::CompareImmediate(slot, 7),
        Op::LoadByte(first, slot),
        Op::LoadIfCarry(first, slot),
        Op::Store(slot, first),
        Op::LeaSlot(first, slot),
        Op::LeaFunction(first),
        Op::LeaSum(first, first, second, 0x1234),
        Op::Alu(Alu::Sub, first, second),
        Op::AluImmediate(Alu::Cmp, first, 3),
        Op::AluLoad(Alu::Add, first, slot),
        Op::Push(first),
        Op::PushSlot(slot),
        Op::Pop(first),
        Op::StackLoad(first, 8),
        Op::Jmp { pad: 1, long: true },
        Op::JmpSlot,
        Op::CallLeaf(0),
        Op::CallLeaf(1),
        Op::CallSlot,
        Op::CallRegister(first),
        Op::CallPcThunk,
        Op::CallNext(first),
    ];
    for condition in trapline_engine::insn::Condition::ALL {
        for to in [To::Skip(1), to_pad] {
            ops.extend([false, true].map(|long| Op::Jcc { condition, to, long }));
        }
    }
    ops.extend((0..5).flat_map(|which| [To::Skip(1), to_pad].map(|to| Op::CounterJump { which, to })));

    let tail = [Op::AluImmediate(Alu::Xor, second, 0x55), Op::MovImmediate(Reg::at(2), 0x1000_0001), Op::Push(first)];
    for op in ops {
        let program = Program([&[op], &tail[..]].concat());
        for place in Place::ALL {
            let mut machine = Machine::new(place);
            // Both ways through every branch: counters of 0, 1 and 2, and all flags clear or set.
            for (counter, flags) in [(0, 0), (1, 0), (2, STATUS_FLAGS), (1, STATUS_FLAGS), (2, 0)] {
                let mut registers = Registers { general: [0x7654_3210; _], flags }.with_stack_pointer(&machine);
                registers.general[1] = counter;
                let near = compare(&mut machine, &program, CALL_BYTES, false, true, &registers);
                assert_eq!(near, Ok(()), "{op:?}");
                if Mode::NATIVE == Mode::Bits64 {
                    let far = compare(&mut machine, &program, 14, true, true, &registers);
                    let relative = reads_relative_to_rip(&program.assemble(&machine), 14);
                    let expected = match op {
                        Op::Jmp { .. } | Op::JmpSlot => Err(RelocateReason::EndsTooSoon),
                        Op::CallLeaf(_) | Op::CallSlot => Err(RelocateReason::ReturnsIntoWindow),
                        _ if relative => Err(RelocateReason::OperandOutOfReach),
                        _ => Ok(()),
                    };
                    assert_eq!(far, expected, "{op:?} far away");
                }
            }
        }
    }
}

/// Copies the window byte by byte, adds a jump back, and reports whether running it shows a difference.
fn naive_copy_differs(program: &Program) -> bool {
    let mut machine = Machine::new(Place::High);
    let assembled = program.load(&mut machine);
    let registers = Registers { general: [5; _], flags: 0 }.with_stack_pointer(&machine);

    let stub = machine.stub();
    let proper = relocate_program(&machine, &assembled, CALL_BYTES, stub, true).expect("can be relocated");
    let original = run(&mut machine, &assembled, &registers);
    let window = &assembled.code[..proper.consumed_bytes];
    let copied_bytes = i64::try_from(window.len()).unwrap();
    let back = jmp(stub.offset(copied_bytes), machine.function().offset(copied_bytes), Mode::NATIVE).unwrap();
    // A call that goes astray must come back for the outcome to be seen: everything behind the copy is `ret`.
    machine.write_stub(&[window, &back].concat(), 0xc3);
    let naive = run_armed(&mut machine, &assembled, window.len(), stub, &registers);
    naive != original
}

#[test]
fn a_byte_copy_of_position_dependent_code_is_noticed() {
    let alu = Op::AluImmediate(Alu::Add, Reg::at(2), 1);
    for leaf in 0..2 {
        assert!(naive_copy_differs(&Program(vec![Op::CallLeaf(leaf), alu])), "leaf {leaf}");
    }
    assert!(naive_copy_differs(&Program(vec![Op::CallPcThunk, alu])));
    assert!(naive_copy_differs(&Program(vec![Op::CallNext(Reg::at(0)), alu])));
    if Mode::NATIVE == Mode::Bits64 {
        for op in [
            Op::Load(Reg::at(0), Slot::at(3)),
            Op::StoreImmediate(Slot::at(3), 0x1234_5678),
            Op::LeaSlot(Reg::at(0), Slot::at(3)),
            Op::LeaFunction(Reg::at(0)),
            Op::AluLoad(Alu::Add, Reg::at(0), Slot::at(3)),
            Op::PushSlot(Slot::at(3)),
        ] {
            assert!(naive_copy_differs(&Program(vec![op, alu])), "{op:?}");
        }
    }
}

#[test]
fn a_byte_copy_of_position_independent_code_is_as_good_as_any() {
    let registers_only =
        [Op::Push(Reg::at(3)), Op::MovRegister(Reg::at(0), Reg::at(1)), Op::AluImmediate(Alu::Sub, Reg::at(0), 3)];
    assert!(!naive_copy_differs(&Program(registers_only.to_vec())));
}
