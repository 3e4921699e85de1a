//! Benchmarks of trapline beside their floors: what the benchmarks share.
//!
//! Owns the traced functions and floors in `native/`, as safe functions, and [`print_ratios`], which sets what criterion measured beside its floor.
//! `cargo xtask bench` runs them; a ratio says more than a time on a machine that others use too.

use std::{
    ffi::c_void,
    fs,
    path::{Path, PathBuf},
};

use trapline_process::CallFrame;

/// How many functions `bench_site_00000`.. there are.
pub const SITES: usize = 20_000;

/// A leaf that returns its argument plus one.
pub type Leaf = unsafe extern "C" fn(isize) -> isize;

unsafe extern "C" {
    fn bench_leaf(value: isize) -> isize;
    fn floor_nop(value: isize) -> isize;
    fn floor_empty_call(value: isize) -> isize;
    fn bench_call_loop(function: Leaf, calls: isize) -> isize;
    fn bench_site_00000();
    fn bench_start_caller(function: *const c_void) -> i32;
    fn bench_stop_caller();
    fn floor_make_sites(sites: usize) -> *mut c_void;
    fn floor_drop_sites();
    fn floor_poke(sites: usize, target: *const c_void);
    /// An ops callback that does nothing.
    pub fn bench_empty_callback(frame: *mut CallFrame, data: *const c_void);
}

/// The function that trapline traces.
pub const LEAF: Leaf = bench_leaf;
/// The same, which nobody traces.
pub const FLOOR_NOP: Leaf = floor_nop;
/// The same with a call to an empty function in place of the nop.
pub const FLOOR_EMPTY_CALL: Leaf = floor_empty_call;

/// Calls one of the leaves.
///
/// # Panics
/// If the leaf did not do its work.
pub fn call_loop(leaf: Leaf, calls: u64) {
    let calls = isize::try_from(calls).expect("fewer calls than fit a word");
    // SAFETY: the leaves of `native/calls.S` take and return a word and do nothing else.
    let sum = unsafe { bench_call_loop(leaf, calls) };
    assert_eq!(sum, calls);
}

/// A thread that calls a function all the time, until this is dropped.
pub struct Caller(());

impl Caller {
    /// A thread that calls the first of the traced sites.
    pub fn of_traced_site() -> Self {
        Self::start(bench_site_00000 as *const c_void)
    }

    fn start(function: *const c_void) -> Self {
        // SAFETY: the function takes no arguments and may be called from any thread.
        let error = unsafe { bench_start_caller(function) };
        assert_eq!(error, 0, "a thread could not be started");
        Self(())
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // SAFETY: the thread was started by `start`, and is joined once.
        unsafe { bench_stop_caller() };
    }
}

/// Sites in memory that is mapped twice, poked without any bookkeeping: the floor of a poke.
pub struct FloorSites(*mut c_void);

impl FloorSites {
    /// Makes [`SITES`] of them, and one more whose return the others call. They take SIGTRAP over.
    ///
    /// # Panics
    /// If there is no memory.
    #[expect(clippy::new_without_default, reason = "it is no value")]
    pub fn new() -> Self {
        // SAFETY: maps fresh memory.
        let first = unsafe { floor_make_sites(SITES + 1) };
        assert!(!first.is_null(), "no memory for the floor");
        Self(first)
    }

    /// A thread that calls the first of them.
    pub fn caller(&self) -> Caller {
        Caller::start(self.0)
    }

    /// Makes the first `sites` calls of an empty function, or nops.
    pub fn poke(&self, sites: usize, calls: bool) {
        // Anything that returns, within reach: the `ret` behind the nop of the site that is never poked.
        let target = if calls { self.0.wrapping_byte_add(16 * SITES + 5).cast_const() } else { std::ptr::null() };
        // SAFETY: `sites` of them exist, and the target returns.
        unsafe { floor_poke(sites.min(SITES), target) };
    }
}

impl Drop for FloorSites {
    fn drop(&mut self) {
        // SAFETY: the caller's thread has been joined, so nobody runs them.
        unsafe { floor_drop_sites() };
    }
}

/// Sets what criterion measured beside its floors, as ratios of medians: `rows` are (benchmark, floor), each `group/name`.
pub fn print_ratios(rows: &[(&str, &str)]) {
    println!("{:<40} {:>12} {:>12} {:>8}", "benchmark", "median ns", "floor ns", "ratio");
    for (benchmark, floor) in rows {
        let (Some(median), Some(floor_median)) = (median_ns(benchmark), median_ns(floor)) else { continue };
        println!("{benchmark:<40} {median:>12.2} {floor_median:>12.2} {:>8.2}", median / floor_median);
    }
}

fn median_ns(benchmark: &str) -> Option<f64> {
    let text = fs::read_to_string(criterion_folder().join(benchmark).join("new/estimates.json")).ok()?;
    let estimates: serde_json::Value = serde_json::from_str(&text).ok()?;
    estimates["median"]["point_estimate"].as_f64()
}

/// Criterion's folder lies in the target folder, which the running benchmark lies in as well.
fn criterion_folder() -> PathBuf {
    let executable = std::env::current_exe().unwrap_or_default();
    let target = executable.ancestors().find(|folder| folder.join("criterion").is_dir());
    target.unwrap_or(Path::new("target")).join("criterion")
}
