//! Numbers for sites, in the order in which they are met.
//!
//! Owns [`SiteIndex`], for whoever keeps something for each function that is called, densely. Invariant: numbers have no gaps.

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SiteIndex {
    /// For each site its number plus 1, or 0.
    number_of: Vec<u32>,
    count: u32,
}

impl SiteIndex {
    /// The number of a site; `None` if it was not met yet.
    #[inline]
    pub fn get(&self, site: u32) -> Option<u32> {
        self.number_of.get(site as usize)?.checked_sub(1)
    }

    /// Gives a site that was not met yet the next number, and returns it.
    #[cold]
    pub fn add(&mut self, site: u32) -> u32 {
        if self.number_of.len() <= site as usize {
            self.number_of.resize(site as usize + 1, 0);
        }
        let number = self.count;
        self.count += 1;
        self.number_of[site as usize] = self.count;
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_are_numbered_in_the_order_in_which_they_are_met() {
        let mut index = SiteIndex::default();
        assert_eq!(index.get(0), None);
        assert_eq!([7, 0, 1000].map(|site| index.add(site)), [0, 1, 2]);
        assert_eq!([7, 0, 1000, 1, 2000].map(|site| index.get(site)), [Some(0), Some(1), Some(2), None, None]);
    }
}
