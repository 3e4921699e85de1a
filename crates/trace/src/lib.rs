//! trapline's trace file: written while recording, read as a stream, analysed.
//!
//! The [`Writer`] takes what the recorder tells it ([`Meta`], [`Process`], [`Module`], [`Stream`], ...) and raw records, which the [`Encoder`] packs. The
//! [`Reader`] gives [`Chunk`]s back, past any damage; the [`Catalog`] gathers what is no event, and the [`Decoder`] unpacks what is.
//! [`Frames`] makes calls of events, for [`profile()`] to count and for [`stacks()`] to add up by their callers, and for
//! [`paces`] to compare. The [`Timeline`] has the events of all threads in the order of time.
#![forbid(unsafe_code)]

mod catalog;
mod decode;
mod encode;
mod error;
pub mod format;
mod frames;
mod histogram;
mod model;
mod pace;
mod profile;
mod reader;
mod site_index;
mod stacks;
mod timeline;
mod writer;

pub use catalog::{Catalog, Clock, FunctionRef};
pub use decode::{BadChunk, Decoder, EventsChunk, TimedEvent};
pub use encode::{Batch, Encoded, Encoder, MAX_RECORDS, Position};
pub use error::Error;
pub use frames::{Ending, Frame, Frames, Sink};
pub use histogram::Histogram;
pub use model::{ClockPoint, End, Exit, Function, How, Load, Losses, Meta, Module, Process, Stream, Unload};
pub use pace::{Estimate, Pace, paces};
pub use profile::{FunctionProfile, Profile, profile};
pub use reader::{Chunk, Damage, Functions, ModuleHead, Reader};
pub use site_index::SiteIndex;
pub use stacks::{Node, Stacks, stacks};
pub use timeline::{Order, Part, Timeline};
pub use trapline_abi::record;
pub use writer::{Writer, hexadecimal};
