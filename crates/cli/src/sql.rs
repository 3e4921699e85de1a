//! `trapline sql`: a trace as tables, asked in SQL.
//!
//! Owns the options, where questions come from, and the three forms of an answer; tables and engine are [`trapline_sql`]'s. Questions come from the command line, or else from standard input: at a
//! prompt if that is a terminal. Invariant: an answer is printed while it is made, and memory does not grow with it.

use std::{
    io::{self, BufWriter, IsTerminal as _, Read as _, Stdout, Write, stdin, stdout},
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
};

use anyhow::{Context as _, Result};
use clap::Args;
use rustyline::{DefaultEditor, error::ReadlineError};
use serde_json::{Value as Json, json};
use signal_hook::consts::SIGINT;
use trapline_sql::{Error, Output, Session, TABLES, Value};
use trapline_trace::hexadecimal;

use crate::{
    Outcome, Refused, color,
    pager::{self, Text},
    report::{DEFAULT_TRACE, warn, warn_of_senseless},
};

/// Of the JSON form. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Asks a trace in SQL: tables calls, functions, threads, losses.
///
/// The language is that of `SQLite`. Without a query, queries are read from standard input: at a prompt if that is a terminal. Nothing is imported, so a query goes through the trace each time.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The query, or several, separated by semicolons
    #[arg(value_name = "QUERY")]
    query: Option<String>,
    /// The trace
    #[arg(short, long, default_value = DEFAULT_TRACE, value_name = "FILE")]
    input: PathBuf,
    /// Print each answer as one JSON object on a line
    #[arg(long)]
    json: bool,
    /// Print each answer as comma-separated values (RFC 4180), with the columns' names
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

const EXAMPLES: &str = "\
Examples:
  trapline sql 'SELECT function, calls, total_ns FROM functions ORDER BY total_ns DESC LIMIT 10'
  trapline sql 'SELECT * FROM calls WHERE duration_ns > 1000000 ORDER BY start_ns' --csv > long.csv
  trapline sql 'SELECT * FROM losses WHERE count > 0' -i trapline.data --json
  trapline sql                             a prompt

docs/sql.md has the tables' columns, and more queries.";

/// Asks.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let session = Session::open(&arguments.input).map_err(told)?;
    warn(session.damage(), session.catalog());
    let is_prompt = arguments.query.is_none() && stdin().is_terminal();
    let mut printer = Printer::new(arguments, !is_prompt);
    let asked = match &arguments.query {
        Some(query) => session.run(query, &mut printer),
        None if is_prompt => return prompt(&session, &mut printer),
        None => {
            let mut queries = String::new();
            stdin().read_to_string(&mut queries).context("cannot read queries from standard input")?;
            session.run(&queries, &mut printer)
        }
    };
    match asked.and_then(|()| printer.output.flush().map_err(Error::Output)) {
        Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Outcome::Good),
        asked => asked.map_err(told)?,
    }
    warn_of_senseless(session.senseless_chunks().saturating_sub(session.damage().senseless_chunks));
    Ok(Outcome::Good)
}

/// An error, with what to do next.
fn told(error: Error) -> anyhow::Error {
    match error {
        Error::Trace(error) => error.into(),
        Error::Output(error) => anyhow::Error::new(error).context("cannot write to standard output"),
        Error::Query { message } => {
            let tables = TABLES.join(", ");
            Refused(format!("{message}; the tables are {tables}, and `SELECT * FROM calls LIMIT 1` shows columns"))
                .into()
        }
        error @ (Error::Failed { .. } | Error::Cancelled) => error.into(),
    }
}

/// Asks people, until they have no more questions. Ctrl-C drops what is typed, or the query that runs.
fn prompt(session: &Session, printer: &mut Printer) -> Result<Outcome> {
    const FIRST: &str = "sql> ";
    const NEXT: &str = "...> ";
    let mut editor = DefaultEditor::new().context("cannot prepare the prompt; give the query as an argument")?;
    signal_hook::flag::register(SIGINT, Arc::clone(session.is_cancelled())).context("cannot prepare for Ctrl-C")?;
    eprintln!("Tables: {}. A query ends with a semicolon; Ctrl-C cancels it; Ctrl-D leaves.", TABLES.join(", "));
    let mut query = String::new();
    loop {
        match editor.readline(if query.is_empty() { FIRST } else { NEXT }) {
            Ok(line) => query = if query.is_empty() { line } else { format!("{query}\n{line}") },
            Err(ReadlineError::Interrupted) => query.clear(),
            Err(ReadlineError::Eof) => return Ok(Outcome::Good),
            Err(error) => return Err(error).context("cannot read a query"),
        }
        if query.trim().is_empty() {
            query.clear();
        } else if query.trim_end().ends_with(';') {
            let _ = editor.add_history_entry(query.as_str());
            // Relaxed: nothing else is told by it.
            session.is_cancelled().store(false, Ordering::Relaxed);
            match session.run(&query, printer).and_then(|()| printer.output.flush().map_err(Error::Output)) {
                Err(error @ Error::Output(_)) => return Err(told(error)),
                Err(error) => {
                    printer.break_off().map_err(|error| told(Error::Output(error)))?;
                    let style = color::error();
                    eprintln!("{style}trapline:{style:#} {:#}", told(error));
                }
                Ok(()) => {}
            }
            query.clear();
        }
    }
}

/// How answers look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Table,
    Json,
    Csv,
}

/// Prints answers.
struct Printer {
    output: BufWriter<Stdout>,
    form: Form,
    has_pages: bool,
    /// An answer was begun.
    has_begun: bool,
    /// No row of it was printed as JSON.
    is_first_row: bool,
    columns: Vec<String>,
    /// Rows of a table that wait until it is known how wide its columns are.
    waiting: Vec<Vec<Shown>>,
    /// Of the columns, once it is.
    widths: Vec<usize>,
}

/// A value as a table shows it, and whether it is a number.
type Shown = (String, bool);

/// Rows by which the widths of columns are decided.
const WAITING: usize = 500;

impl Printer {
    fn new(arguments: &Arguments, has_pages: bool) -> Self {
        let form = match (arguments.json, arguments.csv) {
            (true, _) => Form::Json,
            (_, true) => Form::Csv,
            _ => Form::Table,
        };
        let (columns, waiting, widths) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            output: BufWriter::new(stdout()),
            form,
            has_pages,
            has_begun: false,
            is_first_row: true,
            columns,
            waiting,
            widths,
        }
    }

    /// Leaves an answer as it is.
    fn break_off(&mut self) -> io::Result<()> {
        self.waiting.clear();
        self.output.flush()
    }

    /// Prints the heading and the rows that wait.
    fn settle(&mut self) -> io::Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let widest = |column: usize| waiting.iter().map(|row| row[column].0.chars().count()).max().unwrap_or(0);
        self.widths = self.columns.iter().enumerate().map(|(at, name)| widest(at).max(name.chars().count())).collect();
        let heading = color::heading();
        let are_numbers = (0..self.columns.len()).map(|column| waiting.iter().all(|row| row[column].1));
        let names: Vec<Shown> = self.columns.iter().cloned().zip(are_numbers).collect();
        write!(self.output, "{heading}")?;
        let line = aligned(&names, &self.widths);
        writeln!(self.output, "{line}{heading:#}")?;
        waiting.iter().try_for_each(|row| writeln!(self.output, "{}", aligned(row, &self.widths)))
    }

    fn csv(&mut self, fields: impl Iterator<Item = String>) -> io::Result<()> {
        let mut line = csv::WriterBuilder::new()
            .buffer_capacity(256)
            .terminator(csv::Terminator::CRLF)
            .from_writer(&mut self.output);
        line.write_record(fields)?;
        line.flush()
    }
}

/// Numbers to the right, text to the left.
fn aligned(row: &[Shown], widths: &[usize]) -> String {
    let cells: Vec<String> = row
        .iter()
        .zip(widths)
        .map(
            |((text, is_number), width)| if *is_number { format!("{text:>width$}") } else { format!("{text:<width$}") },
        )
        .collect();
    cells.join("  ").trim_end().to_owned()
}

impl Output for Printer {
    fn begin(&mut self, columns: &[&str]) -> io::Result<()> {
        if self.has_pages && !self.has_begun {
            pager::begin(Text::Stream);
        }
        self.columns = columns.iter().map(|name| (*name).to_owned()).collect();
        self.widths.clear();
        match self.form {
            Form::Table if self.has_begun => writeln!(self.output)?,
            Form::Table => {}
            Form::Json => {
                write!(self.output, "{{\"version\":{JSON_VERSION},\"columns\":{},\"rows\":[", json!(columns))?;
            }
            Form::Csv => self.csv(columns.iter().map(|name| (*name).to_owned()))?,
        }
        (self.has_begun, self.is_first_row) = (true, true);
        Ok(())
    }

    fn row(&mut self, values: &[Value<'_>]) -> io::Result<()> {
        match self.form {
            Form::Table => {
                let row: Vec<Shown> = values.iter().map(shown).collect();
                if self.widths.is_empty() {
                    self.waiting.push(row);
                    if self.waiting.len() == WAITING { self.settle() } else { Ok(()) }
                } else {
                    writeln!(self.output, "{}", aligned(&row, &self.widths))
                }
            }
            Form::Json => {
                let comma = if self.is_first_row { "" } else { "," };
                self.is_first_row = false;
                let row: Vec<Json> = values.iter().map(json_of).collect();
                write!(self.output, "{comma}{}", Json::from(row))
            }
            Form::Csv => {
                self.csv(values.iter().map(|value| if *value == Value::Null { String::new() } else { shown(value).0 }))
            }
        }
    }

    fn end(&mut self) -> io::Result<()> {
        match self.form {
            Form::Table if self.widths.is_empty() => self.settle(),
            Form::Table | Form::Csv => Ok(()),
            Form::Json => writeln!(self.output, "]}}"),
        }
    }
}

fn shown(value: &Value<'_>) -> Shown {
    match value {
        Value::Null => ("-".to_owned(), true),
        Value::Integer(number) => (number.to_string(), true),
        Value::Real(number) => (format!("{number:?}"), true),
        Value::Text(text) => ((*text).to_owned(), false),
        Value::Bytes(bytes) => (hexadecimal(bytes), false),
    }
}

fn json_of(value: &Value<'_>) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Integer(number) => json!(number),
        Value::Real(number) => json!(number),
        Value::Text(text) => json!(text),
        Value::Bytes(bytes) => json!(hexadecimal(bytes)),
    }
}
