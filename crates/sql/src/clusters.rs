//! Rows of the table `calls`, put together by columns in which few values come again and again: what `GROUP BY`, `DISTINCT` and `ORDER BY` of such columns want.
//!
//! Owns [`Order`], what a query wants, and [`Clusters`], which goes through all rows once, deals them out to *buckets* and gives them back bucket by bucket. `SQLite` would sort them, which
//! takes ten times as long. All rows of a bucket have the same thread, function and ending, as far as the query uses these, and depth, if that is what rows are put together by; of the other columns a
//! bucket keeps those that the query uses, in a few bytes each. Invariant: memory grows with the number of buckets, not with that of rows, beyond [`KEPT_BYTES`]; the rest is in a file that has no name.

use std::{
    cmp::Ordering,
    collections::HashMap,
    fmt,
    fs::File,
    io::{self, BufWriter, Write as _},
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::Arc,
};

use trapline_export::{Function, Row, Thread};
use trapline_trace::Ending;

use crate::{
    Error, Value,
    calls::{self, column, of_call, of_function, of_thread},
    whole::Source,
};

/// What buckets hold in memory, all together, before they are written.
const KEPT_BYTES: usize = 128 << 20;

/// Of a bucket that are written or read at once.
const BLOCK_BYTES: usize = 256 << 10;

/// Columns that rows of a bucket never share.
const OWN: [usize; 3] = [column::START, column::DURATION, column::SELF];

/// How rows have to come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Order {
    /// The columns that decide, and whether it is the other way round.
    by: Vec<(usize, bool)>,
    /// The columns that are asked for, a bit each.
    used: u64,
    /// Of rows that are the same in these, one is enough.
    is_distinct: bool,
}

impl Order {
    /// `None` if rows come as they are: there is nothing to order by, or it is what few rows have in common.
    pub(crate) fn new(by: Vec<(usize, bool)>, used: u64, is_distinct: bool) -> Option<Self> {
        let can_be = !by.is_empty() && by.iter().all(|(column, _)| *column < column::ALL && !OWN.contains(column));
        let used = by.iter().fold(used, |used, (column, _)| used | 1 << (column % column::ALL));
        can_be.then_some(Self { by, used, is_distinct })
    }

    /// From its words.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (is_distinct, used) = (words.next()? == "distinct", words.next()?.parse().ok()?);
        let by = words.map(|word| {
            let is_descending = word.ends_with('-');
            Some((word.trim_end_matches('-').parse().ok()?, is_descending))
        });
        Self::new(by.collect::<Option<_>>()?, used, is_distinct)
    }

    fn uses(&self, columns: impl IntoIterator<Item = usize>) -> bool {
        columns.into_iter().any(|column| self.used & 1 << column != 0)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.is_distinct { "distinct" } else { "all" }, self.used)?;
        self.by
            .iter()
            .try_for_each(|(column, is_descending)| write!(f, " {column}{}", if *is_descending { "-" } else { "" }))
    }
}

/// What rows of a bucket share. What a query does not use is the same for all.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Shared {
    /// Of [`Clusters::threads`].
    thread: u32,
    function: u32,
    depth: u32,
    ending: Option<Ending>,
}

/// Which columns a query uses.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent, one for each kind of column")]
struct Uses {
    thread: bool,
    function: bool,
    shared_depth: bool,
    ending: bool,
    depth: bool,
    start: bool,
    duration: bool,
    own: bool,
}

impl Uses {
    fn new(order: &Order) -> Self {
        let shared_depth = order.by.iter().any(|(column, _)| *column == column::DEPTH);
        Self {
            thread: order.uses(column::STREAM..=column::PROGRAM),
            function: order.uses(column::SITE..=column::ADDRESS),
            shared_depth,
            // Without it, durations that nobody knows would be none.
            ending: order.uses([column::ENDING, column::DURATION, column::SELF]),
            depth: !shared_depth && order.uses([column::DEPTH]),
            start: order.uses([column::START]),
            duration: order.uses([column::DURATION]),
            own: order.uses([column::SELF]),
        }
    }

    /// Rows have something that their bucket does not tell.
    fn differ(self) -> bool {
        self.depth | self.start | self.duration | self.own
    }
}

#[derive(Debug)]
struct Bucket {
    shared: Shared,
    rows: u64,
    /// In their order.
    blocks: Vec<Block>,
    /// The rows behind them.
    open: Vec<u8>,
    /// Of the latest row.
    start_ns: u64,
}

#[derive(Debug)]
enum Block {
    Kept(Vec<u8>),
    Written { at: u64, len: usize },
}

/// The rows that one cursor goes through.
pub(crate) struct Clusters {
    source: Arc<Source>,
    uses: Uses,
    threads: Vec<Arc<Thread>>,
    functions: Vec<Function>,
    /// Those that were not given yet, the next one last.
    buckets: Vec<Bucket>,
    file: Option<File>,
    /// Of the bucket that is being given: what it shares, how many rows are left, and where the next one is.
    shared: Shared,
    left: u64,
    blocks: std::vec::IntoIter<Block>,
    block: Vec<u8>,
    at: usize,
    row: Row,
    rowid: i64,
}

impl Clusters {
    /// Takes all rows, and goes to the first. None if there is none.
    pub(crate) fn of(rows: calls::Rows, order: &Order, source: &Arc<Source>) -> Result<Option<Self>, Error> {
        let mut dealer = Dealer::new(Uses::new(order), KEPT_BYTES);
        let functions = dealer.deal(rows, source)?;
        Self::dealt(dealer, functions, order, source)
    }

    fn dealt(
        dealer: Dealer,
        functions: Vec<Function>,
        order: &Order,
        source: &Arc<Source>,
    ) -> Result<Option<Self>, Error> {
        let Dealer { uses, mut buckets, threads, file, .. } = dealer;
        if order.is_distinct && !uses.differ() {
            for bucket in &mut buckets {
                bucket.rows = 1;
            }
        }
        let shared = Shared { thread: 0, function: 0, depth: 0, ending: None };
        let row = Row { function: 0, depth: 0, start_ns: 0, duration_ns: 0, self_ns: 0, ending: None };
        let mut clusters = Self {
            source: Arc::clone(source),
            uses,
            threads,
            functions,
            buckets: Vec::new(),
            file,
            shared,
            left: 0,
            blocks: Vec::new().into_iter(),
            block: Vec::new(),
            at: 0,
            row,
            rowid: -1,
        };
        buckets.sort_by(|a, b| clusters.compare(order, b.shared, a.shared));
        clusters.buckets = buckets;
        Ok(clusters.advance()?.then_some(clusters))
    }

    /// Goes to the next row. False if there is none.
    pub(crate) fn advance(&mut self) -> Result<bool, Error> {
        while self.left == 0 {
            let Some(mut bucket) = self.buckets.pop() else { return Ok(false) };
            bucket.blocks.push(Block::Kept(bucket.open));
            let Shared { function, depth, ending, .. } = bucket.shared;
            self.row = Row { function, depth, start_ns: 0, duration_ns: 0, self_ns: 0, ending };
            (self.shared, self.left, self.blocks) = (bucket.shared, bucket.rows, bucket.blocks.into_iter());
            (self.block, self.at) = (Vec::new(), 0);
        }
        self.left -= 1;
        self.rowid += 1;
        let Uses { depth, start, duration, own, .. } = self.uses;
        if self.uses.differ() {
            while self.at == self.block.len() {
                self.next_block()?;
            }
            if depth {
                self.row.depth = u32::try_from(self.take()).unwrap_or(u32::MAX);
            }
            if start {
                self.row.start_ns = self.row.start_ns.wrapping_add(unfolded(self.take()));
            }
            if duration {
                self.row.duration_ns = self.take();
            }
            if own {
                self.row.self_ns = self.take();
            }
        }
        Ok(true)
    }

    pub(crate) fn rowid(&self) -> i64 {
        self.rowid
    }

    pub(crate) fn value(&self, column: usize) -> Value<'_> {
        self.shared_value(column, self.shared, &self.row)
    }

    fn shared_value<'a>(&'a self, column: usize, shared: Shared, row: &Row) -> Value<'a> {
        match column {
            ..column::SITE => of_thread(column, &self.threads[shared.thread as usize]),
            column::SITE..=column::ADDRESS => of_function(column, &self.functions[shared.function as usize]),
            _ => of_call(column, row, &self.source),
        }
    }

    /// Which bucket comes first.
    fn compare(&self, order: &Order, a: Shared, b: Shared) -> Ordering {
        let value = |column, shared: Shared| {
            let Shared { function, depth, ending, .. } = shared;
            let row = Row { function, depth, start_ns: 0, duration_ns: 0, self_ns: 0, ending };
            self.shared_value(column, shared, &row)
        };
        let orders = order.by.iter().map(|(column, is_descending)| {
            let order = match (value(*column, a), value(*column, b)) {
                (Value::Integer(a), Value::Integer(b)) => a.cmp(&b),
                (Value::Text(a), Value::Text(b)) => a.cmp(b),
                // Columns of these have values of one type.
                _ => Ordering::Equal,
            };
            if *is_descending { order.reverse() } else { order }
        });
        orders.fold(Ordering::Equal, Ordering::then)
    }

    fn next_block(&mut self) -> Result<(), Error> {
        self.at = 0;
        self.source.go_on()?;
        match (self.blocks.next(), &self.file) {
            (Some(Block::Kept(bytes)), _) => self.block = bytes,
            (Some(Block::Written { at, len }), Some(file)) => {
                self.block.resize(len, 0);
                file.read_exact_at(&mut self.block, at).map_err(|error| told(&error))?;
            }
            (Some(Block::Written { .. }), None) | (None, _) => {
                return Err(told(&io::Error::from(io::ErrorKind::UnexpectedEof)));
            }
        }
        Ok(())
    }

    /// A number of the block.
    #[inline]
    fn take(&mut self) -> u64 {
        let (mut number, mut shift) = (0, 0);
        while let Some(byte) = self.block.get(self.at) {
            self.at += 1;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
            shift += 7;
        }
        number
    }
}

/// Deals rows out to buckets.
struct Dealer {
    uses: Uses,
    buckets: Vec<Bucket>,
    threads: Vec<Arc<Thread>>,
    places: HashMap<Shared, usize>,
    /// The bucket of the latest call of each function in this thread.
    latest: Vec<Option<(Shared, usize)>>,
    /// Bytes that buckets hold in memory, and how many they may.
    kept: usize,
    limit: usize,
    file: Option<File>,
    written: u64,
}

impl Dealer {
    fn new(uses: Uses, limit: usize) -> Self {
        let (buckets, threads, places, latest) = (Vec::new(), Vec::new(), HashMap::new(), Vec::new());
        Self { uses, buckets, threads, places, latest, kept: 0, limit, file: None, written: 0 }
    }

    /// Goes through all rows, and tells their functions.
    fn deal(&mut self, mut rows: calls::Rows, source: &Source) -> Result<Vec<Function>, Error> {
        let mut dealt = 0;
        while rows.advance()? {
            let Some((row, thread)) = rows.current() else { break };
            if self.threads.last().is_none_or(|last| !Arc::ptr_eq(last, thread)) {
                self.threads.push(Arc::clone(thread));
                self.latest.clear();
            }
            self.put(row)?;
            dealt += 1;
            if dealt % calls::ROWS_A_LOOK == 0 {
                source.go_on()?;
            }
        }
        Ok(rows.functions().to_vec())
    }

    #[inline]
    fn put(&mut self, row: &Row) -> Result<(), Error> {
        let uses = self.uses;
        let thread = if uses.thread { u32::try_from(self.threads.len() - 1).unwrap_or(u32::MAX) } else { 0 };
        let function = if uses.function { row.function } else { 0 };
        let depth = if uses.shared_depth { row.depth } else { 0 };
        let ending = if uses.ending { row.ending } else { None };
        let shared = Shared { thread, function, depth, ending };
        let place = match self.latest.get(function as usize) {
            Some(Some((latest, place))) if *latest == shared => *place,
            _ => self.place(shared),
        };
        let bucket = &mut self.buckets[place];
        bucket.rows += 1;
        if !uses.differ() {
            return Ok(());
        }
        let before = bucket.open.len();
        if uses.depth {
            push(&mut bucket.open, row.depth.into());
        }
        if uses.start {
            push(&mut bucket.open, folded(row.start_ns.wrapping_sub(bucket.start_ns)));
            bucket.start_ns = row.start_ns;
        }
        if uses.duration {
            push(&mut bucket.open, row.duration_ns);
        }
        if uses.own {
            push(&mut bucket.open, row.self_ns);
        }
        self.kept += bucket.open.len() - before;
        if bucket.open.len() >= BLOCK_BYTES {
            let open = std::mem::take(&mut bucket.open);
            bucket.blocks.push(Block::Kept(open));
        }
        if self.kept > self.limit { self.write().map_err(|error| told(&error)) } else { Ok(()) }
    }

    fn place(&mut self, shared: Shared) -> usize {
        let place = *self.places.entry(shared).or_insert(self.buckets.len());
        if place == self.buckets.len() {
            self.buckets.push(Bucket { shared, rows: 0, blocks: Vec::new(), open: Vec::new(), start_ns: 0 });
        }
        let function = shared.function as usize;
        if self.latest.len() <= function {
            self.latest.resize(function + 1, None);
        }
        self.latest[function] = Some((shared, place));
        place
    }

    /// Writes what is kept.
    fn write(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(temporary())?),
        };
        let mut output = BufWriter::new(file);
        for bucket in &mut self.buckets {
            if !bucket.open.is_empty() {
                bucket.blocks.push(Block::Kept(std::mem::take(&mut bucket.open)));
            }
            // Those that are kept are the last ones.
            let first =
                bucket.blocks.iter().rposition(|block| matches!(block, Block::Written { .. })).map_or(0, |at| at + 1);
            for block in &mut bucket.blocks[first..] {
                if let Block::Kept(bytes) = block {
                    output.write_all(bytes)?;
                    let (at, len) = (self.written, bytes.len());
                    self.written += len as u64;
                    *block = Block::Written { at, len };
                }
            }
        }
        self.kept = 0;
        output.flush()
    }
}

/// Where `SQLite` puts what it sorts.
fn temporary() -> PathBuf {
    let mut named = ["SQLITE_TMPDIR", "TMPDIR"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    named.find(|path| path.is_dir()).unwrap_or_else(|| PathBuf::from("/var/tmp"))
}

fn told(error: &io::Error) -> Error {
    let folder = temporary();
    Error::Failed {
        message: format!(
            "rows cannot be put together in {}: {error}; SQLITE_TMPDIR names another folder for them",
            folder.display()
        ),
    }
}

/// Small numbers for what is little more or less than nothing.
fn folded(difference: u64) -> u64 {
    difference << 1 ^ 0u64.wrapping_sub(difference >> 63)
}

fn unfolded(number: u64) -> u64 {
    number >> 1 ^ 0u64.wrapping_sub(number & 1)
}

/// Seven bits a byte.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "what is left is less than a byte")]
fn push(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[cfg(test)]
mod tests {
    use trapline_trace::{Catalog, Damage};

    use super::*;

    /// Rows of three functions at two depths, some of which nobody knows the end of.
    fn row(number: u64) -> Row {
        let (function, depth) =
            (u32::try_from(number % 7 % 3).expect("a small one"), u32::try_from(number % 5 % 2).expect("a small one"));
        let ending = if number.is_multiple_of(11) { Ending::Unknown } else { Ending::Returned };
        let duration_ns = if ending == Ending::Unknown { 0 } else { number * number % 100_003 };
        Row {
            function,
            depth,
            start_ns: (number * 10) ^ 3,
            duration_ns,
            self_ns: duration_ns / 2,
            ending: Some(ending),
        }
    }

    fn function(number: u32) -> Function {
        let name = ["b", "c", "a"][number as usize].to_owned();
        Function { site: number, name, path: String::new(), address: 0 }
    }

    /// What comes of 5,000 rows ordered by function and depth, with this much memory, and whether that took a file.
    fn ordered(limit: usize) -> (Vec<Vec<String>>, bool) {
        const USED: [usize; 6] =
            [column::FUNCTION, column::DEPTH, column::START, column::DURATION, column::SELF, column::ENDING];
        let used = USED.iter().fold(0, |used, column| used | 1 << column);
        let order = Order::new(vec![(column::FUNCTION, true), (column::DEPTH, false)], used, false).expect("an order");
        let source = Arc::new(Source::new(PathBuf::new(), Catalog::new(), Damage::default()));
        let mut dealer = Dealer::new(Uses::new(&order), limit);
        for number in 0..5000 {
            dealer.put(&row(number)).expect("room");
        }
        let is_written = dealer.file.is_some();
        let functions = (0..3).map(function).collect();
        let mut rows = Clusters::dealt(dealer, functions, &order, &source).expect("rows").expect("one at least");
        let mut all = Vec::new();
        loop {
            all.push(USED.iter().map(|column| format!("{:?}", rows.value(*column))).collect());
            if !rows.advance().expect("rows") {
                return (all, is_written);
            }
        }
    }

    #[test]
    fn rows_come_in_order_and_whole_from_memory_and_from_a_file() {
        let mut expected: Vec<Row> = (0..5000).map(row).collect();
        // Which of two rows comes first is theirs to say that the order does not tell apart.
        expected.sort_by_key(|row| (std::cmp::Reverse(function(row.function).name), row.depth));
        let source = Source::new(PathBuf::new(), Catalog::new(), Damage::default());
        let expected = expected.iter().map(|row| {
            let own = [column::DEPTH, column::START, column::DURATION, column::SELF, column::ENDING];
            let name = format!("{:?}", Value::Text(&function(row.function).name));
            [name].into_iter().chain(own.map(|column| format!("{:?}", of_call(column, row, &source)))).collect()
        });
        let mut expected: Vec<Vec<String>> = expected.collect();
        let (mut kept, is_written) = ordered(KEPT_BYTES);
        assert!(!is_written);
        let (written, is_written) = ordered(1000);
        assert!(is_written);
        assert_eq!(kept, written);
        assert!(kept.is_sorted_by(|a, b| (&b[0], &a[1]) <= (&a[0], &b[1])));
        kept.sort();
        expected.sort();
        assert_eq!(kept, expected);
    }

    #[test]
    fn an_order_is_what_its_words_say() {
        let by = vec![(column::FUNCTION, false), (column::DEPTH, true)];
        let order = Order::new(by, 1 << column::DURATION, true).expect("an order");
        assert_eq!(order.to_string(), "distinct 2624 6 9-");
        assert_eq!(Order::parse(&order.to_string()), Some(order));
        // What is no column, and what each row has for itself.
        for by in [vec![], vec![(column::ALL, false)], vec![(column::SITE, false), (column::START, false)]] {
            assert_eq!(Order::new(by, 0, false), None);
        }
    }

    #[test]
    fn differences_of_any_size_come_back() {
        for difference in [0, 1, 63, 64, u64::MAX, u64::MAX - 62, 1 << 63, (1 << 63) - 1] {
            assert_eq!(unfolded(folded(difference)), difference);
        }
        assert!(folded(3) < 8 && folded(3u64.wrapping_neg()) < 8);
    }
}
