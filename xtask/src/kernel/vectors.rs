//! No vector or x87 instruction in the kernel: an interrupted context's vector registers are nobody's to change, and nothing saves them.
//!
//! Owns [`check`], which disassembles every function of the kernel's file: the trap path, the callbacks, and the engine with all that it is made of. Its
//! control is a program that is compiled for a process, `xtask` itself, in which the same search must find some.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Register};

use super::elf::Functions;

/// What must be among the functions that were looked at, for the result to mean what it says.
const TRAP_PATH: [&str; 8] = [
    "testbed::trap::breakpoint_entry",
    "testbed::trap::breakpoint",
    "testbed::trap::nmi_entry",
    "testbed::trap::timer_entry",
    "testbed::trap::sync_entry",
    "testbed::thread::switch_stacks",
    "testbed::workload::first_callback",
    "testbed::livepatch::patch_callback",
];

/// The least number of the engine's functions.
const ENGINE_FUNCTIONS: usize = 50;

/// Makes sure that no function of this kernel touches vector or x87 registers, and tells how many were looked at.
///
/// # Errors
/// The first functions that do; or the search is not worth its name.
pub(super) fn check(kernel: &Path) -> Result<String> {
    let functions = Functions::read(kernel)?;
    let names = || functions.by_address.values().map(|function| function.name.as_str());
    for name in TRAP_PATH {
        ensure!(names().any(|known| known == name), "{name} is not in the kernel's symbol table");
    }
    let engine = names().filter(|name| name.contains("trapline_engine::")).count();
    ensure!(engine >= ENGINE_FUNCTIONS, "only {engine} functions of the engine are in the kernel's symbol table");
    let found = find(&functions);
    ensure!(found.is_empty(), "functions that use vector registers: {}", found.join(", "));
    let own = std::env::current_exe().context("finding the program that runs")?;
    let control = find(&Functions::read(&own)?);
    ensure!(!control.is_empty(), "no vector instruction was found where there must be some, in {}", own.display());
    let total = functions.by_address.len();
    Ok(format!(
        "no vector or x87 instruction in {total} functions, {engine} of them the engine's (control: {} of xtask's own)",
        control.len()
    ))
}

/// The functions that touch vector or x87 registers, each with the address of the first instruction that does.
fn find(functions: &Functions) -> Vec<String> {
    let uses = |(address, code): (u64, &[u8])| {
        let mut factory = InstructionInfoFactory::new();
        Decoder::with_ip(functions.bitness, code, address, DecoderOptions::NONE)
            .into_iter()
            .find(|instruction| touches_vectors(&mut factory, instruction))
    };
    let all = functions.by_address.iter();
    all.filter_map(|(address, function)| {
        uses((*address, &function.code)).map(|first| format!("{} at {:#x}", function.name, first.ip()))
    })
    .collect()
}

fn touches_vectors(factory: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    let is_vector = |register: Register| {
        register.is_vector_register() || register.is_mm() || register.is_st() || register.is_k() || register.is_tmm()
    };
    let x87 = [CpuidFeature::FPU, CpuidFeature::FPU287, CpuidFeature::FPU387, CpuidFeature::MMX];
    instruction.is_save_restore_instruction()
        || instruction.cpuid_features().iter().any(|feature| x87.contains(feature))
        || matches!(instruction.code(), Code::Ldmxcsr_m32 | Code::Stmxcsr_m32)
        || factory.info(instruction).used_registers().iter().any(|used| is_vector(used.register()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_found(bitness: u32, code: &[u8]) -> bool {
        let instruction = Decoder::new(bitness, code, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid(), "{code:02x?}");
        touches_vectors(&mut InstructionInfoFactory::new(), &instruction)
    }

    #[test]
    fn every_family_of_vector_instructions_is_found() {
        let vectors: [(u32, &[u8]); 9] = [
            (64, &[0x0f, 0x28, 0xc1]),                   // movaps xmm0, xmm1
            (32, &[0xf3, 0x0f, 0x7e, 0x04, 0x24]),       // movq xmm0, [esp]
            (64, &[0xc5, 0xf8, 0x77]),                   // vzeroupper
            (64, &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0xc1]), // vmovaps zmm0, zmm1
            (32, &[0x0f, 0x6f, 0xc1]),                   // movq mm0, mm1
            (32, &[0x0f, 0x77]),                         // emms
            (32, &[0xdd, 0x04, 0x24]),                   // fld qword [esp]
            (64, &[0x0f, 0xae, 0x04, 0x24]),             // fxsave [rsp]
            (64, &[0x0f, 0xae, 0x14, 0x24]),             // ldmxcsr [rsp]
        ];
        for (bitness, code) in vectors {
            assert!(is_found(bitness, code), "{bitness}: {code:02x?}");
        }
    }

    #[test]
    fn what_only_came_with_a_vector_extension_is_none() {
        let plain: [(u32, &[u8]); 4] = [
            (64, &[0x0f, 0xae, 0xe8]),       // lfence
            (32, &[0xf3, 0x90]),             // pause
            (64, &[0x0f, 0x18, 0x0c, 0x24]), // prefetcht0 [rsp]
            (64, &[0xf3, 0x48, 0xab]),       // rep stosq
        ];
        for (bitness, code) in plain {
            assert!(!is_found(bitness, code), "{bitness}: {code:02x?}");
        }
    }
}
