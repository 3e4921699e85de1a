//! The page tables that stay: text is read-only and executable, everything else writable and not executable.
//!
//! Owns the mapping and the *alias* through which text is written: the first 128 MiB of memory appear a second time at [`ALIAS`], writable
//! and not executable. Invariant: no page is ever writable and executable (I8); CR0.WP makes that bind the kernel too.

use core::arch::asm;

/// Where memory appears a second time, writable.
pub const ALIAS: usize = 1 << 30;

const ENTRIES: usize = 512;
const LARGE_BYTES: u64 = 2 << 20;
/// Large pages at the bottom that are split into small ones: they hold the kernel's image.
const SPLIT: usize = 8;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const UNCACHED: u64 = 1 << 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

#[repr(C, align(4096))]
struct Table([u64; ENTRIES]);

static mut SMALL: [Table; SPLIT] = [const { Table([0; ENTRIES]) }; SPLIT];

unsafe extern "C" {
    #[link_name = "second"]
    static mut SECOND: [[u64; ENTRIES]; 4];
    static text_start: u8;
    static text_end: u8;
}

/// The address range of the kernel's text and of the trampolines.
pub fn text() -> core::ops::Range<usize> {
    (&raw const text_start).addr()..(&raw const text_end).addr()
}

/// Installs the tables, on the boot CPU before the others start.
#[expect(clippy::needless_range_loop, reason = "the indices are parts of addresses")]
pub fn protect() {
    let text = text();
    for large in 0..SPLIT {
        for small in 0..ENTRIES {
            let at = large as u64 * LARGE_BYTES + small as u64 * 4096;
            let rights = if text.contains(&(at as usize)) { 0 } else { WRITABLE | NO_EXECUTE };
            // SAFETY: nobody else runs yet, and the indices are within the tables.
            unsafe { SMALL[large].0[small] = at | PRESENT | rights };
        }
    }
    for gib in 0..4 {
        for index in 0..ENTRIES {
            let at = ((gib * ENTRIES + index) as u64) * LARGE_BYTES;
            let data = PRESENT | WRITABLE | NO_EXECUTE;
            let entry = match (gib, index) {
                (0, split @ 0..SPLIT) => (&raw const SMALL).addr() as u64 + split as u64 * 4096 + (PRESENT | WRITABLE),
                (1, alias @ 0..64) => (alias as u64 * LARGE_BYTES) | data | LARGE,
                (3, _) => at | data | LARGE | UNCACHED,
                _ => at | data | LARGE,
            };
            // SAFETY: as above; every entry keeps mapping what runs now, with the rights that it needs.
            unsafe { SECOND[gib][index] = entry };
        }
    }
    // SAFETY: reloading CR3 with its own value drops stale translations and nothing else.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Where trampolines go: the text behind it is theirs.
pub fn code_start() -> usize {
    unsafe extern "C" {
        static code_start: u8;
    }
    (&raw const code_start).addr()
}

/// Stores into text through the alias, one byte after the other.
pub fn write_text(at: usize, bytes: &[u8]) {
    assert!(text().contains(&at) && text().contains(&(at + bytes.len() - 1)), "{at:#x} is no text");
    for (index, byte) in bytes.iter().enumerate() {
        // SAFETY: the alias maps all text writable; a byte's store is whole.
        unsafe { ((ALIAS + at + index) as *mut u8).write_volatile(*byte) };
    }
}

/// Stores into text where it is executed, which must fault: the tables' own control.
pub fn store_directly() {
    let at = text().start;
    let byte = text_byte(at);
    // SAFETY: the byte that is stored is the one that is there.
    unsafe { (at as *mut u8).write_volatile(byte) };
}

/// Reads one byte of text.
pub fn text_byte(at: usize) -> u8 {
    // SAFETY: all of the lower memory is mapped readable; a stray address is a fault, which is reported.
    unsafe { (at as *const u8).read_volatile() }
}
