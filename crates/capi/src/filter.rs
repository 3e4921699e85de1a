//! Filters: which functions an ops is attached to.
//!
//! Owns [`Filter`], which a program builds step by step. [`ops`](crate::ops) takes filters. Invariant: a filter without an inclusion selects nothing, and
//! attaching by it is an error.

use std::{
    ffi::{c_char, c_void},
    mem,
};

use trapline_process::{Addr, Filter as Rules};

use crate::status::{Failure, Status, guard, room_of, taken_back, text_of};

/// Chooses functions. Not for use by two threads at once.
pub struct Filter {
    pub(crate) rules: Rules,
}

/// Makes a filter that selects nothing yet; `trapline_filter_free` frees it.
///
/// # Safety
/// `filter` is good for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_filter_new(filter: *mut *mut Filter) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let filter = unsafe { room_of(filter, "filter") }?;
        filter.write(Box::into_raw(Box::new(Filter { rules: Rules::default() })));
        Ok(())
    })
}

/// Selects functions whose names match a glob: `*` any run of characters, `?` any one, `[a-z]` and `[!a-z]` one of a set. Names are as the source has them: of
/// C++ with parameters, of Rust with the path.
///
/// # Safety
/// `filter` is a filter, `glob` text that ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_filter_add(filter: *mut Filter, glob: *const c_char) -> Status {
    // SAFETY: the caller vouches for both.
    unsafe { change(filter, glob, Rules::or_name) }
}

/// Leaves out functions whose names match a glob, also if they are selected otherwise.
///
/// # Safety
/// `filter` is a filter, `glob` text that ends with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_filter_except(filter: *mut Filter, glob: *const c_char) -> Status {
    // SAFETY: the caller vouches for both.
    unsafe { change(filter, glob, Rules::except) }
}

/// Selects the function whose site has this address, which `trapline_site` tells.
///
/// # Safety
/// `filter` is a filter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_filter_add_address(filter: *mut Filter, address: *const c_void) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let filter = unsafe { filter.as_mut() }.ok_or_else(|| Failure::argument("filter is NULL"))?;
        filter.rules = mem::take(&mut filter.rules).or_address(Addr::new(address.addr() as u64));
        Ok(())
    })
}

/// Frees a filter; nothing if it is NULL. Ops that were attached by it keep what they need.
///
/// # Safety
/// `filter` is NULL, or a filter that has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn trapline_filter_free(filter: *mut Filter) {
    // SAFETY: the caller vouches for it.
    drop(unsafe { taken_back(filter) });
}

/// # Safety
/// As [`trapline_filter_add`].
unsafe fn change(filter: *mut Filter, glob: *const c_char, how: fn(Rules, &str) -> Rules) -> Status {
    guard(|| {
        // SAFETY: the caller vouches for it.
        let glob = unsafe { text_of(glob, "glob") }?;
        // SAFETY: as above.
        let filter = unsafe { filter.as_mut() }.ok_or_else(|| Failure::argument("filter is NULL"))?;
        filter.rules = how(mem::take(&mut filter.rules), glob);
        Ok(())
    })
}
