//! C code with sites, compiled for the width of this program and loaded into it.
//!
//! Builds on the [`support`](super::support) of the discovery tests. Load fixtures before the tracer is built: it looks at the objects that are there.

use trapline_engine::{Addr, Mode};

use super::support::{Directory, compile, text};
pub(crate) use super::support::{Library, clang_is_here};

/// How a compiler leaves sites.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Compiled {
    /// GCC's `-fpatchable-function-entry=5`: five nops, which have to be merged.
    Patchable,
    /// GCC's `-pg -mfentry -mnop-mcount -mrecord-mcount`: a nop of five bytes behind `endbr`.
    Fentry,
    /// Clang's `-fxray-instrument`: a jump over a nop. 64 bit only.
    Xray,
}

impl Compiled {
    /// Whether this machine can make it.
    pub(crate) fn is_possible(self) -> bool {
        self != Self::Xray || (Mode::NATIVE == Mode::Bits64 && clang_is_here())
    }

    /// Compiles a fixture and loads it.
    pub(crate) fn load(self, source: &str) -> Library {
        let directory = Directory::new();
        let source = format!("{}/tests/fixtures/{source}", env!("CARGO_MANIFEST_DIR"));
        let object = directory.path("fixture.o");
        let path = directory.path("fixture.so");
        let (compiler, flags, link): (_, &[&str], &[&str]) = match self {
            Self::Patchable => ("gcc", &["-fPIC", "-fpatchable-function-entry=5", "-fcf-protection=none"], &[]),
            // GCC makes these nops only in code that is not position-independent; the loader relocates its text.
            Self::Fentry => (
                "gcc",
                &["-fno-pic", "-pg", "-mfentry", "-mnop-mcount", "-mrecord-mcount", "-fcf-protection=full"],
                &["-Wl,-z,notext"],
            ),
            Self::Xray => ("clang", &["-fPIC", "-fxray-instrument", "-fxray-instruction-threshold=1"], &[]),
        };
        compile(compiler, &[&["-c", "-O2", "-msse2", "-Wall", "-Werror", &source], flags].concat(), &object);
        compile("gcc", &[&["-shared", text(&object)], link].concat(), &path);
        Library::open(directory, path)
    }
}

/// The function of this name as a pointer.
///
/// # Safety
/// `F` is a pointer to an `extern "C"` function of the type that the fixture gives this one. It is called only while the library is there.
pub(crate) unsafe fn function<F: Copy>(library: &Library, name: &str) -> F {
    assert_eq!(size_of::<F>(), size_of::<usize>());
    let address = native(library.symbol(name));
    // SAFETY: of the same size; the caller vouches for the type.
    unsafe { std::mem::transmute_copy(&address) }
}

/// An address as a number of this process.
pub(crate) fn native(addr: Addr) -> usize {
    usize::try_from(addr.value()).expect("an address of this process")
}
