//! A trace in the formats of other tools.
//!
//! [`export()`] goes through a trace once and writes it in a [`Format`]. What the trace tells comes as calls from one place (`source`), to one file a format, each
//! of which implements `Output` and knows nothing of the others. Invariant: every call of the trace is told to the format exactly once, with times that
//! never go back within a thread; memory does not grow with the trace, but for the formats whose own form is a whole ([`Format::is_held`]).
//! [`Calls`] are for who wants the calls themselves, and [`html()`] writes a page for a browser.
#![forbid(unsafe_code)]

mod calls;
mod chrome;
mod ctf;
mod error;
mod firefox;
mod flame;
mod format;
mod html;
mod parquet;
mod perf_script;
mod perfetto;
mod pprof;
mod source;
mod speedscope;
mod target;
mod uftrace;

pub use calls::{Calls, Row, ending_word};
pub use error::Error;
pub use format::Format;
pub use html::{Facts, html};
pub use source::{Function, Summary, Thread};
pub use target::Target;

use std::path::Path;

use error::Failure;
use source::{Output, drive};

/// Writes a trace in another format, and says what it held. `progress` is told now and then how many events are done, and of how many.
///
/// # Errors
/// [`Error`]: the trace cannot be read, or the output not written; what of it was written stays.
pub fn export(
    input: &Path,
    format: Format,
    target: &Target,
    mut progress: impl FnMut(u64, u64),
) -> Result<Summary, Error> {
    let progress = &mut progress;
    match format {
        Format::Perfetto => to(input, perfetto::Perfetto::new(target.file()?), target, progress),
        Format::Chrome => to(input, chrome::Chrome::new(target.file()?), target, progress),
        Format::Firefox => to(input, firefox::Firefox::new(target.file()?), target, progress),
        Format::Speedscope => to(input, speedscope::Speedscope::new(target.file()?), target, progress),
        Format::Folded => to(input, flame::Folded::new(target.file()?), target, progress),
        Format::Flamegraph => to(input, flame::Flamegraph::new(target.file()?), target, progress),
        Format::Pprof => to(input, pprof::Pprof::new(target.file()?), target, progress),
        Format::Parquet => {
            let output = parquet::Parquet::new(target.file()?);
            to(input, output.map_err(|error| Failure::Output(error).about(target.path()))?, target, progress)
        }
        Format::Ctf => to(input, ctf::Ctf::new(target.directory()?), target, progress),
        Format::Uftrace => to(input, uftrace::Uftrace::new(target.directory()?), target, progress),
        Format::PerfScript => to(input, perf_script::PerfScript::new(target.file()?), target, progress),
    }
}

fn to(
    input: &Path,
    output: impl Output,
    target: &Target,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, Error> {
    drive(input, output, progress).map_err(|failure| failure.about(target.path()))
}
