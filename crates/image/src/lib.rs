//! trapline's view of an ELF file: its functions, and how each of them can be armed.
//!
//! [`Image`] is the principal type: read from a file, it lists every [`Function`] with a [`Verdict`], either a [`Plan`] to arm it or the
//! [`Reason`] why not, and [`Image::arm`] turns plans into bytes for a process. Data flows one way:
//!
//! ```text
//! file --> elf ------> functions --> scan ----------> plan --------> arm --> Armed { stubs, writes, sites }
//!          frames ---^               (decodes all     (the ladder,
//!          names ----^                code once)       verdicts)
//! ```
//!
//! Beside that row: `debug` finds symbols that were taken out of the file; `tables`, `stack` and `marks` belong to the scan; `parts`, `padding` and `flags`
//! to the ladder; `area` to arming. `entry` knows no file.
//!
//! The recorder decides which functions are wanted, allocates the stubs, and writes to the target. Invariants: pure, nothing here knows a
//! process; every function of the file has a verdict, and what is not one is listed in [`Image::left_out`] (I7); what is not understood is refused;
//! the same file gives the same bytes.
//!
//! ```
//! use trapline_image::{Image, Verdict};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = Image::open("/proc/self/exe".as_ref())?;
//! for function in image.functions().iter().take(10) {
//!     match &function.verdict {
//!         Verdict::Traced(plan) => println!("{}: {:?}", function.name, plan.rung),
//!         Verdict::Untraced(reason) => println!("{}: {}", function.name, reason.code()),
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use std::{
    io,
    path::{Path, PathBuf},
};

use trapline_engine::{Addr, AddrRange, Mode};

use self::{
    elf::{Elf, Segment},
    frames::Frames,
    marks::Text,
    plan::Evidence,
};

mod area;
mod arm;
mod debug;
mod discover;
mod elf;
mod entry;
mod flags;
mod frames;
mod function;
mod hook;
mod marks;
mod names;
mod padding;
mod parts;
mod plan;
mod reason;
mod scan;
mod stack;
mod tables;

pub use arm::{ArmRequest, Armed, ArmedSite, Diverted, Entries, SetAside, Shim, Write};
pub use entry::entry_window;
pub use function::{Function, LeftOut, NoFunction, Plan, Rung, Verdict};
pub use reason::Reason;

/// Why a file cannot be traced at all.
#[derive(thiserror::Error, Debug)]
pub enum Error {
    /// It could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is no ELF file for x86, or its headers contradict each other.
    #[error("{what}; trapline reads ELF executables and shared objects for x86 and x86-64")]
    Malformed {
        /// What was found.
        what: String,
    },
}

/// The contents of the file with the symbols that were taken out of the ELF file `bytes`, which was read from `path`: a separate debug file, or one within it.
pub fn symbol_file(bytes: &[u8], path: &Path) -> Option<Vec<u8>> {
    let elf = Elf::parse(bytes).ok()?;
    debug::separate_file(&elf, path).or_else(|| debug::embedded_file(&elf))
}

/// An ELF file, its functions, and how they can be armed.
#[derive(Debug)]
pub struct Image {
    bytes: Vec<u8>,
    segments: Vec<Segment>,
    mode: Mode,
    build_id: Option<Vec<u8>>,
    functions: Vec<Function>,
    left_out: Vec<LeftOut>,
    text: AddrRange,
    lowest: u64,
    is_cut: bool,
}

impl Image {
    /// Reads the file at `path`, and the separate debug file that belongs to it if there is one.
    ///
    /// # Errors
    /// The file cannot be read, or is no ELF file for x86.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(|error| Error::Unreadable { path: path.to_owned(), error })?;
        let module = path.file_name().unwrap_or_default().to_string_lossy();
        Self::read(bytes, &module, |elf| debug::separate_file(elf, path))
    }

    /// Makes sense of the contents of a file, without any other. Functions without a name are called after `module`.
    ///
    /// # Errors
    /// It is no ELF file for x86.
    pub fn parse(bytes: Vec<u8>, module: &str) -> Result<Self, Error> {
        Self::read(bytes, module, |_| None)
    }

    fn read(bytes: Vec<u8>, module: &str, separate: impl FnOnce(&Elf<'_>) -> Option<Vec<u8>>) -> Result<Self, Error> {
        let elf = Elf::parse(&bytes).map_err(|what| Error::Malformed { what })?;
        let mut symbols = elf.symbols(false);
        let other_file = if symbols.iter().any(|symbol| symbol.is_function) {
            None
        } else {
            separate(&elf).or_else(|| debug::embedded_file(&elf))
        };
        let other_elf = other_file.as_deref().and_then(|bytes| Elf::parse(bytes).ok());
        if let Some(other) = other_elf.as_ref().filter(|other| other.mode == elf.mode) {
            symbols.extend(other.symbols(false));
        }
        symbols.extend(elf.symbols(true));

        let text = Text::of(&elf);
        let frames = Frames::read(&elf);
        let discovered = discover::discover(&elf, &symbols, &frames);
        let scanned = scan::scan(&elf, &text, &frames, &discovered);
        let is_go = elf.section(".note.go.buildid").or_else(|| elf.section(".gopclntab")).is_some();
        let evidence = Evidence { elf: &elf, text: &text, scanned: &scanned, module, is_go };
        let (functions, mut left_out) = plan::judge(&evidence, discovered.candidates);
        left_out.extend(discovered.left_out);
        left_out.sort_by_key(LeftOut::address);

        let code = text.ranges();
        let start = code.first().map_or(0, |range| range.start);
        let end = code.iter().map(|range| range.end).max().unwrap_or(start);
        Ok(Self {
            mode: elf.mode,
            build_id: elf.build_id.map(<[u8]>::to_vec),
            functions,
            left_out,
            text: AddrRange { start: Addr::new(start), end: Addr::new(end) },
            lowest: elf.segments.iter().map(|segment| segment.address).min().unwrap_or(0),
            is_cut: elf.is_cut,
            segments: elf.segments,
            bytes,
        })
    }

    /// Whether the file ends before what its headers say is loaded: it was cut, and functions may be missing.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// All functions, by ascending address, each address once. Sites are numbered as they are here.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// The function that a symbol names.
    pub fn function_named(&self, symbol: &str) -> Option<usize> {
        let is_it = |function: &Function| function.name == symbol || function.aliases.iter().any(|name| name == symbol);
        self.functions.iter().position(is_it)
    }

    /// What looks like a function in some table and is none, by ascending address.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// The width of the code.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The descriptor of the `NT_GNU_BUILD_ID` note.
    pub fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    /// From the first to the last byte of code, as the file counts addresses.
    pub fn text_range(&self) -> AddrRange {
        self.text
    }

    /// The lowest address that the file wants to be loaded at: 0 for most that are position-independent.
    pub fn lowest_address(&self) -> u64 {
        self.lowest
    }

    /// How many bytes the stubs of these functions take at most.
    pub fn stub_bytes_bound(&self, selected: &[usize], shims: &[Shim]) -> usize {
        arm::stub_bytes_bound(&self.functions, selected, shims)
    }

    /// Encodes the stubs and the sites of the functions that are asked for. The same request gives the same bytes.
    pub fn arm(&self, request: &ArmRequest<'_>) -> Armed {
        arm::arm(self, request)
    }

    /// The bytes of the file that are loaded at `address` and behind it, as far as its segment goes.
    pub fn code(&self, address: Addr) -> &[u8] {
        let at = |segment: &Segment| segment.at(&self.bytes, address.value());
        self.segments.iter().filter(|segment| segment.is_code).find_map(at).unwrap_or_default()
    }
}
