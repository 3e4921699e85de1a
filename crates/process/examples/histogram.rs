//! Measures how long the calls of a function take: a function of ours takes its place and calls it.
//!
//! `cargo run -p trapline-process --example histogram`

use std::{
    error::Error,
    hint::black_box,
    mem,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use trapline_process::{Addr, Filter, Tracer, traceable};

traceable! {
    /// The function that we want to know about.
    extern "C" fn compress(rounds: u64) -> u64 {
        (0..rounds).fold(0, |sum, round| black_box(sum) + round)
    }
}

type Compress = extern "C" fn(u64) -> u64;

const CALLS: u64 = 2000;

/// Bucket n has the calls that took from 2^n up to 2^(n+1) ns.
static HISTOGRAM: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

/// The function as trapline knows it behind its site: calls of it are not sent to us again.
static ITSELF: OnceLock<Compress> = OnceLock::new();

extern "C" fn timed_compress(rounds: u64) -> u64 {
    let itself = ITSELF.get().expect("it is set before this is called");
    let begin = Instant::now();
    let sum = itself(rounds);
    let took_ns = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
    HISTOGRAM[took_ns.max(1).ilog2() as usize].fetch_add(1, Ordering::Relaxed);
    sum
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let tracer = Tracer::new()?;
    let site = tracer.sites().find(|site| site.name.ends_with("::compress")).ok_or("it is not there")?;
    let body = usize::try_from(site.body.value())?;
    // SAFETY: the body of `compress` has its signature, and lives as long as this program.
    let itself = unsafe { mem::transmute::<usize, Compress>(body) };
    ITSELF.get_or_init(|| itself);

    let place = Addr::new(timed_compress as *const () as u64);
    // SAFETY: `timed_compress` has the signature of the only function that the filter selects.
    let timing = unsafe { tracer.ops("time").filter(Filter::address(site.address)).replace(place) }?;
    for rounds in 0..CALLS {
        assert_eq!(compress(rounds), (0..rounds).sum());
    }
    drop(timing);
    compress(CALLS);

    let calls = HISTOGRAM.iter().map(|bucket| bucket.load(Ordering::Relaxed));
    for (bucket, calls) in calls.clone().enumerate().filter(|(_, calls)| *calls > 0) {
        println!("{:>12} ns and more: {calls}", 1_u64 << bucket);
    }
    assert_eq!(calls.sum::<u64>(), CALLS);
    Ok(())
}
