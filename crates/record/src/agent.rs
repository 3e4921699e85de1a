//! The agent as it travels inside the recorder.
//!
//! Owns [`Agent`]: the bytes of a shared object that the build script makes from `crates/agent`, and the addresses of its symbols. There are three: one for
//! the dynamic linker to preload, one that the recorder maps itself, and one that it maps into 32-bit processes, if the compiler for that was installed. Invariant: the symbols are those of [`trapline_abi::agent::symbol`], found in the
//! object's own symbol table, as it exports nothing.

use std::collections::HashMap;

use object::{Object, ObjectSymbol};
use trapline_engine::Mode;

/// The objects for x86-64, and the one for i386, which may be empty.
const PRELOADED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/trapline-agent.so"));
const INJECTED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/trapline-agent-injected.so"));
const NARROW: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/trapline-agent-i386.so"));

/// A shared object to be loaded into targets.
#[derive(Clone, Debug)]
pub struct Agent {
    bytes: &'static [u8],
    symbols: HashMap<String, u64>,
}

impl Agent {
    /// The one for 64-bit processes whose dynamic linker loads it.
    pub fn native() -> Self {
        Self::new(PRELOADED)
    }

    /// The one that the recorder maps into processes of this width; `None` if it was built without that.
    pub fn injected(mode: Mode) -> Option<Self> {
        let bytes = match mode {
            Mode::Bits32 => NARROW,
            Mode::Bits64 => INJECTED,
        };
        (!bytes.is_empty()).then(|| Self::new(bytes))
    }

    fn new(bytes: &'static [u8]) -> Self {
        let symbols = object::File::parse(bytes).map(|file| {
            let named = file.symbols().filter(object::ObjectSymbol::is_definition);
            named.filter_map(|symbol| Some((symbol.name().ok()?.to_owned(), symbol.address()))).collect()
        });
        // Without symbols the recorder says which one it misses.
        Self { bytes, symbols: symbols.unwrap_or_default() }
    }

    /// The whole file.
    pub fn bytes(&self) -> &'static [u8] {
        self.bytes
    }

    /// The address of a symbol, from where the object's first byte is loaded.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        self.symbols.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use trapline_abi::agent::symbol;

    use super::*;

    #[test]
    fn every_symbol_that_the_recorder_asks_for_is_there() {
        for name in [
            symbol::CONFIG,
            symbol::ENTER,
            symbol::ENTER_KEEP_FLAGS,
            symbol::ENTER_LIMITED,
            symbol::POINT,
            symbol::POINT_KEEP_FLAGS,
            symbol::RETURN,
            symbol::OBJECTS_CHANGED,
            symbol::SANDBOX,
            symbol::BACKTRACE,
            symbol::FIND_FDE,
            symbol::ASKED,
            symbol::ASKED_END,
            symbol::SYSCALL,
            symbol::ERRAND,
            symbol::ERRAND_REGISTERS,
            symbol::SHADOWS,
            symbol::WALKING,
        ] {
            let injected =
                [Mode::Bits32, Mode::Bits64].map(|mode| Agent::injected(mode).expect("the compiler for i686"));
            for agent in [Agent::native()].iter().chain(&injected) {
                assert!(agent.symbol(name).is_some_and(|address| address != 0), "{name}");
            }
        }
        assert_eq!(Agent::native().symbol("trapline_nothing"), None);
    }
}
