//! Where the functions of an object begin, and what they are called.
//!
//! Owns [`Functions`]: one entry for each address at which a function begins, sorted, so that a site finds its function by
//! binary search. Neighbours: [`super::image`] provides the symbols; the unwind table in memory provides the starts that have
//! no symbol, since a stripped object keeps it. Invariant: an address has one entry and at most one name.

use std::cmp::Ordering;

use trapline_engine::{Addr, AddrRange};

use super::{
    DiscoverError, LoadedObject,
    elf::relocated,
    image::{Symbol, string_at},
    memory::Memory,
};

/// All known functions of an object.
pub(super) struct Functions<'a> {
    /// Sorted by address, each address once.
    known: Vec<Function>,
    names: &'a [u8],
    object: &'a LoadedObject,
}

/// One function.
#[derive(Clone, Copy, Debug)]
pub(super) struct Function {
    /// Its first instruction.
    pub(super) entry: Addr,
    /// From its symbol; 0 if that does not say, or if there is none.
    len_bytes: u64,
    /// Offset in the table of names.
    name: Option<u32>,
}

impl Function {
    /// Its code, where the symbol says how long that is.
    pub(super) fn body(&self) -> Option<AddrRange> {
        (self.len_bytes != 0).then(|| AddrRange::new(self.entry, self.len_bytes))
    }
}

impl<'a> Functions<'a> {
    /// Sorts `symbols`, whose names are in `names`, and adds what `object`'s unwind table knows besides.
    pub(super) fn new(
        object: &'a LoadedObject,
        mut symbols: Vec<Symbol>,
        names: &'a [u8],
    ) -> Result<Self, DiscoverError> {
        symbols.sort_unstable_by(|a, b| a.address.cmp(&b.address).then_with(|| by_preference(names, a, b)));
        symbols.dedup_by_key(|symbol| symbol.address);
        let with_symbol = symbols.iter().map(|symbol| Function {
            entry: relocated(object.bias, symbol.address),
            len_bytes: symbol.len_bytes,
            name: Some(symbol.name),
        });
        let from_unwinding =
            unwind_starts(object)?.into_iter().map(|entry| Function { entry, len_bytes: 0, name: None });
        let mut known: Vec<Function> = with_symbol.chain(from_unwinding).collect();
        // The sort is stable: of two with the same address the one with the name stays.
        known.sort_by_key(|function| function.entry);
        known.dedup_by_key(|function| function.entry);
        Ok(Self { known, names, object })
    }

    /// The function that begins at `address`, or else the last one before.
    pub(super) fn at_or_before(&self, address: Addr) -> Option<Function> {
        let behind = self.known.partition_point(|function| function.entry <= address);
        self.known[..behind].last().copied()
    }

    /// The first function that begins after `address`.
    pub(super) fn after(&self, address: Addr) -> Option<Function> {
        let behind = self.known.partition_point(|function| function.entry <= address);
        self.known.get(behind).copied()
    }

    /// The symbol of the function that begins at `entry`; without one, the object's file name and the address in the file.
    pub(super) fn name(&self, entry: Addr) -> String {
        let index = self.known.binary_search_by_key(&entry, |function| function.entry);
        let name = index.ok().and_then(|index| string_at(self.names, self.known[index].name?));
        match name {
            Some(name) if !name.is_empty() => String::from_utf8_lossy(name).into_owned(),
            _ => format!("{}+{:#x}", self.object.file_name(), self.object.file_address(entry)),
        }
    }
}

/// Orders the symbols of one address, best name first: the most widely known, then the plainest (`malloc` before
/// `__libc_malloc`), then by spelling so that the choice does not depend on the table's order.
fn by_preference(names: &[u8], a: &Symbol, b: &Symbol) -> Ordering {
    let key = |symbol: &Symbol| {
        let name = string_at(names, symbol.name).unwrap_or_default();
        let underscores = name.iter().take_while(|&&byte| byte == b'_').count();
        (symbol.binding, name.is_empty(), underscores, name.len(), name)
    };
    key(a).cmp(&key(b))
}

/// What `.eh_frame_hdr` begins with in every object that a linker made (LSB Core, section 10.6.2): version 1; the address of
/// `.eh_frame` as a pc-relative 32-bit number, the count as an unsigned one, the table relative to this section.
const UNWIND_HEADER: [u8; 4] = [1, 0x1b, 0x03, 0x3b];

/// The addresses at which the unwind table says that functions begin. Other layouts than the usual one yield none.
fn unwind_starts(object: &LoadedObject) -> Result<Vec<Addr>, DiscoverError> {
    let Some(segment) = object.segments.iter().find(|segment| segment.is_unwind_table()) else { return Ok(Vec::new()) };
    let range = segment.range(object.bias);
    if !object.maps(range) {
        return Ok(Vec::new());
    }
    let bytes = Memory::read(range)?;
    let word = |chunk: &[u8]| chunk.try_into().map(u32::from_le_bytes).unwrap_or_default();
    let (Some(&UNWIND_HEADER), Some(count)) = (bytes.first_chunk(), bytes.get(8..12).map(word)) else {
        return Ok(Vec::new());
    };
    let entries = bytes[12..].chunks_exact(8).take(usize::try_from(count).unwrap_or(usize::MAX));
    Ok(entries.map(|entry| range.start.offset(i64::from(word(&entry[..4]).cast_signed()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discover::{ObjectRole, image::Binding};

    const NAMES: &[u8] = b"\0__libc_malloc\0malloc\0local\0weak_one\0_ZN1AC2Ev\0_ZN1AC1Ev\0";

    fn symbol(address: u64, binding: Binding, name: &str) -> Symbol {
        let terminated = format!("{name}\0");
        let offset = NAMES.windows(terminated.len()).position(|bytes| bytes == terminated.as_bytes());
        Symbol { address, len_bytes: 8, binding, name: u32::try_from(offset.expect("listed above")).expect("small") }
    }

    fn object() -> LoadedObject {
        LoadedObject {
            path: "/lib/x.so".into(),
            bias: Addr::new(0x10_0000),
            range: AddrRange::new(Addr::new(0x10_0000), 0x1000),
            build_id: None,
            role: ObjectRole::Library,
            segments: Vec::new(),
        }
    }

    #[test]
    fn the_most_public_and_plainest_name_wins() {
        let symbols = vec![
            symbol(0x20, Binding::Local, "local"),
            symbol(0x20, Binding::Weak, "weak_one"),
            symbol(0x10, Binding::Global, "__libc_malloc"),
            symbol(0x10, Binding::Local, "local"),
            symbol(0x10, Binding::Global, "malloc"),
            symbol(0x30, Binding::Weak, "_ZN1AC2Ev"),
            symbol(0x30, Binding::Weak, "_ZN1AC1Ev"),
        ];
        let object = object();
        for symbols in [symbols.clone(), symbols.into_iter().rev().collect()] {
            let functions = Functions::new(&object, symbols, NAMES).expect("reads no memory");
            let name = |address: u64| functions.name(Addr::new(0x10_0000 + address));
            assert_eq!([name(0x10), name(0x20), name(0x30)], ["malloc", "weak_one", "_ZN1AC1Ev"]);
            assert_eq!(name(0x44), "x.so+0x44");
            let entry = |function: Option<Function>| function.map(|function| function.entry.value() - 0x10_0000);
            assert_eq!(entry(functions.at_or_before(Addr::new(0x10_0020))), Some(0x20));
            assert_eq!(entry(functions.at_or_before(Addr::new(0x10_002f))), Some(0x20));
            assert_eq!(entry(functions.at_or_before(Addr::new(0x10_000f))), None);
            assert_eq!(entry(functions.after(Addr::new(0x10_0020))), Some(0x30));
            assert_eq!(entry(functions.after(Addr::new(0x10_0030))), None);
        }
    }
}
