#![no_main]
//! Any bytes whatsoever are a patch that encodes to the same bytes and can be linked, or are refused.

use trapline_engine::Addr;
use trapline_patch::{Linker, Patch, Resolver, ThreadLocal, ThreadPlace};

struct Anywhere;

impl Resolver for Anywhere {
    fn bias(&self) -> u64 {
        0x5555_5555_4000
    }

    fn import(&self, name: &str, _version: Option<&str>) -> Option<Addr> {
        (name.len() % 7 != 6).then_some(Addr::new(0x7f00_0000_1000))
    }

    fn thread_local(&self, _variable: ThreadLocal<'_>) -> Option<ThreadPlace> {
        Some(ThreadPlace { module: 1, offset: 8, from_thread_pointer: Some(-16) })
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // A fuzzer does not find checksums; the contents are what is interesting.
    let whole = Patch::decode(data);
    let Ok(patch) = whole.or_else(|_| Patch::decode(&Patch::with_checksums(data))) else { return };
    assert_eq!(Patch::decode(&patch.encode()).as_ref(), Ok(&patch));
    let linker = Linker::new(&patch);
    if linker.len_bytes() < 1 << 24 {
        let _ = linker.link(Addr::new(0x5555_4000_0000), &Anywhere);
    }
});
