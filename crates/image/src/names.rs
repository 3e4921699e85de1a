//! Which of its names a function goes by, and how people write it.
//!
//! Owns [`Names`]. Neighbours: discovery has the symbols of an address, a [`Function`](crate::Function) carries the choice. Invariant: what is no mangled name
//! stays as it is.

use crate::elf::{Binding, Symbol};

/// The names of one address, the best first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names<'a>(Vec<(Rank, &'a [u8])>);

/// Lower is better: widely known symbols, without leading underscores, short ones.
type Rank = (Binding, usize, usize);

impl<'a> Names<'a> {
    /// Adds a symbol of the address.
    pub(crate) fn add(&mut self, symbol: &Symbol<'a>) {
        let name = without_version(symbol.name);
        if name.is_empty() || self.0.iter().any(|(_, other)| *other == name) {
            return;
        }
        // Mangled names begin with one underscore too: what they stand for has none.
        let underscores = match name {
            [b'_', b'Z' | b'R', ..] => 0,
            _ => name.iter().take_while(|byte| **byte == b'_').count(),
        };
        self.0.push(((symbol.binding, underscores, name.len()), name));
    }

    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, as they are in the file.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().map(|(_, name)| *name)
    }

    /// The best one as people write it, and the others as they are in the file.
    pub(crate) fn choose(mut self) -> Option<(String, Vec<String>)> {
        self.0.sort_unstable();
        let mut names = self.0.iter().map(|(_, name)| String::from_utf8_lossy(name));
        let best = demangle(&names.next()?);
        Some((best, names.map(std::borrow::Cow::into_owned).collect()))
    }
}

/// The name in front of an `@VERSION`.
fn without_version(name: &[u8]) -> &[u8] {
    match name.iter().position(|byte| *byte == b'@') {
        Some(0) | None => name,
        Some(at) => &name[..at],
    }
}

/// The name in the source of a C++ or Rust (legacy or v0) symbol, Rust's without its hash; any other symbol as it is.
///
/// What compilers append to the symbols of clones (`.part.0`, `.constprop.1`) stays.
fn demangle(symbol: &str) -> String {
    // No name in the source is longer. Demanglers take a time that grows with the name they make, which may be much longer than the symbol.
    const MAX_BYTES: usize = 1 << 14;
    if symbol.len() > MAX_BYTES {
        return symbol.to_owned();
    }
    if let Ok(name) = rustc_demangle::try_demangle(symbol) {
        return format!("{name:#}");
    }
    if symbol.starts_with("_Z") {
        let options = cpp_demangle::DemangleOptions::new();
        let parse = cpp_demangle::ParseOptions::default().recursion_limit(128);
        if let Ok(parsed) = cpp_demangle::Symbol::new_with_options(symbol, &parse)
            && let Ok(name) = parsed.demangle_with_options(&options.recursion_limit(128))
        {
            return name;
        }
    }
    symbol.to_owned()
}

/// Whether a symbol of this name is a part of a function, placed elsewhere because it is rarely executed: compilers append `.cold`, and a number
/// perhaps; BOLT appends `.warm` as well.
pub(crate) fn is_part(name: &[u8]) -> bool {
    let mut rest = name;
    while let Some(dot) = rest.iter().rposition(|byte| *byte == b'.') {
        let (front, suffix) = (&rest[..dot], &rest[dot + 1..]);
        match suffix {
            b"cold" | b"warm" => return true,
            _ if !suffix.is_empty() && suffix.iter().all(u8::is_ascii_digit) => rest = front,
            _ => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(name: &str, binding: Binding) -> Symbol<'_> {
        Symbol { name: name.as_bytes(), address: 0, size: 0, binding, is_function: true }
    }

    fn chosen(symbols: &[(&str, Binding)]) -> Option<(String, Vec<String>)> {
        let mut names = Names::default();
        for (name, binding) in symbols {
            names.add(&symbol(name, *binding));
        }
        names.choose()
    }

    #[test]
    fn the_name_that_people_call_it_by_is_chosen_and_the_others_are_kept() {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let all = [
            ("__GI___libc_malloc", Binding::Local),
            ("__libc_malloc", Binding::Global),
            ("malloc@@GLIBC_2.2.5", Binding::Global),
            ("malloc", Binding::Global),
        ];
        let expected = ("malloc".to_owned(), strings(&["__libc_malloc", "__GI___libc_malloc"]));
        assert_eq!(chosen(&all), Some(expected.clone()));
        let mut reversed = all;
        reversed.reverse();
        assert_eq!(chosen(&reversed), Some(expected), "whatever the order");
        assert_eq!(chosen(&[]), None);
        assert_eq!(chosen(&[("", Binding::Global)]), None);
    }

    #[test]
    fn mangled_names_become_what_is_in_the_source() {
        for (symbol, name) in [
            ("_ZN4hook12parse_header17h219e30fe67df68d4E", "hook::parse_header"),
            ("_RNvCs1234_7mycrate3foo", "mycrate::foo"),
            ("_ZN3foo3barEi", "foo::bar(int)"),
            ("_Znot_mangled", "_Znot_mangled"),
            ("main", "main"),
        ] {
            assert_eq!(demangle(symbol), name);
        }
    }

    #[test]
    fn parts_are_known_by_their_suffix_alone() {
        for cold in ["main.cold", "f.part.0.cold", "f.cold.12", "_ZN3fooEv.cold", "f.warm"] {
            assert!(is_part(cold.as_bytes()), "{cold}");
        }
        for function in
            ["main", "cold", "f.cold_start", "f.part.0", "f.isra.1", "f.constprop.0.isra.2", "f.coldest.1", ""]
        {
            assert!(!is_part(function.as_bytes()), "{function}");
        }
    }
}
