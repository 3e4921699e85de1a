//! What a call costs: through a nop, with ops of several kinds, beside the floors.

use criterion::Criterion;
use trapline_benches::{FLOOR_EMPTY_CALL, FLOOR_NOP, LEAF, Leaf, bench_empty_callback, call_loop, print_ratios};
use trapline_process::{Error, Filter, Ops, OpsBuilder, Tracer};

/// A static that a callback counts in; not shared between threads here, but it could be.
static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

fn main() -> Result<(), Error> {
    let mut criterion = Criterion::default().configure_from_args();
    let mut measure = |name: &str, leaf: Leaf| {
        criterion.benchmark_group("call").bench_function(name, |bencher| {
            bencher.iter_custom(|calls| {
                let begin = std::time::Instant::now();
                call_loop(leaf, calls);
                begin.elapsed()
            });
        });
    };
    measure("floor nop", FLOOR_NOP);
    measure("floor empty call", FLOOR_EMPTY_CALL);

    let tracer = Tracer::new()?;
    measure("nop site", LEAF);
    let attached = attach_empty(&tracer, 1, OpsBuilder::recursion_safe)?;
    measure("one empty ops", LEAF);
    drop(attached);
    let attached = attach_empty(&tracer, 1, |ops| ops)?;
    measure("one empty ops, recursion guarded", LEAF);
    drop(attached);
    let attached = attach_empty(&tracer, 1, |ops| ops.recursion_safe().save_regs())?;
    measure("one empty ops, regs_caller", LEAF);
    drop(attached);
    for ops in [2, 4] {
        let attached = attach_empty(&tracer, ops, OpsBuilder::recursion_safe)?;
        measure(&format!("list of {ops} empty ops"), LEAF);
        drop(attached);
    }
    let counting = on_leaf(&tracer).recursion_safe().register(|_call| {
        COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    })?;
    measure("one counting closure", LEAF);
    drop(counting);
    let floats = on_leaf(&tracer).recursion_safe().register(|call| {
        #[expect(clippy::cast_precision_loss, reason = "any arithmetic will do")]
        std::hint::black_box(call.arg(0) as f64 * 0.5);
    })?;
    measure("one closure with vector registers", LEAF);
    drop(floats);

    criterion.final_summary();
    print_ratios(&[
        ("call/nop site", "call/floor nop"),
        ("call/one empty ops", "call/floor empty call"),
        ("call/one empty ops, recursion guarded", "call/floor empty call"),
        ("call/one empty ops, regs_caller", "call/floor empty call"),
        ("call/list of 2 empty ops", "call/floor empty call"),
        ("call/list of 4 empty ops", "call/floor empty call"),
        ("call/one counting closure", "call/floor empty call"),
        ("call/one closure with vector registers", "call/floor empty call"),
    ]);
    Ok(())
}

fn on_leaf(tracer: &Tracer) -> OpsBuilder {
    tracer.ops("bench").filter(Filter::name("bench_leaf"))
}

fn attach_empty(tracer: &Tracer, count: usize, set: impl Fn(OpsBuilder) -> OpsBuilder) -> Result<Vec<Ops>, Error> {
    (0..count)
        .map(|_| {
            // SAFETY: the callback does nothing at all.
            unsafe { set(on_leaf(tracer)).register_raw(bench_empty_callback, std::ptr::null()) }
        })
        .collect()
}
