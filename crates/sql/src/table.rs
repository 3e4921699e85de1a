//! `SQLite`'s side of the tables: what it asks of a virtual table, and of a cursor that goes through one.
//!
//! Owns [`Table`] and [`Cursor`], the same for all tables. The only unsafe code is the promise about their layout, which `SQLite`'s C relies on. Invariant: a condition that a table takes over only leaves
//! rows out that do not meet it; `SQLite` checks all of them again.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    ffi::{CStr, c_int},
    marker::PhantomData,
    sync::Arc,
};

use rusqlite::{
    Connection, Result,
    fallible_streaming_iterator::FallibleStreamingIterator as _,
    ffi,
    types::ValueRef,
    vtab::{Context, DistinctMode, Filters, IndexConstraintOp, IndexInfo, Module, VTab, VTabConnection, VTabCursor},
};

use crate::{
    Error, Value,
    calls::{self, Wanted},
    clusters::{Clusters, Order},
    whole::{self, Cell, Source},
};

/// Where the number that tells a cursor of a plan has those of its columns whose values are lists.
const LISTS: usize = 16;

/// Which table it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Calls,
    Functions,
    Threads,
    Losses,
}

impl Kind {
    const ALL: [(&'static CStr, Self); 4] = [
        (c"calls", Self::Calls),
        (c"functions", Self::Functions),
        (c"threads", Self::Threads),
        (c"losses", Self::Losses),
    ];

    fn declared(self) -> &'static CStr {
        match self {
            Self::Calls => calls::DECLARED,
            Self::Functions => whole::FUNCTIONS,
            Self::Threads => whole::THREADS,
            Self::Losses => whole::LOSSES,
        }
    }

    /// Columns of numbers whose value the table can look for by itself.
    fn keys(self) -> &'static [usize] {
        match self {
            Self::Calls => &calls::KEYS,
            Self::Functions | Self::Threads => &whole::KEYS,
            Self::Losses => &[],
        }
    }

    /// About how many rows there are, for `SQLite` to choose which table it goes through within another one.
    fn size(self) -> i64 {
        match self {
            Self::Calls => 100_000_000,
            Self::Functions => 10_000,
            Self::Threads | Self::Losses => 20,
        }
    }
}

/// Lets a connection know the tables.
pub(crate) fn register(connection: &Connection, source: &Arc<Source>) -> Result<()> {
    const MODULE: &Module<'_, Table> = &Module::eponymous_only_module();
    for (name, kind) in Kind::ALL {
        connection.create_module(name, MODULE, Some((kind, Arc::clone(source))))?;
    }
    Ok(())
}

/// A table of a trace.
#[repr(C)]
pub(crate) struct Table {
    base: ffi::sqlite3_vtab,
    kind: Kind,
    source: Arc<Source>,
}

// SAFETY: the type is `repr(C)` and begins with `sqlite3_vtab`, as the trait wants.
unsafe impl<'table> VTab<'table> for Table {
    type Aux = (Kind, Arc<Source>);
    type Cursor = Cursor<'table>;

    fn connect(
        _: &mut VTabConnection,
        aux: Option<&Self::Aux>,
        _: &[u8],
        _: &[u8],
        _: &[u8],
        _: &[&[u8]],
    ) -> Result<(Cow<'static, CStr>, Self)> {
        let (kind, source) = aux.ok_or_else(|| rusqlite::Error::ModuleError("a table without a trace".to_owned()))?;
        let table = Self { base: ffi::sqlite3_vtab::default(), kind: *kind, source: Arc::clone(source) };
        Ok((Cow::Borrowed(kind.declared()), table))
    }

    fn best_index(&self, info: &mut IndexInfo) -> Result<bool> {
        let mut keys: BTreeMap<usize, usize> = BTreeMap::new();
        for (at, constraint) in info.constraints().enumerate() {
            let column = usize::try_from(constraint.column()).unwrap_or(usize::MAX);
            let is_equal = constraint.operator() == IndexConstraintOp::SQLITE_INDEX_CONSTRAINT_EQ;
            // Texts may be compared otherwise than by their bytes, if the query says so.
            if constraint.is_usable()
                && is_equal
                && self.kind.keys().contains(&column)
                && info.collation(at)? == "BINARY"
            {
                keys.entry(column).or_insert(at);
            }
        }
        let mut plan: c_int = 0;
        for (place, (column, at)) in (1..).zip(&keys) {
            plan |= 1 << column;
            // All values of a list at once: each time that a cursor starts, it goes through the trace.
            if self.kind == Kind::Calls && info.set_in_constraint(*at, true)? {
                plan |= 1 << (LISTS + column);
            }
            info.constraint_usage(*at).set_argv_index(place);
        }
        info.set_idx_num(plan);
        let order = if self.kind == Kind::Calls { order(info) } else { None };
        if let Some(order) = order {
            info.set_idx_str(&order.to_string());
            info.set_order_by_consumed(true);
        }
        let rows = match self.kind {
            Kind::Functions | Kind::Threads if !keys.is_empty() => 1,
            kind => kind.size() >> (2 * keys.len()),
        };
        info.set_estimated_rows(rows);
        // Calls of other functions are gone through all the same.
        let passed = if self.kind == Kind::Calls { self.kind.size() / 4 } else { 0 };
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        info.set_estimated_cost(rows.max(passed) as f64);
        Ok(true)
    }

    fn open(&'table mut self) -> Result<Self::Cursor> {
        let base = ffi::sqlite3_vtab_cursor::default();
        let (kind, source) = (self.kind, Arc::clone(&self.source));
        Ok(Cursor { base, kind, source, at: At::End, table: PhantomData })
    }
}

/// How rows have to come, if `SQLite` cares, and if they can be clustered so.
fn order(info: &IndexInfo) -> Option<Order> {
    let by = info.order_bys().map(|term| (usize::try_from(term.column()).ok(), term.is_order_by_desc()));
    let by: Option<Vec<(usize, bool)>> = by.map(|(column, is_descending)| Some((column?, is_descending))).collect();
    let is_distinct = matches!(info.distinct(), DistinctMode::Distinct | DistinctMode::DistinctOrdered);
    Order::new(by?, info.col_used(), is_distinct)
}

/// Goes through a table.
#[repr(C)]
pub(crate) struct Cursor<'table> {
    base: ffi::sqlite3_vtab_cursor,
    kind: Kind,
    source: Arc<Source>,
    at: At,
    table: PhantomData<&'table Table>,
}

/// Where a cursor is.
enum At {
    End,
    Call(Box<calls::Rows>),
    Clustered(Box<Clusters>),
    /// At this row of a whole, before which row to end.
    Row {
        next: usize,
        end: usize,
    },
}

impl Cursor<'_> {
    /// The rows of a table that is kept.
    fn whole(&self) -> std::result::Result<&whole::Rows, Error> {
        match self.kind {
            Kind::Threads => Ok(self.source.threads()),
            Kind::Losses => Ok(self.source.losses()),
            Kind::Calls | Kind::Functions => self.source.functions(),
        }
    }

    fn start(&self, wanted: &Wanted, order: Option<&Order>) -> std::result::Result<At, Error> {
        if self.kind == Kind::Calls {
            let mut rows = calls::Rows::open(&self.source, wanted)?;
            return match order {
                Some(order) => {
                    Ok(Clusters::of(rows, order, &self.source)?.map_or(At::End, |all| At::Clustered(all.into())))
                }
                None => Ok(if rows.advance()? { At::Call(rows.into()) } else { At::End }),
            };
        }
        let rows = self.whole()?;
        let Some([Cell::Integer(key)]) = wanted.get(&whole::KEYS[0]).map(Vec::as_slice) else {
            return Ok(At::Row { next: 0, end: rows.len() });
        };
        let is_before = |row: &Vec<Cell>| matches!(row.first(), Some(Cell::Integer(number)) if number < key);
        let next = rows.partition_point(is_before);
        let is_there = rows.get(next).and_then(|row| row.first()) == Some(&Cell::Integer(*key));
        Ok(At::Row { next, end: next + usize::from(is_there) })
    }

    fn value(&self, column: usize) -> Value<'_> {
        match &self.at {
            At::End => Value::Null,
            At::Call(calls) => calls.value(column),
            At::Clustered(calls) => calls.value(column),
            At::Row { next, .. } => {
                let row = self.whole().ok().and_then(|rows| rows.get(*next));
                row.and_then(|row| row.get(column)).map_or(Value::Null, Cell::value)
            }
        }
    }
}

fn failure(error: &Error) -> rusqlite::Error {
    rusqlite::Error::ModuleError(match error {
        Error::Failed { message } => message.clone(),
        error => error.to_string(),
    })
}

// SAFETY: the type is `repr(C)` and begins with `sqlite3_vtab_cursor`, as the trait wants.
unsafe impl VTabCursor for Cursor<'_> {
    fn filter(&mut self, plan: c_int, order: Option<&str>, values: &Filters<'_>) -> Result<()> {
        let keys = self.kind.keys().iter().filter(|column| plan & (1 << **column) != 0);
        let mut wanted = Wanted::new();
        for (place, column) in keys.enumerate() {
            let is_text = self.kind == Kind::Calls && *column == calls::column::FUNCTION;
            let wishes = if plan & (1 << (LISTS + column)) != 0 {
                list(values, place, is_text)?
            } else {
                one((&values[place]).into(), is_text).map(|wish| vec![wish])
            };
            wanted.extend(wishes.map(|wishes| (*column, wishes)));
        }
        let order = order.and_then(Order::parse);
        self.at = self.start(&wanted, order.as_ref()).map_err(|error| failure(&error))?;
        Ok(())
    }

    fn next(&mut self) -> Result<()> {
        let is_there = match &mut self.at {
            At::End => false,
            At::Call(calls) => calls.advance().map_err(|error| failure(&error))?,
            At::Clustered(calls) => calls.advance().map_err(|error| failure(&error))?,
            At::Row { next, .. } => {
                *next += 1;
                true
            }
        };
        if !is_there {
            self.at = At::End;
        }
        Ok(())
    }

    fn eof(&self) -> bool {
        match &self.at {
            At::End => true,
            At::Call(_) | At::Clustered(_) => false,
            At::Row { next, end } => next >= end,
        }
    }

    fn column(&self, context: &mut Context, column: c_int) -> Result<()> {
        match self.value(usize::try_from(column).unwrap_or(usize::MAX)) {
            Value::Null => context.set_result(rusqlite::types::Null),
            Value::Integer(number) => context.set_result(number),
            Value::Real(number) => context.set_result(number),
            Value::Text(text) => context.set_result(text),
            Value::Bytes(bytes) => context.set_result(bytes),
        }
    }

    fn rowid(&self) -> Result<i64> {
        Ok(match &self.at {
            At::End => 0,
            At::Call(calls) => calls.rowid(),
            At::Clustered(calls) => calls.rowid(),
            At::Row { next, .. } => i64::try_from(*next).unwrap_or(i64::MAX),
        })
    }
}

/// A value to look for. What is not of the column's type, as half a number, is left to `SQLite`, which knows what it is equal to.
fn one(value: ValueRef<'_>, is_text: bool) -> Option<Cell> {
    match value {
        ValueRef::Integer(number) if !is_text => Some(Cell::Integer(number)),
        ValueRef::Text(text) if is_text => std::str::from_utf8(text).ok().map(|text| Cell::Text(text.to_owned())),
        // Equal to nothing.
        ValueRef::Null => Some(Cell::Null),
        _ => None,
    }
}

/// Several of them. None if one of them is left to `SQLite`.
fn list(values: &Filters<'_>, place: usize, is_text: bool) -> Result<Option<Vec<Cell>>> {
    let (mut wishes, mut list) = (Vec::new(), values.in_values(place)?);
    while let Some(value) = list.next()? {
        let Some(wish) = one(value.into(), is_text) else { return Ok(None) };
        wishes.push(wish);
    }
    Ok(Some(wishes))
}
