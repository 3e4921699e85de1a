//! Functions of the target's libraries that are led through the agent, so that unwinders see what they would see without us.
//!
//! Owns the list of them, and [`Shimmed`]: those that a file has. Upstream [`crate::arm`] looks into every file that is mapped, selected or not;
//! downstream `trapline_image` makes the detours, and the agent's `unwind` module says what is done there. Invariant: a shim is no tracing. The
//! function is recorded if it is selected, and not otherwise.

use std::{fs, path::Path};

use object::{Object, ObjectSymbol};
use trapline_abi::agent::DETOUR_HELPERS;
use trapline_engine::{Addr, AddrRange};
use trapline_image::{Function, Image, Shim};

use crate::space::AgentAt;

/// A function that gets a shim.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Backtrace,
    FindFde,
}

const ALL: [Kind; 2] = [Kind::Backtrace, Kind::FindFde];

impl Kind {
    /// Its symbol. Both are of the interface of C++ exceptions (Itanium C++ ABI) as libgcc has it.
    const fn symbol(self) -> &'static str {
        match self {
            Self::Backtrace => "_Unwind_Backtrace",
            Self::FindFde => "_Unwind_Find_FDE",
        }
    }

    /// What the agent calls for it; the first is indispensable.
    const fn helpers(self) -> &'static [&'static str] {
        match self {
            Self::Backtrace => &["_Unwind_GetIP", "_Unwind_GetCFA", "_Unwind_SetIP"],
            Self::FindFde => &[],
        }
    }
}

/// A function of a file that is to be led through the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shimmed {
    kind: Kind,
    function: usize,
    helpers: [Option<usize>; DETOUR_HELPERS],
}

impl Shimmed {
    /// Its index among the functions of its file.
    pub(crate) fn function(&self) -> usize {
        self.function
    }

    /// For a process that has the agent there.
    pub(crate) fn led_through(&self, agent: &AgentAt) -> Shim {
        let through = match self.kind {
            Kind::Backtrace => agent.backtrace,
            Kind::FindFde => agent.find_fde,
        };
        Shim { function: self.function, through, helpers: self.helpers }
    }
}

/// Whether a file defines any of the functions: far quicker than to read all of its functions.
pub(crate) fn may_be_in(file: &Path) -> bool {
    let Ok(bytes) = fs::read(file) else { return false };
    let Ok(file) = object::File::parse(&*bytes) else { return false };
    let mut symbols = file.dynamic_symbols().chain(file.symbols());
    symbols.any(|symbol| {
        symbol.is_definition() && symbol.name().is_ok_and(|name| ALL.iter().any(|kind| kind.symbol() == name))
    })
}

/// Those that an image has.
pub(crate) fn find(image: &Image) -> Vec<Shimmed> {
    let shimmed = |kind: Kind| {
        let function = image.function_named(kind.symbol())?;
        let mut helpers = [None; DETOUR_HELPERS];
        for (place, name) in helpers.iter_mut().zip(kind.helpers()) {
            *place = image.function_named(name);
        }
        (kind.helpers().is_empty() || helpers[0].is_some()).then_some(Shimmed { kind, function, helpers })
    };
    ALL.into_iter().filter_map(shimmed).collect()
}

/// Where an image's unwinder is, before the load bias is added: its functions stand together, those without a name between those with one.
pub(crate) fn unwinder(image: &Image) -> Option<AddrRange> {
    const PREFIX: &str = "_Unwind_";
    let names = |function: &Function| {
        function.name.starts_with(PREFIX) || function.aliases.iter().any(|name| name.starts_with(PREFIX))
    };
    let ranges = || image.functions().iter().filter(|function| names(function));
    let start = ranges().map(|function| function.address).min()?;
    let end = ranges().map(|function| function.address + function.size).max()?;
    Some(AddrRange { start: Addr::new(start), end: Addr::new(end) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(name: &str) -> std::path::PathBuf {
        let maps = fs::read_to_string("/proc/self/maps").expect("every process has it");
        let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| path.contains(name));
        path.unwrap_or_else(|| panic!("{name} is not mapped")).into()
    }

    #[test]
    fn the_unwinder_is_found_with_all_of_its_helpers() {
        let unwinder = mapped("libgcc_s.so");
        assert!(may_be_in(&unwinder));
        let found = find(&Image::open(&unwinder).expect("a library"));
        assert_eq!(found.iter().map(|shim| shim.kind).collect::<Vec<_>>(), ALL);
        assert!(found[0].helpers.iter().all(Option::is_some));
        let image = Image::open(&unwinder).expect("a library");
        let range = super::unwinder(&image).expect("it has one");
        let inside = |name: &str| {
            let function = &image.functions()[image.function_named(name).expect("a function")];
            range.contains(Addr::new(function.address))
        };
        assert!(["_Unwind_RaiseException", "_Unwind_Resume", "_Unwind_Find_FDE"].into_iter().all(inside));
        assert!(!inside("__udivti3"));
    }

    #[test]
    fn who_only_calls_the_unwinder_has_no_shim() {
        assert!(!may_be_in(&mapped("libc.so")));
    }
}
