//! Backtraces as Rust takes them: the same frames with the same names, captured and printed by an uncaught panic.
use std::backtrace::Backtrace;
use std::hint::black_box;

#[inline(never)]
#[unsafe(no_mangle)]
fn capture(depth: u32) -> String {
    if black_box(depth) > 0 {
        let text = capture(depth - 1);
        return black_box(text);
    }
    let text = Backtrace::force_capture().to_string();
    text.lines().filter(|line| !line.trim_start().starts_with("at ")).map(|line| format!("{line}\n")).collect()
}

#[inline(never)]
#[unsafe(no_mangle)]
fn fails(depth: u32) -> u32 {
    if black_box(depth) == 0 {
        let empty: Option<u32> = black_box(None);
        return empty.expect("there was nothing");
    }
    black_box(fails(depth - 1)) + 1
}

fn main() {
    print!("{}", capture(25));
    println!("calls capture 26");
    println!("calls fails 11");
    fails(10);
}
