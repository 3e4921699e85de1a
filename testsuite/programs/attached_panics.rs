// Panics and catches it all the time, in four threads, until there is a file `over`. Makes the folder `ready` when all of them have begun.
use std::{panic, path::Path, sync::{Barrier, atomic::{AtomicBool, Ordering}}, thread, time::Duration};

static BEGUN: Barrier = Barrier::new(5);
static IS_OVER: AtomicBool = AtomicBool::new(false);

#[inline(never)]
fn panics(levels: u64, what: u64) -> u64 {
    let kept = vec![what; 3];
    if levels == 0 {
        panic::panic_any(what);
    }
    panics(levels - 1, what) + kept[0]
}

fn main() {
    panic::set_hook(Box::new(|_| {}));
    let work = |number: u64| {
        BEGUN.wait();
        let mut what = number;
        while !IS_OVER.load(Ordering::Relaxed) {
            let caught = panic::catch_unwind(|| panics(what % 8, what)).expect_err("it panics");
            assert_eq!(*caught.downcast::<u64>().expect("a number"), what);
            what += 1;
        }
    };
    let threads: Vec<_> = (0..4).map(|number| thread::spawn(move || work(number))).collect();
    BEGUN.wait();
    // A folder: it is there at once, without a descriptor that is open for a moment.
    std::fs::create_dir("ready").expect("a folder of our own");
    while !Path::new("over").exists() {
        thread::sleep(Duration::from_millis(5));
    }
    IS_OVER.store(true, Ordering::Relaxed);
    let is_right = threads.into_iter().all(|thread| thread.join().is_ok());
    println!("{}", if is_right { "right" } else { "wrong" });
    std::process::exit(if is_right { 7 } else { 3 });
}
