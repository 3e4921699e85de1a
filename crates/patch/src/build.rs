//! From objects to a patch: what is replaced, what is left out, what is refused.
//!
//! Owns [`build()`] and [`Request`]. Neighbours: `compare` says what changed, `target` where it is, `bind` what comes along. Invariants: all refusals are told at once;
//! every function of the new objects is in the patch, or in its notes with the reason.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use crate::{
    Error, Reason,
    bind::{Binder, Input},
    compare::{Comparison, Reference, plain},
    debug::Debug,
    found::{find_by_code, is_made_of},
    object::{Home, Object, Role, Symbol, SymbolKind, Unit, has_identity, is_part},
    patch::{Callback, Function, NoteKind, Patch, Pin, Target, When},
    target::{TargetFile, TargetSymbol},
    unwind::Frames,
};

/// What to build a patch from.
#[derive(Clone, Debug)]
pub struct Request {
    /// The executable or library that the process runs.
    pub target: PathBuf,
    /// The recompiled objects.
    pub pairs: Vec<Pair>,
    /// What the patch is called; without, after its first new object.
    pub name: Option<String>,
    /// Functions that nobody may be in when the patch is applied, although they stay.
    pub pins: Vec<String>,
    /// Whether copies of replaced functions may stay, inlined into functions of the target.
    pub allow_inlined: bool,
}

/// A recompiled object, and the one that the target was made of.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Without it, all functions that the target has are replaced.
    pub old: Option<PathBuf>,
    /// The recompiled one.
    pub new: PathBuf,
}

/// Builds a patch.
///
/// # Errors
/// A file cannot be read or is not what it should be; something changed that cannot be patched; nothing changed.
pub fn build(request: &Request) -> Result<Patch, Error> {
    let mut target = TargetFile::open(&request.target)?;
    let mut inputs = Vec::new();
    for pair in &request.pairs {
        let (new, new_types) = Object::open(&pair.new)?;
        let (old, old_types) = pair.old.as_deref().map(Object::open).transpose()?.unzip();
        for object in old.iter().chain([&new]) {
            if object.mode != target.mode {
                return Err(Error::OtherWidth {
                    object: object.path.clone(),
                    object_bits: object.mode.bitness(),
                    target: target.path.clone(),
                    target_bits: target.mode.bitness(),
                });
            }
        }
        let types = old_types.flatten().zip(new_types);
        inputs.push(Input { old, frames: Frames::of(&new), new, types });
    }
    if !target.has_symbols {
        inputs.iter().filter_map(|input: &Input| input.old.as_ref()).for_each(|old| find_by_code(&mut target, old));
    }
    let mut building = Building {
        target: &target,
        inputs: &inputs,
        binder: Binder::new(&target, &inputs),
        functions: BTreeMap::new(),
    };
    for input in 0..inputs.len() {
        building.take(input);
    }
    building.callbacks_and_finish(request)
}

/// A patch in progress.
struct Building<'a> {
    target: &'a TargetFile,
    inputs: &'a [Input],
    binder: Binder<'a>,
    /// By the old address.
    functions: BTreeMap<u64, Function>,
}

impl Building<'_> {
    /// Takes what has to be replaced of one object.
    fn take(&mut self, input: usize) {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let comparison = inputs[input].comparison();
        if let Some(comparison) = &comparison {
            self.check_start(input, comparison);
            self.check_data(input, comparison);
            self.check_types(input, comparison);
        } else {
            self.check_data_in_target(input);
        }
        let started = started_by_tables(object);
        for unit in object.units() {
            let name = &object.symbols[unit.symbols[0]].name;
            if callback_of(name).is_some() {
                continue;
            }
            if let Some(comparison) = &comparison {
                let old = old_section(comparison, &unit);
                match old {
                    // A new function comes along if something refers to it.
                    None => {}
                    Some(old)
                        if comparison.same_sections(old, unit.section)
                            && !self.calls_changed_signature(input, unit.section) =>
                    {
                        self.binder.note(input, name, NoteKind::Unchanged, String::new());
                        continue;
                    }
                    Some(_) if started.contains(&unit.section) => {
                        self.binder.refuse(input, name, Reason::ChangedStart, String::new());
                        continue;
                    }
                    Some(old) => {
                        self.replace(input, &unit, Some((comparison, old)));
                        continue;
                    }
                }
            } else if started.contains(&unit.section) {
                self.binder.note(input, name, NoteKind::StartUp, String::new());
                continue;
            }
            self.replace(input, &unit, None);
        }
    }

    /// Puts a function into the patch, at all addresses at which the target has it.
    fn replace(&mut self, input: usize, unit: &Unit, old: Option<(&Comparison<'_>, usize)>) {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let mut found_any = false;
        for &index in &unit.symbols {
            let symbol = &object.symbols[index];
            if symbol.kind == SymbolKind::Indirect {
                self.binder.refuse(input, &symbol.name, Reason::IndirectFunction, String::new());
                return;
            }
            let Some(found) = self.binder.find(input, symbol) else { continue };
            found_any = true;
            self.add(input, symbol, index, &found, old);
        }
        if !found_any {
            let name = &object.symbols[unit.symbols[0]].name;
            let reason = if self.target.has_symbols || old.is_none() { None } else { Some(Reason::NoSymbol) };
            match reason {
                Some(reason) => self.binder.refuse(input, name, reason, String::new()),
                None => self.binder.note(input, name, NoteKind::NotInTarget, String::new()),
            }
        }
    }

    fn add(
        &mut self,
        input: usize,
        symbol: &Symbol,
        index: usize,
        found: &TargetSymbol,
        old: Option<(&Comparison<'_>, usize)>,
    ) {
        let object = &self.inputs[input].new;
        if found.kind == SymbolKind::Indirect {
            self.binder.refuse(input, &symbol.name, Reason::IndirectFunction, String::new());
            return;
        }
        let len_bytes = match (found.size, old) {
            (0, Some((comparison, section))) => comparison.old.sections[section].len_bytes,
            (size, _) => size,
        };
        let expected = self.target.at(found.address, len_bytes).filter(|bytes| !bytes.is_empty()).map(<[u8]>::to_vec);
        let Some(expected) = expected else {
            self.binder.refuse(input, &symbol.name, Reason::NoSymbol, "its symbol has no length".to_owned());
            return;
        };
        if let Some((comparison, section)) = old
            && !is_made_of(&expected, comparison.old, section)
        {
            self.binder.note(input, &symbol.name, NoteKind::OtherBuild, String::new());
        }
        if self.target.is_found_by_code(&symbol.name) {
            self.binder.note(input, &symbol.name, NoteKind::FoundByCode, String::new());
        }
        let body = self.binder.keep(input, index);
        let function = Function {
            name: symbol.name.clone(),
            object: object.source.clone().unwrap_or_else(|| object.path.clone()),
            address: found.address,
            expected,
            parts: parts(self.target, &symbol.name, found),
            symbol: body,
        };
        if let Some(other) = self.functions.get(&found.address) {
            // Another name of the same function is fine, another body is not.
            let bodies = [other.symbol, body].map(|symbol| &self.binder.symbols[symbol as usize].place);
            if bodies[0] != bodies[1] {
                self.binder.refuse(input, &symbol.name, Reason::ReplacedTwice, other.object.clone());
            }
            return;
        }
        self.functions.insert(found.address, function);
    }

    /// Constructors and destructors have to be what they were.
    fn check_start(&mut self, input: usize, comparison: &Comparison<'_>) {
        let of = |object: &Object| -> BTreeMap<String, Vec<usize>> {
            let mut by_name: BTreeMap<String, Vec<usize>> = BTreeMap::new();
            for (index, section) in object.sections.iter().enumerate() {
                if section.role == Role::StartOrEnd && section.len_bytes > 0 {
                    by_name.entry(section.name.clone()).or_default().push(index);
                }
            }
            by_name
        };
        let (old, new) = (of(comparison.old), of(comparison.new));
        let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for name in names {
            let (old, new) = (old.get(name), new.get(name));
            let is_same = match (old, new) {
                (Some(old), Some(new)) => {
                    old.len() == new.len() && old.iter().zip(new).all(|(&old, &new)| comparison.same_sections(old, new))
                }
                _ => false,
            };
            if !is_same {
                self.binder.refuse(input, name, Reason::ChangedStart, String::new());
            }
        }
    }

    /// Variables have to begin as they did, and to be as large; constants that others see have to be what they were.
    fn check_data(&mut self, input: usize, comparison: &Comparison<'_>) {
        let object = comparison.new;
        for index in variables(object) {
            let symbol = &object.symbols[index];
            let Some(old) = comparison.old_of(index) else { continue };
            let before = &comparison.old.symbols[old];
            let Home::Section(section) = symbol.home else { continue };
            let role = object.sections[section].role;
            if before.size != symbol.size && (role != Role::ReadOnly || !symbol.is_local) {
                let detail = format!("{} bytes, and {} before", symbol.size, before.size);
                self.binder.refuse(input, &symbol.name, Reason::ChangedLayout, detail);
            } else if matches!(before.home, Home::Section(_)) && !comparison.same_symbols(old, index) {
                match role {
                    Role::ReadOnly if symbol.is_local => {
                        self.binder.note(input, &symbol.name, NoteKind::ChangedConstant, String::new());
                    }
                    Role::ReadOnly => self.binder.refuse(input, &symbol.name, Reason::ChangedConstant, String::new()),
                    _ => self.binder.refuse(input, &symbol.name, Reason::ChangedInitialiser, String::new()),
                }
            }
        }
    }

    /// Types of variables have to be what they were; those of functions are told. Where debugging information does not tell, sizes did.
    fn check_types(&mut self, input: usize, comparison: &Comparison<'_>) {
        let Some((old, new)) = &self.inputs[input].types else { return };
        let object = comparison.new;
        for index in variables(object) {
            let symbol = &object.symbols[index];
            let Home::Section(section) = symbol.home else { continue };
            let Some(before) = comparison.old_of(index) else { continue };
            if object.sections[section].role == Role::ReadOnly {
                continue;
            }
            let old_name = plain(&comparison.old.symbols[before].name, SymbolKind::Data);
            let new_name = plain(&symbol.name, SymbolKind::Data);
            let Some((old, new)) = old.variables.get(old_name).zip(new.variables.get(new_name)) else { continue };
            if old.0 != new.0 {
                self.binder.refuse(input, &symbol.name, Reason::ChangedLayout, "its type has other members".to_owned());
            } else if old.1 != new.1 {
                self.binder.note(input, &symbol.name, NoteKind::ChangedPointee, String::new());
            }
        }
        for unit in object.units() {
            let symbol = &object.symbols[unit.symbols[0]];
            let signatures = old.signatures.get(&symbol.name).zip(new.signatures.get(&symbol.name));
            if !symbol.is_local
                && let Some((old, new)) = signatures
                && old != new
            {
                self.binder.note(input, &symbol.name, NoteKind::ChangedSignature, String::new());
            }
        }
    }

    /// Whether something is called in another way than before, although the code is the same.
    fn calls_changed_signature(&self, input: usize, section: usize) -> bool {
        let Some((old, new)) = &self.inputs[input].types else { return false };
        let object = &self.inputs[input].new;
        object.sections[section].relocations.iter().any(|place| match object.reference(place) {
            Reference::Named { name, .. } => {
                old.signatures.get(name).zip(new.signatures.get(name)).is_some_and(|(old, new)| old != new)
            }
            _ => false,
        })
    }

    /// Copies of replaced functions in functions that stay.
    fn check_inlined(&mut self, allow: bool) {
        let bytes = self.target.debug_file.as_ref().unwrap_or(&self.target.bytes);
        let names: Vec<&str> = self.functions.values().map(|function| function.name.as_str()).collect();
        let Some(debug) = Debug::of(bytes) else { return };
        let mut hosts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for inlined in debug.inlined(&names) {
            let function = self.functions.values().find(|function| function.name == inlined.name);
            let is_other = function.is_some_and(|function| {
                inlined.source.is_some() && inlined.source.as_deref() != Some(function.object.as_str())
            });
            if !is_other && !self.functions.contains_key(&inlined.host_address) {
                hosts.entry(inlined.name).or_default().push(inlined.host);
            }
        }
        for (name, hosts) in hosts {
            let input = self.inputs.iter().position(|input| {
                input.new.symbols.iter().any(|symbol| symbol.name == name && symbol.home != Home::Undefined)
            });
            let detail = format!("into {}", hosts.join(", "));
            let input = input.unwrap_or(0);
            if allow {
                self.binder.note(input, &name, NoteKind::Inlined, detail);
            } else {
                self.binder.refuse(input, &name, Reason::Inlined, detail);
            }
        }
    }

    /// The same without an old object: by what the target's file holds.
    fn check_data_in_target(&mut self, input: usize) {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        for index in variables(object) {
            let symbol = &object.symbols[index];
            let Home::Section(section) = symbol.home else { continue };
            let role = object.sections[section].role;
            if role == Role::ThreadLocal || (role == Role::ReadOnly && symbol.is_local) {
                continue;
            }
            let source = object.source.as_deref();
            let crate::target::Found::One(found) = self.target.find(&symbol.name, symbol.is_local, source) else {
                continue;
            };
            let found = found.clone();
            if found.size != 0 && found.size != symbol.size {
                let detail = format!("{} bytes, and {} in the target", symbol.size, found.size);
                self.binder.refuse(input, &symbol.name, Reason::ChangedLayout, detail);
                continue;
            }
            let range = symbol.value..symbol.value.saturating_add(symbol.size);
            if object.sections[section].relocations.iter().any(|place| range.contains(&place.offset)) {
                continue;
            }
            let new = object.bytes(section, symbol.value, symbol.size);
            let now = self.target.at(found.address, symbol.size);
            let is_zero = |bytes: Option<&[u8]>| bytes.is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0));
            let is_same = if self.target.is_zero(found.address) {
                is_zero(new)
            } else {
                new == now || (is_zero(new) && is_zero(now))
            };
            if !is_same {
                let reason = if role == Role::ReadOnly { Reason::ChangedConstant } else { Reason::ChangedInitialiser };
                self.binder.refuse(input, &symbol.name, reason, String::new());
            }
        }
    }

    fn callbacks_and_finish(mut self, request: &Request) -> Result<Patch, Error> {
        let inputs = self.inputs;
        let mut callbacks = Vec::new();
        for (input, object) in inputs.iter().enumerate() {
            for unit in object.new.units() {
                let named =
                    unit.symbols.iter().find_map(|&index| Some((index, callback_of(&object.new.symbols[index].name)?)));
                if let Some((index, when)) = named {
                    callbacks.push(Callback { when, symbol: self.binder.keep(input, index) });
                }
            }
        }
        callbacks.sort_by_key(|callback| callback.when);
        self.check_inlined(request.allow_inlined);
        self.binder.finish();
        let pins = self.pins(&request.pins)?;
        let binder = self.binder;
        if !binder.refusals.is_empty() {
            return Err(Error::Refused(binder.refusals.into_iter().collect()));
        }
        if self.functions.is_empty() {
            let unchanged = binder.notes.iter().filter(|note| note.kind == NoteKind::Unchanged).count();
            let absent: Vec<_> = binder
                .notes
                .iter()
                .filter(|note| note.kind == NoteKind::NotInTarget)
                .map(|note| note.symbol.as_str())
                .collect();
            let mut why = format!("{unchanged} functions are what they were");
            if !absent.is_empty() {
                why = format!("{why}, and {} has no {}", self.target.name, absent.join(", "));
            }
            return Err(Error::Nothing(why));
        }
        let first = &request.pairs[0].new;
        let patch = Patch {
            name: request
                .name
                .clone()
                .unwrap_or_else(|| first.file_stem().unwrap_or_default().to_string_lossy().into_owned()),
            target: Target {
                name: self.target.name.clone(),
                mode: self.target.mode,
                build_id: self.target.build_id.clone(),
            },
            functions: self.functions.into_values().collect(),
            pins,
            callbacks,
            sections: binder.sections,
            symbols: binder.symbols,
            // What came along because it was referred to is told as new, and not as left out.
            notes: binder
                .notes
                .iter()
                .filter(|note| {
                    !(note.kind == NoteKind::NotInTarget
                        && binder.notes.iter().any(|other| other.kind == NoteKind::New && other.symbol == note.symbol))
                })
                .cloned()
                .collect(),
        };
        patch.check().map_err(|what| Error::Malformed { path: first.display().to_string(), what: what.to_owned() })?;
        Ok(patch)
    }

    fn pins(&self, names: &[String]) -> Result<Vec<Pin>, Error> {
        let mut pins = Vec::new();
        for name in names {
            let all = self.target.all(name).iter().filter(|symbol| symbol.kind == SymbolKind::Function);
            let before = pins.len();
            pins.extend(all.map(|symbol| Pin {
                name: name.clone(),
                address: symbol.address,
                len_bytes: symbol.size.max(1),
            }));
            if pins.len() == before {
                return Err(Error::NoSuchPin { name: name.clone(), target: self.target.path.clone() });
            }
        }
        Ok(pins)
    }
}

/// The callback that a function is, by its name.
fn callback_of(name: &str) -> Option<When> {
    let code = name.strip_prefix("trapline_")?;
    When::ALL.into_iter().find(|when| when.code() == code)
}

/// The section of the old function with one of the names.
fn old_section(comparison: &Comparison<'_>, unit: &Unit) -> Option<usize> {
    let old = unit.symbols.iter().find_map(|&index| comparison.old_of(index))?;
    match comparison.old.symbols[old].home {
        Home::Section(section) if comparison.old.sections[section].role == Role::Code => Some(section),
        _ => None,
    }
}

/// Named variables and constants that are defined in an object.
fn variables(object: &Object) -> impl Iterator<Item = usize> {
    let with_name = object.symbols.iter().enumerate().filter(|(_, symbol)| {
        matches!(symbol.kind, SymbolKind::Data | SymbolKind::ThreadLocal)
            && has_identity(&symbol.name)
            && !symbol.name.starts_with("DW.ref.")
    });
    with_name.map(|(index, _)| index)
}

/// Sections of code that tables of constructors and destructors refer to.
fn started_by_tables(object: &Object) -> HashSet<usize> {
    let tables = object.sections.iter().filter(|section| section.role == Role::StartOrEnd);
    let targets =
        tables.flat_map(|table| &table.relocations).filter_map(|place| match object.symbols[place.symbol].home {
            Home::Section(section) => Some(section),
            _ => None,
        });
    targets.collect()
}

/// Other pieces of a function of the target.
fn parts(target: &TargetFile, name: &str, function: &TargetSymbol) -> Vec<(u64, u64)> {
    let prefix = format!("{name}.cold");
    let mut parts: Vec<(u64, u64)> = target
        .symbols()
        .filter(|(other, symbol)| {
            other.starts_with(&prefix) && is_part(other) && symbol.source == function.source || *other == prefix
        })
        .map(|(_, symbol)| (symbol.address, symbol.size))
        .collect();
    parts.sort_unstable();
    parts.dedup();
    parts
}
