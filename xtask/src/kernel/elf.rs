//! The testbed's file: its functions with their code, and which of them have a site.
//!
//! Owns [`Functions`]. What judges the code ([`vectors`](super::vectors)) and what makes a trace file ([`trace`](super::trace)) read it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};

/// A function as the symbol table has it.
#[derive(Debug)]
pub(super) struct Function {
    /// As people write it.
    pub(super) name: String,
    /// Its machine code.
    pub(super) code: Vec<u8>,
}

/// All functions of a file, by address.
#[derive(Debug)]
pub(super) struct Functions {
    /// 64 or 32.
    pub(super) bitness: u32,
    /// By address. Functions with the same code share one, and have one name here.
    pub(super) by_address: BTreeMap<u64, Function>,
    /// Addresses at which the compiler left room for a call; none in a file that is not the testbed's.
    pub(super) sites: BTreeSet<u64>,
    /// Where the testbed's text begins; 0 in another file.
    pub(super) text_start: u64,
}

impl Functions {
    /// Reads an ELF file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        let file = object::File::parse(&*bytes).with_context(|| format!("{} is no ELF file", path.display()))?;
        let mut by_address = BTreeMap::new();
        for symbol in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0) {
            let section = symbol.section_index().and_then(|index| file.section_by_index(index).ok());
            let code = section.and_then(|section| section.data_range(symbol.address(), symbol.size()).ok().flatten());
            let (Some(code), Ok(name)) = (code, symbol.name()) else { continue };
            let name = format!("{:#}", rustc_demangle::demangle(name));
            by_address.insert(symbol.address(), Function { name, code: code.to_vec() });
        }
        ensure!(!by_address.is_empty(), "{} has no functions in its symbol table", path.display());
        let bitness = if file.is_64() { 64 } else { 32 };
        let list = file.section_by_name(".sites").and_then(|section| section.data().ok()).unwrap_or_default();
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        let sites = list.chunks_exact(bitness as usize / 8).map(word).collect();
        let text_start = file.symbol_by_name("text_start").map_or(0, |symbol| symbol.address());
        Ok(Self { bitness, by_address, sites, text_start })
    }
}
