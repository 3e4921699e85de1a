//! What `Effect` takes for a nop does nothing when it runs.

use trapline_engine::{
    Mode,
    insn::{Effect, MAX_INSN_BYTES},
};

use crate::machine::{GPR_COUNT, Machine, Place, Registers, STATUS_FLAGS};

/// All nops among the instructions that begin with one of these and then any two bytes, the rest zero.
fn nops() -> impl Iterator<Item = Vec<u8>> {
    let prefixes: [&[u8]; 8] = [&[], &[0x66], &[0x67], &[0xf2], &[0xf3], &[0x48], &[0x4c], &[0x66, 0x66, 0x2e]];
    prefixes.into_iter().flat_map(|prefix| {
        (0..=u16::MAX).filter_map(move |any| {
            let mut bytes = [prefix, &any.to_le_bytes(), &[0; MAX_INSN_BYTES]].concat();
            let len_bytes = (1..=MAX_INSN_BYTES).find(|len_bytes| {
                let effect = Effect::decode(Mode::NATIVE, trapline_engine::Addr::new(0), &bytes[..*len_bytes]);
                matches!(effect, Ok(Effect::Nop { .. }))
            })?;
            bytes.truncate(len_bytes);
            Some(bytes)
        })
    })
}

#[test]
fn accepted_nops_do_nothing_on_this_cpu() {
    let mut machine = Machine::new(Place::High);
    machine.reset_memory();
    let data = machine.read_data();
    let registers = |seed: usize, flags| {
        let general = std::array::from_fn::<_, GPR_COUNT, _>(|number| seed.wrapping_mul(number + 1));
        Registers { general, flags }.with_stack_pointer(&machine)
    };
    let files = [registers(usize::MAX / 31, 0), registers(0x0123_4567, STATUS_FLAGS)];
    let mut count = 0;
    let distinct: std::collections::BTreeSet<_> = nops().collect();
    for nop in distinct {
        // The stack is full of the exit's address.
        machine.write_function(&[&nop[..], &[0xc3]].concat());
        for before in files {
            let mut expected = before;
            expected.general[4] += size_of::<usize>();
            assert_eq!(machine.run(machine.function(), &before), expected, "{nop:02x?}");
        }
        count += 1;
    }
    assert_eq!(machine.read_data(), data);
    assert!(count > 100, "only {count} nops found");
}
