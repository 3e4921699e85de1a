//! Which sites an ops is attached to: globs on names, address ranges, exceptions.
//!
//! Owns [`Filter`]. The [`engine`](crate::Engine) resolves it once, when an ops is registered or its filter changes, to indices into the
//! [`SiteTable`](crate::SiteTable). Invariant: a filter that selects nothing is an error that helps, never an ops that silently sees nothing.

use alloc::{
    string::{String, ToString},
    vec::Vec,
};

use crate::{Addr, AddrRange};

/// Selects sites: those that any of the inclusions matches, without those that any of the exceptions matches.
///
/// ```
/// use trapline_engine::Filter;
///
/// let filter = Filter::name("parse_*").or_name("lex").except("*_debug");
/// assert!(filter.matches("parse_header", 0x1000.into()));
/// assert!(!filter.matches("parse_debug", 0x2000.into()));
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    include: Vec<Rule>,
    except: Vec<Rule>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Rule {
    Name(String),
    Range(AddrRange),
}

impl Rule {
    fn matches(&self, name: &str, address: Addr) -> bool {
        match self {
            Self::Name(glob) => glob_matches(glob, name),
            Self::Range(range) => range.contains(address),
        }
    }
}

impl Filter {
    /// Sites whose name matches a glob: `*` any run of characters, `?` any one, `[a-z]` and `[!a-z]` one of a set.
    #[must_use]
    pub fn name(glob: &str) -> Self {
        Self::default().or_name(glob)
    }

    /// All sites in a range of addresses.
    #[must_use]
    pub fn range(range: AddrRange) -> Self {
        Self::default().or_range(range)
    }

    /// The one site at an address.
    #[must_use]
    pub fn address(site: Addr) -> Self {
        Self::range(AddrRange::new(site, 1))
    }

    /// Every site.
    #[must_use]
    pub fn all() -> Self {
        Self::name("*")
    }

    /// Also the sites whose name matches `glob`.
    #[must_use]
    pub fn or_name(mut self, glob: &str) -> Self {
        self.include.push(Rule::Name(glob.to_string()));
        self
    }

    /// Also the sites in a range of addresses.
    #[must_use]
    pub fn or_range(mut self, range: AddrRange) -> Self {
        self.include.push(Rule::Range(range));
        self
    }

    /// Also the one site at an address.
    #[must_use]
    pub fn or_address(self, site: Addr) -> Self {
        self.or_range(AddrRange::new(site, 1))
    }

    /// Without the sites whose name matches `glob`.
    #[must_use]
    pub fn except(mut self, glob: &str) -> Self {
        self.except.push(Rule::Name(glob.to_string()));
        self
    }

    /// Without the sites in a range of addresses.
    #[must_use]
    pub fn except_range(mut self, range: AddrRange) -> Self {
        self.except.push(Rule::Range(range));
        self
    }

    /// Whether a site is selected.
    pub fn matches(&self, name: &str, address: Addr) -> bool {
        let any = |rules: &[Rule]| rules.iter().any(|rule| rule.matches(name, address));
        any(&self.include) && !any(&self.except)
    }

    /// The single addresses that are asked for.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = Addr> + '_ {
        self.include.iter().filter_map(|rule| match rule {
            Rule::Range(range) if range.len_bytes() == 1 => Some(range.start),
            _ => None,
        })
    }

    /// The globs that are asked for.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.include.iter().filter_map(|rule| match rule {
            Rule::Name(glob) => Some(glob.as_str()),
            Rule::Range(_) => None,
        })
    }
}

/// Shell-style matching of a whole name. Linear in the name for each `*`.
fn glob_matches(glob: &str, name: &str) -> bool {
    let (glob, name) = (glob.as_bytes(), name.as_bytes());
    let (mut at_glob, mut at_name) = (0, 0);
    // The last `*`, and the name's byte up to which it has been stretched.
    let mut star: Option<(usize, usize)> = None;
    while at_name < name.len() {
        let step = match glob.get(at_glob) {
            Some(b'*') => {
                star = Some((at_glob, at_name));
                at_glob += 1;
                continue;
            }
            Some(b'?') => Some(1),
            Some(b'[') => match set_matches(&glob[at_glob..], name[at_name]) {
                Some((true, len)) => Some(len),
                Some((false, _)) => None,
                // A bracket without its end stands for itself.
                None => (name[at_name] == b'[').then_some(1),
            },
            Some(byte) => (*byte == name[at_name]).then_some(1),
            None => None,
        };
        if let Some(len) = step {
            at_glob += len;
            at_name += 1;
        } else if let Some((star_at, stretched)) = star {
            star = Some((star_at, stretched + 1));
            at_glob = star_at + 1;
            at_name = stretched + 1;
        } else {
            return false;
        }
    }
    glob[at_glob..].iter().all(|byte| *byte == b'*')
}

/// Matches one byte against the set at the head of `glob`; gives the set's length too. `None` where the set has no end.
fn set_matches(glob: &[u8], byte: u8) -> Option<(bool, usize)> {
    let negated = matches!(glob.get(1), Some(b'!' | b'^'));
    let first = if negated { 2 } else { 1 };
    // A `]` right at the start belongs to the set.
    let end = first + 1 + glob.get(first + 1..)?.iter().position(|byte| *byte == b']')?;
    let mut found = false;
    let mut at = first;
    while at < end {
        if at + 2 < end && glob[at + 1] == b'-' {
            found |= (glob[at]..=glob[at + 2]).contains(&byte);
            at += 3;
        } else {
            found |= glob[at] == byte;
            at += 1;
        }
    }
    Some((found != negated, end + 1))
}

/// How many names an error offers.
const NEAR_MISSES: usize = 3;

/// The names nearest to what was asked for, best first: those that contain it, then by edit distance of the name or of its last segment.
pub(crate) fn near_misses<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let wanted = wanted.replace(['*', '?'], "");
    let limit = wanted.len() / 3;
    let mut nearest: Vec<(usize, &str)> = Vec::new();
    for name in names {
        let last_segment = name.rsplit("::").next().unwrap_or(name);
        let distance = if !wanted.is_empty() && name.contains(&wanted) {
            0
        } else {
            edit_distance(&wanted, name).min(edit_distance(&wanted, last_segment))
        };
        if distance <= limit {
            nearest.push((distance, name));
            nearest.sort_unstable();
            nearest.dedup();
            nearest.truncate(NEAR_MISSES);
        }
    }
    nearest.into_iter().map(|(_, name)| name.to_string()).collect()
}

/// Levenshtein's distance in bytes, one row at a time.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        for (glob, name) in [
            ("parse", "parse"),
            ("*", ""),
            ("parse_*", "parse_"),
            ("*_end", "the_end_end"),
            ("a*b*c", "aXbYbZc"),
            ("f?o", "foo"),
            ("[a-c]x", "bx"),
            ("[!a-c]x", "dx"),
            ("[]]", "]"),
            ("std::vec[*", "std::vec[int]"),
        ] {
            assert!(glob_matches(glob, name), "{glob} has to match {name}");
        }
        for (glob, name) in
            [("parse", "parser"), ("?", ""), ("a*b", "ac"), ("[a-c]x", "dx"), ("[!a-c]x", "ax"), ("", "a")]
        {
            assert!(!glob_matches(glob, name), "{glob} must not match {name}");
        }
    }

    #[test]
    fn exceptions_win_over_inclusions() {
        let inside = AddrRange::new(Addr::new(0x1000), 0x100);
        let filter =
            Filter::name("a*").or_range(inside).except("*x").except_range(AddrRange::new(Addr::new(0x1010), 1));
        assert!(filter.matches("ab", Addr::new(0)));
        assert!(filter.matches("zz", Addr::new(0x1000)));
        assert!(!filter.matches("zz", Addr::new(0x1010)));
        assert!(!filter.matches("ax", Addr::new(0x1000)));
        assert!(!filter.matches("zz", Addr::new(0x1100)));
    }

    #[test]
    fn near_misses_are_the_nearest_names() {
        let names = ["parse_header", "parse_body", "write_body", "main"];
        assert_eq!(near_misses("parse_haeder", names.into_iter()), ["parse_header"]);
        assert_eq!(near_misses("body", names.into_iter())[..2], ["parse_body", "write_body"]);
        assert_eq!(near_misses("strat", ["program::start"].into_iter()), [] as [&str; 0]);
        assert_eq!(near_misses("begni_it", ["program::begin_it"].into_iter()), ["program::begin_it"]);
        assert!(near_misses("entirely_different", names.into_iter()).is_empty());
    }
}
