#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod explore;
pub mod poke;
pub mod slots;
pub mod suite;
