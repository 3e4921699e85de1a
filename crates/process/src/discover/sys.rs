//! The calls into libc and the kernel that discovery needs.
//!
//! Owns all of discovery's unsafe code: [`loaded`] asks the dynamic loader what is mapped, [`vdso`] tells where the kernel's
//! own object lies, [`read_memory`] copies bytes of this process. Neighbours: [`super::objects`] and [`super::memory`] make
//! sense of what they return. Invariant: nothing here follows a pointer that another thread may unmap meanwhile. Memory is copied by
//! the kernel, which answers an unmapped page with an error and not with a signal.

use std::{
    ffi::{CStr, c_int, c_void},
    fs::File,
    io,
    os::unix::fs::FileExt,
    slice,
};

use libc::dl_phdr_info;
use trapline_engine::Addr;

/// One object as the dynamic loader knows it.
pub(super) struct Loaded {
    /// What the loader calls it: a path, or empty for the main executable.
    pub(super) name: Vec<u8>,
    /// What was added to the addresses in the file.
    pub(super) bias: Addr,
    /// The program headers, in the native layout.
    pub(super) program_headers: Vec<u8>,
}

/// The objects that the dynamic loader has mapped, in its order: the main executable first.
///
/// These are the ones of the caller's link-map namespace (`dl_iterate_phdr(3)`); objects opened with `dlmopen` into
/// another one are not among them.
pub(super) fn loaded() -> Vec<Loaded> {
    let mut objects: Vec<Loaded> = Vec::new();
    // SAFETY: (1) `collect` has the type that is asked for and does not unwind; (2) `data` is the vector that it expects,
    // which outlives the call and is not touched here during it.
    unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut objects).cast()) };
    objects
}

/// Copies one object's description to the vector that `data` points to. The loader's lock is held.
unsafe extern "C" fn collect(info: *mut dl_phdr_info, _size: usize, data: *mut c_void) -> c_int {
    // SAFETY: the loader passes a valid description for the time of this call.
    let info = unsafe { &*info };
    // SAFETY: `loaded` passes the address of its vector, to which nobody else has a reference during the call.
    let objects = unsafe { &mut *data.cast::<Vec<Loaded>>() };
    let name = if info.dlpi_name.is_null() {
        Vec::new()
    } else {
        // SAFETY: not null, and the loader keeps names as C strings as long as the object is loaded, which its lock ensures.
        unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes().to_vec()
    };
    let program_headers = if info.dlpi_phdr.is_null() {
        Vec::new()
    } else {
        let entry_bytes = size_of_val_pointed_to(info.dlpi_phdr);
        // SAFETY: (1) the loader says that `dlpi_phnum` headers stand there; (2) plain integers are readable as bytes; (3) the
        // object stays loaded, and its headers unchanged, while the loader's lock is held.
        unsafe { slice::from_raw_parts(info.dlpi_phdr.cast::<u8>(), usize::from(info.dlpi_phnum) * entry_bytes) }
            .to_vec()
    };
    objects.push(Loaded { name, bias: address(info.dlpi_addr), program_headers });
    0
}

/// The size of what a pointer points to, for types that differ between the widths.
const fn size_of_val_pointed_to<T>(_: *const T) -> usize {
    size_of::<T>()
}

/// Where the kernel mapped the vDSO's ELF header (`vdso(7)`), if it did.
pub(super) fn vdso() -> Option<Addr> {
    // SAFETY: reads a table that the kernel left at process start and nobody changes.
    let header = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    (header != 0).then(|| address(header))
}

/// An address of this process from one of the integer types that libc uses for it, all as wide as a pointer.
fn address<T>(word: T) -> Addr
where
    usize: TryFrom<T>,
{
    let native = usize::try_from(word).unwrap_or_else(|_| unreachable!("an address of this process fits a pointer"));
    Addr::new(native as u64)
}

/// Fills `bytes` with this process's memory from `at` on.
///
/// Reads with `process_vm_readv(2)`, and through `/proc/self/mem` where that fails: it is forbidden in some sandboxes, and
/// it does not read mappings that are executable only.
///
/// # Errors
/// The kernel's error of the first attempt, if the second fails too. `EFAULT` says that not all of it is mapped.
pub(super) fn read_memory(at: Addr, bytes: &mut [u8]) -> io::Result<()> {
    let Err(first) = read_by_call(at, bytes) else { return Ok(()) };
    let by_file = File::open("/proc/self/mem").and_then(|memory| memory.read_exact_at(bytes, at.value()));
    by_file.map_err(|_| first)
}

fn read_by_call(at: Addr, bytes: &mut [u8]) -> io::Result<()> {
    let unmapped = || io::Error::from_raw_os_error(libc::EFAULT);
    let remote_base = usize::try_from(at.value()).map_err(|_| unmapped())?;
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: remote_base as *mut c_void, iov_len: bytes.len() };
    let this_process = std::process::id().cast_signed();
    // SAFETY: the kernel writes at most `bytes.len()` bytes to `bytes`, which is borrowed for it; the other side is only read,
    // by the kernel, which checks that it is mapped.
    let copied = unsafe { libc::process_vm_readv(this_process, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(copied) {
        Ok(copied) if copied == bytes.len() => Ok(()),
        Ok(_) => Err(unmapped()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    /// An anonymous page.
    struct Page(*mut c_void);

    impl Page {
        const BYTES: usize = 4096;

        fn new() -> Self {
            let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: asks for new memory, wherever there is room.
            let page = unsafe { libc::mmap(ptr::null_mut(), Self::BYTES, access, flags, -1, 0) };
            assert_ne!(page, libc::MAP_FAILED);
            Self(page)
        }

        fn address(&self) -> Addr {
            Addr::new(self.0 as u64)
        }
    }

    impl Drop for Page {
        fn drop(&mut self) {
            // SAFETY: the page is ours, and nobody has a reference to it.
            unsafe { libc::munmap(self.0, Self::BYTES) };
        }
    }

    #[test]
    fn pages_without_read_permission_are_read_through_the_file() {
        let page = Page::new();
        // SAFETY: the page is writable and nobody else's.
        unsafe { page.0.cast::<u8>().write(0x90) };
        // SAFETY: nobody has a reference to the page.
        assert_eq!(unsafe { libc::mprotect(page.0, Page::BYTES, libc::PROT_NONE) }, 0);
        let mut byte = [0];
        assert!(read_by_call(page.address(), &mut byte).is_err(), "or else this test shows nothing");
        match read_memory(page.address(), &mut byte) {
            Ok(()) => assert_eq!(byte, [0x90]),
            Err(error) => eprintln!("skipped: this kernel keeps /proc/self/mem from overriding permissions ({error})"),
        }
    }
}
