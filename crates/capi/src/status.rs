//! How a function tells what went wrong: a status that programs decide by, and a message for people.
//!
//! Owns [`Status`], the message of the calling thread, and `guard`, through which every function goes that can fail. Invariant: a panic becomes
//! [`Status::Internal`] here.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    mem::MaybeUninit,
    panic::{self, AssertUnwindSafe},
};

use trapline_process::{EngineError, Error};

/// How a call of the library went.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// It did what it says.
    Ok = 0,
    /// An argument makes no sense: a null pointer, text that is not UTF-8, an index beyond the end.
    Argument = 1,
    /// The process has a tracer already.
    AlreadyRunning = 2,
    /// No loaded object has a function that can be traced.
    NoSites = 3,
    /// No function has the name, or the filter selects none. The message has names that are near.
    NoMatch = 4,
    /// More than one function has the name.
    Ambiguous = 5,
    /// Another ops with `TRAPLINE_IP_MODIFY` holds one of the functions.
    Taken = 6,
    /// Code is not what it should be: a debugger or another patcher writes there.
    Text = 7,
    /// Threads are where they may not be. Trying again may help.
    Busy = 8,
    /// An earlier change failed and could not be undone. The process goes on; nothing more can be changed.
    Stuck = 9,
    /// The system refused something. The message has what, and what to do.
    System = 10,
    /// A defect of trapline's. Please report the message.
    Internal = 11,
}

/// A status with its message.
pub(crate) struct Failure {
    status: Status,
    message: String,
}

impl Failure {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// An argument makes no sense.
    pub(crate) fn argument(message: impl Into<String>) -> Self {
        Self::new(Status::Argument, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::AlreadyRunning => Status::AlreadyRunning,
            Error::NoSites { .. } => Status::NoSites,
            Error::StillInside { .. } | Error::Engine(EngineError::Busy) => Status::Busy,
            Error::Engine(EngineError::NoSuchSite { .. } | EngineError::NothingMatches { .. }) => Status::NoMatch,
            Error::Engine(EngineError::IpModifyTaken { .. }) => Status::Taken,
            Error::Engine(EngineError::Text(_)) => Status::Text,
            Error::Engine(EngineError::Stuck) => Status::Stuck,
            _ => Status::System,
        };
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static MESSAGE: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// Does `work`, keeps what is to be told about its failure, and lets no panic out.
pub(crate) fn guard(work: impl FnOnce() -> Result<(), Failure>) -> Status {
    let failure = match panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return Status::Ok,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
            Failure::new(Status::Internal, format!("a defect of trapline: {}", text.unwrap_or("a panic")))
        }
    };
    let message = CString::new(failure.message.replace('\0', " ")).ok();
    // Without a message where the thread is about to end.
    let _ = MESSAGE.try_with(|kept| kept.replace(message));
    failure.status
}

/// What went wrong in the last call of the calling thread that failed, for people: what was being done, what was found, and what to do. An empty text if none
/// has failed. It is good until the next call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn trapline_message() -> *const c_char {
    const NOTHING: &CStr = c"";
    MESSAGE
        .try_with(|kept| kept.borrow().as_ref().map_or(NOTHING.as_ptr(), |message| message.as_ptr()))
        .unwrap_or(NOTHING.as_ptr())
}

/// The version of the library: 0x00010203 is 1.2.3. Versions with the same first number that is not 0 do what the header of an older one says.
#[unsafe(no_mangle)]
pub extern "C" fn trapline_version() -> u32 {
    const fn number(text: &str) -> u32 {
        let (bytes, mut value, mut at) = (text.as_bytes(), 0, 0);
        while at < bytes.len() {
            value = value * 10 + (bytes[at] - b'0') as u32;
            at += 1;
        }
        value
    }
    number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | number(env!("CARGO_PKG_VERSION_PATCH"))
}

/// Text of C that has to be there.
///
/// # Safety
/// `text` is null, or ends with a zero byte and stays for `'a`.
pub(crate) unsafe fn text_of<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::argument(format!("{what} is NULL")));
    }
    // SAFETY: the caller vouches for it.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::argument(format!("{what} is not UTF-8: {}", text.to_string_lossy())))
}

/// What a pointer that must not be null points to.
///
/// # Safety
/// `pointer` is null, or good for `'a`.
pub(crate) unsafe fn target_of<'a, T>(pointer: *const T, what: &str) -> Result<&'a T, Failure> {
    // SAFETY: the caller vouches for it.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::argument(format!("{what} is NULL")))
}

/// A place for an answer, which must not be null.
///
/// # Safety
/// `pointer` is null, or good for a write, and nobody else uses it for `'a`.
pub(crate) unsafe fn room_of<'a, T>(pointer: *mut T, what: &str) -> Result<&'a mut MaybeUninit<T>, Failure> {
    // SAFETY: the caller vouches for it; uninitialised memory is a `MaybeUninit`.
    unsafe { pointer.cast::<MaybeUninit<T>>().as_mut() }.ok_or_else(|| Failure::argument(format!("{what} is NULL")))
}

/// A pointer that `Box::into_raw` made, back in its box; nothing if it is null.
///
/// # Safety
/// `pointer` is null, or one that a function of this library handed out as a `T` and that has not been taken back.
pub(crate) unsafe fn taken_back<T>(pointer: *mut T) -> Option<Box<T>> {
    // SAFETY: the caller vouches for it.
    (!pointer.is_null()).then(|| unsafe { Box::from_raw(pointer) })
}
