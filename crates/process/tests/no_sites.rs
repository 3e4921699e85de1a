//! A program without a single site: this one, as long as nobody compiles it for tracing.

use trapline_process::{Error, Tracer, sigtrap_is_ours};

#[test]
fn a_program_without_sites_is_told_how_to_get_some() {
    let error = Tracer::new().expect_err("nothing here was compiled for tracing");
    assert!(matches!(error, Error::NoSites { skipped: 0, .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("-fpatchable-function-entry=5") && message.contains("traceable!"), "{message}");
    assert!(!sigtrap_is_ours(), "a refused tracer leaves nothing behind");
}
