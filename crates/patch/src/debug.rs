//! What debugging information tells: types of variables, signatures of functions, and where functions were inlined.
//!
//! Owns [`Debug`]. Neighbours: `build` compares the old object's with the new one's, and asks the target's for copies of what it replaces. Invariant: what cannot be read
//! tells nothing; types are the same if their descriptions are. Source: DWARF 5, sections 3.3, 4.1 and 5.

use std::collections::{BTreeMap, HashMap};

use gimli::{AttributeValue, DebuggingInformationEntry, Dwarf, EndianSlice, LittleEndian, Unit, UnitOffset};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget};

type Slice<'a> = EndianSlice<'a, LittleEndian>;
type Entry<'a> = DebuggingInformationEntry<Slice<'a>>;

/// Descriptions of types grow no longer than this; then they say that they were cut.
const MAX_DESCRIPTION_BYTES: usize = 1 << 16;

/// The debugging information of a file, with relocations applied.
#[derive(Debug)]
pub(crate) struct Debug {
    sections: HashMap<&'static str, Vec<u8>>,
}

/// Types as text, by the names of what has them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Types {
    /// Of variables with a place of their own; without what pointers point to, and with it.
    pub(crate) variables: BTreeMap<String, (String, String)>,
    /// Of functions.
    pub(crate) signatures: BTreeMap<String, String>,
}

/// A copy of a function within another one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Inlined {
    pub(crate) name: String,
    /// The source file's name, of functions that are known in one file only.
    pub(crate) source: Option<String>,
    pub(crate) host: String,
    pub(crate) host_address: u64,
}

impl Debug {
    /// Reads a file's. `None`: it has none, or it is compressed.
    pub(crate) fn of(bytes: &[u8]) -> Option<Self> {
        let file = object::File::parse(bytes).ok()?;
        let mut sections = HashMap::new();
        for id in [
            gimli::SectionId::DebugAbbrev,
            gimli::SectionId::DebugAddr,
            gimli::SectionId::DebugInfo,
            gimli::SectionId::DebugLine,
            gimli::SectionId::DebugLineStr,
            gimli::SectionId::DebugRanges,
            gimli::SectionId::DebugRngLists,
            gimli::SectionId::DebugStr,
            gimli::SectionId::DebugStrOffsets,
        ] {
            let Some(section) = file.section_by_name(id.name()) else { continue };
            let mut data = section.uncompressed_data().ok()?.into_owned();
            for (offset, relocation) in section.relocations() {
                let RelocationTarget::Symbol(index) = relocation.target() else { continue };
                let value = file.symbol_by_index(index).map_or(0, |symbol| symbol.address());
                let width = usize::from(relocation.size() / 8);
                let at = usize::try_from(offset).ok()?;
                let Some(place) = data.get_mut(at..at.saturating_add(width)) else { continue };
                let mut word = [0; 8];
                if relocation.has_implicit_addend() && width <= 8 {
                    word[..width].copy_from_slice(place);
                }
                let value = value.wrapping_add_signed(relocation.addend()).wrapping_add(u64::from_le_bytes(word));
                place.copy_from_slice(value.to_le_bytes().get(..width)?);
            }
            sections.insert(id.name(), data);
        }
        sections.contains_key(".debug_info").then_some(Self { sections })
    }

    fn dwarf(&self) -> Dwarf<Slice<'_>> {
        let section = |id: gimli::SectionId| {
            let data = self.sections.get(id.name()).map_or(&[][..], Vec::as_slice);
            Ok::<_, gimli::Error>(EndianSlice::new(data, LittleEndian))
        };
        Dwarf::load(section).unwrap_or_default()
    }

    /// The types of what an object defines and calls.
    pub(crate) fn types(&self) -> Types {
        let dwarf = self.dwarf();
        let mut types = Types::default();
        let _ = for_each_unit(&dwarf, &mut |reading| {
            let mut entries = reading.unit.entries();
            while let Some(entry) = entries.next_dfs()? {
                let name = || reading.symbol_name(entry);
                match entry.tag() {
                    gimli::DW_TAG_variable if entry.attr_value(gimli::DW_AT_location).is_some() => {
                        if let (Some(name), Some(kind)) = (name(), reading.type_of(entry)) {
                            let (mut near, mut far) = (Described::new(false), Described::new(true));
                            near.add(reading, kind);
                            far.add(reading, kind);
                            types.variables.entry(name).or_insert((near.text, far.text));
                        }
                    }
                    gimli::DW_TAG_subprogram => {
                        if let Some(name) = name() {
                            let signature = reading.signature(entry)?;
                            types.signatures.entry(name).or_insert(signature);
                        }
                    }
                    _ => {}
                }
            }
            Ok(())
        });
        types
    }

    /// All copies of functions with one of the `names` that have code in another function.
    pub(crate) fn inlined(&self, names: &[&str]) -> Vec<Inlined> {
        let dwarf = self.dwarf();
        let mut found = Vec::new();
        // By their offsets in `.debug_info`: other units may refer to them.
        let mut origins: HashMap<usize, (String, Option<String>)> = HashMap::new();
        let _ = for_each_unit(&dwarf, &mut |reading| {
            let mut entries = reading.unit.entries();
            while let Some(entry) = entries.next_dfs()? {
                if entry.tag() == gimli::DW_TAG_subprogram
                    && entry.attr_value(gimli::DW_AT_inline).is_some()
                    && let Some(name) = reading.symbol_name(entry)
                    && names.contains(&name.as_str())
                {
                    let is_external = reading.is_external(entry);
                    let source = reading.source().filter(|_| !is_external);
                    origins.insert(reading.absolute(entry.offset()), (name, source));
                }
            }
            Ok(())
        });
        if origins.is_empty() {
            return found;
        }
        let _ = for_each_unit(&dwarf, &mut |reading| {
            // Functions that the current entry lies in, with their depths.
            let mut hosts: Vec<(isize, String, Option<u64>)> = Vec::new();
            let mut entries = reading.unit.entries();
            while let Some(entry) = entries.next_dfs()? {
                hosts.retain(|(depth, ..)| *depth < entry.depth());
                if entry.tag() == gimli::DW_TAG_subprogram {
                    let name = reading.symbol_name(entry).unwrap_or_default();
                    hosts.push((entry.depth(), name, reading.address(entry)));
                } else if entry.tag() == gimli::DW_TAG_inlined_subroutine
                    && let Some(origin) = entry.attr_value(gimli::DW_AT_abstract_origin)
                    && let Some((name, source)) = reading.target_of(origin).and_then(|at| origins.get(&at))
                    && let Some((_, host, Some(host_address))) = hosts.last()
                {
                    found.push(Inlined {
                        name: name.clone(),
                        source: source.clone(),
                        host: host.clone(),
                        host_address: *host_address,
                    });
                }
            }
            Ok(())
        });
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// A unit that is being read.
struct Reading<'a> {
    dwarf: &'a Dwarf<Slice<'a>>,
    unit: Unit<Slice<'a>>,
}

fn for_each_unit<'a>(
    dwarf: &'a Dwarf<Slice<'a>>,
    visit: &mut dyn FnMut(&Reading<'a>) -> gimli::Result<()>,
) -> gimli::Result<()> {
    let mut units = dwarf.units();
    while let Some(header) = units.next()? {
        visit(&Reading { dwarf, unit: dwarf.unit(header)? })?;
    }
    Ok(())
}

impl<'a> Reading<'a> {
    fn text(&self, entry: &Entry<'a>, attribute: gimli::DwAt) -> Option<String> {
        let text = self.dwarf.attr_string(&self.unit, entry.attr_value(attribute)?).ok()?;
        Some(text.to_string_lossy().into_owned())
    }

    /// The name of the symbol of a function or variable, which another entry may hold.
    fn symbol_name(&self, entry: &Entry<'a>) -> Option<String> {
        let linkage = self.text(entry, gimli::DW_AT_linkage_name);
        let other = || {
            [gimli::DW_AT_specification, gimli::DW_AT_abstract_origin].into_iter().find_map(|attribute| {
                let AttributeValue::UnitRef(offset) = entry.attr_value(attribute)? else { return None };
                self.symbol_name(&self.unit.entry(offset).ok()?)
            })
        };
        linkage.or_else(other).or_else(|| self.text(entry, gimli::DW_AT_name))
    }

    fn is_external(&self, entry: &Entry<'a>) -> bool {
        let says_so = |entry: &Entry<'a>| entry.attr_value(gimli::DW_AT_external) == Some(AttributeValue::Flag(true));
        let declaration = match entry.attr_value(gimli::DW_AT_specification) {
            Some(AttributeValue::UnitRef(offset)) => self.unit.entry(offset).ok(),
            _ => None,
        };
        says_so(entry) || declaration.is_some_and(|declaration| says_so(&declaration))
    }

    fn source(&self) -> Option<String> {
        let name = self.unit.name.as_ref()?.to_string_lossy();
        Some(name.rsplit('/').next().unwrap_or_default().to_owned())
    }

    fn absolute(&self, offset: UnitOffset) -> usize {
        let base = self.unit.header.debug_info_offset().map_or(0, |offset| offset.0);
        base.wrapping_add(offset.0)
    }

    fn target_of(&self, reference: AttributeValue<Slice<'a>>) -> Option<usize> {
        match reference {
            AttributeValue::UnitRef(offset) => Some(self.absolute(offset)),
            AttributeValue::DebugInfoRef(offset) => Some(offset.0),
            _ => None,
        }
    }

    fn address(&self, entry: &Entry<'a>) -> Option<u64> {
        let low = entry.attr_value(gimli::DW_AT_low_pc);
        if let Some(address) = low.and_then(|value| self.dwarf.attr_address(&self.unit, value).ok().flatten()) {
            return Some(address);
        }
        let mut ranges = self.dwarf.die_ranges(&self.unit, entry).ok()?;
        ranges.next().ok().flatten().map(|range| range.begin)
    }

    fn type_of(&self, entry: &Entry<'a>) -> Option<UnitOffset> {
        match entry.attr_value(gimli::DW_AT_type) {
            Some(AttributeValue::UnitRef(offset)) => Some(offset),
            _ => [gimli::DW_AT_specification, gimli::DW_AT_abstract_origin].into_iter().find_map(|attribute| {
                let AttributeValue::UnitRef(offset) = entry.attr_value(attribute)? else { return None };
                self.type_of(&self.unit.entry(offset).ok()?)
            }),
        }
    }

    /// The types of a function's result and parameters.
    fn signature(&self, entry: &Entry<'a>) -> gimli::Result<String> {
        let mut described = Described::new(false);
        described.add_or_void(self, self.type_of(entry));
        described.push("(");
        self.for_each_child(entry.offset(), &mut |child| {
            if child.tag() == gimli::DW_TAG_formal_parameter {
                described.add_or_void(self, self.type_of(child));
                described.push(",");
            } else if child.tag() == gimli::DW_TAG_unspecified_parameters {
                described.push("...");
            }
        })?;
        Ok(described.text)
    }

    fn for_each_child(&self, parent: UnitOffset, visit: &mut dyn FnMut(&Entry<'a>)) -> gimli::Result<()> {
        let mut tree = self.unit.entries_tree(Some(parent))?;
        let mut children = tree.root()?.children();
        while let Some(child) = children.next()? {
            visit(child.entry());
        }
        Ok(())
    }
}

/// A type as text.
struct Described {
    text: String,
    follows_pointers: bool,
    /// What is being described, so that circles end.
    seen: Vec<UnitOffset>,
}

impl Described {
    fn new(follows_pointers: bool) -> Self {
        Self { text: String::new(), follows_pointers, seen: Vec::new() }
    }

    fn push(&mut self, text: &str) {
        if self.text.len() < MAX_DESCRIPTION_BYTES {
            self.text.push_str(text);
        }
    }

    fn add_or_void(&mut self, reading: &Reading<'_>, kind: Option<UnitOffset>) {
        match kind {
            Some(kind) => self.add(reading, kind),
            None => self.push("void"),
        }
    }

    fn add(&mut self, reading: &Reading<'_>, kind: UnitOffset) {
        let Ok(entry) = reading.unit.entry(kind) else { return };
        if self.text.len() >= MAX_DESCRIPTION_BYTES {
            return;
        }
        let name = reading.text(&entry, gimli::DW_AT_name).unwrap_or_default();
        let number = |attribute| entry.attr_value(attribute).and_then(|value| value.udata_value()).unwrap_or(0);
        match entry.tag() {
            gimli::DW_TAG_const_type
            | gimli::DW_TAG_volatile_type
            | gimli::DW_TAG_typedef
            | gimli::DW_TAG_restrict_type => {
                self.add_or_void(reading, reading.type_of(&entry));
            }
            gimli::DW_TAG_pointer_type | gimli::DW_TAG_reference_type | gimli::DW_TAG_rvalue_reference_type => {
                self.push("*");
                if self.follows_pointers {
                    self.add_or_void(reading, reading.type_of(&entry));
                }
            }
            gimli::DW_TAG_array_type => {
                self.add_or_void(reading, reading.type_of(&entry));
                let mut lengths = String::new();
                let _ = reading.for_each_child(kind, &mut |child| {
                    let bound = |attribute| child.attr_value(attribute).and_then(|value| value.udata_value());
                    let length = bound(gimli::DW_AT_count)
                        .or_else(|| bound(gimli::DW_AT_upper_bound).map(|last| last.wrapping_add(1)));
                    lengths = format!("{lengths}[{}]", length.unwrap_or(0));
                });
                self.push(&lengths);
            }
            gimli::DW_TAG_structure_type | gimli::DW_TAG_class_type | gimli::DW_TAG_union_type => {
                self.push(&format!("{name}{{{}", number(gimli::DW_AT_byte_size)));
                if !self.seen.contains(&kind) {
                    self.seen.push(kind);
                    let mut members = Vec::new();
                    let _ = reading.for_each_child(kind, &mut |child| {
                        if matches!(child.tag(), gimli::DW_TAG_member | gimli::DW_TAG_inheritance) {
                            let value = |attribute| child.attr_value(attribute).and_then(|value| value.udata_value());
                            let place = value(gimli::DW_AT_data_member_location)
                                .or_else(|| value(gimli::DW_AT_data_bit_offset))
                                .unwrap_or(0);
                            let name = reading.text(child, gimli::DW_AT_name).unwrap_or_default();
                            members.push((name, place, reading.type_of(child)));
                        }
                    });
                    for (name, place, kind) in members {
                        self.push(&format!(";{name}@{place}:"));
                        self.add_or_void(reading, kind);
                    }
                }
                self.push("}");
            }
            gimli::DW_TAG_enumeration_type => self.push(&format!("enum {name}:{}", number(gimli::DW_AT_byte_size))),
            gimli::DW_TAG_subroutine_type => self.push("function"),
            _ => self.push(&format!("{name}:{}", number(gimli::DW_AT_byte_size))),
        }
    }
}
