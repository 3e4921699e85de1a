//! What the new code refers to, and with it what a patch has to bring along.
//!
//! Owns [`Binder`]. Neighbours: `build` says which functions are replaced; sections, symbols and relocations of the patch come out. Invariants: a variable that the
//! target has is the target's; a function that the target has is entered where the target enters it, so that tracers and later patches see the call; what
//! is brought along is reachable from what is replaced.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::{
    Reason, Refusal,
    compare::{Comparison, Reference, plain},
    debug::Types,
    object::{Home, Merge, Object, Relocation, Role, Symbol, SymbolKind, has_identity},
    operands::Operands,
    patch::{self, Note, NoteKind, Place},
    relocation,
    target::{Found, TargetFile, TargetSymbol},
    unwind::{Frames, Gathered},
};

/// An object of a patch, and the one that it replaces.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) old: Option<Object>,
    pub(crate) new: Object,
    pub(crate) frames: Frames,
    /// What debugging information tells about the old object and the new one.
    pub(crate) types: Option<(Types, Types)>,
}

impl Input {
    pub(crate) fn comparison(&self) -> Option<Comparison<'_>> {
        self.old.as_ref().map(|old| Comparison::new(old, &self.new))
    }
}

/// Gathers what a patch consists of.
#[derive(Debug)]
pub(crate) struct Binder<'a> {
    target: &'a TargetFile,
    inputs: &'a [Input],
    comparisons: Vec<Option<Comparison<'a>>>,
    pub(crate) sections: Vec<patch::Section>,
    pub(crate) symbols: Vec<patch::Symbol>,
    /// By input and section.
    carried: HashMap<(usize, usize), u32>,
    /// By input, symbol, and whether it is the new body that is meant.
    bound: HashMap<(usize, usize, bool), u32>,
    queue: VecDeque<(usize, usize)>,
    /// What the objects define for each other, and the target does not have.
    definitions: BTreeMap<&'a str, (usize, usize)>,
    pub(crate) refusals: BTreeSet<Refusal>,
    pub(crate) notes: BTreeSet<Note>,
}

impl<'a> Binder<'a> {
    pub(crate) fn new(target: &'a TargetFile, inputs: &'a [Input]) -> Self {
        let mut definitions = BTreeMap::new();
        for (input, object) in inputs.iter().enumerate() {
            for (index, symbol) in object.new.symbols.iter().enumerate() {
                if matches!(symbol.home, Home::Section(_) | Home::Common) && !symbol.is_local {
                    definitions.entry(symbol.name.as_str()).or_insert((input, index));
                }
            }
        }
        Self {
            target,
            inputs,
            comparisons: inputs.iter().map(Input::comparison).collect(),
            sections: Vec::new(),
            symbols: Vec::new(),
            carried: HashMap::new(),
            bound: HashMap::new(),
            queue: VecDeque::new(),
            definitions,
            refusals: BTreeSet::new(),
            notes: BTreeSet::new(),
        }
    }

    /// The new body of a function, which comes along with all that it needs.
    pub(crate) fn keep(&mut self, input: usize, symbol: usize) -> u32 {
        let inputs = self.inputs;
        let definition = &inputs[input].new.symbols[symbol];
        match definition.home {
            Home::Section(section) => self.own(input, symbol, section),
            _ => self.symbol(definition, Place::Absolute { value: 0 }),
        }
    }

    /// Follows all references, until nothing is left that has to come along.
    pub(crate) fn finish(&mut self) {
        loop {
            while let Some((input, section)) = self.queue.pop_front() {
                self.bind_section(input, section);
            }
            // Unwind tables refer to what handles exceptions, which may bring more along.
            let gathered: Vec<Gathered> = (0..self.inputs.len()).map(|input| self.gather(input)).collect();
            let unwind = self.unwind(&gathered);
            if self.queue.is_empty() {
                self.sections.extend(unwind);
                return;
            }
        }
    }

    fn gather(&self, input: usize) -> Gathered {
        let mut gathered = Gathered::default();
        let object = &self.inputs[input];
        object.frames.gather(&object.new, |code| self.carried.contains_key(&(input, code)), &mut gathered);
        gathered
    }

    /// One table of all objects': zeroes between two would be the end.
    fn unwind(&mut self, gathered: &[Gathered]) -> Option<patch::Section> {
        let mut section = patch::Section {
            name: ".eh_frame".to_owned(),
            object: self.inputs.first().map_or_else(String::new, |input| input.new.path.clone()),
            role: patch::Role::Unwind,
            align: 8,
            data: Vec::new(),
            len_bytes: 0,
            relocations: Vec::new(),
        };
        for (input, gathered) in gathered.iter().enumerate() {
            let base = section.data.len() as u64;
            section.data.extend(&gathered.data);
            for relocation in &gathered.relocations {
                let symbol = self.bind(input, relocation, true);
                if self.check_type(input, ".eh_frame", relocation) {
                    section.relocations.push(patch::Relocation {
                        offset: base + relocation.offset,
                        kind: relocation.kind,
                        symbol,
                        addend: relocation.addend,
                    });
                }
            }
        }
        section.len_bytes = section.data.len() as u64;
        (!section.data.is_empty()).then_some(section)
    }

    fn bind_section(&mut self, input: usize, index: usize) {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let section = &object.sections[index];
        let operands = Operands::of(object, index);
        let mut relocations = Vec::with_capacity(section.relocations.len());
        for relocation in &section.relocations {
            if !self.check_type(input, &section.name, relocation) {
                continue;
            }
            let is_inner = is_inner(object, index, relocation, &operands);
            let symbol = self.bind(input, relocation, is_inner);
            relocations.push(patch::Relocation {
                offset: relocation.offset,
                kind: relocation.kind,
                symbol,
                addend: relocation.addend,
            });
        }
        let at = self.carried[&(input, index)] as usize;
        self.sections[at].relocations = relocations;
    }

    fn check_type(&mut self, input: usize, section: &str, relocation: &Relocation) -> bool {
        let object = &self.inputs[input].new;
        let is_known = relocation::meaning(object.mode, relocation.kind).is_some();
        if !is_known {
            let kind = relocation::name(object.mode, relocation.kind);
            let symbol = &object.symbols[relocation.symbol].name;
            self.refuse(input, symbol, Reason::UnsupportedRelocation, format!("{kind} in section {section}"));
        }
        is_known
    }

    pub(crate) fn refuse(&mut self, input: usize, symbol: &str, reason: Reason, detail: String) {
        let object = self.inputs[input].new.path.clone();
        self.refusals.insert(Refusal { object, symbol: symbol.to_owned(), reason, detail });
    }

    pub(crate) fn note(&mut self, input: usize, symbol: &str, kind: NoteKind, detail: String) {
        let object = self.inputs[input].new.path.clone();
        self.notes.insert(Note { kind, symbol: symbol.to_owned(), object, detail });
    }

    /// The patch's symbol for what a relocation is against. `is_inner`: not a function is meant, but a place in its new body.
    fn bind(&mut self, input: usize, relocation: &Relocation, is_inner: bool) -> u32 {
        let index = relocation.symbol;
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let is_shared_data = matches!(object.reference(relocation), Reference::Unclear { .. });
        if let Some(known) = self.bound.get(&(input, index, is_inner)) {
            return *known;
        }
        let symbol = &object.symbols[index];
        let bound = match symbol.home {
            Home::Undefined if index == 0 => self.symbol(symbol, Place::Absolute { value: 0 }),
            Home::Undefined if symbol.name == "_GLOBAL_OFFSET_TABLE_" => self.symbol(symbol, Place::Table),
            Home::Undefined => self.bind_elsewhere(input, symbol),
            Home::Absolute => self.symbol(symbol, Place::Absolute { value: symbol.value }),
            Home::Common => match self.find(input, symbol) {
                Some(found) => self.symbol(symbol, Place::Target { address: found.address }),
                None => self.allocate(input, symbol),
            },
            Home::Section(section) => match object.sections[section].role {
                Role::Code => self.bind_code(input, index, section, is_inner),
                Role::ReadOnly => self.bind_constant(input, index, section),
                Role::Data if is_pointer_table(object, section) => self.own(input, index, section),
                Role::Data | Role::Zero if is_shared_data => {
                    let name = format!("{} in section {}", symbol.name, object.sections[section].name);
                    self.refuse(input, &name, Reason::SharedData, String::new());
                    self.own(input, index, section)
                }
                Role::Data | Role::Zero => self.bind_variable(input, index, section),
                Role::ThreadLocal => self.bind_thread_local(input, index, section),
                Role::Unwind | Role::StartOrEnd | Role::Ignored => {
                    let name = object.sections[section].name.clone();
                    self.refuse(input, &name, Reason::ChangedStart, String::new());
                    self.own(input, index, section)
                }
            },
        };
        self.bound.insert((input, index, is_inner), bound);
        bound
    }

    /// A symbol that another object defines: the target, one of the patch, or a library.
    fn bind_elsewhere(&mut self, input: usize, symbol: &Symbol) -> u32 {
        match self.target.find(&symbol.name, false, None) {
            Found::One(found) => {
                let found = found.clone();
                return self.in_target(input, symbol, &found, 0);
            }
            Found::Ambiguous(count) => {
                self.refuse(input, &symbol.name, Reason::Ambiguous, format!("{count} of them"));
            }
            Found::Nothing => {}
        }
        if let Some(&(other, index)) = self.definitions.get(symbol.name.as_str()) {
            let inputs = self.inputs;
            let definition = &inputs[other].new.symbols[index];
            return match definition.home {
                Home::Section(section) => {
                    if inputs[other].new.sections[section].is_writable() {
                        self.note(other, &symbol.name, NoteKind::NewData, String::new());
                    }
                    self.own(other, index, section)
                }
                _ => self.allocate(other, definition),
            };
        }
        if !self.target.imports(&symbol.name) && !symbol.is_weak {
            let hint = "or the target itself has it, and no symbols; give the object that defines it too";
            let detail = if self.target.has_symbols { String::new() } else { hint.to_owned() };
            self.note(input, &symbol.name, NoteKind::NewImport, detail);
        }
        let version = self.target.import_version(&symbol.name).map(str::to_owned);
        let is_thread_local = symbol.kind == SymbolKind::ThreadLocal;
        self.symbol(symbol, Place::Import { version, is_weak: symbol.is_weak, is_thread_local })
    }

    /// A place in the target. The patch's symbol stands for the object's symbol, which lies `inside` bytes behind the one that was found.
    fn in_target(&mut self, input: usize, symbol: &Symbol, found: &TargetSymbol, inside: u64) -> u32 {
        match found.kind {
            SymbolKind::ThreadLocal => {
                self.symbol(symbol, Place::TargetThreadLocal { offset: found.address.wrapping_add(inside) })
            }
            SymbolKind::Indirect => {
                self.refuse(input, &symbol.name, Reason::IndirectFunction, String::new());
                self.symbol(symbol, Place::Absolute { value: 0 })
            }
            _ => self.symbol(symbol, Place::Target { address: found.address.wrapping_add(inside) }),
        }
    }

    fn bind_code(&mut self, input: usize, index: usize, section: usize, is_inner: bool) -> u32 {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let Some(function) = object.function_of(section) else { return self.own(input, index, section) };
        let is_carried = self.carried.contains_key(&(input, section));
        if is_inner && is_carried {
            return self.own(input, index, section);
        }
        let named = &object.symbols[function];
        let symbol = &object.symbols[index];
        if let Some(found) = self.find(input, named) {
            return self.in_target(input, symbol, &found, symbol.value);
        }
        if !is_carried {
            self.note(input, &named.name, NoteKind::New, String::new());
        }
        self.own(input, index, section)
    }

    fn bind_constant(&mut self, input: usize, index: usize, section: usize) -> u32 {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        // What has a number, or no name, has no identity either.
        let named = named_at(object, index, section).filter(|&named| {
            let named = &object.symbols[named];
            plain(&named.name, named.kind) == named.name && object.sections[section].merge == Merge::No
        });
        if let Some(named) = named
            && let Some(found) = self.find(input, &object.symbols[named])
            && self.is_unchanged(input, named, section, &found)
        {
            let inside = object.symbols[index].value.wrapping_sub(object.symbols[named].value);
            return self.in_target(input, &object.symbols[index], &found, inside);
        }
        self.own(input, index, section)
    }

    /// Whether a constant is the one that the target has.
    fn is_unchanged(&self, input: usize, symbol: usize, section: usize, found: &TargetSymbol) -> bool {
        let object = &self.inputs[input].new;
        let named = &object.symbols[symbol];
        if !named.is_local {
            return true;
        }
        if let Some(comparison) = &self.comparisons[input] {
            return comparison.old_of(symbol).is_some_and(|old| comparison.same_symbols(old, symbol));
        }
        let range = named.value..named.value.saturating_add(named.size);
        let has_places = object.sections[section].relocations.iter().any(|place| range.contains(&place.offset));
        found.size == named.size
            && !has_places
            && object.bytes(section, named.value, named.size) == self.target.at(found.address, named.size)
    }

    fn bind_variable(&mut self, input: usize, index: usize, section: usize) -> u32 {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let symbol = &object.symbols[index];
        let Some(named) = named_at(object, index, section) else {
            let name = object.sections[section].name.clone();
            self.refuse(input, &name, Reason::SharedData, "it is writable and has no name".to_owned());
            return self.own(input, index, section);
        };
        let definition = &object.symbols[named];
        // A pointer to an exception handler or a type; each object has its own.
        if definition.name.starts_with("DW.ref.") {
            return self.own(input, index, section);
        }
        let old = self.comparisons[input].as_ref().and_then(|comparison| comparison.old_of(named));
        let name = match (&inputs[input].old, old) {
            (Some(objects), Some(old)) => objects.symbols[old].name.as_str(),
            _ => definition.name.as_str(),
        };
        let known = Symbol { name: name.to_owned(), ..definition.clone() };
        if let Some(found) = self.find(input, &known) {
            if found.size != 0 && found.size != definition.size {
                let detail = format!("{} bytes, and {} in the target", definition.size, found.size);
                self.refuse(input, &definition.name, Reason::ChangedLayout, detail);
            }
            return self.in_target(input, symbol, &found, symbol.value.wrapping_sub(definition.value));
        }
        if old.is_some() || (self.comparisons[input].is_none() && !self.target.has_symbols) {
            self.refuse(input, &definition.name, Reason::NoSymbol, String::new());
        } else {
            self.note(input, &definition.name, NoteKind::NewData, String::new());
        }
        self.own(input, index, section)
    }

    fn bind_thread_local(&mut self, input: usize, index: usize, section: usize) -> u32 {
        let inputs = self.inputs;
        let object = &inputs[input].new;
        let symbol = &object.symbols[index];
        let named = named_at(object, index, section).unwrap_or(index);
        let definition = &object.symbols[named];
        match self.find(input, definition) {
            Some(found) if found.kind == SymbolKind::ThreadLocal => {
                self.in_target(input, symbol, &found, symbol.value.wrapping_sub(definition.value))
            }
            _ => {
                let reason = if self.target.has_symbols { Reason::NewThreadLocal } else { Reason::NoSymbol };
                self.refuse(input, &definition.name, reason, String::new());
                self.symbol(symbol, Place::TargetThreadLocal { offset: 0 })
            }
        }
    }

    /// Where the target has what an object defines.
    pub(crate) fn find(&mut self, input: usize, symbol: &Symbol) -> Option<TargetSymbol> {
        let source = self.inputs[input].new.source.as_deref();
        match self.target.find(&symbol.name, symbol.is_local, source) {
            Found::One(found) => Some(found.clone()),
            Found::Nothing => None,
            Found::Ambiguous(count) => {
                self.refuse(input, &symbol.name, Reason::Ambiguous, format!("{count} of them"));
                None
            }
        }
    }

    /// A symbol of something that comes along.
    fn own(&mut self, input: usize, index: usize, section: usize) -> u32 {
        if let Some(known) = self.bound.get(&(input, index, true)) {
            return *known;
        }
        let inputs = self.inputs;
        let symbol = &inputs[input].new.symbols[index];
        let carried = self.carry(input, section);
        let own = self.symbol(symbol, Place::Own { section: carried, offset: symbol.value });
        self.bound.insert((input, index, true), own);
        own
    }

    /// Takes a section along.
    fn carry(&mut self, input: usize, index: usize) -> u32 {
        if let Some(known) = self.carried.get(&(input, index)) {
            return *known;
        }
        let object = &self.inputs[input].new;
        let section = &object.sections[index];
        let number = u32::try_from(self.sections.len()).unwrap_or(u32::MAX);
        if section.role == Role::Code
            && let Some(inside) = object.function_inside(index)
        {
            let name = inside.name.clone();
            self.refuse(input, &name, Reason::SharedSection, section.name.clone());
        }
        self.sections.push(patch::Section {
            name: section.name.clone(),
            object: object.path.clone(),
            role: match section.role {
                Role::Code => patch::Role::Code,
                Role::Data => patch::Role::Data,
                Role::Zero => patch::Role::Zero,
                _ => patch::Role::ReadOnly,
            },
            align: section.align,
            data: section.data.clone(),
            len_bytes: section.len_bytes,
            relocations: Vec::new(),
        });
        self.carried.insert((input, index), number);
        self.queue.push_back((input, index));
        number
    }

    /// Memory for a variable that the target does not have.
    fn allocate(&mut self, input: usize, symbol: &Symbol) -> u32 {
        self.note(input, &symbol.name, NoteKind::NewData, String::new());
        let number = u32::try_from(self.sections.len()).unwrap_or(u32::MAX);
        self.sections.push(patch::Section {
            name: format!("COMMON.{}", symbol.name),
            object: self.inputs[input].new.path.clone(),
            role: patch::Role::Zero,
            align: symbol.value.max(1).next_power_of_two(),
            data: Vec::new(),
            len_bytes: symbol.size,
            relocations: Vec::new(),
        });
        self.symbol(symbol, Place::Own { section: number, offset: 0 })
    }

    fn symbol(&mut self, symbol: &Symbol, place: Place) -> u32 {
        let number = u32::try_from(self.symbols.len()).unwrap_or(u32::MAX);
        self.symbols.push(patch::Symbol { name: symbol.name.clone(), place, len_bytes: symbol.size });
        number
    }
}

/// Whether a section holds nothing but pointers without a name. Compilers keep such beside tables of exceptions, writable and never written by the program.
fn is_pointer_table(object: &Object, section: usize) -> bool {
    let content = &object.sections[section];
    let word = u64::from(object.mode.word_bytes());
    object.named_in(section).is_empty() && content.relocations.len() as u64 * word == content.len_bytes
}

/// The variable or constant that a symbol stands for: itself, or the only one in the section.
fn named_at(object: &Object, index: usize, section: usize) -> Option<usize> {
    let symbol = &object.symbols[index];
    let is_itself = matches!(symbol.kind, SymbolKind::Data | SymbolKind::ThreadLocal) && has_identity(&symbol.name);
    match object.named_in(section) {
        _ if is_itself => Some(index),
        [only] => Some(*only),
        _ => None,
    }
}

/// Whether a place in `section` refers to something within a function, which is then the new one's, and not to the function.
fn is_inner(object: &Object, section: usize, relocation: &Relocation, operands: &Operands) -> bool {
    let symbol = &object.symbols[relocation.symbol];
    let Home::Section(home) = symbol.home else { return false };
    if object.sections[home].role != Role::Code {
        return false;
    }
    let is_relative = relocation::meaning(object.mode, relocation.kind).is_some_and(relocation::Meaning::is_relative);
    let to_end_bytes = match (is_relative, object.sections[section].role) {
        (false, _) => 0,
        (true, Role::Code) => operands.at(relocation.offset).map_or(4, |operand| operand.to_end_bytes),
        // A table of distances: of a switch.
        (true, _) => return true,
    };
    symbol.value.cast_signed().wrapping_add(relocation.addend).wrapping_add(to_end_bytes) != 0
}
