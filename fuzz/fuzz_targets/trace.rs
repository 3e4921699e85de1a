#![no_main]
#![allow(missing_docs, reason = "the fuzzer's entry point")]

use std::path::Path;

use trapline_trace::{Catalog, Decoder, Reader};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(mut reader) = Reader::new(data, Path::new("fuzz")) else { return };
    let (mut catalog, mut decoder, mut events) = (Catalog::new(), Decoder::new(), Vec::new());
    while let Ok(Some(chunk)) = reader.next_chunk() {
        if let Some(chunk) = catalog.take(chunk)
            && decoder.decode(&chunk, &mut events).is_ok()
        {
            assert_eq!(events.len(), chunk.records as usize);
        }
    }
});
