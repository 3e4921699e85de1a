//! A trace as tables, asked in SQL.
//!
//! A [`Session`] is `SQLite` with four tables that are views of one trace: `calls`, `functions`, `threads`, `losses`. [`Session::run`] carries out what is asked, and tells an [`Output`] the
//! answers. Nothing is imported: a table's rows are made while `SQLite` goes through them (`table`), those of `calls` from the trace's events (`calls`), put together
//! first if a query groups them (`clusters`), the others from what is known of the whole (`whole`). Invariant: memory does not grow with the trace; what is sorted or put together lies in temporary files.

mod calls;
mod clusters;
mod table;
mod whole;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rusqlite::{
    Batch, Connection, ErrorCode, Row, Statement, fallible_iterator::FallibleIterator as _, types::ValueRef,
};
use trapline_trace::{Catalog, Damage, Reader};
use whole::Source;

/// The tables' names.
pub const TABLES: [&str; 4] = ["calls", "functions", "threads", "losses"];

/// Memory that `SQLite` sorts in before it takes a file, in kibibytes.
const SORT_KIB: u32 = 16 << 10;

/// Threads that it sorts with beside the one that makes rows.
const SORT_THREADS: u32 = 2;

/// Steps of `SQLite`'s machine after which it looks whether an answer is still wanted: some hundred rows.
const STEPS_A_LOOK: i32 = 2000;

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The trace cannot be read.
    #[error(transparent)]
    Trace(#[from] trapline_trace::Error),
    /// The question makes no sense.
    #[error("{message}")]
    Query {
        /// What `SQLite` says.
        message: String,
    },
    /// Something went wrong on the way to the answer.
    #[error("the query failed: {message}")]
    Failed {
        /// What `SQLite` says.
        message: String,
    },
    /// The answer cannot be written.
    #[error("{0}")]
    Output(#[source] io::Error),
    /// The answer is no longer wanted.
    #[error("the query was cancelled")]
    Cancelled,
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error {
            rusqlite::Error::SqliteFailure(failure, _) if failure.code == ErrorCode::OperationInterrupted => {
                Self::Cancelled
            }
            rusqlite::Error::SqliteFailure(_, Some(message)) => Self::Failed { message },
            error => Self::Failed { message: error.to_string() },
        }
    }
}

/// A value of a table, or of an answer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value<'a> {
    /// Nobody knows.
    Null,
    /// A whole number.
    Integer(i64),
    /// Another one.
    Real(f64),
    /// A text.
    Text(&'a str),
    /// Bytes that are no text.
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    fn of(value: ValueRef<'a>) -> Self {
        match value {
            ValueRef::Null => Self::Null,
            ValueRef::Integer(number) => Self::Integer(number),
            ValueRef::Real(number) => Self::Real(number),
            ValueRef::Text(bytes) => std::str::from_utf8(bytes).map_or(Self::Bytes(bytes), Self::Text),
            ValueRef::Blob(bytes) => Self::Bytes(bytes),
        }
    }
}

/// Takes answers.
pub trait Output {
    /// An answer follows, with these columns.
    ///
    /// # Errors
    /// It cannot be written.
    fn begin(&mut self, columns: &[&str]) -> io::Result<()>;

    /// A row of it.
    ///
    /// # Errors
    /// It cannot be written.
    fn row(&mut self, values: &[Value<'_>]) -> io::Result<()>;

    /// It has no more rows.
    ///
    /// # Errors
    /// It cannot be written.
    fn end(&mut self) -> io::Result<()>;
}

/// See the module's text.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    source: Arc<Source>,
}

impl Session {
    /// Opens a trace, and reads all of it but the events.
    ///
    /// # Errors
    /// Those of [`Reader::open`] and [`Reader::next_chunk`].
    pub fn open(input: &Path) -> Result<Self, Error> {
        let mut reader = Reader::open(input)?;
        let mut catalog = Catalog::new();
        while let Some(chunk) = reader.next_chunk()? {
            catalog.take(chunk);
        }
        let source = Arc::new(Source::new(PathBuf::from(input), catalog, reader.damage().clone()));
        let mut connection = Connection::open_in_memory()?;
        // Statements that SQLite sorts for: in files, beyond some memory. Text is compared by its bytes, as everywhere here.
        connection.execute_batch(&format!(
            "PRAGMA temp_store = file; PRAGMA cache_size = -{SORT_KIB}; PRAGMA threads = {SORT_THREADS};"
        ))?;
        table::register(&connection, &source)?;
        let asked = Arc::clone(&source.is_cancelled);
        // Relaxed: nothing else is told by it.
        connection.progress_handler(STEPS_A_LOOK, Some(move || asked.load(Ordering::Relaxed)))?;
        Ok(Self { connection, source })
    }

    /// Everything that the trace tells but the events.
    pub fn catalog(&self) -> &Catalog {
        &self.source.catalog
    }

    /// What is wrong with it.
    pub fn damage(&self) -> &Damage {
        &self.source.damage
    }

    /// Chunks that made no sense when their events were read, as far as they were.
    pub fn senseless_chunks(&self) -> u64 {
        self.source.senseless_chunks()
    }

    /// While it is true, answers are not wanted: [`Session::run`] ends with [`Error::Cancelled`]. A signal handler may set it.
    pub fn is_cancelled(&self) -> &Arc<AtomicBool> {
        &self.source.is_cancelled
    }

    /// Carries out statements, separated by semicolons, and tells the answers of those that have one.
    ///
    /// # Errors
    /// [`Error::Query`], [`Error::Failed`], [`Error::Output`], [`Error::Cancelled`]. What came before was carried out.
    pub fn run(&self, statements: &str, output: &mut dyn Output) -> Result<(), Error> {
        let mut batch = Batch::new(&self.connection, statements);
        while let Some(mut statement) = batch.next().map_err(wrong)? {
            answer(&mut statement, output).map_err(|error| match (error, self.source.go_on()) {
                // Tables that made no rows meanwhile say so in words.
                (Error::Failed { .. }, Err(cancelled)) => cancelled,
                (error, _) => error,
            })?;
        }
        Ok(())
    }
}

/// Of a statement that cannot be begun.
fn wrong(error: rusqlite::Error) -> Error {
    let message = match error {
        rusqlite::Error::SqlInputError { msg, .. } => msg,
        rusqlite::Error::SqliteFailure(_, Some(message)) => message,
        error => error.to_string(),
    };
    Error::Query { message }
}

fn answer(statement: &mut Statement<'_>, output: &mut dyn Output) -> Result<(), Error> {
    let columns: Vec<String> = statement.column_names().map(str::to_owned).collect();
    let mut rows = statement.query([])?;
    // The first row is there before anything is told: what fails at once has no answer that breaks off.
    let mut row = rows.next()?;
    if columns.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = columns.iter().map(String::as_str).collect();
    output.begin(&names).map_err(Error::Output)?;
    while let Some(found) = row {
        tell(found, columns.len(), output)?;
        row = rows.next()?;
    }
    output.end().map_err(Error::Output)
}

fn tell(row: &Row<'_>, columns: usize, output: &mut dyn Output) -> Result<(), Error> {
    let values: Result<Vec<Value<'_>>, rusqlite::Error> =
        (0..columns).map(|column| row.get_ref(column).map(Value::of)).collect();
    output.row(&values?).map_err(Error::Output)
}
