//! Parquet: a table with a row a call, for the engines that people ask in SQL.
//!
//! Owns [`Parquet`] and the table's columns. Calls are gathered to groups of rows, column by column, and a group is written when it is full. A row comes when its call has ended, so a
//! call's row is behind those of the calls that it made. Invariant: what nobody knows is null: the duration of a call whose return is not seen, or was lost.

use std::{
    io::{self, Write},
    sync::Arc,
};

use parquet::{
    basic::{Compression, Encoding, ZstdLevel},
    data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type},
    errors::ParquetError,
    file::{
        metadata::KeyValue,
        properties::WriterProperties,
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    schema::{parser::parse_message_type, types::ColumnPath},
};
use trapline_trace::Ending;

use crate::{
    source::{Call, ENDINGS, Enter, Output, Thread, Trace, place_of},
    target::Stream,
};

/// The columns, in the order in which [`Rows::write`] writes them.
const SCHEMA: &str = "message call {
    required binary host (STRING);
    required int64 trace_unix_ns;
    required binary program (STRING);
    required int32 pid;
    required int32 tid;
    required binary thread (STRING);
    required binary function (STRING);
    required binary module (STRING);
    required int32 depth;
    required int64 start_ns;
    optional int64 duration_ns;
    optional int64 self_ns;
    required binary ending (STRING);
}";

/// Columns of numbers that are rarely the same.
const NUMBERS: [&str; 3] = ["start_ns", "duration_ns", "self_ns"];

/// In a group. Engines deal groups out to their threads, and some hundred thousand rows are enough for each.
const GROUP_ROWS: usize = 1 << 18;

/// See the module's text.
pub(crate) struct Parquet {
    writer: Option<SerializedFileWriter<Stream>>,
    rows: Rows,
    host: ByteArray,
    trace_unix_ns: i64,
    /// The words of [`ENDINGS`].
    endings: [ByteArray; ENDINGS.len()],
    /// The functions' names and modules.
    functions: Vec<[ByteArray; 2]>,
    /// Of the current thread.
    thread: Named,
}

/// What is the same in all rows of a thread.
#[derive(Clone, Default)]
struct Named {
    program: ByteArray,
    name: ByteArray,
    pid: i32,
    tid: i32,
}

/// A group that is being gathered.
#[derive(Default)]
struct Rows {
    programs: Vec<ByteArray>,
    pids: Vec<i32>,
    tids: Vec<i32>,
    threads: Vec<ByteArray>,
    functions: Vec<ByteArray>,
    modules: Vec<ByteArray>,
    depths: Vec<i32>,
    starts: Vec<i64>,
    /// Of those that have one.
    durations: Vec<i64>,
    selves: Vec<i64>,
    /// 1 for each row that has a duration, 0 for the others.
    are_timed: Vec<i16>,
    endings: Vec<ByteArray>,
}

impl Parquet {
    pub(crate) fn new(output: Stream) -> Result<Self, io::Error> {
        let schema = Arc::new(parse_message_type(SCHEMA).map_err(failure)?);
        let mut properties = WriterProperties::builder()
            .set_created_by(concat!("trapline ", env!("CARGO_PKG_VERSION")).to_owned())
            .set_compression(Compression::ZSTD(ZstdLevel::default()));
        for name in NUMBERS {
            let column = ColumnPath::from(name);
            properties = properties
                .set_column_dictionary_enabled(column.clone(), false)
                .set_column_encoding(column, Encoding::DELTA_BINARY_PACKED);
        }
        let writer = SerializedFileWriter::new(output, schema, Arc::new(properties.build())).map_err(failure)?;
        Ok(Self {
            writer: Some(writer),
            rows: Rows::default(),
            host: ByteArray::from(""),
            trace_unix_ns: 0,
            endings: ENDINGS.map(ByteArray::from),
            functions: Vec::new(),
            thread: Named::default(),
        })
    }

    fn row(&mut self, trace: &Trace, enter: Enter, timed: Option<(u64, u64)>, ending: usize) -> io::Result<()> {
        for known in &trace.functions[self.functions.len()..] {
            self.functions.push([known.name.as_str(), known.path.as_str()].map(ByteArray::from));
        }
        let [function, module] = &self.functions[enter.function as usize];
        let rows = &mut self.rows;
        rows.programs.push(self.thread.program.clone());
        rows.pids.push(self.thread.pid);
        rows.tids.push(self.thread.tid);
        rows.threads.push(self.thread.name.clone());
        rows.functions.push(function.clone());
        rows.modules.push(module.clone());
        rows.depths.push(i32::try_from(enter.depth).unwrap_or(i32::MAX));
        rows.starts.push(enter.start_ns.cast_signed());
        if let Some((duration_ns, self_ns)) = timed {
            rows.durations.push(duration_ns.cast_signed());
            rows.selves.push(self_ns.cast_signed());
        }
        rows.are_timed.push(i16::from(timed.is_some()));
        rows.endings.push(self.endings[ending].clone());
        if self.rows.starts.len() == GROUP_ROWS { self.write() } else { Ok(()) }
    }

    /// Writes the group.
    fn write(&mut self) -> io::Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let rows = std::mem::take(&mut self.rows);
        let group = writer.next_row_group().map_err(failure)?;
        rows.write(group, &self.host, self.trace_unix_ns).map_err(failure)
    }
}

impl Rows {
    /// Column by column, in the order of [`SCHEMA`].
    fn write(
        self,
        mut group: SerializedRowGroupWriter<'_, Stream>,
        host: &ByteArray,
        trace_unix_ns: i64,
    ) -> Result<(), ParquetError> {
        let count = self.starts.len();
        column::<ByteArrayType>(&mut group, &vec![host.clone(); count], None)?;
        column::<Int64Type>(&mut group, &vec![trace_unix_ns; count], None)?;
        column::<ByteArrayType>(&mut group, &self.programs, None)?;
        column::<Int32Type>(&mut group, &self.pids, None)?;
        column::<Int32Type>(&mut group, &self.tids, None)?;
        column::<ByteArrayType>(&mut group, &self.threads, None)?;
        column::<ByteArrayType>(&mut group, &self.functions, None)?;
        column::<ByteArrayType>(&mut group, &self.modules, None)?;
        column::<Int32Type>(&mut group, &self.depths, None)?;
        column::<Int64Type>(&mut group, &self.starts, None)?;
        column::<Int64Type>(&mut group, &self.durations, Some(&self.are_timed))?;
        column::<Int64Type>(&mut group, &self.selves, Some(&self.are_timed))?;
        column::<ByteArrayType>(&mut group, &self.endings, None)?;
        group.close()?;
        Ok(())
    }
}

/// Writes the next column of a group.
fn column<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, Stream>,
    values: &[T::T],
    are_there: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let next = group.next_column()?;
    let mut column = next.ok_or_else(|| ParquetError::General("the table has no such column".to_owned()))?;
    column.typed::<T>().write_batch(values, are_there, None)?;
    column.close()
}

/// What went wrong, with what the system said of it if it did.
fn failure(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(source) => match source.downcast::<io::Error>() {
            Ok(error) => *error,
            Err(source) => io::Error::other(source),
        },
        error => io::Error::other(error),
    }
}

impl Output for Parquet {
    fn begin(&mut self, trace: &Trace) -> io::Result<()> {
        let meta = trace.catalog.meta.clone().unwrap_or_default();
        self.host = ByteArray::from(meta.host.as_str());
        self.trace_unix_ns = meta.started_unix_ns.cast_signed();
        let known = [("command", meta.command.join(" ")), ("kernel", meta.kernel), ("cpu", meta.cpu)];
        for (key, value) in known {
            if let Some(writer) = &mut self.writer {
                writer.append_key_value_metadata(KeyValue::new(format!("trapline.{key}"), value));
            }
        }
        Ok(())
    }

    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.thread = Named {
            program: ByteArray::from(thread.program()),
            name: ByteArray::from(thread.name.as_str()),
            pid: thread.pid.cast_signed(),
            tid: thread.tid.cast_signed(),
        };
        Ok(())
    }

    fn leave(&mut self, trace: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        let Call { function, depth, start_ns, end_ns, self_ns, ending } = call;
        let timed = (ending != Ending::Unknown).then(|| (end_ns - start_ns, self_ns));
        self.row(trace, Enter { function, depth, start_ns }, timed, place_of(Some(ending)))
    }

    fn point(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.row(trace, enter, None, place_of(None))
    }

    fn end(mut self, _: &Trace) -> io::Result<()> {
        if !self.rows.starts.is_empty() {
            self.write()?;
        }
        match self.writer.take() {
            Some(writer) => writer.into_inner().map_err(failure)?.flush(),
            None => Ok(()),
        }
    }
}
