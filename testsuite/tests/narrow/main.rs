//! 32-bit programs: those that Debian ships, and trees of processes of both widths. The other tests compile their programs for i386 where `TRAPLINE_WIDTH` is 32.

mod mixed;
mod stock;
