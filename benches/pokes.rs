//! What a poke costs while a thread runs the sites: batches of 1, 1,000 and 20,000, beside the same protocol through an alias of the text
//! and without any bookkeeping.

use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use trapline_benches::{Caller, FloorSites, SITES, bench_empty_callback, print_ratios};
use trapline_process::{Error, Filter, TextWriter, Tracer};

const BATCHES: [usize; 3] = [1, 1_000, SITES];

fn main() -> Result<(), Error> {
    let mut criterion = Criterion::default().measurement_time(Duration::from_secs(3)).configure_from_args();
    floor(&mut criterion);
    traced(&mut criterion, TextWriter::ProcMem, "trapline")?;
    traced(&mut criterion, TextWriter::Remap, "trapline, remapped")?;
    criterion.final_summary();
    print_ratios(&[
        ("enable/trapline/1", "enable/floor/1"),
        ("enable/trapline/1000", "enable/floor/1000"),
        ("enable/trapline/20000", "enable/floor/20000"),
        ("enable/trapline, remapped/20000", "enable/floor/20000"),
        ("toggle/trapline", "toggle/floor"),
    ]);
    Ok(())
}

fn floor(criterion: &mut Criterion) {
    let sites = FloorSites::new();
    let _caller = sites.caller();
    let mut group = criterion.benchmark_group("enable");
    for batch in BATCHES {
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new("floor", batch), |bencher| {
            bencher.iter_batched(|| sites.poke(batch, false), |()| sites.poke(batch, true), BatchSize::PerIteration);
        });
    }
    group.finish();
    criterion.benchmark_group("toggle").bench_function("floor", |bencher| {
        bencher.iter(|| {
            sites.poke(1, true);
            sites.poke(1, false);
        });
    });
}

fn traced(criterion: &mut Criterion, writer: TextWriter, name: &str) -> Result<(), Error> {
    let tracer = Tracer::builder().text_writer(writer).build()?;
    let _caller = Caller::of_traced_site();
    let mut group = criterion.benchmark_group("enable");
    for batch in BATCHES {
        let ops = tracer.ops("bench").filter(first_sites(batch)).recursion_safe().disabled();
        // SAFETY: the callback does nothing at all.
        let ops = unsafe { ops.register_raw(bench_empty_callback, std::ptr::null()) }?;
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new(name, batch), |bencher| {
            bencher.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    let begin = Instant::now();
                    ops.enable().expect("the sites are as they were");
                    spent += begin.elapsed();
                    ops.disable().expect("the sites are as they were");
                }
                spent
            });
        });
    }
    group.finish();
    if writer == TextWriter::ProcMem {
        let ops = tracer.ops("toggle").filter(first_sites(1)).recursion_safe().disabled();
        // SAFETY: the callback does nothing at all.
        let ops = unsafe { ops.register_raw(bench_empty_callback, std::ptr::null()) }?;
        criterion.benchmark_group("toggle").bench_function(name, |bencher| {
            bencher.iter(|| {
                ops.enable().expect("the site is as it was");
                ops.disable().expect("the site is as it was");
            });
        });
    }
    Ok(())
}

/// The first one, whose thread runs it, and others up to `count`.
fn first_sites(count: usize) -> Filter {
    match count {
        1 => Filter::name("bench_site_00000"),
        1_000 => Filter::name("bench_site_00*"),
        _ => Filter::name("bench_site_*"),
    }
}
