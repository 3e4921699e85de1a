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
    Connection, Result, ffi,
    vtab::{Context, Filters, IndexConstraintOp, IndexInfo, Module, VTab, VTabConnection, VTabCursor},
};

use crate::{
    Error, Value, calls,
    whole::{self, Cell, Source},
};

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
            if constraint.is_usable() && is_equal && self.kind.keys().contains(&column) {
                keys.entry(column).or_insert(at);
            }
        }
        let mut columns: c_int = 0;
        for (place, (column, at)) in (1..).zip(&keys) {
            columns |= 1 << column;
            info.constraint_usage(*at).set_argv_index(place);
        }
        info.set_idx_num(columns);
        let rows = match self.kind {
            Kind::Functions | Kind::Threads if !keys.is_empty() => 1,
            kind => kind.size() >> (2 * keys.len()),
        };
        info.set_estimated_rows(rows);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        info.set_estimated_cost(rows as f64);
        Ok(true)
    }

    fn open(&'table mut self) -> Result<Self::Cursor> {
        let base = ffi::sqlite3_vtab_cursor::default();
        let (kind, source) = (self.kind, Arc::clone(&self.source));
        Ok(Cursor { base, kind, source, at: At::End, rowid: 0, table: PhantomData })
    }
}

/// Goes through a table.
#[repr(C)]
pub(crate) struct Cursor<'table> {
    base: ffi::sqlite3_vtab_cursor,
    kind: Kind,
    source: Arc<Source>,
    at: At,
    rowid: i64,
    table: PhantomData<&'table Table>,
}

/// Where a cursor is.
enum At {
    End,
    Call(Box<calls::Rows>),
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

    fn start(&self, wanted: &BTreeMap<usize, i64>) -> std::result::Result<At, Error> {
        if self.kind == Kind::Calls {
            return Ok(At::Call(Box::new(calls::Rows::open(&self.source, wanted)?)));
        }
        let rows = self.whole()?;
        let Some(key) = wanted.get(&whole::KEYS[0]) else { return Ok(At::Row { next: 0, end: rows.len() }) };
        let is_before = |row: &Vec<Cell>| matches!(row.first(), Some(Cell::Integer(number)) if number < key);
        let next = rows.partition_point(is_before);
        let is_there = rows.get(next).and_then(|row| row.first()) == Some(&Cell::Integer(*key));
        Ok(At::Row { next, end: next + usize::from(is_there) })
    }

    fn value(&self, column: usize) -> Value<'_> {
        match &self.at {
            At::End => Value::Null,
            At::Call(calls) => calls.value(column),
            At::Row { next, .. } => {
                let row = self.whole().ok().and_then(|rows| rows.get(*next));
                row.and_then(|row| row.get(column)).map_or(Value::Null, Cell::value)
            }
        }
    }
}

fn failure(error: &Error) -> rusqlite::Error {
    rusqlite::Error::ModuleError(error.to_string())
}

// SAFETY: the type is `repr(C)` and begins with `sqlite3_vtab_cursor`, as the trait wants.
unsafe impl VTabCursor for Cursor<'_> {
    fn filter(&mut self, columns: c_int, _: Option<&str>, values: &Filters<'_>) -> Result<()> {
        let keys = self.kind.keys().iter().filter(|column| columns & (1 << **column) != 0);
        // What is no whole number is left to SQLite, which knows what it is equal to.
        let wanted = keys.enumerate().filter_map(|(place, column)| Some((*column, values.get::<i64>(place).ok()?)));
        let wanted = wanted.collect();
        self.rowid = 0;
        self.at = self.start(&wanted).map_err(|error| failure(&error))?;
        Ok(())
    }

    fn next(&mut self) -> Result<()> {
        self.rowid += 1;
        match &mut self.at {
            At::End => Ok(()),
            At::Call(calls) => calls.advance().map_err(|error| failure(&error)),
            At::Row { next, .. } => {
                *next += 1;
                Ok(())
            }
        }
    }

    fn eof(&self) -> bool {
        match &self.at {
            At::End => true,
            At::Call(calls) => calls.is_at_end(),
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
        Ok(self.rowid)
    }
}
