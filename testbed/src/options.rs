//! The kernel's command line: what is to be run, as `name=value` words.
//!
//! Owns [`Options`]. QEMU hands the line over in the PVH start structure, whose address the entry code kept.

use core::ffi::{CStr, c_char};

/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which scenario: `pokes` ([`crate::scenario`]), `step` ([`crate::step`]), `batch` (what a batch costs), `livepatch` ([`crate::livepatch`]) or `trace` ([`crate::graph`]).
    pub scenario: &'static str,
    /// Strategies, by name, separated by commas.
    pub strategies: &'static str,
    /// Calls that are traced at least, in the scenario `trace`.
    pub calls: usize,
    /// Records that a CPU's ring holds.
    pub ring: usize,
    /// Pokes of one site in each run.
    pub single_pokes: usize,
    /// Batches of all sites in each run.
    pub batches: usize,
    /// NMIs at each step of a poke in the runs with a storm; none: no such runs.
    pub nmis: usize,
    /// Whether runs without NMIs are left out.
    pub only_storms: bool,
    /// Slots that may be used.
    pub slot_limit: usize,
    /// How many calls are to be pending at once before a run ends.
    pub until_depth: usize,
    /// Calls that each softirq, interrupt and NMI makes; none: as many as [`crate::trap`] thinks fit.
    pub context_calls: usize,
    /// Whether a slot is to be missing before a run ends.
    pub until_overflow: bool,
    /// Ticks between the timer's interrupts.
    pub ticks: usize,
    /// Returns by IRET from a breakpoint in NMI context.
    pub iret_in_nmi: bool,
    /// Empties slots by a trampoline that gives each one back before it is read.
    pub early_release: bool,
    /// Preempts CPUs with a pending call.
    pub preempt_pending: bool,
    /// Leaves out the int3 phase.
    pub without_int3: bool,
    /// Does not revert a live patch, and says that it did.
    pub forget_revert: bool,
    /// Stores into text where it is executed, not through the alias.
    pub store_directly: bool,
    /// Stores text again behind each barrier, for an emulator that translates code.
    pub store_again: bool,
}

const DEFAULT: Options = Options {
    scenario: "pokes",
    strategies: "slots",
    calls: 20_000,
    ring: crate::graph::RECORDS,
    single_pokes: 100,
    batches: 4,
    nmis: 2,
    only_storms: false,
    slot_limit: crate::thread::SLOTS,
    until_depth: 0,
    until_overflow: false,
    context_calls: 0,
    ticks: 200_000,
    iret_in_nmi: false,
    early_release: false,
    preempt_pending: false,
    without_int3: false,
    forget_revert: false,
    store_directly: false,
    store_again: true,
};

/// Reads the command line.
///
/// # Panics
/// If a word is not understood.
pub fn read() -> Options {
    let mut options = DEFAULT;
    for word in command_line().split_ascii_whitespace() {
        let Some((name, value)) = word.split_once('=') else {
            // QEMU puts the kernel's file name first.
            continue;
        };
        let number = || value.parse().expect("a number");
        match name {
            "scenario" => options.scenario = value,
            "strategies" => options.strategies = value,
            "calls" => options.calls = number(),
            "ring" => options.ring = number(),
            "single" => options.single_pokes = number(),
            "batches" => options.batches = number(),
            "nmis" => options.nmis = number(),
            "only-storms" => options.only_storms = number() != 0,
            "slots" => options.slot_limit = number(),
            "until-overflow" => options.until_overflow = number() != 0,
            "until-depth" => options.until_depth = number(),
            "context-calls" => options.context_calls = number(),
            "ticks" => options.ticks = number(),
            "iret" => options.iret_in_nmi = number() != 0,
            "store-again" => options.store_again = number() != 0,
            "early-release" => options.early_release = number() != 0,
            "preempt-pending" => options.preempt_pending = number() != 0,
            "store-directly" => options.store_directly = number() != 0,
            "forget-revert" => options.forget_revert = number() != 0,
            "naive" => options.without_int3 = number() != 0,
            _ => panic!("unknown word on the command line: {word}"),
        }
    }
    options
}

fn command_line() -> &'static str {
    unsafe extern "C" {
        static START_INFO: u32;
    }
    /// Of `cmdline_paddr` in `hvm_start_info`.
    const COMMAND_LINE: usize = 24;
    // SAFETY: the entry code stored what the boot protocol hands over.
    let start_info = unsafe { START_INFO } as usize;
    // SAFETY: the structure lies in the lower memory, which is mapped.
    let address = unsafe { ((start_info + COMMAND_LINE) as *const u32).read() } as usize;
    if address == 0 {
        return "";
    }
    // SAFETY: the boot protocol asks for a string that ends in a zero; nothing overwrites it.
    unsafe { CStr::from_ptr(address as *const c_char) }.to_str().expect("a command line of plain text")
}
