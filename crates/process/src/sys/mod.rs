//! The crate's door to Linux: every system call, and every layout that the kernel hands out, is behind it.
//!
//! Most of this is called by the stopper task of [`quiesce`](crate::quiesce) while every thread of the process stands still, whichever
//! lock it holds. So, unless a function says otherwise: it allocates nothing, takes no lock, touches no thread-local variable (`errno` is
//! one), and cannot panic for any answer of the kernel's.
//!
//! From the bottom up: [`syscall`] enters the kernel; [`errno`] is what it may answer; [`clock`], [`signal`], [`task`], [`pages`] and
//! [`ptrace`] are its calls by topic, with [`restart`] for those that ptrace disturbs; [`maps`] and [`procfs`] read the text it writes
//! about a process; [`memory`] reads memory that may be missing; [`valgrind`] is asked where the processor is not one.
//!
//! `cfg(target_arch)` appears in [`syscall`] and [`restart`] (numbers), and in [`ptrace`] and [`valgrind`] (registers), nowhere else.

pub(crate) mod clock;
pub(crate) mod errno;
pub(crate) mod maps;
pub(crate) mod memory;
pub(crate) mod pages;
pub(crate) mod procfs;
pub(crate) mod ptrace;
pub(crate) mod restart;
pub(crate) mod signal;
pub(crate) mod syscall;
pub(crate) mod task;
pub(crate) mod valgrind;
