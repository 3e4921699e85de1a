//! Builds the traced functions and the floors that trapline is measured against.

use std::{env, error::Error, fmt::Write, fs, path::PathBuf};

/// How many functions the batch benchmarks poke.
const SITES: usize = 20_000;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=native");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let sites = out.join("sites.S");
    fs::write(&sites, site_functions()?)?;
    cc::Build::new()
        .opt_level(2)
        .file("native/floor.c")
        .file("native/calls.S")
        .file(sites)
        .compile("trapline_bench_native");
    Ok(())
}

/// `bench_site_00000` and so on, 16 bytes apart: a 5-byte nop, listed as a compiler would, and a return.
fn site_functions() -> Result<String, std::fmt::Error> {
    let word = if env::var("CARGO_CFG_TARGET_POINTER_WIDTH").as_deref() == Ok("32") { ".long" } else { ".quad" };
    let mut code = String::from(".section .note.GNU-stack,\"\",@progbits\n.text\n");
    for index in 0..SITES {
        writeln!(code, ".balign 16\n.globl bench_site_{index:05}\n.type bench_site_{index:05}, @function")?;
        writeln!(code, "bench_site_{index:05}: .byte 0x0f, 0x1f, 0x44, 0, 0\n ret\n.size bench_site_{index:05}, 6")?;
    }
    writeln!(code, ".section __patchable_function_entries, \"awo\", @progbits, .text")?;
    for index in 0..SITES {
        writeln!(code, "{word} bench_site_{index:05}")?;
    }
    Ok(code)
}
