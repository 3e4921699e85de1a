//! Which vector state this CPU has, and how trampolines keep it.
//!
//! Owns the choice of [`VectorSave`] from CPUID and XCR0 (SDM volume 1, sections 10.5 and 13.2). Invariant: every component that compiled
//! code can write is in the mask; AMX tiles (8 KiB, written by nobody by accident) and PKRU (a permission, not data) are not.

#[cfg(target_arch = "x86")]
use core::arch::x86::{__cpuid, __cpuid_count, _xgetbv};
#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

use trapline_engine::trampoline::VectorSave;

/// x87, SSE, AVX, MPX (2), AVX-512 (3), APX.
const COMPONENTS: u64 = 0b111 | 0b11 << 3 | 0b111 << 5 | 1 << 19;

/// The legacy region and the header (SDM volume 1, section 13.4).
const LEGACY_BYTES: u32 = 576;

/// How this CPU's vector state is kept.
pub(super) fn vector_save() -> VectorSave {
    const OSXSAVE: u32 = 1 << 27;
    const XSAVEC: u32 = 1 << 1;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return VectorSave::Fxsave;
    }
    // SAFETY: CPUID says that the operating system has enabled XSAVE, so XGETBV exists and XCR0 can be read.
    let enabled = unsafe { xcr0() };
    let mask = enabled & COMPONENTS;
    if __cpuid_count(0xd, 1).eax & XSAVEC == 0 {
        VectorSave::Xsave { mask, area_bytes: standard_bytes(mask) }
    } else {
        VectorSave::Xsavec { mask, area_bytes: compacted_bytes(mask) }
    }
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: the target feature is enabled, and register 0 exists wherever XGETBV does.
    unsafe { _xgetbv(0) }
}

/// Components beyond x87 and SSE, which lie in the legacy region: (size, offset in the standard form, aligned to 64 in the compacted one).
fn extended(mask: u64) -> impl Iterator<Item = (u32, u32, bool)> {
    (2..63).filter(move |component| mask >> component & 1 == 1).map(|component| {
        let leaf = __cpuid_count(0xd, component);
        (leaf.eax, leaf.ebx, leaf.ecx & 0b10 != 0)
    })
}

fn standard_bytes(mask: u64) -> u32 {
    extended(mask).map(|(size, offset, _)| offset + size).max().unwrap_or(0).max(LEGACY_BYTES)
}

fn compacted_bytes(mask: u64) -> u32 {
    extended(mask)
        .fold(LEGACY_BYTES, |end, (size, _, aligned)| (if aligned { end.next_multiple_of(64) } else { end }) + size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_is_no_larger_than_the_cpu_says_for_everything() {
        let (mask, bytes) = match vector_save() {
            VectorSave::Xsave { mask, area_bytes } | VectorSave::Xsavec { mask, area_bytes } => (mask, area_bytes),
            other => panic!("{other:?} on a CPU of this century"),
        };
        assert_eq!(mask & 0b11, 0b11, "x87 and SSE");
        let all_enabled = __cpuid_count(0xd, 0).ebx;
        assert!((LEGACY_BYTES..=all_enabled + 63 * 8).contains(&bytes), "{bytes} of {all_enabled}");
        assert!(standard_bytes(mask) <= all_enabled);
    }
}
