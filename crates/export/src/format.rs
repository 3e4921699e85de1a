//! The formats by their names.
//!
//! Owns [`Format`] and what is known of each without a trace: its name, its file's ending, what opens it.

/// A format of another tool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Format {
    /// Perfetto's protobuf.
    Perfetto,
    /// Chrome's trace event JSON.
    Chrome,
    /// The Firefox Profiler's processed profile.
    Firefox,
    /// speedscope's own JSON.
    Speedscope,
    /// A line for each distinct stack, as `flamegraph.pl` and its descendants read.
    Folded,
    /// A flame graph as SVG.
    Flamegraph,
    /// pprof's protobuf.
    Pprof,
    /// A table in Parquet.
    Parquet,
    /// The Common Trace Format, a directory.
    Ctf,
    /// uftrace's data directory.
    Uftrace,
    /// What `perf script` prints.
    PerfScript,
}

impl Format {
    /// All of them, the one that most people want first.
    pub const ALL: [Self; 11] = [
        Self::Perfetto,
        Self::Chrome,
        Self::Firefox,
        Self::Speedscope,
        Self::Folded,
        Self::Flamegraph,
        Self::Pprof,
        Self::Parquet,
        Self::Ctf,
        Self::Uftrace,
        Self::PerfScript,
    ];

    /// As on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Perfetto => "perfetto",
            Self::Chrome => "chrome",
            Self::Firefox => "firefox",
            Self::Speedscope => "speedscope",
            Self::Folded => "folded",
            Self::Flamegraph => "flamegraph",
            Self::Pprof => "pprof",
            Self::Parquet => "parquet",
            Self::Ctf => "ctf",
            Self::Uftrace => "uftrace",
            Self::PerfScript => "perf-script",
        }
    }

    /// How the names of such files end, by the habits of their tools.
    pub const fn ending(self) -> &'static str {
        match self {
            Self::Perfetto => "perfetto-trace",
            Self::Chrome => "trace.json",
            Self::Firefox => "firefox.json",
            Self::Speedscope => "speedscope.json",
            Self::Folded => "folded",
            Self::Flamegraph => "svg",
            Self::Pprof => "pb",
            Self::Parquet => "parquet",
            Self::Ctf => "ctf",
            Self::Uftrace => "uftrace",
            Self::PerfScript => "perf.txt",
        }
    }

    /// What opens it, for people.
    pub const fn opened_by(self) -> &'static str {
        match self {
            Self::Perfetto => "ui.perfetto.dev, or Perfetto's trace processor",
            Self::Chrome => "ui.perfetto.dev, chrome://tracing or speedscope",
            Self::Firefox => "profiler.firefox.com",
            Self::Speedscope => "speedscope",
            Self::Folded => "flamegraph.pl, inferno-flamegraph or speedscope",
            Self::Flamegraph => "any browser",
            Self::Pprof => "pprof -http=: FILE",
            Self::Parquet => "DuckDB, ClickHouse, Spark and other engines for tables",
            Self::Ctf => "babeltrace2 DIRECTORY",
            Self::Uftrace => "uftrace replay -d DIRECTORY, and its other commands",
            Self::PerfScript => "stackcollapse-perf.pl, speedscope or profiler.firefox.com",
        }
    }

    /// It is a directory, not a file.
    pub const fn is_directory(self) -> bool {
        matches!(self, Self::Ctf | Self::Uftrace)
    }

    /// All calls are held in memory before anything is written.
    pub const fn is_held(self) -> bool {
        matches!(self, Self::Firefox)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_and_endings_are_distinct() {
        let of = |word: fn(Format) -> &'static str| Format::ALL.map(word).into_iter().collect::<HashSet<_>>().len();
        assert_eq!((of(Format::name), of(Format::ending)), (Format::ALL.len(), Format::ALL.len()));
    }
}
