//! Where a target without symbols has what its objects define: by its code.
//!
//! Owns [`find_by_code`] and [`is_made_of`]. Neighbours: `build` asks for it if the target was stripped and the old object is there; `target` takes the names in.
//! Invariants: a function is found if its code is in the target exactly once, but for what linkers fill in; what functions refer to is known if all that refer to it
//! agree; nothing else is added.

use std::collections::{BTreeMap, BTreeSet};

use trapline_engine::Mode;

use crate::{
    compare::Reference,
    object::{Home, Object, Relocation, Role, SymbolKind, Unit},
    relocation::{self, Slot, Value},
    target::{TargetFile, TargetSymbol},
};

/// Shorter functions are too much alike.
const MIN_CODE_BYTES: usize = 16;
/// What of a function linkers leave alone, in one piece. It is searched for.
const MIN_FIXED_BYTES: usize = 3;
/// What of a function linkers leave alone, in all.
const MIN_OWN_BYTES: usize = 10;

/// Adds to the target's symbols what its code tells about what the old object defines and refers to.
pub(crate) fn find_by_code(target: &mut TargetFile, old: &Object) {
    let mut votes = Votes::new();
    let mut known = BTreeSet::new();
    for unit in old.units() {
        if old.sections[unit.section].data.len() >= MIN_CODE_BYTES
            && let Some(address) = only_place(target, old, unit.section)
        {
            known.insert(unit.section);
            listen(target, old, &unit, address, &mut votes);
        }
    }
    // Short functions are known by their callers, and tell something themselves.
    loop {
        let called = old.units().find_map(|unit| {
            let addresses = votes.get(unit.symbols.first()?).filter(|addresses| addresses.len() == 1)?;
            let address = *addresses.first()?;
            let code = target.at(address, old.sections[unit.section].len_bytes)?;
            (!known.contains(&unit.section) && is_made_of(code, old, unit.section)).then_some((unit, address))
        });
        let Some((unit, address)) = called else { break };
        known.insert(unit.section);
        listen(target, old, &unit, address, &mut votes);
    }
    for (symbol, addresses) in votes {
        let (Some(&address), 1) = (addresses.first(), addresses.len()) else { continue };
        let symbol = &old.symbols[symbol];
        let is_function = match symbol.home {
            Home::Section(section) if old.sections[section].role == Role::Code => {
                let len_bytes = old.sections[section].len_bytes;
                if !target.at(address, len_bytes).is_some_and(|code| is_made_of(code, old, section)) {
                    continue;
                }
                true
            }
            // Where a library's function is called, there is a stub of the target's.
            Home::Undefined if target.imports(&symbol.name) => continue,
            _ => false,
        };
        let kind = match symbol.kind {
            SymbolKind::ThreadLocal => SymbolKind::ThreadLocal,
            _ if is_function => SymbolKind::Function,
            _ => SymbolKind::Data,
        };
        let found = TargetSymbol {
            address,
            size: symbol.size,
            kind,
            is_local: symbol.is_local,
            source: old.source.clone().filter(|_| symbol.is_local),
        };
        target.add_found(&symbol.name, found);
    }
}

/// By symbol: where it is, as each place that refers to it tells.
type Votes = BTreeMap<usize, BTreeSet<u64>>;

/// Takes in what a function that was found tells.
fn listen(target: &TargetFile, old: &Object, unit: &Unit, address: u64, votes: &mut Votes) {
    for symbol in &unit.symbols {
        votes.entry(*symbol).or_default().insert(address);
    }
    let places = &old.sections[unit.section].relocations;
    let table = places.iter().find_map(|place| table_address(target, old, address, place));
    for place in places {
        if let Some((symbol, at)) = referred(target, old, address, place, table) {
            votes.entry(symbol).or_default().insert(at);
        }
    }
}

/// Whether the target's code is this section of the old object, but for what linkers fill in or rewrite.
pub(crate) fn is_made_of(code: &[u8], old: &Object, section: usize) -> bool {
    let data = &old.sections[section].data;
    let is_linkers = linkers_bytes(old, section);
    data.len() == code.len()
        && code.iter().zip(data).zip(&is_linkers).all(|((now, then), is_linkers)| *is_linkers || now == then)
}

/// Which bytes of a section linkers fill in or rewrite.
fn linkers_bytes(object: &Object, section: usize) -> Vec<bool> {
    let section = &object.sections[section];
    let mut is_linkers = vec![false; section.data.len()];
    for place in &section.relocations {
        let at = usize::try_from(place.offset).unwrap_or(usize::MAX);
        // Around accesses by the GOT and to thread-local variables, they rewrite instructions.
        let meaning = relocation::meaning(object.mode, place.kind);
        let (before, after) = match meaning.map(|meaning| (meaning.value, meaning.width_bytes())) {
            Some((Value::ThreadOffset, width)) => (0, width),
            Some((_, width))
                if meaning.is_some_and(|meaning| meaning.slot().is_none() && !meaning.is_thread_local()) =>
            {
                (0, width)
            }
            _ => (4, 12),
        };
        let end = at.saturating_add(after).min(is_linkers.len());
        is_linkers[at.saturating_sub(before).min(end)..end].fill(true);
    }
    is_linkers
}

/// Where the target has the code of a section, if that is one place.
fn only_place(target: &TargetFile, old: &Object, section: usize) -> Option<u64> {
    let data = &old.sections[section].data;
    let is_linkers = linkers_bytes(old, section);
    if is_linkers.iter().filter(|is_linkers| !**is_linkers).count() < MIN_OWN_BYTES {
        return None;
    }
    let fixed = longest_run(&is_linkers).filter(|run| run.len() >= MIN_FIXED_BYTES)?;
    let needle = &data[fixed.clone()];
    let mut places = BTreeSet::new();
    for segment in target.segments.iter().filter(|segment| segment.is_code) {
        let hits = segment.data.windows(needle.len()).enumerate().filter(|(_, window)| *window == needle);
        for (at, _) in hits {
            let start = at.checked_sub(fixed.start);
            let code = start.and_then(|start| segment.data.get(start..start.checked_add(data.len())?));
            if let (Some(start), Some(code)) = (start, code)
                && code.iter().zip(data).zip(&is_linkers).all(|((now, then), skip)| *skip || now == then)
            {
                places.insert(segment.address + start as u64);
            }
        }
    }
    let first = places.pop_first()?;
    places.is_empty().then_some(first)
}

fn longest_run(is_linkers: &[bool]) -> Option<std::ops::Range<usize>> {
    let mut longest = 0..0;
    let mut start = 0;
    for (at, is_linkers) in is_linkers.iter().chain([&true]).enumerate() {
        if *is_linkers {
            if at - start > longest.len() {
                longest = start..at;
            }
            start = at + 1;
        }
    }
    (!longest.is_empty()).then_some(longest)
}

/// What the linker stored in a place of the function at `function`, and where that is.
fn stored(target: &TargetFile, old: &Object, function: u64, place: &Relocation) -> Option<(u64, u64)> {
    let meaning = relocation::meaning(old.mode, place.kind)?;
    let at = function.checked_add(place.offset)?;
    let bytes: [u8; 4] = target.at(at, 4)?.try_into().ok()?;
    let value = i64::from(i32::from_le_bytes(bytes)).cast_unsigned();
    (meaning.width_bytes() == 4).then_some((at, value.wrapping_add_signed(place.addend.wrapping_neg())))
}

/// The address of the target's table of slots, if a place tells.
fn table_address(target: &TargetFile, old: &Object, function: u64, place: &Relocation) -> Option<u64> {
    if relocation::meaning(old.mode, place.kind)?.value != Value::TableRelative {
        return None;
    }
    let (at, value) = stored(target, old, function, place)?;
    Some(narrowed(old.mode, at.wrapping_add(value)))
}

/// The named symbol that a place refers to, and its address in the target.
fn referred(
    target: &TargetFile,
    old: &Object,
    function: u64,
    place: &Relocation,
    table: Option<u64>,
) -> Option<(usize, u64)> {
    let meaning = relocation::meaning(old.mode, place.kind)?;
    let Reference::Named { symbol: named, .. } = old.reference(place) else { return None };
    let (at, value) = stored(target, old, function, place)?;
    let address = match meaning.value {
        Value::Relative | Value::Call => at.wrapping_add(value),
        Value::Absolute => value,
        Value::FromTable => table?.wrapping_add(value),
        Value::ThreadOffset => value.wrapping_add(target.thread_block_bytes?),
        // A linker that knew the address has made the load of a slot the address itself, or the call by a slot a call.
        Value::SlotRelative(Slot::Address) => match target.at(at.checked_sub(2)?, 2)? {
            [0x8d, _] | [0x67, 0xe8] => at.wrapping_add(value),
            _ => return None,
        },
        _ => return None,
    };
    // The symbol of the relocation may be a section's.
    let inside = match old.symbols[named].home {
        Home::Section(_) => old.symbols[named].value.wrapping_sub(old.symbols[place.symbol].value),
        _ => 0,
    };
    Some((named, narrowed(old.mode, address.wrapping_add(inside))))
}

fn narrowed(mode: Mode, address: u64) -> u64 {
    match mode {
        Mode::Bits32 => address & 0xffff_ffff,
        Mode::Bits64 => address,
    }
}
