//! Discovery: which functions of this process can be hooked, and where.
//!
//! Owns the search for the nops that compilers leave at function entries on request. [`loaded_objects`] lists what is mapped,
//! [`compiled_in_sites`] finds the sites of one object. A [`FoundSite`] says where to poke and what has to be done first; what cannot
//! be used is [`Skipped`] with its reason.
//!
//! | [`SiteKind`] | made by | listed in |
//! |---|---|---|
//! | `PatchableEntry` | `-fpatchable-function-entry=N,M` of GCC and Clang, `-Zpatchable-function-entry` of rustc | `__patchable_function_entries` |
//! | `Fentry` | `-pg -mfentry -mnop-mcount -mrecord-mcount` of GCC | `__mcount_loc` |
//! | `XrayEntry` | `-fxray-instrument` of Clang (64-bit) | `xray_instr_map` |
//!
//! Flow, without turning back: the loader's list (`objects`) -> the sections in the object's file (`image`) -> the records in
//! memory (`records`) -> function and address (`place`, with `functions`) -> the bytes there (`window`) -> site. Behind it
//! come filters and pokes, which this module does not know.
//!
//! A list is as complete as compiler and linker have left it. GCC 11 and 12 put all records of a source file into one section
//! that belongs to its first function and goes with it when the linker drops that (GCC bug 110729); gold drops all lists under
//! `--gc-sections`. Functions that no list names are not found here, nops or not; they are left to the ways of hooking a function that
//! was not prepared for it.
//!
//! Invariant: nothing is left out in silence. Each function that a list names is either a site or skipped, once, with the reason;
//! an object whose file is not the loaded one is skipped as a whole.
//!
//! ```
//! use trapline_process::discover::{compiled_in_sites, loaded_objects};
//!
//! for object in loaded_objects()? {
//!     let found = compiled_in_sites(&object)?;
//!     for site in &found.sites {
//!         println!("{} {} {:?}", site.address, site.name, site.needs);
//!     }
//!     for skipped in &found.skipped {
//!         eprintln!("{} {}: {}", skipped.address, skipped.name, skipped.reason);
//!     }
//! }
//! # Ok::<(), trapline_process::discover::DiscoverError>(())
//! ```

mod elf;
mod functions;
mod image;
mod memory;
mod objects;
mod place;
mod records;
mod sys;
mod window;

use std::{fmt, io, mem};

use trapline_engine::{Addr, AddrRange, Mode, insn::InsnBytes};

use self::{
    functions::Functions,
    image::{Image, ListSection},
    memory::Memory,
    place::{Place, Places},
    records::{List, Record},
};

pub use self::{
    elf::BuildId,
    objects::{LoadedObject, ObjectRole, loaded_objects},
};

/// What an object's lists of sites amount to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Discovered {
    /// The sites, by address; no function has two.
    pub sites: Vec<FoundSite>,
    /// What is listed, or should have been, but cannot be used. By address.
    pub skipped: Vec<Skipped>,
}

/// A place at a function's entry where a call can be put.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoundSite {
    /// The first byte to poke.
    pub address: Addr,
    /// The function's symbol as the linker knows it (mangled), global ones preferred; `file+0x1234`, with the address in the file,
    /// if it has none.
    pub name: String,
    /// The function's entry. The site is there, or behind `endbr` and nops.
    pub function: Addr,
    /// How the site came about.
    pub kind: SiteKind,
    /// What is there now: the whole instructions that [`Needs`] is about, at least 5 bytes.
    pub found: Vec<u8>,
    /// What is to be done before calls can be poked.
    pub needs: Needs,
}

/// The ways of compiling sites into a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SiteKind {
    /// Nops of `-fpatchable-function-entry`.
    PatchableEntry,
    /// The nop that stands for a call of `__fentry__`.
    Fentry,
    /// The entry sled of `XRay`: a jump over a nop.
    XrayEntry,
}

impl SiteKind {
    const ALL: [Self; 3] = [Self::PatchableEntry, Self::Fentry, Self::XrayEntry];

    /// The section that lists sites of this kind.
    pub const fn section_name(self) -> &'static str {
        match self {
            Self::PatchableEntry => "__patchable_function_entries",
            Self::Fentry => "__mcount_loc",
            Self::XrayEntry => "xray_instr_map",
        }
    }
}

/// What has to happen once before a site's first 5 bytes are one instruction that can be poked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Needs {
    /// They are: one 5-byte nop.
    Nothing,
    /// One longer nop: becomes a 5-byte nop and a shorter one. Threads stand before or behind all of it, so one ordinary poke
    /// of its whole length does it.
    SplitNop,
    /// An `XRay` sled of 11 bytes: a 2-byte jump and the 9 bytes behind it, which nobody executes. Becomes a 5-byte nop and a
    /// 6-byte one by one ordinary poke of its whole length.
    XrayNormalise,
    /// Several nops: become one. Threads may stand between them, so this needs quiescence, and a look at the function for
    /// jumps to between them.
    MergeNops,
}

/// Something that cannot be used as a site.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skipped {
    /// The site if it is known; else the address that is listed; for a whole list where it begins, for a whole object where
    /// that begins.
    pub address: Addr,
    /// The function, named like [`FoundSite::name`], or the object's file name.
    pub name: String,
    /// Why.
    pub reason: SkipReason,
}

/// Why something cannot be used as a site. The first group concerns a function, the second a list, the third an object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SkipReason {
    /// The compiler's nops are not there: something else has changed the code.
    UnexpectedBytes {
        /// What is there instead, as far as it was read.
        found: InsnBytes,
    },
    /// Less than the 5 bytes of a call.
    TooShort {
        /// The nops that the function executes at its entry, in bytes: 0 if all of them are in front of it.
        len_bytes: usize,
    },
    /// `__fentry__` is called: compiled without `-mnop-mcount`.
    FentryCall {
        /// The call and what follows.
        found: InsnBytes,
    },
    /// The function does something before it comes to the site.
    NotAtEntry {
        /// Where it begins.
        function: Addr,
    },
    /// The nops may stand at the entry or in front of it: neither symbol nor unwind table nor `endbr` tells where the
    /// function begins.
    EntryUnknown,
    /// The listed address is not in the object's code.
    OutsideText,
    /// The function has a better site, of another kind.
    FunctionHasSite {
        /// That site.
        site: Addr,
    },

    /// The list is not loaded, so that its addresses are not relocated.
    SectionNotLoaded {
        /// The list's section.
        section: &'static str,
    },
    /// The list does not consist of whole entries, or lies outside of what is loaded.
    MalformedSection {
        /// The list's section.
        section: &'static str,
    },
    /// `XRay`'s list has a layout that came after version 2.
    UnknownXrayVersion {
        /// The version.
        version: u8,
    },

    /// The object's file cannot be opened; it was deleted, perhaps.
    FileUnreadable {
        /// The kernel's answer.
        error: io::ErrorKind,
    },
    /// The file is no ELF file of this width that makes sense.
    MalformedFile {
        /// What does not.
        what: String,
    },
    /// The file is another one than was loaded: it was replaced since.
    NotTheLoadedFile {
        /// What is not the same in memory.
        what: &'static str,
    },
    /// The object was unloaded while it was looked at.
    Unloaded,
}

/// What stops discovery altogether.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoverError {
    /// This process's own memory cannot be read.
    #[error("cannot read {len_bytes} bytes of this process's memory at {address}")]
    Memory {
        /// From here.
        address: Addr,
        /// So much.
        len_bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl DiscoverError {
    /// Whether something was not mapped (any more), as against a process that is not allowed to look.
    fn is_unmapped(&self) -> bool {
        let Self::Memory { source, .. } = self;
        source.raw_os_error() == Some(libc::EFAULT)
    }
}

/// Why one thing cannot be used, or nothing can.
enum Refusal {
    Skip(SkipReason),
    Error(DiscoverError),
}

impl Refusal {
    /// The reason to go on with, unless there is no going on.
    fn reason(self) -> Result<SkipReason, DiscoverError> {
        match self {
            Self::Skip(reason) => Ok(reason),
            Self::Error(error) => Err(error),
        }
    }
}

impl From<SkipReason> for Refusal {
    fn from(reason: SkipReason) -> Self {
        Self::Skip(reason)
    }
}

impl From<DiscoverError> for Refusal {
    fn from(error: DiscoverError) -> Self {
        if error.is_unmapped() { Self::Skip(SkipReason::Unloaded) } else { Self::Error(error) }
    }
}

/// Finds the sites that were compiled into `object`, one of [`loaded_objects`].
///
/// Reads the object's file and this process's memory, and changes nothing. A function is found once, however often it is
/// listed: as an alias, or folded with identical ones.
///
/// # Errors
/// [`DiscoverError::Memory`] if this process's own memory cannot be read. A file that is gone or was replaced, and an
/// object that is unloaded meanwhile, are no errors: the object is then [`Skipped`].
pub fn compiled_in_sites(object: &LoadedObject) -> Result<Discovered, DiscoverError> {
    if object.role == ObjectRole::Vdso {
        return Ok(Discovered::default());
    }
    sites_of(object).or_else(|refusal| {
        let skipped = Skipped { address: object.range.start, name: object.file_name(), reason: refusal.reason()? };
        Ok(Discovered { sites: Vec::new(), skipped: vec![skipped] })
    })
}

fn sites_of(object: &LoadedObject) -> Result<Discovered, Refusal> {
    let image = Image::of(object)?;
    let Discovered { mut sites, mut skipped } = Discovered::default();
    let mut records = Vec::new();
    for list in &image.lists {
        match records_in(object, list) {
            Ok(listed) => records.extend(listed),
            Err(refusal) => {
                let address = elf::relocated(object.bias, list.address);
                skipped.push(Skipped { address, name: object.file_name(), reason: refusal.reason()? });
            }
        }
    }
    if records.is_empty() {
        return Ok(Discovered { sites, skipped });
    }
    records.sort_unstable();
    records.dedup_by_key(|record| record.address);

    let (symbols, names) = image.functions()?;
    let functions = Functions::new(object, symbols, names)?;
    let mut places = Places { object, functions: &functions, memory: Memory::default() };
    for record in records {
        let place = match places.place(record) {
            Ok(place) => place,
            Err(refusal) => {
                let reason = refusal.reason()?;
                let function = if let SkipReason::NotAtEntry { function } = reason { function } else { record.address };
                skipped.push(Skipped { address: record.address, name: functions.name(function), reason });
                continue;
            }
        };
        let name = functions.name(place.function);
        match judge(record, place, places.code(place)?) {
            Ok((needs, found)) => {
                let Place { site: address, function, .. } = place;
                sites.push(FoundSite { address, name, function, kind: record.kind, found, needs });
            }
            Err(reason) => skipped.push(Skipped { address: place.site, name, reason }),
        }
    }
    keep_one_site_a_function(&mut sites, &mut skipped);
    sites.sort_by_key(|site| site.address);
    skipped.sort_by_key(|skipped| skipped.address);
    Ok(Discovered { sites, skipped })
}

/// Reads one list from memory.
fn records_in(object: &LoadedObject, list: &ListSection) -> Result<Vec<Record>, Refusal> {
    let section = list.kind.section_name();
    if !list.loaded {
        return Err(SkipReason::SectionNotLoaded { section }.into());
    }
    let range = AddrRange::new(elf::relocated(object.bias, list.address), list.len_bytes);
    if !object.maps(range) {
        return Err(SkipReason::MalformedSection { section }.into());
    }
    let bytes = Memory::read(range)?;
    Ok(List { mode: Mode::NATIVE, kind: list.kind, at: range.start, bias: object.bias, bytes: &bytes }.records()?)
}

/// Looks at the code at a record's site.
fn judge(record: Record, place: Place, code: &[u8]) -> Result<(Needs, Vec<u8>), SkipReason> {
    let judged = match record.kind {
        SiteKind::PatchableEntry => window::judge_nops(Mode::NATIVE, code),
        SiteKind::Fentry => window::judge_fentry(Mode::NATIVE, code),
        SiteKind::XrayEntry => window::judge_sled(Mode::NATIVE, code),
    };
    judged.map_err(|reason| match reason {
        // All the nops that are listed stand in front of the entry, and behind it the function goes on.
        SkipReason::UnexpectedBytes { .. } if record.address < place.function => SkipReason::TooShort { len_bytes: 0 },
        reason => reason,
    })
}

/// A function may have been compiled with sites of several kinds. Tracing it at two would count its calls twice: the one that
/// needs least is kept.
fn keep_one_site_a_function(sites: &mut Vec<FoundSite>, skipped: &mut Vec<Skipped>) {
    sites.sort_by_key(|site| (site.function, site.needs, site.address));
    sites.dedup_by(|other, kept| {
        let same = other.function == kept.function;
        if same {
            let reason = SkipReason::FunctionHasSite { site: kept.address };
            skipped.push(Skipped { address: other.address, name: mem::take(&mut other.name), reason });
        }
        same
    });
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnexpectedBytes { found } => write!(f, "the compiler's nops are not there but `{found}`"),
            Self::TooShort { len_bytes } => write!(f, "only {len_bytes} bytes of nops at the entry, a call takes 5"),
            Self::FentryCall { found } => {
                write!(f, "calls __fentry__ (`{found}`), recompile with -mnop-mcount")
            }
            Self::NotAtEntry { function } => write!(f, "the function begins at {function} and does something before"),
            Self::EntryUnknown => write!(f, "no symbol or unwind entry tells where the function begins"),
            Self::OutsideText => write!(f, "the listed address is not in the object's code"),
            Self::FunctionHasSite { site } => write!(f, "the function has a site at {site}"),
            Self::SectionNotLoaded { section } => write!(f, "section {section} is not loaded"),
            Self::MalformedSection { section } => write!(f, "section {section} is malformed"),
            Self::UnknownXrayVersion { version } => write!(f, "XRay sleds of version {version} are not known"),
            Self::FileUnreadable { error } => write!(f, "the object's file cannot be opened: {error}"),
            Self::MalformedFile { what } => write!(f, "the object's file is malformed: {what}"),
            Self::NotTheLoadedFile { what } => {
                write!(f, "the object's file was replaced since it was loaded: {what} differ")
            }
            Self::Unloaded => write!(f, "the object was unloaded meanwhile"),
        }
    }
}
