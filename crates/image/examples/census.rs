//! How many functions of the files on the command line can be traced, how, and why the others cannot.
//!
//!     cargo run --release -p trapline-image --example census -- /usr/bin/xz
//!
//! `--untraced` lists the functions that are not traced, `--left-out` what is no function.

use std::{collections::BTreeMap, path::Path, time::Instant};

use trapline_engine::Addr;
use trapline_image::{ArmRequest, Entries, Image, Rung, Verdict};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    for file in arguments.iter().filter(|argument| !argument.starts_with("--")) {
        let started = Instant::now();
        let image = match Image::open(Path::new(file)) {
            Ok(image) => image,
            Err(error) => {
                println!("{file}: {error}");
                continue;
            }
        };
        let opened = started.elapsed();
        let all: Vec<usize> =
            (0..image.functions().len()).filter(|index| image.functions()[*index].plan().is_some()).collect();
        // As Linux loads them.
        let bias = if image.lowest_address() == 0 { 0x5555_5555_4000 } else { 0 };
        let entry = Addr::new(0x7f00_0000_0000);
        let started = Instant::now();
        let armed = image.arm(&ArmRequest {
            selected: &all,
            bias,
            stubs_at: Addr::new(bias)
                .after(usize::try_from(image.text_range().end.value()).unwrap_or(0).next_multiple_of(1 << 24)),
            entries: Entries::all_at(entry),
            first_site: 0,
            returns: true,
            limit_depth: false,
            shims: &[],
            diverted: &[],
        });
        let arming = started.elapsed();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for function in image.functions() {
            let kind = match &function.verdict {
                Verdict::Untraced(reason) => {
                    if has("--untraced") {
                        println!(
                            "{:#x} {} {}: {} {}",
                            function.address,
                            function.size,
                            function.name,
                            reason.code(),
                            reason.detail()
                        );
                    }
                    format!("- {}", reason.code())
                }
                Verdict::Traced(plan) => {
                    for (is_so, name) in [(plan.keep_flags, "(flags)"), (plan.is_branch_target, "(branch target)")] {
                        *counts.entry(name.to_owned()).or_default() += usize::from(is_so);
                    }
                    if let Some(reason) = plan.entry_only {
                        if has("--entry-only") {
                            println!("{:#x} {} {}: {}", function.address, function.size, function.name, reason.code());
                        }
                        *counts.entry(format!("(entry only: {})", reason.code())).or_default() += 1;
                    }
                    match plan.rung {
                        Rung::Nop => "+ nop",
                        Rung::OneInstruction => "+ one instruction",
                        Rung::Window if plan.redirects() => "+ window, redirected",
                        Rung::Window => "+ window",
                        Rung::ShortJump { .. } => "+ short jump",
                    }
                    .to_owned()
                }
            };
            *counts.entry(kind).or_default() += 1;
        }
        for other in image.left_out() {
            if has("--left-out") {
                println!("{} {:?} {:?}", other.address(), other.name, other.why);
            }
            *counts.entry(format!("no function: {:?}", other.why)).or_default() += 1;
        }
        for (index, reason) in &armed.refused {
            let function = &image.functions()[*index];
            println!("refused: {:#x} {}: {} {}", function.address, function.name, reason.code(), reason.detail());
        }
        let (traced, total) = (all.len(), image.functions().len());
        println!(
            "{file}: {traced} of {total} functions, {} %; read in {opened:.0?}, armed in {arming:.0?}: {} stub bytes, {} refused",
            percent(traced, total),
            armed.stubs.len(),
            armed.refused.len(),
        );
        for (kind, count) in counts {
            println!("    {count:7} {kind}");
        }
    }
}

/// With two digits behind the point, rounded down.
fn percent(part: usize, whole: usize) -> String {
    let hundredths = part * 10_000 / whole.max(1);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}
