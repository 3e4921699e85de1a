#![no_main]
#![allow(missing_docs, reason = "the fuzzer's entry point")]

libfuzzer_sys::fuzz_target!(|data: &[u8]| trapline_fuzz::relocate(data));
