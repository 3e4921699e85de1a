//! The process's tracer, and the functions that it can trace.
//!
//! Owns [`Tracer`], [`Site`] and [`Skipped`]. The texts that sites point to live in the tracer. Invariant: what cannot be traced is listed with the
//! reason.

use std::{
    ffi::{CString, c_char, c_void},
    mem, ptr,
    time::Duration,
};

use trapline_process::{Tracer as Inner, called_from};

use crate::{
    entry::{self, with_frames},
    ops::Function,
    status::{Failure, Status, guard, room_of, taken_back, target_of, text_of},
};

/// The tracer of a process: there is one at most.
pub struct Tracer {
    pub(crate) inner: Inner,
    sites: Vec<Names>,
    skipped: Vec<Names>,
}

/// A function with its texts; `detail` is its symbol, or why it was skipped.
struct Names {
    address: usize,
    body: Function,
    name: CString,
    detail: CString,
}

/// A function that can be traced.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Where the call is put: at the function's entry, behind `endbr` if it has one.
    pub address: *const c_void,
    /// The function behind the site: a call of it is one that no ops sees. What replaces the function calls the function itself by it, cast to the function's
    /// own type. It is good as long as the function's object is loaded.
    pub body: Function,
    /// The function's name as its source has it. It is good until `trapline_stop`, as the symbol is.
    pub name: *const c_char,
    /// Its symbol as the linker knows it.
    pub symbol: *const c_char,
}

/// A function that was compiled for tracing, and cannot be traced.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Skipped {
    /// The site, or where what lists it begins.
    pub address: *const c_void,
    /// The function's name, or the file's. It is good until `trapline_stop`, as the reason is.
    pub name: *const c_char,
    /// Why.
    pub reason: *const c_char,
}

/// What was done since the process's tracer was made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Batches of changes.
    pub batches: u64,
    /// Sites that were rewritten by them.
    pub pokes: u64,
    /// Breakpoints that threads met meanwhile. None of them lost a call.
    pub traps: u64,
}

/// Makes the process's tracer: finds the functions of all loaded objects that were compiled for tracing, with `-fpatchable-function-entry=5` for instance,
/// and takes SIGTRAP over. `trapline_stop` ends it.
///
/// # Safety
/// `tracer` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_start(tracer: *mut *mut Tracer) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let room = unsafe { room_of(tracer, "tracer") }?;
        room.write(ptr::null_mut());
        let inner = Inner::new()?;
        let text = |text: String| CString::new(text.replace('\0', " ")).unwrap_or_default();
        let number = |address: trapline_process::Addr| usize::try_from(address.value()).unwrap_or(0);
        let sites = inner.sites().map(|site| Names {
            address: number(site.address),
            body: function_at(number(site.body)),
            name: text(site.name),
            detail: text(site.symbol),
        });
        let skipped = inner.skipped().iter().map(|skipped| Names {
            address: number(skipped.address),
            body: None,
            name: text(skipped.name.clone()),
            detail: text(skipped.reason.to_string()),
        });
        let (sites, skipped) = (sites.collect(), skipped.collect());
        room.write(Box::into_raw(Box::new(Tracer { inner, sites, skipped })));
        Ok(())
    })
}

/// Ends the tracer; nothing if it is NULL. Functions that ops are attached to stay traced until these are detached as well: with the last of them the original
/// code is back, and SIGTRAP is the program's again.
///
/// # Safety
/// `tracer` is NULL, or a tracer that has not been stopped.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn trapline_stop(tracer: *mut Tracer) {
    with_frames!(stop)
}

/// # Safety
/// As [`trapline_stop`]; `frames` is the caller's stack pointer.
unsafe extern "C" fn stop(tracer: *mut Tracer, _: usize, frames: usize) {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let tracer = unsafe { taken_back(tracer) };
        called_from(entry::address(frames), || drop(tracer));
        Ok(())
    });
}

/// How many functions can be traced; 0 if `tracer` is NULL.
///
/// # Safety
/// `tracer` is NULL or a tracer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_site_count(tracer: *const Tracer) -> usize {
    // SAFETY: the caller vouches for it.
    unsafe { tracer.as_ref() }.map_or(0, |tracer| tracer.sites.len())
}

/// Tells of the function with this index, from 0; they are sorted by address.
///
/// # Safety
/// `tracer` is a tracer, `site` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_site_at(tracer: *const Tracer, index: usize, site: *mut Site) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let tracer = unsafe { target_of(tracer, "tracer") }?;
        let found = at(&tracer.sites, index, "site")?;
        // SAFETY: as above.
        unsafe { room_of(site, "site") }?.write(found.site());
        Ok(())
    })
}

/// Tells of the function of this name, or of this symbol.
///
/// # Safety
/// `tracer` is a tracer, `name` text that ends with a zero byte, `site` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_site_find(tracer: *const Tracer, name: *const c_char, site: *mut Site) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let tracer = unsafe { target_of(tracer, "tracer") }?;
        // SAFETY: as above.
        let name = unsafe { text_of(name, "name") }?;
        // SAFETY: as above.
        let room = unsafe { room_of(site, "site") }?;
        let is_named = |text: &CString| text.as_bytes() == name.as_bytes();
        let mut found = tracer.sites.iter().filter(|site| is_named(&site.name) || is_named(&site.detail));
        let none = || Failure::new(Status::NoMatch, format!("none of {} sites is named {name}", tracer.sites.len()));
        let first = found.next().ok_or_else(none)?;
        if found.next().is_some() {
            let message = format!("more than one site is named {name}; choose one of them by trapline_site_at");
            return Err(Failure::new(Status::Ambiguous, message));
        }
        room.write(first.site());
        Ok(())
    })
}

/// How many functions were compiled for tracing and cannot be traced; 0 if `tracer` is NULL.
///
/// # Safety
/// `tracer` is NULL or a tracer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_skipped_count(tracer: *const Tracer) -> usize {
    // SAFETY: the caller vouches for it.
    unsafe { tracer.as_ref() }.map_or(0, |tracer| tracer.skipped.len())
}

/// Tells of the skipped function with this index, from 0.
///
/// # Safety
/// `tracer` is a tracer, `skipped` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_skipped_at(tracer: *const Tracer, index: usize, skipped: *mut Skipped) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let tracer = unsafe { target_of(tracer, "tracer") }?;
        let found = at(&tracer.skipped, index, "skipped function")?;
        let address = ptr::with_exposed_provenance(found.address);
        // SAFETY: as above.
        let room = unsafe { room_of(skipped, "skipped") }?;
        room.write(Skipped { address, name: found.name.as_ptr(), reason: found.detail.as_ptr() });
        Ok(())
    })
}

/// Tells what was done so far.
///
/// # Safety
/// `tracer` is a tracer, `stats` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_stats(tracer: *const Tracer, stats: *mut Stats) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let done = unsafe { target_of(tracer, "tracer") }?.inner.stats();
        // SAFETY: as above.
        let room = unsafe { room_of(stats, "stats") }?;
        room.write(Stats { batches: done.batches, pokes: done.pokes, traps: done.traps.traps });
        Ok(())
    })
}

/// Waits until no thread can be inside a callback that was detached before: then what its `data` points to may be freed, and the object that it is in may be
/// unloaded. `TRAPLINE_STATUS_BUSY` after `timeout_ms` milliseconds.
///
/// # Safety
/// `tracer` is a tracer.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn trapline_synchronize(tracer: *const Tracer, timeout_ms: u32) -> Status {
    with_frames!(synchronize)
}

/// # Safety
/// As [`trapline_synchronize`]; `frames` is the caller's stack pointer.
unsafe extern "C" fn synchronize(tracer: *const Tracer, timeout_ms: u32, frames: usize) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let tracer = unsafe { target_of(tracer, "tracer") }?;
        let limit = Duration::from_millis(timeout_ms.into());
        Ok(called_from(entry::address(frames), || tracer.inner.synchronize(limit))?)
    })
}

/// The address of code as C has it, which casts it to the type that the code has.
fn function_at(address: usize) -> Function {
    // SAFETY: of the same size; zero is `None`, and anything else is called by C only, which vouches for the type.
    unsafe { mem::transmute::<usize, Function>(address) }
}

fn at<'a>(names: &'a [Names], index: usize, what: &str) -> Result<&'a Names, Failure> {
    let beyond = || Failure::argument(format!("there is no {what} {index}: there are {}", names.len()));
    names.get(index).ok_or_else(beyond)
}

impl Names {
    fn site(&self) -> Site {
        Site {
            address: ptr::with_exposed_provenance(self.address),
            body: self.body,
            name: self.name.as_ptr(),
            symbol: self.detail.as_ptr(),
        }
    }
}
