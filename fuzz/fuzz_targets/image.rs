#![no_main]
//! Any bytes whatsoever are an ELF file that can be read, or are refused; what is armed does not get in its own way.

use trapline_engine::Addr;
use trapline_image::{ArmRequest, Entries, Image};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(image) = Image::parse(data.to_vec(), "fuzz") else { return };
    let selected: Vec<usize> = (0..image.functions().len()).collect();
    let entry = Addr::new(0x7f00_0000_0000);
    let armed = image.arm(&ArmRequest {
        selected: &selected,
        bias: 0x5555_5555_4000,
        stubs_at: Addr::new(0x5555_6000_0000),
        entries: Entries::all_at(entry),
        first_site: 0,
        returns: true,
        limit_depth: false,
        shims: &[],
        diverted: &[],
    });
    assert_eq!(armed.sites.len() + armed.refused.len(), selected.len());
    for pair in armed.writes.windows(2) {
        assert!(pair[0].at.after(pair[0].new.len()) <= pair[1].at, "{} {}", pair[0].at, pair[1].at);
    }
});
