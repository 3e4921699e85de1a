//! What the instruction layer says about code, against what the CPU does when that code runs.
#![cfg(any(target_arch = "x86", target_arch = "x86_64"))]

mod asm;
mod clobbered;
mod machine;
mod nops;
mod program;
mod relocated;

use proptest::prelude::*;

use crate::machine::{GPR_COUNT, Machine, Registers};

/// No regression files: a failing case is printed, and becomes a test of its own.
fn quiet() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

/// Values that branches and loops can tell apart, and others.
fn registers() -> impl Strategy<Value = Registers> {
    let value = prop_oneof![0..3_usize, any::<usize>()];
    (prop::array::uniform::<_, GPR_COUNT>(value), any::<usize>())
        .prop_map(|(general, flags)| Registers { general, flags })
}

impl Registers {
    /// These, with a stack pointer into the machine's stack.
    fn with_stack_pointer(mut self, machine: &Machine) -> Self {
        self.general[4] = machine.stack_pointer();
        self
    }
}
