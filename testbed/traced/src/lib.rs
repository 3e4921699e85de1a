//! What the testbed traces: a thousand functions whose entries the compiler leaves room at.
//!
//! Owns the table behind [`function`], and the functions that are there to be replaced ([`replaceable`]). This crate alone is compiled with `-Zpatchable-function-entry=5`, so that nothing else has sites. Each function is a
//! different one, and [`expected`] tells what it must return: a caller notices if its argument or its result was disturbed.
#![no_std]

use core::sync::atomic::{AtomicUsize, Ordering};

/// How many functions there are.
pub const COUNT: usize = 1024;

/// A traced function.
pub type Function = fn(usize) -> usize;

/// What the function at `index` returns for `argument`.
#[inline(always)]
pub const fn expected(index: usize, argument: usize) -> usize {
    argument.rotate_left(7).wrapping_mul(2 * index + 1) ^ index
}

#[inline(never)]
fn work<const INDEX: usize>(argument: usize) -> usize {
    expected(INDEX, argument)
}

macro_rules! functions {
    ($(($row:literal))*) => {
        [$(functions!(row $row)),*]
    };
    (row $row:literal) => {
        [
            work::<{ $row * 16 }>, work::<{ $row * 16 + 1 }>, work::<{ $row * 16 + 2 }>, work::<{ $row * 16 + 3 }>,
            work::<{ $row * 16 + 4 }>, work::<{ $row * 16 + 5 }>, work::<{ $row * 16 + 6 }>, work::<{ $row * 16 + 7 }>,
            work::<{ $row * 16 + 8 }>, work::<{ $row * 16 + 9 }>, work::<{ $row * 16 + 10 }>, work::<{ $row * 16 + 11 }>,
            work::<{ $row * 16 + 12 }>, work::<{ $row * 16 + 13 }>, work::<{ $row * 16 + 14 }>, work::<{ $row * 16 + 15 }>,
        ]
    };
}

/// Every traced function: the one at `row * 16 + column` stands at `[row][column]`.
static ROWS: [[Function; 16]; COUNT / 16] =
    functions!((0)(1)(2)(3)(4)(5)(6)(7)(8)(9)(10)(11)(12)(13)(14)(15)(16)(17)(18)(19)(20)(21)(22)(23)(24)(25)(26)(27)(
        28
    )(29)(30)(31)(32)(33)(34)(35)(36)(37)(38)(39)(40)(41)(42)(43)(44)(45)(46)(47)(48)(49)(50)(51)(52)(
        53
    )(54)(55)(56)(57)(58)(59)(60)(61)(62)(63));

/// The function at `index`.
///
/// # Panics
/// If `index` is not below [`COUNT`].
#[inline(always)]
pub fn function(index: usize) -> Function {
    ROWS[index / 16][index % 16]
}

/// Calls itself so many levels deep, and then the function that `argument` leads to: a call graph. Not a loop: the compiler must not see that it is one.
#[inline(never)]
pub fn nest(levels: usize, argument: usize) -> usize {
    match levels {
        0 => function(argument % COUNT)(argument),
        _ => core::hint::black_box(nest as fn(usize, usize) -> usize)(levels - 1, argument).wrapping_add(levels),
    }
}

/// What [`nest`] returns.
#[inline(always)]
pub const fn expected_of_nest(levels: usize, argument: usize) -> usize {
    expected(argument % COUNT, argument).wrapping_add(levels * (levels + 1) / 2)
}

/// How often each body of one replaceable function ran, in one call.
#[derive(Debug, Default)]
pub struct Bodies {
    /// The body that the function was compiled with.
    pub old: AtomicUsize,
    /// The one that replaces it.
    pub new: AtomicUsize,
}

/// How many functions are there to be replaced.
pub const REPLACEABLE_COUNT: usize = 16;

/// A function that is there to be replaced.
pub type Replaceable = extern "C" fn(&Bodies, usize) -> usize;

#[inline(never)]
extern "C" fn old_body<const INDEX: usize>(bodies: &Bodies, argument: usize) -> usize {
    bodies.old.fetch_add(1, Ordering::Relaxed);
    expected(INDEX, argument)
}

macro_rules! old_bodies {
    ($($index:literal)*) => {
        [$(old_body::<$index>),*]
    };
}

static REPLACEABLE: [Replaceable; REPLACEABLE_COUNT] = old_bodies!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);

/// The replaceable function at `index`. Its own body returns what [`expected`] says.
///
/// # Panics
/// If `index` is not below [`REPLACEABLE_COUNT`].
#[inline(always)]
pub fn replaceable(index: usize) -> Replaceable {
    REPLACEABLE[index]
}
