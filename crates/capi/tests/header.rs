//! The header is what the source says.
#![cfg(target_pointer_width = "64")]

use std::{env, fs, path::Path};

/// The header as the source makes it.
fn made() -> String {
    let mut header = Vec::new();
    cbindgen::generate(env!("CARGO_MANIFEST_DIR")).expect("the source makes a header").write(&mut header);
    // What Rust calls safety is for a C programmer just what has to be so.
    String::from_utf8(header).expect("it is text").replace(" # Safety\n", " What has to be so:\n")
}

/// The number of the first line in which two texts differ.
fn difference(one: &str, other: &str) -> Option<usize> {
    let shared = one.lines().zip(other.lines()).take_while(|(one, other)| one == other).count();
    (one != other).then_some(shared + 1)
}

#[test]
fn the_header_is_what_the_source_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/trapline.h");
    let made = made();
    if env::var_os("TRAPLINE_WRITE_HEADER").is_some() {
        fs::write(&path, &made).expect("the header can be written");
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        difference(&kept, &made),
        None,
        "include/trapline.h is not what the source says, from that line on; write it again by \
         `TRAPLINE_WRITE_HEADER=1 cargo test -p trapline-capi --test header`",
    );
    // A header that lacks something is not taken for right.
    let declared = kept.find("trapline_site_find(").expect("it is declared");
    let without = kept.replacen("trapline_site_find(", "trapline_site_search(", 1);
    assert_eq!(difference(&without, &made), Some(kept[..declared].lines().count()));
}
