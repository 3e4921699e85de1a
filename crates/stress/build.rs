//! Compiles the traced functions, their callbacks, and the assembly that holds registers.

const FOLDER: &str = "src/workload";

fn main() {
    println!("cargo:rerun-if-changed={FOLDER}");
    cc::Build::new()
        .files(["functions.c", "callbacks.c", "registers.S"].map(|file| format!("{FOLDER}/{file}")))
        // The same code in every profile: what a callback can write is read from its machine code.
        .opt_level(2)
        // The traced functions and the callbacks must leave alone the vector registers that are held across them.
        .flag("-mgeneral-regs-only")
        .warnings(true)
        .extra_warnings(true)
        .compile("trapline_stress_workload");
}
