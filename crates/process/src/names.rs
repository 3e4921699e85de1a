//! Names as people write them.
//!
//! Owns the step from a linkage symbol to the name in the source, by the demanglers that debuggers use. Filters and messages show what comes out; the
//! symbol itself stays available. Invariant: what is no mangled name stays as it is.

/// The name in the source of a C++ or Rust (legacy or v0) symbol, Rust's without its hash; any other symbol as it is.
pub(crate) fn demangle(symbol: &str) -> String {
    if let Ok(name) = rustc_demangle::try_demangle(symbol) {
        return format!("{name:#}");
    }
    if symbol.starts_with("_Z")
        && let Ok(parsed) = cpp_demangle::Symbol::new(symbol)
        && let Ok(name) = parsed.demangle()
    {
        return name;
    }
    symbol.to_owned()
}

#[cfg(test)]
mod tests {
    use super::demangle;

    #[test]
    fn rust_and_cpp_symbols_become_names_and_others_stay() {
        for (symbol, name) in [
            ("_ZN4hook12parse_header17h219e30fe67df68d4E", "hook::parse_header"),
            ("_RNvCs1234_7mycrate3foo", "mycrate::foo"),
            ("_ZN3foo3barEi", "foo::bar(int)"),
            ("main", "main"),
            ("_Znot_mangled", "_Znot_mangled"),
            ("lib.so+0x1234", "lib.so+0x1234"),
        ] {
            assert_eq!(demangle(symbol), name);
        }
    }
}
