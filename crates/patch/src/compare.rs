//! Whether two objects mean the same.
//!
//! Owns [`Comparison`] and [`Reference`], what a relocation refers to whichever way the compiler wrote it. Neighbours: `build` asks which functions and variables
//! changed, `bind` what a place refers to. Invariant: "same" is only said of what is; what cannot be told is different, and then there is more in a patch than
//! there had to be.
//!
//! The names of functions and variables are compared, and not where they lie. Constants without a name, strings and parts of functions are compared by what is
//! in them, as deep as it goes.

use std::collections::{BTreeSet, HashMap};

use crate::{
    object::{Home, Merge, Object, Relocation, Role, Section, SymbolKind, has_identity},
    operands::Operands,
    relocation::{self, Value},
};

/// What a relocation refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reference<'a> {
    /// What has a name: undefined here, or the symbol with this index.
    Named {
        /// The name of the symbol.
        name: &'a str,
        /// Where it is defined.
        symbol: usize,
        /// Of the reference, from the symbol's address.
        offset: i64,
    },
    /// An entry of a section that linkers merge.
    Entry {
        section: usize,
        /// The symbol's value.
        value: u64,
        addend: i64,
    },
    /// A place in a section without names.
    Content { section: usize, offset: i64 },
    /// A place in writable memory, and it cannot be told of which variable.
    Unclear { section: usize, offset: i64 },
    /// A number.
    Number(i64),
}

impl Object {
    /// What a relocation refers to.
    pub(crate) fn reference(&self, relocation: &Relocation) -> Reference<'_> {
        let index = relocation.symbol;
        let symbol = &self.symbols[index];
        let offset = symbol.value.cast_signed().wrapping_add(relocation.addend);
        let named = |index: usize| {
            let symbol = &self.symbols[index];
            Reference::Named {
                name: &symbol.name,
                symbol: index,
                offset: offset.wrapping_sub(symbol.value.cast_signed()),
            }
        };
        let section = match symbol.home {
            Home::Undefined | Home::Common => {
                return Reference::Named { name: &symbol.name, symbol: index, offset: relocation.addend };
            }
            Home::Absolute => return Reference::Number(offset),
            Home::Section(section) => section,
        };
        let has_name = symbol.kind != SymbolKind::Section && has_identity(&symbol.name);
        match &self.sections[section] {
            Section { merge: Merge::Strings(_) | Merge::Entries(_), .. } if symbol.is_local => {
                Reference::Entry { section, value: symbol.value, addend: relocation.addend }
            }
            Section { role: Role::Code, .. } => match self.function_of(section) {
                Some(function) => named(function),
                None => Reference::Content { section, offset },
            },
            _ if has_name && symbol.kind != SymbolKind::Other => named(index),
            content => match (self.named_in(section), content.role) {
                ([only], _) => named(*only),
                (_, Role::ReadOnly) => Reference::Content { section, offset },
                _ => Reference::Unclear { section, offset },
            },
        }
    }

    /// The entry at `offset` of a section that linkers merge, and where in it that is.
    fn entry(&self, section: usize, offset: u64) -> Option<(&[u8], u64)> {
        let section = &self.sections[section];
        let start = usize::try_from(offset).ok()?;
        match section.merge {
            Merge::No => None,
            Merge::Entries(bytes) => {
                let first = start / bytes * bytes;
                Some((section.data.get(first..first.checked_add(bytes)?)?, (start - first) as u64))
            }
            Merge::Strings(bytes) => {
                let text = section.data.get(start..)?;
                let end = text.chunks_exact(bytes).position(|unit| unit.iter().all(|byte| *byte == 0))?;
                Some((&text[..(end + 1) * bytes], 0))
            }
        }
    }
}

/// Two objects, side by side.
#[derive(Debug)]
pub(crate) struct Comparison<'a> {
    pub(crate) old: &'a Object,
    pub(crate) new: &'a Object,
    old_by_name: HashMap<String, Vec<usize>>,
    old_strings: Strings,
    new_strings: Strings,
}

/// Places in sections without names that something refers to. Without optimisation compilers put strings there, one behind the other.
type Strings = HashMap<usize, BTreeSet<u64>>;

/// A range of a section: an object or a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    section: usize,
    start: u64,
    len_bytes: u64,
}

impl<'a> Comparison<'a> {
    pub(crate) fn new(old: &'a Object, new: &'a Object) -> Self {
        let mut old_by_name: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, symbol) in old.symbols.iter().enumerate() {
            if matches!(symbol.home, Home::Section(_) | Home::Common) && !symbol.name.is_empty() {
                old_by_name.entry(plain(&symbol.name, symbol.kind).to_owned()).or_default().push(index);
            }
        }
        Self { old, new, old_by_name, old_strings: strings(old), new_strings: strings(new) }
    }

    /// The old symbol that became this new one. Numbers that compilers put behind the names of static variables may differ, if there is no doubt.
    pub(crate) fn old_of(&self, new: usize) -> Option<usize> {
        let symbol = &self.new.symbols[new];
        let candidates = self.old_by_name.get(plain(&symbol.name, symbol.kind))?;
        let is_same = |index: &&usize| {
            let old = &self.old.symbols[**index];
            old.name == symbol.name && old.is_local == symbol.is_local
        };
        let plain_name = plain(&symbol.name, symbol.kind);
        if plain_name == symbol.name {
            return candidates.iter().find(is_same).copied();
        }
        let news = self
            .new
            .symbols
            .iter()
            .filter(|other| matches!(other.home, Home::Section(_)) && plain(&other.name, other.kind) == plain_name);
        match (&candidates[..], news.count()) {
            ([one], 1) => Some(*one),
            _ => self.by_users(new, candidates),
        }
    }

    /// Of several static variables of one name the one that the same function uses.
    fn by_users(&self, new: usize, candidates: &[usize]) -> Option<usize> {
        let current = users(self.new, new);
        let mut fitting =
            candidates.iter().filter(|&&old| users(self.old, old).iter().any(|user| current.contains(user)));
        let first = fitting.next()?;
        fitting.next().is_none().then_some(*first)
    }

    /// Whether two sections mean the same.
    pub(crate) fn same_sections(&self, old: usize, new: usize) -> bool {
        self.same(whole(self.old, old), whole(self.new, new), &mut Vec::new())
    }

    /// Whether the contents of two symbols mean the same.
    pub(crate) fn same_symbols(&self, old: usize, new: usize) -> bool {
        match (piece(self.old, old), piece(self.new, new)) {
            (Some(old), Some(new)) => self.same(old, new, &mut Vec::new()),
            (None, None) => true,
            _ => false,
        }
    }

    /// `seen`: what is being compared already; a circle is the same if everything else on it is.
    fn same(&self, old: Piece, new: Piece, seen: &mut Vec<(Piece, Piece)>) -> bool {
        if seen.contains(&(old, new)) {
            return true;
        }
        let (of_old, of_new) = (&self.old.sections[old.section], &self.new.sections[new.section]);
        if old.len_bytes != new.len_bytes
            || !same_bytes(
                self.old.bytes(old.section, old.start, old.len_bytes),
                self.new.bytes(new.section, new.start, new.len_bytes),
            )
        {
            return false;
        }
        let (olds, news) = (places(of_old, old), places(of_new, new));
        if olds.len() != news.len() {
            return false;
        }
        seen.push((old, new));
        let operands = (Operands::of(self.old, old.section), Operands::of(self.new, new.section));
        // One difference is enough, so what was seen is never wrong for the rest.
        olds.iter().zip(&news).all(|(one, other)| {
            one.offset - old.start == other.offset - new.start
                && one.kind == other.kind
                && self.same_reference((old, one, &operands.0), (new, other, &operands.1), seen)
        })
    }

    fn same_reference(
        &self,
        (in_old, old, old_operands): (Piece, &Relocation, &Operands),
        (in_new, new, new_operands): (Piece, &Relocation, &Operands),
        seen: &mut Vec<(Piece, Piece)>,
    ) -> bool {
        match (self.old.reference(old), self.new.reference(new)) {
            (Reference::Number(old), Reference::Number(new)) => old == new,
            (
                Reference::Named { name: old_name, symbol: old_symbol, offset: old_offset },
                Reference::Named { name: new_name, symbol: new_symbol, offset: new_offset },
            ) => {
                let (old_symbol, new_symbol) = (&self.old.symbols[old_symbol], &self.new.symbols[new_symbol]);
                if old_offset != new_offset || plain(old_name, old_symbol.kind) != plain(new_name, new_symbol.kind) {
                    return false;
                }
                match (old_symbol.home, new_symbol.home) {
                    (Home::Section(one), Home::Section(other))
                        if self.old.sections[one].role == Role::ReadOnly
                            && self.new.sections[other].role == Role::ReadOnly =>
                    {
                        let old = self.old.reference(old).symbol().and_then(|symbol| piece(self.old, symbol));
                        let new = self.new.reference(new).symbol().and_then(|symbol| piece(self.new, symbol));
                        old.zip(new).is_none_or(|(old, new)| self.same(old, new, seen))
                    }
                    _ => true,
                }
            }
            (
                Reference::Entry { section: old_section, value: old_value, addend: old_addend },
                Reference::Entry { section, value, addend },
            ) => {
                let old_at = entry_offset(self.old, in_old, old, old_operands, old_value, old_addend);
                let new_at = entry_offset(self.new, in_new, new, new_operands, value, addend);
                match old_at.zip(new_at) {
                    Some((old_at, new_at)) => {
                        let found = (self.old.entry(old_section, old_at), self.new.entry(section, new_at));
                        found.0.is_some() && found.0 == found.1
                    }
                    None => {
                        old_value == value
                            && old_addend == addend
                            && self.same(whole(self.old, old_section), whole(self.new, section), seen)
                    }
                }
            }
            (
                Reference::Content { section: one, offset: old_offset },
                Reference::Content { section: other, offset: new_offset },
            ) => {
                let old_at = entry_offset(self.old, in_old, old, old_operands, 0, old_offset);
                let new_at = entry_offset(self.new, in_new, new, new_operands, 0, new_offset);
                let old_text = old_at.and_then(|at| string(self.old, one, at, &self.old_strings));
                let new_text = new_at.and_then(|at| string(self.new, other, at, &self.new_strings));
                if old_text.is_some() && new_text.is_some() {
                    return old_text == new_text;
                }
                old_offset == new_offset && self.same(whole(self.old, one), whole(self.new, other), seen)
            }
            (
                Reference::Unclear { section: one, offset: old_offset },
                Reference::Unclear { section: other, offset: new_offset },
            ) => old_offset == new_offset && same_layout(self.old, one, self.new, other),
            _ => false,
        }
    }
}

impl Reference<'_> {
    fn symbol(self) -> Option<usize> {
        match self {
            Reference::Named { symbol, .. } => Some(symbol),
            _ => None,
        }
    }
}

/// A name without the number that compilers append to the names of static variables. Functions keep theirs: clones are different functions.
pub(crate) fn plain(name: &str, kind: SymbolKind) -> &str {
    if kind == SymbolKind::Function {
        return name;
    }
    match name.rsplit_once('.') {
        Some((plain, number))
            if !plain.is_empty() && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) =>
        {
            plain
        }
        _ => name,
    }
}

fn whole(object: &Object, section: usize) -> Piece {
    Piece { section, start: 0, len_bytes: object.sections[section].len_bytes }
}

fn piece(object: &Object, symbol: usize) -> Option<Piece> {
    let symbol = &object.symbols[symbol];
    match symbol.home {
        Home::Section(section) => Some(Piece { section, start: symbol.value, len_bytes: symbol.size }),
        _ => None,
    }
}

/// Zeroed memory has no bytes, and may have become or been memory with bytes that are all zero.
fn same_bytes(old: Option<&[u8]>, new: Option<&[u8]>) -> bool {
    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    match (old, new) {
        (Some(old), Some(new)) => old == new,
        (Some(bytes), None) | (None, Some(bytes)) => is_zero(bytes),
        (None, None) => true,
    }
}

fn places(section: &Section, piece: Piece) -> Vec<Relocation> {
    let range = piece.start..piece.start.saturating_add(piece.len_bytes);
    section.relocations.iter().filter(|relocation| range.contains(&relocation.offset)).copied().collect()
}

/// Where the entry begins that a place refers to, if that can be told.
fn entry_offset(
    object: &Object,
    from: Piece,
    relocation: &Relocation,
    operands: &Operands,
    value: u64,
    addend: i64,
) -> Option<u64> {
    let meaning = relocation::meaning(object.mode, relocation.kind)?;
    let is_relative = meaning.is_relative();
    let correction = if object.sections[from.section].role == Role::Code {
        let operand = operands.at(relocation.offset)?;
        // Position-independent code of i386 adds the table of slots, which is a register.
        if operand.registers > usize::from(meaning.value == Value::FromTable) {
            return None;
        }
        if is_relative { operand.to_end_bytes } else { 0 }
    } else if is_relative {
        // A table of distances from its own beginning.
        (from.start.cast_signed()).wrapping_sub(relocation.offset.cast_signed())
    } else {
        0
    };
    value.checked_add_signed(addend.checked_add(correction)?)
}

fn strings(object: &Object) -> Strings {
    let mut strings = Strings::new();
    for (index, section) in object.sections.iter().enumerate() {
        let operands = Operands::of(object, index);
        for place in &section.relocations {
            let Reference::Content { section: home, offset } = object.reference(place) else { continue };
            if let Some(at) = entry_offset(object, whole(object, index), place, &operands, 0, offset) {
                strings.entry(home).or_default().insert(at);
            }
        }
    }
    strings
}

/// The string at `offset`, if that is all there is before the next place that something refers to.
fn string<'a>(object: &'a Object, section: usize, offset: u64, strings: &Strings) -> Option<&'a str> {
    let section_data = &object.sections[section].data;
    let end = strings.get(&section)?.range(offset + 1..).next().copied();
    let end = usize::try_from(end.unwrap_or(section_data.len() as u64)).ok()?;
    let bytes = section_data.get(usize::try_from(offset).ok()?..end)?;
    let text = std::str::from_utf8(&bytes[..bytes.iter().position(|byte| *byte == 0)?]).ok()?;
    let is_text = !text.is_empty() && !text.contains(|c: char| c.is_control() && !c.is_whitespace());
    let is_all = bytes[text.len()..].iter().all(|byte| *byte == 0);
    let range = offset..end as u64;
    let has_places = object.sections[section].relocations.iter().any(|place| range.contains(&place.offset));
    (is_text && is_all && !has_places).then_some(text)
}

fn same_layout(old: &Object, old_section: usize, new: &Object, new_section: usize) -> bool {
    let layout = |object: &Object, section: usize| {
        let named = object.named_in(section);
        named.iter().map(|&index| (object.symbols[index].name.clone(), object.symbols[index].value)).collect::<Vec<_>>()
    };
    layout(old, old_section) == layout(new, new_section)
}

/// The functions that refer to a symbol.
fn users(object: &Object, symbol: usize) -> Vec<&str> {
    let mut users: Vec<&str> = object
        .units()
        .filter(|unit| {
            let places = &object.sections[unit.section].relocations;
            places.iter().any(|place| object.reference(place).symbol() == Some(symbol))
        })
        .filter_map(|unit| unit.symbols.first().map(|&index| object.symbols[index].name.as_str()))
        .collect();
    users.sort_unstable();
    users
}
