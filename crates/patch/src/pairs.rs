//! Which of several objects belong together.
//!
//! Owns [`pair_up()`]. Compilers that make several objects of one source (rustc: codegen units) give them names that say nothing of what is in them. Neighbour: the
//! pairs go to `build`. Invariant: an object is of one pair at most; a pair that is not the best one makes a patch larger and never wrong, as functions
//! that are in no old object count as changed.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use crate::{
    Error, Pair,
    object::{Home, Object, SymbolKind},
};

/// Finds the old object for each of the new ones: the one that has most functions in common with it.
///
/// # Errors
/// One of them cannot be read.
pub fn pair_up(old: &[PathBuf], new: &[PathBuf]) -> Result<Vec<Pair>, Error> {
    let olds = old.iter().map(|path| functions(path)).collect::<Result<Vec<_>, _>>()?;
    let mut homes: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, functions) in olds.iter().enumerate() {
        for name in functions {
            homes.entry(name).or_default().push(index);
        }
    }
    let mut pairs: Vec<Pair> = new.iter().map(|new| Pair { old: None, new: new.clone() }).collect();
    let mut shared: Vec<(usize, usize, usize)> = Vec::new();
    for (index, path) in new.iter().enumerate() {
        let mut counts = vec![0; olds.len()];
        for name in functions(path)? {
            homes.get(name.as_str()).into_iter().flatten().for_each(|&old| counts[old] += 1);
        }
        shared.extend(
            counts.into_iter().enumerate().filter(|(_, count)| *count > 0).map(|(old, count)| (count, index, old)),
        );
    }
    shared.sort_unstable_by_key(|&(count, new, old)| (Reverse(count), new, old));
    let mut is_taken = vec![false; olds.len()];
    for (_, new, old_index) in shared {
        if pairs[new].old.is_none() && !is_taken[old_index] {
            is_taken[old_index] = true;
            pairs[new].old = Some(old[old_index].clone());
        }
    }
    Ok(pairs)
}

/// The functions that an object defines.
fn functions(path: &Path) -> Result<BTreeSet<String>, Error> {
    let (object, _) = Object::open(path)?;
    let is_defined = |kind, home| kind == SymbolKind::Function && matches!(home, Home::Section(_));
    let defined = object.symbols.into_iter().filter(|symbol| is_defined(symbol.kind, symbol.home));
    Ok(defined.map(|symbol| symbol.name).collect())
}
