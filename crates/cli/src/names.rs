//! Names that are like one that was not found.

/// What to try instead, as the end of a sentence.
pub(crate) fn near<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 5;
    let plain = |name: &str| name.trim_matches('*').to_lowercase();
    let wanted = plain(wanted);
    let is_near = |name: &&str| {
        let name = plain(name);
        !wanted.is_empty() && (name.contains(&wanted) || is_typo(&name, &wanted))
    };
    let mut found: Vec<&str> = names.filter(is_near).collect();
    found.sort_unstable();
    found.dedup();
    found.truncate(SHOWN);
    if found.is_empty() {
        "; `trapline report` lists the functions that were called, `trapline functions` all of them".to_owned()
    } else {
        format!("; functions of the trace with a similar name: {}", found.join(", "))
    }
}

/// Whether one letter was added, left out, or is another one, or two are exchanged.
fn is_typo(name: &str, wanted: &str) -> bool {
    let (name, wanted): (Vec<char>, Vec<char>) = (name.chars().collect(), wanted.chars().collect());
    let same = name.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
    let (rest, other) = (&name[same..], &wanted[same..]);
    let swapped = rest.len() >= 2 && other.len() >= 2 && rest[0] == other[1] && rest[1] == other[0];
    rest.get(1..) == Some(other)
        || other.get(1..) == Some(rest)
        || (!rest.is_empty() && rest.get(1..) == other.get(1..))
        || (swapped && rest[2..] == other[2..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_typos_are_near_and_other_names_are_not() {
        let names = ["parse_header", "parse_body", "main", "print"];
        let of = |wanted| near(wanted, names.into_iter());
        assert!(of("parse").ends_with(": parse_body, parse_header"));
        for typo in ["mian", "mai", "mainn", "nain"] {
            assert!(of(typo).ends_with(": main"), "{typo}");
        }
        assert!(of("write").contains("trapline report"));
        assert!(of("*").contains("trapline report"));
    }
}
