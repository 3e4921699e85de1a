//! trapline's trace file: written while recording, read as a stream, analysed.
//!
//! The [`Writer`] takes what the recorder tells it ([`Meta`], [`Process`], [`Module`], [`Stream`], ...) and raw records, which the [`Encoder`] packs.
#![forbid(unsafe_code)]

mod encode;
mod error;
pub mod format;
mod model;
mod writer;

pub use encode::{Batch, Encoded, Encoder, MAX_RECORDS, Position};
pub use error::Error;
pub use model::{ClockPoint, End, Exit, Function, How, Load, Losses, Meta, Module, Process, Stream, Unload};
pub use writer::Writer;
